// Stochastic rounding to 16-bit floats.
//
// A value v between the neighbours a < v < b of the narrow type becomes b with probability
// (v - a) / (b - a), otherwise a. Its expectation is v. So an update far below half a unit in the
// last place, which rounding to nearest always drops, takes effect on average.
//
// bfloat16   The upper half of a float. Adding u, uniform in [0, 2^16), to the 16 bits that are
//            dropped, d, carries into the upper half in d of 2^16 cases.
// half       If the result is normal, |v| >= 2^-14, as bfloat16 with the upper 13 of the 16 bits.
//            Below, the grid is fixed: t = |v|·2^24 is rounded to an integer, up if
//            u·2^-16 < t - floor(t). The probability is therefore t - floor(t), rounded up to a
//            multiple of 2^-16: a subnormal result is on average at most 2^-40 too large.
//
// Values that the type holds are not changed, including infinities and NaN. A value beyond the
// largest finite number has infinity as its upper neighbour, as in rounding to nearest. The
// arithmetic is exact or on integers, so every capability has the same bits.
//
// One 32-bit word gives the bits of two columns: see random_bits.h.
#pragma once

#include <bit>
#include <type_traits>

#include "kernels/cpu/vector.h"
#include "kernels/random_bits.h"

namespace peer::cpu::PEER_CAPABILITY {

// 16 random bits for each of 2·kLanes places of a row, in the lower halves of lanes.
class RandomBits {
 public:
  // place: of the first, even.
  RandomBits(uint64_t row_key, int64_t place) {
    // Word place/2 + i of the key is word i of a key that is place/2 steps further in the Weyl
    // sequence. So the numbers of the lanes are constants.
    const uint32_t start = uint32_t(row_key) + uint32_t(place / 2) * kWeylStep;
    Bits32 lanes;
    for (int i = 0; i < kLanes<float>; ++i) {
      lanes[i] = i;
    }
    words_ = random_word((row_key >> 32 << 32) | start, lanes);
  }

  Bits32 first() const { return half(0); }
  Bits32 second() const { return half(1); }

 private:
  // A word's lower half, the bits of the even place, comes first in memory.
  static_assert(std::endian::native == std::endian::little);
  Bits32 half(int i) const {
    Bits16 halves[2];
    std::memcpy(halves, &words_, sizeof(words_));
    return widen(halves[i]);
  }

  Bits32 words_;
};

static inline Bits32 round_to_half(Vector<float> v, Bits32 random) {
  using Int32 = VectorOf<int32_t, kLanes<float>>::type;
  constexpr uint32_t least_normal = 0x38800000u;
  constexpr uint32_t least_overflow = 0x47800000u;  // 65536
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 magnitude = bits & 0x7fffffffu;
  Bits32 result = (magnitude - 0x38000000u + (random >> 3)) >> 13;
  if (lane_bits(Bits32(magnitude - least_normal >= least_overflow - least_normal)) != 0) {
    const Bits32 is_subnormal = Bits32(magnitude < least_normal);
    const Vector<float> scaled = bit_cast<Vector<float>>(magnitude & is_subnormal) * 0x1p24f;
    const Int32 floor = __builtin_convertvector(scaled, Int32);
    const Vector<float> fraction = scaled - __builtin_convertvector(floor, Vector<float>);
    const Vector<float> uniform =
        __builtin_convertvector(bit_cast<Int32>(random), Vector<float>) * 0x1p-16f;
    const Bits32 subnormal = bit_cast<Bits32>(floor) + (Bits32(uniform < fraction) & 1u);
    result = select(is_subnormal, subnormal, result);
    result = select(Bits32(magnitude >= least_overflow), Bits32{} + 0x7c00u, result);
    result = select(Bits32(magnitude > 0x7f800000u), Bits32{} + 0x7e00u, result);
  }
  return result | ((bits >> 16) & 0x8000u);
}

template <class Element>
static inline Bits32 round_stochastically(Vector<float> v, Bits32 random) {
  static_assert(sizeof(Element) == 2);
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return round_to_bfloat16(v, random);
  } else {
    return round_to_half(v, random);
  }
}

template <class Element>
static inline void store_two_stochastically(Element* target,
                                            TwoVectors<float> v,
                                            const RandomBits& random) {
  store_lower_halves(&target->bits, round_stochastically<Element>(v.first, random.first()),
                     round_stochastically<Element>(v.second, random.second()));
}

}  // namespace peer::cpu::PEER_CAPABILITY
