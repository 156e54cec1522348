// Stands in for CUDA's header: asynchronous copies to shared memory.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* target, const void* source, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  if ((size != 4 && size != 8 && size != 16) || address % size != 0) {
    throw std::logic_error("an asynchronous copy of a wrong size, or not aligned to it");
  }
  ::peer::test::cp_async(target, source, size);
}

inline void __pipeline_commit() { ::peer::test::end_batch_of_copies(); }

inline void __pipeline_wait_prior(size_t batches_left) {
  ::peer::test::wait_for_copies(batches_left);
}
