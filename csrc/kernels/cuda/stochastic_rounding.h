// Stochastic rounding to 16-bit floats, one value at a time. kernels/cpu/stochastic_rounding.h
// explains the arithmetic; the results have the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common.h"

namespace peer::cuda {

// Element types that are as wide as the accumulation type are not rounded.
template <class Element>
PEER_HOST_DEVICE inline Element narrow_stochastically(accumulation_t<Element> value, uint32_t) {
  return value;
}

template <>
PEER_HOST_DEVICE inline BFloat16 narrow_stochastically<BFloat16>(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + (random >> 16)) >> 16;
  return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

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
    rounded = (magnitude - 0x38000000u + (random >> 19)) >> 13;
  } else {
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof(absolute));
    const float scaled = absolute * 0x1p24f;
    const uint32_t floor = uint32_t(scaled);
    const float uniform = float(random >> 8) * 0x1p-24f;
    rounded = floor + uint32_t(uniform < scaled - float(floor));
  }
  return {uint16_t(sign | rounded)};
}

}  // namespace peer::cuda
