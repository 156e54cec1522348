// Stands in for CUDA's header when the kernels are compiled as C++ and run on the CPU. It has the
// parts that they use. Device memory is host memory, and streams execute work at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../grid_player.h"

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// A built-in variable of the running thread. It has only x.
template <unsigned peer::test::ThreadPlace::* coordinate>
struct Coordinate {
  operator unsigned() const { return ::peer::test::thread_place().*coordinate; }
};

template <unsigned peer::test::ThreadPlace::* coordinate>
struct Coordinates {
  Coordinate<coordinate> x;
};

constexpr Coordinates<&peer::test::ThreadPlace::thread> threadIdx;
constexpr Coordinates<&peer::test::ThreadPlace::block> blockIdx;
constexpr Coordinates<&peer::test::ThreadPlace::threads> blockDim;
constexpr Coordinates<&peer::test::ThreadPlace::blocks> gridDim;

// Collectives.

inline void __syncthreads() { ::peer::test::block_barrier(); }

inline void __check_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) {
    throw std::logic_error("a collective of less than a warp");
  }
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  __check_all_lanes(mask);
  ::peer::test::warp_barrier();
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  static_assert(sizeof(Value) <= 8, "CUDA shuffles 4 or 8 bytes");
  __check_all_lanes(mask);
  const unsigned char* values = ::peer::test::exchange_in_warp(&value, sizeof(value));
  Value result;
  std::memcpy(&result, values + 16 * (source & 31), sizeof(result));
  return result;
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ distance);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance) {
  const int lane = int(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane >= int(distance) ? lane - int(distance) : lane);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned distance) {
  const int lane = int(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane + int(distance) < 32 ? lane + int(distance) : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  __check_all_lanes(mask);
  const unsigned char holds = predicate != 0;
  const unsigned char* all = ::peer::test::exchange_in_warp(&holds, 1);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    ballot |= unsigned(all[16 * lane]) << lane;
  }
  return ballot;
}

template <class Value, class Combine>
Value __reduce_in_warp(unsigned mask, Value value, Combine combine) {
  __check_all_lanes(mask);
  const unsigned char* all = ::peer::test::exchange_in_warp(&value, sizeof(value));
  Value result;
  std::memcpy(&result, all, sizeof(result));
  for (int lane = 1; lane < 32; ++lane) {
    std::memcpy(&value, all + 16 * lane, sizeof(value));
    result = combine(result, value);
  }
  return result;
}

inline int __reduce_add_sync(unsigned mask, int value) {
  return __reduce_in_warp(mask, value, [](int a, int b) { return a + b; });
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return __reduce_in_warp(mask, value, [](unsigned a, unsigned b) { return a + b; });
}

inline int __reduce_max_sync(unsigned mask, int value) {
  return __reduce_in_warp(mask, value, [](int a, int b) { return a < b ? b : a; });
}

// Arithmetic.

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }
[[noreturn]] inline void __trap() { throw std::runtime_error("CUDA: a kernel trapped"); }

// Memory. Cache hints have no effect.

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class Value>
void __stcs(Value* target, Value value) {
  std::memcpy(target, &value, sizeof(value));
}

// The runtime.

using cudaStream_t = void*;

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// The number of SMs. Tests change it; only speed may depend on it.
inline int emulated_sm_count = 3;

// The last error, until cudaGetLastError clears it.
inline cudaError_t emulated_last_error = cudaSuccess;

inline cudaError_t cudaPeekAtLastError() { return emulated_last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulated_sm_count;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(::peer::test::shared_bytes_limit());
      break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Copies to the host arrive when the host waits for them, not before: a host that reads too early
// finds what was there.
struct EmulatedCopy {
  void* target;
  std::vector<unsigned char> bytes;
};
inline std::vector<EmulatedCopy> emulated_copies;
inline std::vector<size_t*> emulated_events;

inline cudaError_t cudaMemcpyAsync(void* target,
                                   const void* source,
                                   size_t bytes,
                                   cudaMemcpyKind,
                                   cudaStream_t) {
  const auto* first = static_cast<const unsigned char*>(source);
  emulated_copies.push_back({target, {first, first + bytes}});
  return cudaSuccess;
}

// The first copies of those that have not arrived.
inline void __arrive(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(emulated_copies[i].target, emulated_copies[i].bytes.data(),
                emulated_copies[i].bytes.size());
  }
  emulated_copies.erase(emulated_copies.begin(), emulated_copies.begin() + count);
  for (size_t* const event : emulated_events) {
    *event -= std::min(*event, count);
  }
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  __arrive(emulated_copies.size());
  return cudaSuccess;
}

// An event is the number of copies before it that have not arrived.
using cudaEvent_t = size_t*;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocPortable = 1;

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  emulated_events.push_back(*event = new size_t(0));
  return cudaSuccess;
}

inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *event = emulated_copies.size();
  return cudaSuccess;
}

inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  __arrive(*event);
  return cudaSuccess;
}

inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) {
    return emulated_last_error = cudaErrorInvalidValue;
  }
  ::peer::test::play_grid({config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes},
                          [&] { kernel(arguments...); });
  return cudaSuccess;
}
