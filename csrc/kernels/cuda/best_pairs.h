// The k best experts of a query, by one warp: the k best sums of one of the best row keys and one
// of the best column keys.
//
// Infinite sub-scores are clamped to the largest finite numbers, and NaN ranks first. So a sum is
// monotone in both ranks, and only candidate pairs (kernels/product_key_topk.h) can be among the k
// best. For the same reason, k sums reach the sum of the pair (i, j) if (i + 1)(j + 1) >= k. The
// greatest such sum is the bound that a candidate pair must reach. Of 50 pairs at k = 16, about 25
// reach it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/best_keys.h"
#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/warp_select.h"
#include "kernels/ordered.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

constexpr int kMaxCandidatePairs =
    count_candidate_pairs<int>(kMaxRetrieved, kMaxRetrieved, kMaxRetrieved);

// The ranks of a row key and a column key.
struct alignas(2) RankPair {
  uint8_t row, column;
};

// The pairs among which a query's best are, the same for all queries.
struct CandidatePairs {
  int k, rows, columns;  // the best rows and columns
  int count = 0;
  RankPair* pairs = nullptr;         // (count), in order of (row rank, column rank)
  uint8_t* bound_columns = nullptr;  // (rows), the first column with which k sums reach a row's sum

  // Called by all threads of the block, with a barrier before the pairs are read.
  __device__ void list() const {
    for (int i = int(threadIdx.x); i < rows; i += int(blockDim.x)) {
      const int first = count_candidate_pairs(i, columns, k);
      for (int j = 0; j < count_candidate_columns(i, columns, k); ++j) {
        pairs[first + j] = {uint8_t(i), uint8_t(j)};
      }
      bound_columns[i] = uint8_t(divide_up(k, i + 1) - 1);
    }
  }
};

// The k best keys of a half of one query, in shared memory.
template <class Real>
struct BestKeys {
  Real* scores;
  int32_t* ids;

  __device__ void set(int rank, Packed<ordered_t<Real>> key) const {
    scores[rank] = from_ordered<Real>(order_of<ordered_t<Real>>(key));
    ids[rank] = id_of<ordered_t<Real>>(key);
  }
};

// Merges the best keys of a half's ranges, k of each range. Overwrites `items`. Called by one warp.
template <class Real>
__device__ void merge_best_keys(const Packed<ordered_t<Real>>* of_ranges,
                                int ranges,
                                int k,
                                Packed<ordered_t<Real>>* items,
                                const BestKeys<Real>& best) {
  using Item = Packed<ordered_t<Real>>;
  if (ranges == 1) {  // in order already
    for (int rank = lane(); rank < k; rank += kWarp) {
      best.set(rank, of_ranges[rank]);
    }
    return;
  }
  // The best keys of all ranges come first, so that the floor rises fast.
  KeyList<ordered_t<Real>> list = {.items = items, .capacity = capacity_for(k), .k = k};
  constexpr int kLoads = 4;  // in flight
  const int count = ranges * k;
  for (int first = 0; first < count; first += kLoads * kWarp) {
    Item keys[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int i = first + load * kWarp + lane();
      keys[load] = i < count ? of_ranges[i % ranges * k + i / ranges] : Item(0);
    }
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      list.add(keys[load]);
    }
  }
  list.visit_best([&](int rank, Item key) { best.set(rank, key); });
}

// Writes the k best pairs of a query. Overwrites `items`. Called by one warp.
template <class Real>
__device__ void select_pairs(const CandidatePairs& candidates,
                             const BestKeys<Real>& rows,
                             const BestKeys<Real>& columns,
                             int64_t column_count,
                             Packed<ordered_t<Real>>* items,
                             Real* scores,
                             int64_t* indices) {
  using Order = ordered_t<Real>;
  const auto sum_of = [&](int row, int column) {
    return to_ordered(rows.scores[row] + columns.scores[column]);
  };
  Order bound = std::numeric_limits<Order>::min();
  for (int row = lane(); row < candidates.rows; row += kWarp) {
    const int column = candidates.bound_columns[row];
    if (column < candidates.columns) {
      bound = std::max(bound, sum_of(row, column));
    }
  }
  bound = warp_max(bound);

  // Among equal sums, the smaller position in the list of pairs is better.
  CandidateList<Order, kMaxCandidatePairs> list = {
      .items = items, .capacity = candidates.count, .k = candidates.k};
  const Packed<Order> lowest = pack_lowest(bound);
  for (int first = 0; first < candidates.count; first += kWarp) {
    const int i = first + lane();
    Packed<Order> candidate = 0;
    if (i < candidates.count) {
      const RankPair pair = candidates.pairs[i];
      const Packed<Order> packed = pack(sum_of(pair.row, pair.column), uint32_t(i));
      candidate = packed >= lowest ? packed : 0;
    }
    list.add(candidate);
  }
  list.visit_best([&](int rank, Packed<Order> item) {
    const RankPair pair = candidates.pairs[id_of<Order>(item)];
    scores[rank] = from_ordered<Real>(order_of<Order>(item));
    indices[rank] = rows.ids[pair.row] * column_count + columns.ids[pair.column];
  });
}

}  // namespace peer::cuda
