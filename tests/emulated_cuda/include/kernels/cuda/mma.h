// Stands in for the kernels' header of the same name, whose instruction only GPUs have. The lanes
// exchange their elements of A and B, and each lane computes its own sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cuda/elements.h"

namespace peer::cuda {

template <class Element>
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const auto at = [](const unsigned char* words, unsigned half) {
    Element element;
    std::memcpy(&element, words + 2 * half, sizeof(element));
    return widen(element);
  };
  // Word w of lane 4g + q holds columns 2q + 8·(w / 2) and 2q + 8·(w / 2) + 1 of row g + 8·(w % 2).
  float rows[2][16];
  const unsigned char* all = ::peer::test::exchange_in_warp(a, sizeof(a));
  for (unsigned q = 0; q < 4; ++q) {
    for (unsigned word = 0; word < 4; ++word) {
      for (unsigned half = 0; half < 2; ++half) {
        rows[word % 2][2 * q + 8 * (word / 2) + half] =
            at(all + 16 * (4 * group + q) + 4 * word, half);
      }
    }
  }
  // Word w of lane 4g + q holds rows 2q + 8·w and 2q + 8·w + 1 of column g.
  all = ::peer::test::exchange_in_warp(b, sizeof(b));
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * quarter + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      sums[i] += rows[i / 2][k] * at(all + 16 * (4 * column + k % 8 / 2) + 4 * (k / 8), k % 2);
    }
  }
}

}  // namespace peer::cuda
