// The k best experts of one query, by one warp, from the sub-scores of the two halves:
//
//   BestKeys         the k best keys of a half, batch by batch
//   PairSelection    the k best sums of a row key and a column key
//
// Infinite sub-scores are clamped to the largest finite numbers, and NaN ranks first. So a sum is
// monotone in both ranks, and only candidate pairs (kernels/product_key_topk.h) can be among the k
// best.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/warp_select.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// The scores of a batch, in registers.
constexpr int kScoresPerLane = 16;
constexpr int kMaxKeysPerBatch = kScoresPerLane * kWarp;
// The scores move to registers, then the list of candidates reuses their shared memory. It needs
// the space of this many keys.
constexpr int kMinKeysPerBatch = 256;

constexpr int kMaxCandidatePairs =
    count_candidate_pairs<int>(kMaxRetrieved, kMaxRetrieved, kMaxRetrieved);
constexpr int kCandidatePairsPerLane = (kMaxCandidatePairs + kWarp - 1) / kWarp;

// NaN, which is above infinity, stays.
template <class Real>
__device__ ordered_t<Real> clamp_to_finite(ordered_t<Real> score) {
  using Order = ordered_t<Real>;
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  const Order lowest = to_ordered(-infinity) + 1;
  const Order clamped = score == to_ordered(infinity) ? score - 1 : score;
  return clamped > lowest ? clamped : lowest;
}

// The best keys of one half of a query, in shared memory. Read and written by one warp.
template <class Real>
struct BestKeys {
  using Order = ordered_t<Real>;

  int k;
  Candidate<Order>* sorted;  // the k best of the keys so far, or all of them

  // Merges a batch's scores into the list. Overwrites the scores. The block must synchronise before
  // the next batch. Under a mask, `unused` is that of all keys.
  template <bool is_masked>
  __device__ void add_batch(Order* batch,
                            int batch_keys,
                            int32_t first_key,
                            const bool* unused) const {
    Order scores[kScoresPerLane];
#pragma unroll
    for (int i = 0; i < kScoresPerLane; ++i) {
      const int position = position_of(i);
      scores[i] = position < batch_keys ? clamp_to_finite<Real>(batch[position]) : kBelowAll<Order>;
    }
    if constexpr (is_masked) {
#pragma unroll
      for (int i = 0; i < kScoresPerLane; ++i) {
        const int position = position_of(i);
        if (position < batch_keys && unused[first_key + position]) {
          scores[i] = unused_key_order<Real>();
        }
      }
    }
    __syncwarp();
    // Every batch but the last has more than k keys.
    const int previous = first_key == 0 ? 0 : k;
    const int wanted = std::min(k, batch_keys);
    auto* list = reinterpret_cast<Candidate<Order>*>(batch);
    for (int i = lane(); i < previous; i += kWarp) {
      list[i] = sorted[i];
    }
    const Order floor = previous > 0 ? sorted[k - 1].order : floor_by_groups(scores, wanted);
    const int length = append_above(floor, scores, wanted, first_key, list, previous);
    __syncwarp();
    if (length > previous) {
      visit_best(list, length, k,
                 [&](int rank, const Candidate<Order>& key) { sorted[rank] = key; });
    }
  }
};

// The ranks of a row key and a column key.
struct alignas(2) RankPair {
  uint8_t row, column;
};

// Lists the candidate pairs in order of (row rank, column rank). Called by all threads of the
// block.
__device__ inline void list_candidate_pairs(int row_count,
                                            int column_count,
                                            int k,
                                            RankPair* pairs) {
  for (int i = int(threadIdx.x); i < row_count; i += int(blockDim.x)) {
    const int first = count_candidate_pairs(i, column_count, k);
    for (int j = 0; j < count_candidate_columns(i, column_count, k); ++j) {
      pairs[first + j] = {uint8_t(i), uint8_t(j)};
    }
  }
}

// Selects a query's k best pairs and writes its result.
template <class Real>
struct PairSelection {
  using Order = ordered_t<Real>;

  BestKeys<Real> rows, columns;
  int64_t column_count;  // C
  const RankPair* pairs;
  int pair_count;
  int k;
  Real* scores;      // (k)
  int64_t* indices;  // (k)

  __device__ Order sum(int pair) const {
    const Real row = from_ordered<Real>(rows.sorted[pairs[pair].row].order);
    const Real column = from_ordered<Real>(columns.sorted[pairs[pair].column].order);
    return to_ordered(row + column);
  }

  __device__ int64_t expert(int pair) const {
    return rows.sorted[pairs[pair].row].id * column_count + columns.sorted[pairs[pair].column].id;
  }

  // Among equal sums, the smaller position in the list of pairs is better.
  __device__ void select(Candidate<Order>* list) const {
    Order sums[kCandidatePairsPerLane];
#pragma unroll
    for (int i = 0; i < kCandidatePairsPerLane; ++i) {
      const int position = position_of(i);
      sums[i] = position < pair_count ? sum(position) : kBelowAll<Order>;
    }
    const int length = append_above(floor_by_groups(sums, k), sums, k, 0, list, 0);
    __syncwarp();
    visit_best(list, length, k, [&](int rank, const Candidate<Order>& pair) {
      scores[rank] = from_ordered<Real>(pair.order);
      indices[rank] = expert(pair.id);
    });
  }
};

}  // namespace peer::cuda
