// Retrieval among the enabled experts, in two kernels:
//
//   filter   keeps the first k enabled ones of a query's best experts, which are more than k
//   scan     finds the k best of all enabled pairs, for the queries that have kept fewer
//
// The best experts are those of the order without a mask. So the first k enabled ones are the
// result, and if there are fewer, others follow that only a scan can find.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "kernels/cuda/best_keys.h"
#include "kernels/cuda/product_key_topk_masked.h"
#include "kernels/cuda/query_block.h"
#include "kernels/cuda/sub_scores.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/warp_select.h"
#include "kernels/ordered.h"

namespace peer::cuda {

namespace {

// Filter.
//
// One warp    one query; a lane has every 32nd of its best experts
// Traffic     score, id and a byte of the mask per best expert; score and id per result
constexpr int kFilterWarps = 8;

template <class Query>
__global__ void filter_kernel(ProductKeyTopk<Query> best,
                              ProductKeyTopk<Query> retrieval,
                              bool* is_unfinished) {
  const int64_t query = int64_t(blockIdx.x) * kFilterWarps + warp_in_block();
  if (query >= retrieval.tokens * retrieval.heads) {
    return;
  }
  const int64_t source = query * best.k;
  const int64_t target = query * retrieval.k;
  int64_t kept = 0;
  for (int64_t first = 0; first < best.k && kept < retrieval.k; first += kWarp) {
    const int64_t i = first + lane();
    const bool is_kept = i < best.k && !retrieval.disabled[best.indices[source + i]];
    const unsigned keeping = __ballot_sync(kAllLanes, is_kept);
    const int64_t place = kept + count_lower_lanes(keeping);
    if (is_kept && place < retrieval.k) {
      retrieval.scores[target + place] = best.scores[source + i];
      retrieval.indices[target + place] = best.indices[source + i];
    }
    kept += __popc(keeping);
  }
  if (lane() == 0) {
    is_unfinished[query] = kept < retrieval.k;
  }
}

// Scan. The enabled pairs of a row are ordered as their columns are, so the best of all pairs is
// among the heads of the rows, their best ones. The k best pairs are found one after the other: the
// best head, which the next pair of its row then replaces.
//
// One block   blocks of queries, one after the other (query_block.h). If one of its queries is
//             unfinished, it scores all keys; then it scans for each unfinished query. A warp finds
//             the head of a row, all threads find the best head
// Memory      the sub-scores of a block's queries, and a head per row. The number of blocks is such
//             that this takes at most kScanBytes, or is one
// Traffic     a byte of the mask per pair and k·C bytes again, and a sub-score for each of them
// Exactness   sub-scores are those of the retrieval without a mask; a pair's score is one addition
// Requires    R and C up to kMaxMaskedKeys
constexpr int kScanThreads = 256;  // two blocks fit on an SM
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int64_t kScanBytes = int64_t(64) << 20;

// Device memory of the blocks.
template <class Query>
struct ScanMemory {
  static constexpr int kQueries = kFewQueries<Query>;
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;

  int strides[2];    // of the scores of rows and of columns, in whole tiles of keys
  Order* scores[2];  // (blocks, kQueries, stride)
  int32_t* heads;    // (blocks, row stride), the column of each head, -1 if the row has none

  // The scores of one of the block's queries.
  __device__ Order* block_scores(int half, int query) const {
    return scores[half] + (int64_t(blockIdx.x) * kQueries + query) * strides[half];
  }
  __device__ int32_t* block_heads() const { return heads + int64_t(blockIdx.x) * strides[kRows]; }
};

// A row and the score of its head, or no row. The order is that of the heads' pairs.
template <class Order>
struct Head {
  Order score = std::numeric_limits<Order>::min();
  Order row_score = std::numeric_limits<Order>::min();
  int32_t row = -1;
};

template <class Order>
__device__ bool is_better(const Head<Order>& a, const Head<Order>& b) {
  if (a.score != b.score) {
    return a.score > b.score;
  }
  return a.row_score > b.row_score || (a.row_score == b.row_score && a.row < b.row);
}

// The best of all threads' heads. `of_warps` has a place for every warp.
template <class Order>
__device__ Head<Order> best_of_block(Head<Order> best, Head<Order>* of_warps) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Head<Order> other = {__shfl_xor_sync(kAllLanes, best.score, distance),
                               __shfl_xor_sync(kAllLanes, best.row_score, distance),
                               __shfl_xor_sync(kAllLanes, best.row, distance)};
    best = is_better(other, best) ? other : best;
  }
  if (lane() == 0) {
    of_warps[warp_in_block()] = best;
  }
  __syncthreads();
  for (int warp = 0; warp < kScanWarps; ++warp) {
    best = is_better(of_warps[warp], best) ? of_warps[warp] : best;
  }
  __syncthreads();
  return best;
}

