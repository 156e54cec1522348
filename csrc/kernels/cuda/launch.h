// How kernels are launched.
//
// Every function that takes a Context takes device pointers, queues work on the context's stream
// and returns. Only functions that say so wait for the stream. No kernel adds floats atomically,
// and the order of every sum depends on shapes alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace peer::cuda {

constexpr int kWarp = 32;

// A stream, and an allocator of device memory. Memory may be freed as soon as the work that uses it
// has been queued on the stream, as with Torch's allocator.
struct Context {
  cudaStream_t stream;
  std::function<std::shared_ptr<void>(int64_t bytes)> allocate;

  template <class Item>
  std::shared_ptr<Item> array(int64_t count) const {
    return std::static_pointer_cast<Item>(allocate(count * int64_t(sizeof(Item))));
  }
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears the error, which CUB and Torch would report as their own
    throw std::runtime_error(std::string("peer: CUDA: ") + what + ": " +
                             cudaGetErrorString(status));
  }
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "no device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "no attributes of the device");
  return value;
}

inline int sm_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The most dynamic shared memory of a block.
inline int64_t max_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

struct LaunchShape {
  int64_t blocks;
  int threads;               // per block, a multiple of kWarp
  int64_t shared_bytes = 0;  // dynamic shared memory per block; kernels use no static one
};

// Launches kernel(arguments...) on the stream, or nothing if there are no blocks. Every launch goes
// through this function, so that another runtime can replace CUDA's.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...),
            const LaunchShape& shape,
            cudaStream_t stream,
            Arguments&&... arguments) {
  if (shape.blocks == 0) {
    return;
  }
  constexpr int64_t kDefaultSharedBytes = 48 << 10;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)),
        "too much shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...),
        "a kernel did not start");
}

}  // namespace peer::cuda

// A block's dynamic shared memory, aligned for 16-byte accesses.
extern __shared__ __align__(16) unsigned char peer_shared_memory[];
