// Stochastic rounding to 16-bit floats.
//
// A value v between the neighbours a < v < b of the narrow type becomes b with probability
// (v - a) / (b - a), otherwise a. Its expectation is v. So an update far below half a unit in the
// last place, which rounding to nearest always drops, takes effect on average.
//
// bfloat16   The upper half of a float. Adding u, uniform in [0, 2^16), to the 16 bits that are
//            dropped, d, carries into the upper half in d of 2^16 cases.
// half       If the result is normal, |v| >= 2^-14, as bfloat16 with 13 bits. Below, the grid is
//            fixed: t = |v|·2^24 is rounded to an integer, up if u < t - floor(t) for u uniform
//            among the multiples of 2^-24 in [0, 1). All steps are exact, except that fractions
//            below 2^-24 count as 2^-24.
//
// Values that the type holds are not changed, including infinities and NaN. A value beyond the
// largest finite number has infinity as its upper neighbour, as in rounding to nearest. The
// arithmetic is exact or on integers, so every capability has the same bits.
#pragma once

#include "kernels/cpu/vector.h"
#include "kernels/random_bits.h"

namespace peer::cpu::PEER_CAPABILITY {

// The random words of the columns from `column` on. They are the words of columns 0, 1, ... of a
// key that is `column` places further in the Weyl sequence, so that the columns of lanes are
// constants.
static inline Bits32 random_words(uint64_t row_key, int64_t column) {
  Bits32 lanes;
  for (int i = 0; i < kLanes<float>; ++i) {
    lanes[i] = i;
  }
  const uint32_t place = uint32_t(row_key) + uint32_t(column) * kWeylStep;
  return random_word((row_key >> 32 << 32) | place, lanes);
}

static inline Bits32 select(Bits32 mask, Bits32 yes, Bits32 no) {
  return (yes & mask) | (no & ~mask);
}

static inline void store_stochastic(BFloat16* target, Vector<float> v, Bits32 random) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 is_nan = bit_cast<Bits32>(v != v);
  const Bits32 rounded = (bits + (random >> 16)) >> 16;
  const Bits16 narrow =
      __builtin_convertvector(select(is_nan, Bits32{} + 0x7fc0u, rounded), Bits16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

static inline void store_stochastic(Half* target, Vector<float> v, Bits32 random) {
  using Int32 = VectorOf<int32_t, kLanes<float>>::type;
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 sign = (bits >> 16) & 0x8000u;
  const Bits32 magnitude = bits & 0x7fffffffu;
  const Bits32 is_nan = Bits32(magnitude > 0x7f800000u);
  const Bits32 overflows = Bits32(magnitude >= 0x47800000u);  // 65536 and above, infinity
  const Bits32 is_subnormal = Bits32(magnitude < 0x38800000u);

  const Bits32 normal = (magnitude - 0x38000000u + (random >> 19)) >> 13;

  const Vector<float> scaled = bit_cast<Vector<float>>(magnitude & is_subnormal) * 0x1p24f;
  const Int32 floor = __builtin_convertvector(scaled, Int32);
  const Vector<float> fraction = scaled - __builtin_convertvector(floor, Vector<float>);
  const Vector<float> uniform =
      __builtin_convertvector(bit_cast<Int32>(random >> 8), Vector<float>) * 0x1p-24f;
  const Bits32 subnormal = bit_cast<Bits32>(floor) + (Bits32(uniform < fraction) & 1u);

  Bits32 result = select(is_subnormal, subnormal, normal);
  result = select(overflows, Bits32{} + 0x7c00u, result);
  result = select(is_nan, Bits32{} + 0x7e00u, result);
  const Bits16 narrow = __builtin_convertvector(result | sign, Bits16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

// Types as wide as the accumulation type are not rounded.
static inline void store_stochastic(float* target, Vector<float> v, Bits32) { store(target, v); }
static inline void store_stochastic(double* target, Vector<double> v, Bits32) { store(target, v); }

template <class Element>
static inline void store_first_stochastic(Element* target,
                                          Vector<accumulation_t<Element>> v,
                                          Bits32 random,
                                          int64_t count) {
  Element padded[kLanes<accumulation_t<Element>>];
  store_stochastic(padded, v, random);
  std::memcpy(target, padded, count * sizeof(Element));
}

}  // namespace peer::cpu::PEER_CAPABILITY
