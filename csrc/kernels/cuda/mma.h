// One tensor-core instruction, executed by all lanes of a warp:  sums += A·B.
//
// A (16, 16) and B (16, 8) hold BFloat16 or Half, two elements per word, the element of the smaller
// index in the lower half. sums (16, 8) holds float. A lane holds, with g = lane / 4, q = lane % 4,
//
//   a[0]  A[g    ][2q, 2q + 1]      a[2]  A[g    ][2q + 8, 2q + 9]
//   a[1]  A[g + 8][2q, 2q + 1]      a[3]  A[g + 8][2q + 8, 2q + 9]
//   b[0]  B[2q, 2q + 1][g]          b[1]  B[2q + 8, 2q + 9][g]
//   sums[0], sums[1]  of row g, columns 2q and 2q + 1;      sums[2], sums[3]  of row g + 8
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common.h"

namespace peer::cuda {

template <class Element>
__device__ void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_m16n8k16<BFloat16>(float (&sums)[4],
                                              const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_m16n8k16<Half>(float (&sums)[4],
                                          const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace peer::cuda