// The scan for one query. Called by all threads of the block.
template <class Real>
struct PairScan {
  using Order = ordered_t<Real>;

  int row_count, column_count;
  const Order* rows;     // (R), sub-scores
  const Order* columns;  // (C)
  const bool* unused_rows;
  const bool* disabled;
  int32_t* heads;  // (R)
  Head<Order>* warp_heads;

  // The best enabled column of a row among the candidates up to a limit, or -1. Called by one warp.
  __device__ int32_t best_column(int32_t row, Packed<Order> limit) const {
    const bool* const are_disabled = disabled + int64_t(row) * column_count;
    Packed<Order> best = 0;
    for (int column = lane(); column < column_count; column += kWarp) {
      const Packed<Order> candidate = pack(columns[column], uint32_t(column));
      if (candidate > best && candidate <= limit && !are_disabled[column]) {
        best = candidate;
      }
    }
    best = warp_max(best);
    return best == 0 ? -1 : id_of<Order>(best);
  }

  __device__ void find_heads() const {
    for (int row = warp_in_block(); row < row_count; row += kScanWarps) {
      const int32_t head = unused_rows[row] ? -1 : best_column(row, ~Packed<Order>(0));
      if (lane() == 0) {
        heads[row] = head;
      }
    }
    __syncthreads();
  }

  __device__ Head<Order> best_head() const {
    Head<Order> best;
    for (int row = int(threadIdx.x); row < row_count; row += kScanThreads) {
      if (heads[row] >= 0) {
        const Real sum = from_ordered<Real>(rows[row]) + from_ordered<Real>(columns[heads[row]]);
        const Head<Order> head = {to_ordered(sum), rows[row], row};
        best = is_better(head, best) ? head : best;
      }
    }
    return best_of_block(best, warp_heads);
  }

  // Returns how many of the k pairs there are.
  __device__ int find(int k, Real* scores, int64_t* indices) const {
    find_heads();
    for (int i = 0; i < k; ++i) {
      const Head<Order> best = best_head();
      if (best.row < 0) {
        return i;
      }
      const int32_t column = heads[best.row];
      __syncthreads();  // all threads have read the head
      if (warp_in_block() == 0) {
        const int32_t next = best_column(best.row, pack(columns[column], uint32_t(column)) - 1);
        if (lane() == 0) {
          heads[best.row] = next;
          scores[i] = from_ordered<Real>(best.score);
          indices[i] = int64_t(best.row) * column_count + column;
        }
      }
      __syncthreads();
    }
    return k;
  }
};

// Writes the sub-scores of a block's queries, clamped. Called by all threads of the block.
template <class Query>
__device__ void score_all_keys(const QueryBlock<Query, kFewQueries<Query>>& block,
                               const ScanMemory<Query>& memory,
                               OperandVec<Query>* stage_vecs) {
  using Tile = ScoreTile<Query, kFewQueries<Query>>;
  for (int half = kRows; half <= kColumns; ++half) {
    const HalfRows<Query> keys = block.key_rows(half);
    for (int64_t first = 0; first < keys.count; first += kScanWarps * kKeysPerTile<Query>) {
      const int64_t first_of_warp = first + warp_in_block() * kKeysPerTile<Query>;
      const bool is_used = first_of_warp < keys.count;
      Tile tile(keys, first_of_warp);
      multiply_tile<Query, kFewQueries<Query>>(block.query_rows(half), keys, stage_vecs, first == 0,
                                               is_used, tile);
      if (!is_used) {
        continue;
      }
#pragma unroll
      for (int i = 0; i < Tile::kLaneQueries; ++i) {
        auto* scores = memory.block_scores(half, Tile::query_of(i)) + first_of_warp;
#pragma unroll
        for (int j = 0; j < Tile::kLaneKeys; ++j) {
          scores[Tile::key_at(Tile::place() + j)] = to_ordered(clamp_to_finite(tile.sum(i, j)));
        }
      }
    }
  }
  __syncthreads();
}

