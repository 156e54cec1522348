// Warp select: one warp selects and sorts the k best of a few hundred scores, which are ordered
// integers (ordered.h).
//
//   1. floor    a value that at least k scores exceed, and few more than k
//   2. filter   the scores above the floor are appended to a list
//   3. rank     the rank of a candidate is the number of better candidates
//
// Lanes      lane l holds the scores at positions l, l + 32, l + 64, ... in registers, kBelowAll
//            where there is no score
// List       up to kMaxCandidates, in shared memory. If more scores exceed the floor, as with many
//            ties, only the k best are appended: bisection finds the k-th best score, and equal
//            scores are taken in order of position
// Order      higher score first, equal scores by id. Ids increase with positions
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// Below every score, including -inf.
template <class Order>
constexpr Order kBelowAll = std::numeric_limits<Order>::min();

constexpr int kMaxCandidates = 128;

// Aligned, so that it is read and written by one access.
template <class Order>
struct alignas(2 * sizeof(Order)) Candidate {
  Order order;
  int32_t id;
};

template <class Order>
__device__ bool is_better(const Candidate<Order>& a, const Candidate<Order>& b) {
  return a.order > b.order || (a.order == b.order && a.id < b.id);
}

__device__ inline int position_of(int i) { return i * kWarp + lane(); }

template <int count, class Order>
__device__ int count_above(const Order (&scores)[count], Order floor) {
  int above = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    above += scores[i] > floor;
  }
  return above;
}

// The reduction of the lanes' values, in every lane.
template <class Value, class Operation>
__device__ Value warp_reduce(Value value, const Operation& operation) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sum over lower lanes.
__device__ inline int warp_exclusive_sum(int value) {
  int sum = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, unsigned(distance));
    sum += lane() >= distance ? below : 0;
  }
  return sum - value;
}

// A bound that at least k of the warp's scores reach, by bisection between the least and the
// greatest score: the k-th best score, or a bound that at most `enough` scores reach. Requires k
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
  Order low = greater(warp_reduce(least, lesser), kBelowAll<Order> + 1);
  Order high = warp_reduce(greatest, greater);
  while (low < high) {
    const Order middle = middle_of(low, high);
    const int reaching = __reduce_add_sync(kAllLanes, count_above(scores, Order(middle - 1)));
    narrow_to_kth(low, high, middle, reaching, k, enough);
  }
  return low;
}

// The floor from the maxima of 128 groups of scores, four groups per lane. A floor that k maxima
// exceed is one that k scores exceed. About k + k²/256 of 512 random scores exceed it, and an
// eighth more if the bisection stops early.
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

// A floor that exactly the k best of the warp's scores exceed. Surplus scores that equal the k-th
// best become kBelowAll. Requires k scores.
template <int count, class Order>
__device__ Order floor_of_k_best(Order (&scores)[count], int k) {
  const Order kth = bound_of_kth(scores, k, k);
  int room = k - __reduce_add_sync(kAllLanes, count_above(scores, kth));
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const bool is_equal = scores[i] == kth;
    const unsigned equals = __ballot_sync(kAllLanes, is_equal);
    if (is_equal && count_lower_lanes(equals) >= room) {
      scores[i] = kBelowAll<Order>;
    }
    room -= __popc(equals);
  }
  return kth - 1;
}

// Appends the scores above a floor to the list, or only the k best if the list has no room for all.
// Returns the new length of the list. Requires room for k.
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
  int end = length + warp_exclusive_sum(own);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (scores[i] > floor) {
      list[end++] = {scores[i], first_id + position_of(i)};
    }
  }
  return length + all;
}

// Calls visit(rank, candidate) for each of the k best of a list, by one lane each.
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
