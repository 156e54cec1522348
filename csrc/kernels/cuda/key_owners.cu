// Which row and which column of the keys every retrieval took: see KeyOwners in kernels.h.
//
// One thread  one retrieved expert
// Traffic     24 bytes each
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "kernels/cuda/kernels.h"

namespace peer::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void key_owners_kernel(KeyOwners pass) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pass.retrievals * pass.k) {
    return;
  }
  const int64_t id = pass.indices[i];
  if (id < 0 || id >= pass.experts) {
    printf("peer: index %lld at position %lld of indices is out of range for %lld experts\n",
           (long long)(id), (long long)(i), (long long)(pass.experts));
    __trap();
  }
  const int64_t head = i / pass.k % pass.heads;
  const int64_t row = id / pass.columns;
  pass.row_owners[i] = head * pass.row_head_stride + row;
  pass.column_owners[i] = head * pass.column_head_stride + (id - row * pass.columns);
}

}  // namespace

void find_key_owners(const KeyOwners& pass, const Context& context) {
  const int64_t blocks = (pass.retrievals * pass.k + kThreads - 1) / kThreads;
  launch(key_owners_kernel, {blocks, kThreads}, context.stream, pass);
}

}  // namespace peer::cuda
