// Stands in for CUDA's header: asynchronous copies to shared memory.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* target, const void* source, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  if ((size != 4 && size != 8 && size != 16) || address % size != 0) {
    throw std::logic_error("an asynchronous copy has a wrong size or alignment");
  }
  ::peer::test::cp_async(target, source, size);
}

inline void __pipeline_commit() { ::peer::test::cp_async_commit(); }

inline void __pipeline_wait_prior(size_t groups_in_flight) {
  ::peer::test::cp_async_wait(groups_in_flight);
}
