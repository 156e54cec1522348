// Stochastic rounding to 16-bit floats. kernels/cpu/stochastic_rounding.h explains the arithmetic;
// the results have the same bits.
//
// Two neighbouring columns share a random word. The column at an even place of the row takes the
// lower half, the next one the upper half. Every part of a row starts at an even place.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cuda/elements.h"
#include "kernels/random_bits.h"

namespace peer::cuda {

// The random bits of a place.
PEER_HOST_DEVICE inline uint32_t random_bits(uint64_t row_key, uint32_t place) {
  const uint32_t word = random_word(row_key, place / 2);
  return place % 2 == 0 ? word & 0xffffu : word >> 16;
}

// random: 16 bits. Element types that are as wide as the accumulation type are not rounded.
template <class Element>
PEER_HOST_DEVICE inline Element narrow_stochastically(accumulation_t<Element> value, uint32_t) {
  return value;
}

template <>
PEER_HOST_DEVICE inline BFloat16 narrow_stochastically<BFloat16>(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {uint16_t(value != value ? 0x7fc0u : (bits + random) >> 16)};
}

// The fraction of a subnormal result is compared with a multiple of 2^-16. So the probability of
// rounding up is too large by at most 2^-16, and the bias is at most 2^-16 units in the last place.
template <>
PEER_HOST_DEVICE inline Half narrow_stochastically<Half>(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // at least 65536, and infinity
    rounded = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // a normal half
    rounded = (magnitude - 0x38000000u + (random >> 3)) >> 13;
  } else {
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof(absolute));
    const float scaled = absolute * 0x1p24f;
    const uint32_t floor = uint32_t(scaled);
    rounded = floor + uint32_t(float(random) * 0x1p-16f < scaled - float(floor));
  }
  return {uint16_t(sign | rounded)};
}

// Rounds a vector whose first column is at an even place. NaN is rare, so each vector tests for it
// once.
template <class Element, int vec_size>
__device__ RawVec<Element, vec_size> narrow_vec_stochastically(
    const Vec<accumulation_t<Element>, vec_size>& wide,
    uint64_t row_key,
    uint32_t place) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    RawVec<BFloat16, vec_size> result;
    bool has_nan = false;
#pragma unroll
    for (int w = 0; w < vec_size / 2; ++w) {
      const uint32_t random = random_word(row_key, place / 2 + w);
      uint32_t bits[2];
      std::memcpy(bits, wide.values + 2 * w, sizeof(bits));
      bits[0] += random & 0xffffu;
      bits[1] += random >> 16;
      const float first = wide.values[2 * w], second = wide.values[2 * w + 1];
      has_nan |= (first != first) | (second != second);
      result.words[w] = bits[0] >> 16 | (bits[1] & 0xffff0000u);
    }
    if (has_nan) {
#pragma unroll
      for (int w = 0; w < vec_size / 2; ++w) {
        const float first = wide.values[2 * w], second = wide.values[2 * w + 1];
        result.words[w] =
            first != first ? (result.words[w] & 0xffff0000u) | 0x7fc0u : result.words[w];
        result.words[w] =
            second != second ? (result.words[w] & 0xffffu) | 0x7fc00000u : result.words[w];
      }
    }
    return result;
  } else {
    Vec<Element, vec_size> result;
#pragma unroll
    for (int i = 0; i < vec_size; ++i) {
      result.values[i] =
          narrow_stochastically<Element>(wide.values[i], random_bits(row_key, place + i));
    }
    return to_raw(result);
  }
}

}  // namespace peer::cuda
