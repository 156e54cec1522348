// product_key_topk: the k best of R·C experts for every token and head, exactly, without computing
// R·C scores. Two kernels:
//
//   best keys    the k best keys of each half of every query (best_keys.h), from the sub-scores
//                <q1, row_keys[r]> and <q2, col_keys[c]> (sub_scores.h)
//   best pairs   the k best sums row + column of every query (best_pairs.h)
//
// Shapes      query (T, H, dim_key)   keys (R or C, dim_key / 2), shared or for each head
//             scores, indices (T, H, k)
// Exactness   every sub-score is summed in an order that depends only on dim_key; a pair's score is
//             one addition
// Order       higher score first; among equal scores the smaller (row rank, column rank). Keys with
//             equal sub-scores rank by id. Scores are compared as ordered integers (ordered.h), so
//             NaN ranks highest and -0 equals 0. An infinite sub-score counts as the largest finite
//             number of its sign
// Mask        the same retrieval with the largest k, then product_key_topk_masked.cu
// Requires    k up to kMaxRetrieved and R·C; R, C and dim_key below 2^31; any alignments, but
//             elements that are not vectorizable are read one by one
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/best_keys.h"
#include "kernels/cuda/best_pairs.h"
#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/product_key_topk_masked.h"
#include "kernels/cuda/query_block.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/sub_scores.h"

namespace peer::cuda {

namespace {

// The division of both halves' keys into ranges, rows first. With few queries, several blocks share
// a half, so that they fill the device and read the keys at once.
struct KeyRanges {
  int64_t keys_per_range;
  int rows, columns;  // the number of ranges of a half

  PEER_HOST_DEVICE int count() const { return rows + columns; }
};

// Best keys.
//
// One block   64 queries of one head (32 of float or if there are few, 16 of double), one half, one
//             range of its keys. Its warps divide the keys of a batch for the sub-scores, then the
//             queries for the selection
// Memory      the sub-scores of 512 keys (1024 of float or double), a block per SM
// Traffic     the keys once per block, from the L2 cache; k candidates per query, half and range
template <bool is_masked, int queries, class Query>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    best_keys_kernel(ProductKeyTopk<Query> retrieval,
                     KeyRanges ranges,
                     BestKeysMemory<Query, queries> memory,
                     Vectorizable vectorizable,
                     Packed<ordered_t<accumulation_t<Query>>>* best) {
  const QueryBlock<Query, queries> block(retrieval, vectorizable, blockIdx.x / ranges.count());
  const int range = int(blockIdx.x % ranges.count());
  const int half = range < ranges.rows ? kRows : kColumns;
  const int64_t first = (half == kRows ? range : range - ranges.rows) * ranges.keys_per_range;
  const HalfRows<Query> keys = block.key_rows(half);
  const KeyRange<Query> key_range = {
      .rows = keys,
      .first = first,
      .end = std::min(first + ranges.keys_per_range, keys.count),
      .unused = half == kRows ? retrieval.rows.unused : retrieval.columns.unused,
  };
  if (ranges.count() > 2) {
    prefetch_l2(keys.row(first), keys.row(key_range.end));
  }
  find_best_keys<is_masked>(block.query_rows(half), key_range, memory, [&](int query) {
    return best + (block.query(query) * ranges.count() + range) * retrieval.k;
  });
}

// Best pairs.
//
// One warp    one query after another
// Traffic     k candidates per half and range; score and id per result
constexpr int kPairWarps = 8;
constexpr int kPairBlocksPerSm = 6;

// The layout of a block's shared memory, in bytes from its start.
template <class Real>
class BestPairsMemory {
 public:
  using Item = Packed<ordered_t<Real>>;

  BestPairsMemory(int k, int pair_count, int rows)
      : k_(k), capacity_((std::max(pair_count, capacity_for(k)) + 1) / 2 * 2) {
    scores_ = kPairWarps * capacity_ * int(sizeof(Item));
    ids_ = scores_ + kPairWarps * 2 * k * int(sizeof(Real));
    pairs_ = ids_ + kPairWarps * 2 * k * int(sizeof(int32_t));
    bound_columns_ = pairs_ + pair_count * int(sizeof(RankPair));
    bytes_ = bound_columns_ + rows;
  }

