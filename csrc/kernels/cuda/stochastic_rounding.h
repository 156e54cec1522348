// Stochastic rounding to 16-bit floats. kernels/cpu/stochastic_rounding.h explains the arithmetic;
// the results have the same bits.
//
// Two neighbouring columns share a random word. The column at an even place of the row takes the
// lower half, the next one the upper half. Every part of a row starts at an even place.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

constexpr uint32_t kNanBits = 0x7fc0;  // of bfloat16

template <>
PEER_HOST_DEVICE inline BFloat16 narrow_stochastically<BFloat16>(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {uint16_t(value != value ? kNanBits : (bits + random) >> 16)};
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

// Rounds two neighbouring columns, the first at an even place, by one random word. NaN becomes
// something else if Element is BFloat16.
template <class Element>
PEER_HOST_DEVICE inline uint32_t narrow_two_stochastically(const float* values, uint32_t random) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    uint32_t bits[2];
    std::memcpy(bits, values, sizeof(bits));
    return (bits[0] + (random & 0xffffu)) >> 16 | ((bits[1] + (random >> 16)) & 0xffff0000u);
  } else {
    const uint32_t first = narrow_stochastically<Element>(values[0], random & 0xffffu).bits;
    const uint32_t second = narrow_stochastically<Element>(values[1], random >> 16).bits;
    return first | second << 16;
  }
}

// Rounds a vector whose first column is at an even place. NaN is rare, so a vector of bfloat16
// tests for it once.
template <class Element, int vec_size>
__device__ RawVec<Element, vec_size> narrow_vec_stochastically(const Vec<float, vec_size>& wide,
                                                               uint64_t row_key,
                                                               uint32_t place) {
  RawVec<Element, vec_size> result;
  bool has_nan = false;
#pragma unroll
  for (int w = 0; w < vec_size / 2; ++w) {
    const float* const two = wide.values + 2 * w;
    result.words[w] = narrow_two_stochastically<Element>(two, random_word(row_key, place / 2 + w));
    has_nan |= (two[0] != two[0]) | (two[1] != two[1]);
  }
  if (std::is_same_v<Element, BFloat16> && has_nan) {
#pragma unroll
    for (int w = 0; w < vec_size / 2; ++w) {
      const float* const two = wide.values + 2 * w;
      uint32_t& word = result.words[w];
      word = two[0] != two[0] ? (word & 0xffff0000u) | kNanBits : word;
      word = two[1] != two[1] ? (word & 0xffffu) | kNanBits << 16 : word;
    }
  }
  return result;
}

}  // namespace peer::cuda
