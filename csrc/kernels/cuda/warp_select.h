// Selection by one warp: the k best of some hundred scores on ordered integers (ordered.h), sorted.
//
//   1. floor    a value that at least k of the scores are above, and few more
//   2. filter   those above it, gathered in a list
//   3. rank     of each of the list: how many are better
//
// Lanes      lane l holds the scores at positions l, l + 32, l + 64, ... in registers, kBelowAll
//            where there is none, and reads each once
// List       up to kMaxCandidates, in shared memory. Where more are above the floor, as in rows of
//            ties, the k best alone: bisection for the k-th, then equal ones by position
// Order      higher score first, equal scores by id. Ids grow with positions
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// Less than the order of any score, -inf included.
template <class Order>
constexpr Order kBelowAll = std::numeric_limits<Order>::min();

constexpr int kMaxCandidates = 128;

// Read and written as one.
template <class Order>
struct alignas(2 * sizeof(Order)) Candidate {
  Order order;
  int32_t id;
};

template <class Order>
__device__ bool is_better(const Candidate<Order>& a, const Candidate<Order>& b) {
  return a.order > b.order || (a.order == b.order && a.id < b.id);
}

__device__ inline int position_in_lane(int i) { return i * kWarp + lane(); }

template <int count, class Order>
__device__ int count_above(const Order (&scores)[count], Order floor) {
  int above = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    above += scores[i] > floor;
  }
  return above;
}

// Folds the lanes' values into one, in every lane.
template <class Value, class Operation>
__device__ Value fold_warp(Value value, const Operation& operation) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sum over the lanes below this one.
__device__ inline int sum_before(int value) {
  int sum = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, unsigned(distance));
    sum += lane() >= distance ? below : 0;
  }
  return sum - value;
}

// A bound that at least k of the warp's scores reach, found by bisecting the integers between the
// least and the greatest of them: the k-th best score, or what no more than `enough` reach. Needs k
// scores.
template <int count, class Order>
__device__ Order bound_of_kth(const Order (&scores)[count], int k, int enough) {
  const auto lesser = [](Order a, Order b) { return a < b ? a : b; };
  const auto greater = [](Order a, Order b) { return a > b ? a : b; };
  Order least = scores[0];
  Order greatest = scores[0];
#pragma unroll
  for (int i = 1; i < count; ++i) {
    least = lesser(least, scores[i]);
    greatest = greater(greatest, scores[i]);
  }
  Order low = greater(fold_warp(least, lesser), kBelowAll<Order> + 1);
  Order high = fold_warp(greatest, greater);
  while (low < high) {
    const Order middle = middle_of(low, high);
    const int reaching = __reduce_add_sync(kAllLanes, count_above(scores, Order(middle - 1)));
    narrow_to_kth(low, high, middle, reaching, k, enough);
  }
  return low;
}

// The group-maximum filter, with 128 groups, four in each lane. Each maximum is a score, so a floor
// that k maxima are above is one that k scores are above: of 512 random ones about k + k²/256, and
// an eighth more where the bisection stops early.
template <int count, class Order>
__device__ Order floor_by_groups(const Order (&scores)[count], int k) {
  constexpr int groups = 4;
  static_assert(count >= groups);
  Order maxima[groups];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    Order& maximum = maxima[i % groups];
    maximum = i < groups || scores[i] > maximum ? scores[i] : maximum;
  }
  return bound_of_kth(maxima, k, k + k / 8 + 1) - 1;
}

// A floor that just the k best of the warp's scores are above: of those equal to the k-th best, the
// ones too many become kBelowAll. Needs k scores.
template <int count, class Order>
__device__ Order floor_of_k_best(Order (&scores)[count], int k) {
  const Order kth = bound_of_kth(scores, k, k);
  int room = k - __reduce_add_sync(kAllLanes, count_above(scores, kth));
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const bool is_equal = scores[i] == kth;
    const unsigned equals = __ballot_sync(kAllLanes, is_equal);
    if (is_equal && count_before(equals) >= room) {
      scores[i] = kBelowAll<Order>;
    }
    room -= __popc(equals);
  }
  return kth - 1;
}

// Appends the scores above a floor to the list, or the k best of them where it has no room for all;
// returns the list's new length. There must be room for k.
template <int count, class Order>
__device__ int append_above(Order floor,
                            Order (&scores)[count],
                            int k,
                            int32_t first_id,
                            Candidate<Order>* list,
                            int length) {
  int own = count_above(scores, floor);
  int all = __reduce_add_sync(kAllLanes, own);
  if (length + all > kMaxCandidates) {
    floor = floor_of_k_best(scores, k);
    own = count_above(scores, floor);
    all = k;
  }
  int place = length + sum_before(own);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (scores[i] > floor) {
      list[place++] = {scores[i], first_id + position_in_lane(i)};
    }
  }
  return length + all;
}

// Calls visit(rank, candidate) for the k best of a list, each by some lane.
template <class Order, class Visit>
__device__ void visit_best(const Candidate<Order>* list, int length, int k, const Visit& visit) {
  for (int i = lane(); i < length; i += kWarp) {
    const Candidate<Order> own = list[i];
    int rank = 0;
    for (int j = 0; j < length; ++j) {
      const Candidate<Order> other = list[j];
      rank += is_better(other, own);
    }
    if (rank < k) {
      visit(rank, own);
    }
  }
}

}  // namespace peer::cuda