  int bytes() const { return bytes_; }

  __device__ Item* items() const { return at<Item>(0) + warp_in_block() * capacity_; }
  __device__ BestKeys<Real> best_keys(int half) const {
    const int place = (warp_in_block() * 2 + half) * k_;
    return {at<Real>(scores_) + place, at<int32_t>(ids_) + place};
  }
  __device__ RankPair* pairs() const { return at<RankPair>(pairs_); }
  __device__ uint8_t* bound_columns() const { return at<uint8_t>(bound_columns_); }

 private:
  template <class Item>
  __device__ static Item* at(int byte) {
    return reinterpret_cast<Item*>(peer_shared_memory + byte);
  }

  int k_, capacity_;
  int scores_, ids_, pairs_, bound_columns_, bytes_;
};

template <class Query>
__global__ void __launch_bounds__(kPairWarps* kWarp)
    best_pairs_kernel(ProductKeyTopk<Query> retrieval,
                      KeyRanges ranges,
                      CandidatePairs candidates,
                      BestPairsMemory<accumulation_t<Query>> memory,
                      const Packed<ordered_t<accumulation_t<Query>>>* best) {
  using Real = accumulation_t<Query>;
  const int k = candidates.k;
  candidates.pairs = memory.pairs();
  candidates.bound_columns = memory.bound_columns();
  candidates.list();
  __syncthreads();
  const BestKeys<Real> rows = memory.best_keys(kRows);
  const BestKeys<Real> columns = memory.best_keys(kColumns);
  const int64_t queries = retrieval.tokens * retrieval.heads;
  for (int64_t query = int64_t(blockIdx.x) * kPairWarps + warp_in_block(); query < queries;
       query += int64_t(gridDim.x) * kPairWarps) {
    const auto* of_ranges = best + query * ranges.count() * k;
    merge_best_keys(of_ranges, ranges.rows, k, memory.items(), rows);
    __syncwarp();
    merge_best_keys(of_ranges + ranges.rows * k, ranges.columns, k, memory.items(), columns);
    __syncwarp();
    select_pairs(candidates, rows, columns, retrieval.columns.count, memory.items(),
                 retrieval.scores + query * k, retrieval.indices + query * k);
    __syncwarp();
  }
}

// Divides the keys such that every SM has a block, if the ranges do not become too short to be
// worth one, or too many to merge.
template <class Query>
KeyRanges divide_keys(const ProductKeyTopk<Query>& retrieval, int64_t query_blocks) {
  constexpr int64_t kMinKeys = 64;  // per range
  constexpr int64_t kMaxRanges = 32;
  static_assert(kMinKeys % kKeysPerTile<Query> == 0);
  const int64_t blocks_per_half = sm_count() / (2 * std::max<int64_t>(query_blocks, 1));
  const int64_t wanted = std::clamp<int64_t>(blocks_per_half, 1, kMaxRanges);
  const int64_t keys = std::max(retrieval.rows.count, retrieval.columns.count);
  const int64_t keys_per_range =
      ((keys + wanted - 1) / wanted + kMinKeys - 1) / kMinKeys * kMinKeys;
  const auto ranges_of = [&](const Keys<Query>& half) {
    return int((half.count + keys_per_range - 1) / keys_per_range);
  };
  return {keys_per_range, ranges_of(retrieval.rows), ranges_of(retrieval.columns)};
}

// Chooses as many warps as have keys and fit in shared memory, an even number.
template <int queries, class Query>
BestKeysMemory<Query, queries> choose_memory(int k, int64_t keys) {
  constexpr int kMinWarps = 4;
  const int64_t tiles = (keys + kKeysPerTile<Query> - 1) / kKeysPerTile<Query>;
  int warps = int(std::clamp<int64_t>((tiles + 1) / 2 * 2, kMaxWarps / 2, kMaxWarps));
  while (warps > kMinWarps &&
         BestKeysMemory<Query, queries>(k, warps).bytes() > max_shared_bytes()) {
    warps -= 2;
  }
  return {k, warps};
}

template <bool is_masked, int queries, class Query>
void find_best(const ProductKeyTopk<Query>& retrieval, const Context& context) {
  using Real = accumulation_t<Query>;
  using Item = Packed<ordered_t<Real>>;
  const int k = int(retrieval.k);
  const int64_t query_blocks = count_query_blocks(retrieval, queries);
  const KeyRanges ranges = divide_keys(retrieval, query_blocks);
  const int64_t query_count = retrieval.tokens * retrieval.heads;
  const auto best = context.array<Item>(query_count * ranges.count() * k);

  const auto memory = choose_memory<queries, Query>(
      k, std::min(std::max(retrieval.rows.count, retrieval.columns.count), ranges.keys_per_range));
  launch(best_keys_kernel<is_masked, queries, Query>,
         {query_blocks * ranges.count(), memory.threads(), memory.bytes()}, context.stream,
         retrieval, ranges, memory, find_vectorizable(retrieval), best.get());

  CandidatePairs candidates = {
      .k = k,
      .rows = int(std::min(retrieval.k, retrieval.rows.count)),
      .columns = int(std::min(retrieval.k, retrieval.columns.count)),
  };
  candidates.count = count_candidate_pairs(candidates.rows, candidates.columns, k);
  const BestPairsMemory<Real> pairs_memory(k, candidates.count, candidates.rows);
  const int64_t blocks =
      std::min((query_count + kPairWarps - 1) / kPairWarps, int64_t(kPairBlocksPerSm) * sm_count());
  launch(best_pairs_kernel<Query>, {blocks, kPairWarps * kWarp, pairs_memory.bytes()},
         context.stream, retrieval, ranges, candidates, pairs_memory, best.get());
}

// Retrieves from all experts. Under a mask, unused keys rank behind the others.
template <bool is_masked, class Query>
void retrieve(const ProductKeyTopk<Query>& retrieval, const Context& context) {
  constexpr int many = kManyQueries<Query>;
  constexpr int few = kFewQueries<Query>;
  if (retrieval.tokens > few &&
      BestKeysMemory<Query, many>(int(retrieval.k), kMaxWarps / 2).bytes() <= max_shared_bytes()) {
    find_best<is_masked, many>(retrieval, context);
  } else {
    find_best<is_masked, few>(retrieval, context);
  }
}

}  // namespace

template <class Query>
void product_key_topk(const ProductKeyTopk<Query>& given, const Context& context) {
  ProductKeyTopk<Query> retrieval = given;
  // With shared keys, a head is like a token, so that the heads of one token can share a block.
  if (retrieval.rows.head_stride == 0 && retrieval.columns.head_stride == 0) {
    retrieval.tokens *= retrieval.heads;
    retrieval.heads = 1;
  }
  if (retrieval.disabled == nullptr) {
    retrieve<false>(retrieval, context);
    return;
  }
  ProductKeyTopk<Query> best = retrieval;
  best.k = std::min(kMaxRetrieved, retrieval.rows.count * retrieval.columns.count);
  const int64_t count = retrieval.tokens * retrieval.heads * best.k;
  const auto scores = context.array<accumulation_t<Query>>(count);
  const auto indices = context.array<int64_t>(count);
  best.scores = scores.get();
  best.indices = indices.get();
  retrieve<true>(best, context);
  keep_enabled(best, retrieval, context);
}

template void product_key_topk(const ProductKeyTopk<float>&, const Context&);
template void product_key_topk(const ProductKeyTopk<double>&, const Context&);
template void product_key_topk(const ProductKeyTopk<BFloat16>&, const Context&);
template void product_key_topk(const ProductKeyTopk<Half>&, const Context&);

}  // namespace peer::cuda
