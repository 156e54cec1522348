// Rows that a kernel is given by the caller, before it reads or writes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace peer::cuda {

// Ends the kernel with an error if the row at a position of a list is not in [0, rows): elsewhere,
// reading would be silent corruption.
__device__ inline void check_row(int64_t row, int64_t position, int64_t rows) {
  if (row < 0 || row >= rows) {
    printf("peer: index %lld at position %lld is out of range for %lld rows\n", (long long)(row),
           (long long)(position), (long long)(rows));
    __trap();
  }
}

}  // namespace peer::cuda
