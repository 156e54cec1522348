// How kernels are started, and what the code that starts them knows of the device.
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

// Where a pass runs, and memory for what lives as long as it does: device memory that may be given
// back as soon as the work on the stream has been queued, as Torch's allocator allows.
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
    cudaGetLastError();  // clears it: CUB and Torch would report it of their own next call
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

// What a block may have of dynamic shared memory.
inline int64_t max_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

struct LaunchShape {
  int64_t blocks;
  int threads;               // of a block: whole warps
  int64_t shared_bytes = 0;  // of dynamic shared memory, the only kind used
};

// Starts kernel(arguments...) on the stream; nothing where there are no blocks. Every launch goes
// through here, so that another runtime can take the place of CUDA's.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...),
            const LaunchShape& shape,
            cudaStream_t stream,
            Arguments&&... arguments) {
  if (shape.blocks == 0) {
    return;
  }
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
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
