// Warp-wide operations. All lanes of the warp must take part in every call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace peer::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return int(threadIdx.x) % kWarp; }
__device__ inline int warp_in_block() { return int(threadIdx.x) / kWarp; }

// The sum over the lanes, in every lane. The order is fixed.
template <class Value>
__device__ Value warp_reduce_sum(Value value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The number of lower lanes whose bit is set.
__device__ inline int count_lower_lanes(unsigned ballot) {
  return __popc(ballot & ((1u << lane()) - 1));
}

}  // namespace peer::cuda
