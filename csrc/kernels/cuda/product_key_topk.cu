// product_key_topk: the k best of R·C experts for every token and head, exactly, without computing
// R·C scores.
//
//   1. sub-scores   <q1, row_keys[r]>, then <q2, col_keys[c]>, of a block's queries, a batch of
//                   keys at a time, in shared memory (sub_scores.h)
//   2. best keys    the k best keys of each half of every query: the best of those so far and of
//                   the batch (query_topk.h, warp_select.h)
//   3. best pairs   the k best sums row + column, among the candidate pairs (query_topk.h)
//
// Shapes      query (T, H, dim_key)   keys (R or C, dim_key / 2), shared or for each head
//             scores, indices (T, H, k)
// One block   32 queries (16 of double) of one head. Its warps divide the keys of a batch for the
//             sub-scores, then the queries for the selection. Two blocks fit on an SM, so that one
//             multiplies while the other selects
// Traffic     the keys once per block, from the L2 cache; nothing of size R or C per query leaves
//             the block
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

#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/product_key_topk_masked.h"
#include "kernels/cuda/query_block.h"
#include "kernels/cuda/query_topk.h"
#include "kernels/cuda/sub_scores.h"

namespace peer::cuda {

namespace {

constexpr int kMaxThreads = 512;

// The layout of a block's shared memory, in bytes from its start.
template <class Query>
class SharedLayout {
 public:
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;
  static constexpr int kQueries = kQueriesPerBlock<Query>;

  SharedLayout(int k, int keys_per_batch)
      : k_(k),
        keys_per_batch_(keys_per_batch),
        sorted_(kScores + kQueries * score_stride() * int(sizeof(Order))),
        pairs_(sorted_ + 2 * kQueries * k * int(sizeof(Candidate<Order>))),
        bytes_(pairs_ + kMaxCandidatePairs * int(sizeof(RankPair))) {}

  int bytes() const { return bytes_; }
  PEER_HOST_DEVICE int keys_per_batch() const { return keys_per_batch_; }

  __device__ OperandVec<Query>* stage_vecs() const { return at<OperandVec<Query>>(0); }
  // (kQueries, at least keys_per_batch)
  __device__ ScoreRows<Real> scores() const { return {at<Order>(kScores), score_stride()}; }
  __device__ RankPair* pairs() const { return at<RankPair>(pairs_); }
  __device__ BestKeys<Real> best_keys(int half, int query) const {
    return {k_, at<Candidate<Order>>(sorted_) + (half * kQueries + query) * k_};
  }

 private:
  template <class Item>
  __device__ static Item* at(int byte) {
    return reinterpret_cast<Item*>(peer_shared_memory + byte);
  }

  static constexpr int kScores = Stage<Query>::kBytes;
  // The padding avoids bank conflicts: four lanes store eight scores of a query, and the lanes
  // beside them eight scores of the next query.
  PEER_HOST_DEVICE int score_stride() const { return keys_per_batch_ + 8; }
  static_assert(kMaxCandidates * sizeof(Candidate<Order>) <= kMinKeysPerBatch * sizeof(Order));

  int k_;
  int keys_per_batch_;
  int sorted_, pairs_, bytes_;
};

template <bool is_masked, class Query>
__global__ void __launch_bounds__(kMaxThreads)
    product_key_topk_kernel(ProductKeyTopk<Query> retrieval,
                            SharedLayout<Query> shared,
                            Vectorizable vectorizable) {
  using Real = accumulation_t<Query>;
  const int k = int(retrieval.k);
  const QueryBlock<Query> block(retrieval, vectorizable, blockIdx.x);
  const int queries = block.count();
  const int warps = int(blockDim.x) / kWarp;
  const ScoreRows<Real> scores = shared.scores();

  const int best_rows = int(std::min(retrieval.k, retrieval.rows.count));
  const int best_columns = int(std::min(retrieval.k, retrieval.columns.count));
  const int pair_count = count_candidate_pairs(best_rows, best_columns, k);
  list_candidate_pairs(best_rows, best_columns, k, shared.pairs());

  for (int half = kRows; half <= kColumns; ++half) {
    const HalfRows<Query> keys = block.key_rows(half);
    const HalfRows<Query> query_rows = block.query_rows(half);
    const bool* const unused = half == kRows ? retrieval.rows.unused : retrieval.columns.unused;
    for (int64_t first = 0; first < keys.count; first += shared.keys_per_batch()) {
      const int batch = int(std::min<int64_t>(shared.keys_per_batch(), keys.count - first));
      score_batch(query_rows, keys, first, batch, shared.stage_vecs(), scores);
      __syncthreads();
      for (int query = warp_in_block(); query < queries; query += warps) {
        shared.best_keys(half, query)
            .template add_batch<is_masked>(scores.data + query * scores.stride, batch,
                                           int32_t(first), unused);
      }
      __syncthreads();
    }
  }

  for (int query = warp_in_block(); query < queries; query += warps) {
    const int64_t target = block.query(query) * retrieval.k;
    const PairSelection<Real> selection = {
        .rows = shared.best_keys(kRows, query),
        .columns = shared.best_keys(kColumns, query),
        .column_count = retrieval.columns.count,
        .pairs = shared.pairs(),
        .pair_count = pair_count,
        .k = k,
        .scores = retrieval.scores + target,
        .indices = retrieval.indices + target,
    };
    selection.select(
        reinterpret_cast<Candidate<ordered_t<Real>>*>(scores.data + query * scores.stride));
  }
}

// Chooses the largest batch of keys with which two blocks fit on an SM. The SM reserves 1 KiB for
// each block.
template <class Query>
SharedLayout<Query> choose_shared_layout(const ProductKeyTopk<Query>& retrieval) {
  constexpr int kReserved = 1 << 10;
  constexpr int kStep = 2 * kWarp;
  const int64_t bytes_per_block = (max_shared_bytes() - kReserved) / 2;
  const auto layout_for = [&](int64_t keys) {
    return SharedLayout<Query>(int(retrieval.k), int(keys));
  };
  const int64_t keys = std::max(retrieval.rows.count, retrieval.columns.count);
  int64_t batch =
      std::clamp<int64_t>((keys + kStep - 1) / kStep * kStep, kMinKeysPerBatch, kMaxKeysPerBatch);
  while (batch > kMinKeysPerBatch && layout_for(batch).bytes() > bytes_per_block) {
    batch -= kStep;
  }
  return layout_for(batch);
}

// Retrieves from all experts. Under a mask, unused keys rank behind the others.
template <bool is_masked, class Query>
void retrieve(const ProductKeyTopk<Query>& retrieval, const Context& context) {
  const int64_t blocks = count_query_blocks(retrieval);
  const SharedLayout<Query> shared = choose_shared_layout(retrieval);
  // With at most one block per SM, a block takes all registers.
  const int threads = blocks > sm_count() ? kMaxThreads / 2 : kMaxThreads;
  launch(product_key_topk_kernel<is_masked, Query>, {blocks, threads, shared.bytes()},
         context.stream, retrieval, shared, find_vectorizable(retrieval));
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