template <class Query>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(ProductKeyTopk<Query> retrieval,
                                                            Vectorizable vectorizable,
                                                            int64_t query_blocks,
                                                            const bool* is_unfinished,
                                                            ScanMemory<Query> memory) {
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;
  auto* const stage_vecs = reinterpret_cast<OperandVec<Query>*>(peer_shared_memory);
  auto* const warp_heads =
      reinterpret_cast<Head<Order>*>(peer_shared_memory + Stage<Query, kFewQueries<Query>>::kBytes);
  const int k = int(retrieval.k);
  for (int64_t i = blockIdx.x; i < query_blocks; i += gridDim.x) {
    const QueryBlock<Query, kFewQueries<Query>> block(retrieval, vectorizable, i);
    const bool is_waiting = lane() < block.count() && is_unfinished[block.query(lane())];
    const unsigned waiting = __ballot_sync(kAllLanes, is_waiting);  // the same in every warp
    if (waiting == 0) {
      continue;
    }
    score_all_keys(block, memory, stage_vecs);
    for (int query = 0; query < block.count(); ++query) {
      if ((waiting >> query & 1) == 0) {
        continue;
      }
      const PairScan<Real> scan = {
          .row_count = int(retrieval.rows.count),
          .column_count = int(retrieval.columns.count),
          .rows = memory.block_scores(kRows, query),
          .columns = memory.block_scores(kColumns, query),
          .unused_rows = retrieval.rows.unused,
          .disabled = retrieval.disabled,
          .heads = memory.block_heads(),
          .warp_heads = warp_heads,
      };
      const int64_t target = block.query(query) * retrieval.k;
      const int found = scan.find(k, retrieval.scores + target, retrieval.indices + target);
      if (found < k) {
        if (threadIdx.x == 0) {
          printf("peer: expected at least k = %d enabled experts, got %d\n", k, found);
          __trap();
        }
        return;
      }
    }
  }
}

}  // namespace

template <class Query>
void keep_enabled(const ProductKeyTopk<Query>& best,
                  const ProductKeyTopk<Query>& retrieval,
                  const Context& context) {
  using Memory = ScanMemory<Query>;
  using Order = typename Memory::Order;
  const int64_t queries = retrieval.tokens * retrieval.heads;
  const auto is_unfinished = context.array<bool>(queries);
  launch(filter_kernel<Query>, {(queries + kFilterWarps - 1) / kFilterWarps, kFilterWarps * kWarp},
         context.stream, best, retrieval, is_unfinished.get());

  const auto stride_of = [](const Keys<Query>& keys) {
    constexpr int64_t tile = kKeysPerTile<Query>;
    return (keys.count + tile - 1) / tile * tile;
  };
  const int64_t row_stride = stride_of(retrieval.rows);
  const int64_t column_stride = stride_of(retrieval.columns);
  const int64_t bytes_per_block =
      Memory::kQueries * (row_stride + column_stride) * int64_t(sizeof(Order)) +
      row_stride * int64_t(sizeof(int32_t));
  const int64_t query_blocks = count_query_blocks(retrieval, Memory::kQueries);
  const int64_t blocks = std::min(
      {query_blocks, int64_t(2 * sm_count()), std::max<int64_t>(kScanBytes / bytes_per_block, 1)});
  const auto row_scores = context.array<Order>(blocks * Memory::kQueries * row_stride);
  const auto column_scores = context.array<Order>(blocks * Memory::kQueries * column_stride);
  const auto heads = context.array<int32_t>(blocks * row_stride);
  const Memory memory = {
      .strides = {int(row_stride), int(column_stride)},
      .scores = {row_scores.get(), column_scores.get()},
      .heads = heads.get(),
  };
  const int64_t shared_bytes =
      Stage<Query, kFewQueries<Query>>::kBytes + kScanWarps * int64_t(sizeof(Head<Order>));
  launch(scan_kernel<Query>, {blocks, kScanThreads, shared_bytes}, context.stream, retrieval,
         find_vectorizable(retrieval), query_blocks, is_unfinished.get(), memory);
}

template void keep_enabled(const ProductKeyTopk<float>&,
                           const ProductKeyTopk<float>&,
                           const Context&);
template void keep_enabled(const ProductKeyTopk<double>&,
                           const ProductKeyTopk<double>&,
                           const Context&);
template void keep_enabled(const ProductKeyTopk<BFloat16>&,
                           const ProductKeyTopk<BFloat16>&,
                           const Context&);
template void keep_enabled(const ProductKeyTopk<Half>&,
                           const ProductKeyTopk<Half>&,
                           const Context&);

}  // namespace peer::cuda
