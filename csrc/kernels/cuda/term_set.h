// A set of the terms of a tile, in one register per lane: lane l holds the bits of the terms 32·l
// to 32·l + 31. All lanes of a warp must take part in every call.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

class TermSet {
 public:
  // The number of lanes that hold bits.
  static constexpr int kWords = (kMaxTerms + kWarp - 1) / kWarp;
  static_assert(kWords <= kWarp);

  TermSet() = default;

  // From and to kWords words of memory.
  static __device__ TermSet load(const unsigned* words) {
    return TermSet(lane() < kWords ? words[lane()] : 0);
  }
  __device__ void store(unsigned* words) const {
    if (lane() < kWords) {
      words[lane()] = bits_;
    }
  }

  __device__ void insert_if(bool condition, int term) {
    bits_ |= unsigned(condition && lane() == term / kWarp) << term % kWarp;
  }
  __device__ bool has(int term) const {
    return __shfl_sync(kAllLanes, bits_, term / kWarp) >> term % kWarp & 1;
  }
  __device__ TermSet operator|(const TermSet& other) const { return TermSet(bits_ | other.bits_); }
  __device__ TermSet operator-(const TermSet& other) const { return TermSet(bits_ & ~other.bits_); }

  // Calls body(term) for each term, in ascending order.
  template <class Body>
  __device__ void for_each(const Body& body) const {
    unsigned words = __ballot_sync(kAllLanes, bits_ != 0);
#pragma unroll 1
    for (; words != 0; words &= words - 1) {
      const int word = __ffs(int(words)) - 1;
      unsigned bits = __shfl_sync(kAllLanes, bits_, word);
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        body(word * kWarp + __ffs(int(bits)) - 1);
      }
    }
  }

 private:
  explicit __device__ TermSet(unsigned bits) : bits_(bits) {}

  unsigned bits_ = 0;
};

}  // namespace peer::cuda
