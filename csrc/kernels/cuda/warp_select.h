// Warp select: one warp selects and sorts the k best of a stream of candidates.
//
// A candidate is a score and an id, packed into one integer, so that the better of two candidates
// is the greater integer: the higher score, and of equal scores the smaller id. 0 is no candidate.
//
//   1. add         appends the candidates above a floor to a list in shared memory
//   2. keep_best   if the list is full, keeps the k best. The worst of them is the next floor
//   3. visit_best  the rank of a candidate is the number of better ones in the list
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// The bits of an ordered score (ordered.h) above the 32 bits of the complement of the id.
__extension__ typedef unsigned __int128 UnsignedInt128;

template <class Order>
using Packed = std::conditional_t<sizeof(Order) == 4, uint64_t, UnsignedInt128>;

// The scores of two candidates compare like these unsigned integers.
template <class Order>
__device__ std::make_unsigned_t<Order> to_unsigned(Order order) {
  using Unsigned = std::make_unsigned_t<Order>;
  return Unsigned(order) ^ Unsigned(std::numeric_limits<Order>::min());
}

template <class Order>
__device__ Packed<Order> pack(Order order, uint32_t id) {
  return Packed<Order>(to_unsigned(order)) << 32 | uint32_t(~id);
}

// The worst candidate with this score.
template <class Order>
__device__ Packed<Order> pack_lowest(Order order) {
  return Packed<Order>(to_unsigned(order)) << 32;
}

template <class Order>
__device__ Order order_of(Packed<Order> candidate) {
  using Unsigned = std::make_unsigned_t<Order>;
  return Order(Unsigned(candidate >> 32) ^ Unsigned(std::numeric_limits<Order>::min()));
}

template <class Order>
__device__ int32_t id_of(Packed<Order> candidate) {
  return int32_t(~uint32_t(candidate));
}

template <class Value>
__device__ Value shuffle_xor(Value value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}
__device__ inline UnsignedInt128 shuffle_xor(UnsignedInt128 value, int distance) {
  return UnsignedInt128(shuffle_xor(uint64_t(value >> 64), distance)) << 64 |
         shuffle_xor(uint64_t(value), distance);
}

// The greatest of the lanes' values, in every lane.
template <class Value>
__device__ Value warp_max(Value value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Value other = shuffle_xor(value, distance);
    value = other > value ? other : value;
  }
  return value;
}
__device__ inline int32_t warp_max(int32_t value) { return __reduce_max_sync(kAllLanes, value); }

// Rounds up.
__device__ constexpr int divide_up(int value, int divisor) {
  return (value + divisor - 1) / divisor;
}

// count - (a > b). For 64 bits, the borrow of a - b that passes into a third word: three
// instructions instead of five.
template <class Item>
__device__ int subtract_if_above(int count, Item a, Item b) {
  if constexpr (sizeof(Item) == 8) {
    return int(((UnsignedInt128(uint32_t(count)) << 64 | b) - a) >> 64);
  } else {
    return count - int(a > b);
  }
}

// The capacity of a list to which any number of candidates can be added.
PEER_HOST_DEVICE constexpr int capacity_for(int k) { return k + kWarp; }

// The candidates of one warp, up to max_length. Lists are aligned to 16 bytes and have an even
// capacity.
template <class Order, int max_length>
struct CandidateList {
  using Item = Packed<Order>;

  Item* items;
  int capacity;
  int k;
  int length = 0;
  Item floor = 0;

  // Appends the lanes' candidates that exceed the floor.
  __device__ void add(Item candidate) {
    bool is_appended = candidate > floor;
    unsigned appending = __ballot_sync(kAllLanes, is_appended);
    if (length + __popc(appending) > capacity) {
      keep_best();
      is_appended = candidate > floor;
      appending = __ballot_sync(kAllLanes, is_appended);
    }
    if (is_appended) {
      items[length + count_lower_lanes(appending)] = candidate;
    }
    length += __popc(appending);
  }

  // Keeps the k best and raises the floor. Requires more than k candidates. Bisection finds an
  // integer that exactly k candidates reach. It exists, because candidates are distinct.
  __device__ void keep_best() {
    __syncwarp();
    Item own[kItemsPerLane];
    load(own);
    Item low = pack_lowest(Order(~greatest_order(own, [](Order order) { return Order(~order); })));
    Item high = pack(greatest_order(own, [](Order order) { return order; }), 0);
    for (int reaching = length; reaching != k;) {
      const Item middle = high - (high - low) / 2;
      reaching = 0;
#pragma unroll
      for (int i = 0; i < kItemsPerLane; ++i) {
        reaching += own[i] >= middle;
      }
      reaching = __reduce_add_sync(kAllLanes, reaching);
      if (reaching < k) {
        high = middle - 1;
      } else {
        low = middle;
      }
    }
    keep(own, low);
    floor = low;
  }

  // Keeps the candidates from a bound on.
  __device__ void keep_from(Item bound) {
    __syncwarp();
    Item own[kItemsPerLane];
    load(own);
    keep(own, bound);
  }

  // Calls visit(rank, candidate) for each of the k best, by one lane each.
  template <class Visit>
  __device__ void visit_best(const Visit& visit) {
    if (length > kWarp && length > k) {
      keep_best();
    }
    constexpr int size = 16 / int(sizeof(Item));
    using ItemVec = Vec<Item, size>;
    const int vecs = divide_up(length, size);
    if (lane() == 0 && length < vecs * size) {
      items[length] = 0;
    }
    __syncwarp();
    for (int i = lane(); i < length; i += kWarp) {
      const Item own = items[i];
      int negative_rank = 0;
      for (int j = 0; j < vecs; ++j) {
        const ItemVec others = reinterpret_cast<const ItemVec*>(items)[j];
#pragma unroll
        for (int e = 0; e < size; ++e) {
          negative_rank = subtract_if_above(negative_rank, others.values[e], own);
        }
      }
      const int rank = -negative_rank;
      if (rank < k) {
        visit(rank, own);
      }
    }
  }

 private:
  static constexpr int kItemsPerLane = (max_length + kWarp - 1) / kWarp;

  // The greatest transformed order of the lanes' items.
  template <class Transform>
  __device__ static Order greatest_order(const Item (&own)[kItemsPerLane],
                                         const Transform& transform) {
    Order greatest = std::numeric_limits<Order>::min();
#pragma unroll
    for (int i = 0; i < kItemsPerLane; ++i) {
      const Order order = transform(order_of<Order>(own[i]));
      greatest = own[i] != 0 && order > greatest ? order : greatest;
    }
    return warp_max(greatest);
  }

  __device__ void load(Item (&own)[kItemsPerLane]) const {
#pragma unroll
    for (int i = 0; i < kItemsPerLane; ++i) {
      const int place = i * kWarp + lane();
      own[i] = place < length ? items[place] : Item(0);
    }
    __syncwarp();
  }

  __device__ void keep(const Item (&own)[kItemsPerLane], Item bound) {
    length = 0;
#pragma unroll
    for (int i = 0; i < kItemsPerLane; ++i) {
      const unsigned keeping = __ballot_sync(kAllLanes, own[i] >= bound && own[i] != 0);
      if (own[i] >= bound && own[i] != 0) {
        items[length + count_lower_lanes(keeping)] = own[i];
      }
      length += __popc(keeping);
    }
    __syncwarp();
  }
};

}  // namespace peer::cuda
