// A vector of accumulators, as wide as the capability that this file is compiled for. It uses the
// compiler's vector extension: arithmetic, comparison and ?: work lane by lane. So kernels are
// written once for all capabilities.
//
// Only for the sources that are compiled once per capability. Everything is static, for the reason
// given in capability.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/common.h"
#include "kernels/cpu/capability.h"

namespace peer::cpu::PEER_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Lane, int lanes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(lanes * sizeof(Lane))));
};

template <class Real>
constexpr int kLanes = kVectorBytes / int(sizeof(Real));

template <class Real>
using Vector = typename VectorOf<Real, kLanes<Real>>::type;

using Bits16 = VectorOf<uint16_t, kLanes<float>>::type;
using Bits32 = VectorOf<uint32_t, kLanes<float>>::type;

template <class To, class From>
static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// load: kLanes elements from any address, widened to the accumulation type.

static inline Vector<float> load(const float* source) {
  Vector<float> v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

static inline Vector<double> load(const double* source) {
  Vector<double> v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

// By one instruction. GCC 12 widens a vector half by half, which takes four.
static inline Bits32 widen(Bits16 bits) {
#if defined(__AVX512F__)
  return bit_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<Bits32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, Bits32);
#endif
}

static inline Vector<float> load(const BFloat16* source) {
  Bits16 bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bit_cast<Vector<float>>(widen(bits) << 16);
}

static inline Vector<float> load(const Half* source) {
  Bits16 bits;
  std::memcpy(&bits, source, sizeof(bits));
#if defined(__AVX512F__)
  return bit_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vector<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // Exponent and mantissa move to their places in a float; multiplying by 2^112 corrects the
  // exponent's bias, subnormals included. Infinity and NaN (exponent all ones) would stay finite,
  // so they get the float's full exponent.
  const Bits32 wide = __builtin_convertvector(bits, Bits32);
  const Bits32 magnitude = wide & 0x7fffu;
  const Vector<float> scaled = bit_cast<Vector<float>>(magnitude << 13) * 0x1p112f;
  const Bits32 special = (magnitude >= 0x7c00u) & 0x7f800000u;
  return bit_cast<Vector<float>>(bit_cast<Bits32>(scaled) | special | ((wide & 0x8000u) << 16));
#endif
}

// store: kLanes elements, rounded to nearest even.

static inline void store(float* target, Vector<float> v) { std::memcpy(target, &v, sizeof(v)); }

static inline void store(double* target, Vector<double> v) { std::memcpy(target, &v, sizeof(v)); }

// Masks, the results of comparisons: all ones or zero in every lane.

// One bit per lane. Mask: a vector of 32-bit or 64-bit integers.
template <class Mask>
static inline uint64_t lane_bits(Mask mask) {
  constexpr bool is_32_bit = sizeof(mask[0]) == 4;
#if defined(__AVX512F__)
  if constexpr (is_32_bit) {
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  } else {
    return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
  }
#elif defined(__AVX2__)
  if constexpr (is_32_bit) {
    return uint32_t(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  } else {
    return uint32_t(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
  }
#elif defined(__SSE2__)
  if constexpr (is_32_bit) {
    return uint32_t(_mm_movemask_ps(bit_cast<__m128>(mask)));
  } else {
    return uint32_t(_mm_movemask_pd(bit_cast<__m128d>(mask)));
  }
#else
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) {
    bits |= uint64_t(mask[i] != 0) << i;
  }
  return bits;
#endif
}

static inline Bits32 select(Bits32 mask, Bits32 yes, Bits32 no) {
  return (yes & mask) | (no & ~mask);
}

// The bits of a bfloat16: the upper half of those of v plus what rounds it. The sum of a NaN could
// be an infinity.
static inline Bits32 round_to_bfloat16(Vector<float> v, Bits32 rounding) {
  return select(bit_cast<Bits32>(v != v), Bits32{} + 0x7fc0u,
                (bit_cast<Bits32>(v) + rounding) >> 16);
}

static inline Bits32 round_to_bfloat16(Vector<float> v) {
  return round_to_bfloat16(v, ((bit_cast<Bits32>(v) >> 16) & 1u) + 0x7fffu);
}

static inline void store(BFloat16* target, Vector<float> v) {
  const Bits16 narrow = __builtin_convertvector(round_to_bfloat16(v), Bits16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

static inline void store(Half* target, Vector<float> v) {
#if defined(__AVX512F__)
  const __m256i narrow =
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &narrow, sizeof(narrow));
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  // The result must be rounded once. A normal result is rounded on integers. A subnormal result is
  // rounded by an addition of floats: 0.5 has a last mantissa bit of the weight of the result's
  // last bit, so adding it rounds to nearest even in the right place.
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 sign = (bits >> 16) & 0x8000u;
  const Bits32 magnitude = bits & 0x7fffffffu;
  const Bits32 is_nan = Bits32(magnitude > 0x7f800000u);
  const Bits32 overflows = Bits32(magnitude >= 0x477ff000u);  // 65520 and above round to infinity
  const Bits32 is_subnormal = Bits32(magnitude < 0x38800000u);
  const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 subnormal =
      bit_cast<Bits32>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Bits32 result = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  result = (result & ~overflows) | (overflows & 0x7c00u);
  result = (result & ~is_nan) | (is_nan & 0x7e00u);
  const Bits16 narrow = __builtin_convertvector(result | sign, Bits16);
  std::memcpy(target, &narrow, sizeof(narrow));
#endif
}

// Two vectors side by side, 2·kLanes elements. A vector of 16-bit elements is then read and written
// whole, which takes fewer instructions than its halves.
template <class Real>
struct TwoVectors {
  Vector<Real> first, second;

  friend TwoVectors operator+(TwoVectors a, TwoVectors b) {
    return {a.first + b.first, a.second + b.second};
  }
  friend TwoVectors operator-(TwoVectors a, TwoVectors b) {
    return {a.first - b.first, a.second - b.second};
  }
  friend TwoVectors operator*(TwoVectors a, TwoVectors b) {
    return {a.first * b.first, a.second * b.second};
  }
  friend TwoVectors operator*(Real factor, TwoVectors v) {
    return {factor * v.first, factor * v.second};
  }
};

template <class Element>
static inline TwoVectors<accumulation_t<Element>> load_two(const Element* source) {
  return {load(source), load(source + kLanes<accumulation_t<Element>>)};
}

// The lower halves of the lanes, which are all below 2^16, in order.
static inline void store_lower_halves(uint16_t* target, Bits32 first, Bits32 second) {
#if defined(__AVX512BW__)
  const __m512i packed = _mm512_packus_epi32(bit_cast<__m512i>(first), bit_cast<__m512i>(second));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i narrow = _mm512_maskz_permutexvar_epi64(0xff, order, packed);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(first), bit_cast<__m256i>(second));
  const __m256i narrow = _mm256_permute4x64_epi64(packed, 0b11011000);
#else
  const Bits16 narrow[2] = {__builtin_convertvector(first, Bits16),
                            __builtin_convertvector(second, Bits16)};
#endif
  std::memcpy(target, &narrow, sizeof(narrow));
}

template <class Element>
static inline void store_two(Element* target, TwoVectors<accumulation_t<Element>> v) {
  store(target, v.first);
  store(target + kLanes<accumulation_t<Element>>, v.second);
}

static inline void store_two(BFloat16* target, TwoVectors<float> v) {
  store_lower_halves(&target->bits, round_to_bfloat16(v.first), round_to_bfloat16(v.second));
}

// store_two past the caches. The address must be aligned to kVectorBytes. These stores are ordered
// with others only after fence_nontemporal_stores().
template <class Element>
static inline void store_nontemporal(Element* target, TwoVectors<accumulation_t<Element>> v) {
  Element stored[2 * kLanes<accumulation_t<Element>>];
  store_two(stored, v);
  const char* const from = reinterpret_cast<const char*>(stored);
  char* const to = reinterpret_cast<char*>(target);
  for (size_t byte = 0; byte < sizeof(stored); byte += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + byte), _mm512_loadu_si512(from + byte));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + byte),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + byte)));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + byte),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + byte)));
#else
    std::memcpy(to + byte, from + byte, kVectorBytes);
#endif
  }
}

static inline void fence_nontemporal_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The last, incomplete vectors of a row: missing lanes are read as zero and not written.

template <class Element>
static inline Vector<accumulation_t<Element>> load_first(const Element* source, int64_t count) {
  Element padded[kLanes<accumulation_t<Element>>] = {};
  std::memcpy(padded, source, count * sizeof(Element));
  return load(padded);
}

template <class Element>
static inline void store_first(Element* target, Vector<accumulation_t<Element>> v, int64_t count) {
  Element padded[kLanes<accumulation_t<Element>>];
  store(padded, v);
  std::memcpy(target, padded, count * sizeof(Element));
}

template <class Element>
static inline TwoVectors<accumulation_t<Element>> load_first_of_two(const Element* source,
                                                                    int64_t count) {
  Element padded[2 * kLanes<accumulation_t<Element>>] = {};
  std::memcpy(padded, source, count * sizeof(Element));
  return load_two(padded);
}

// Prefetches the lines of some bytes.
template <bool for_writing = false>
static inline void prefetch_bytes(const void* from, int64_t bytes) {
  constexpr int64_t line = 64;
  for (int64_t byte = 0; byte < bytes; byte += line) {
    __builtin_prefetch(static_cast<const char*>(from) + byte, for_writing);
  }
}

template <class Real>
static inline Real reduce_add(Vector<Real> v) {
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<Real> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] += lanes[i + width];
    }
  }
  return lanes[0];
}

// Lane i of the result is lane i + width of v, modulo the number of lanes.
template <size_t width, class V, size_t... i>
static inline V rotate(V v, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i);
#if defined(__clang__)
  return __builtin_shufflevector(v, v, int((i + width) % lanes)...);
#else
  return __builtin_shuffle(v, V{(i + width) % lanes...});
#endif
}

// The two halves of the sequence a0 b0 a1 b1 ...
template <class V, class Indices, size_t... i>
static inline void interleave(V a, V b, V& low, V& high, std::index_sequence<i...>) {
  constexpr size_t lanes = sizeof...(i);
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, int(i / 2 + i % 2 * lanes)...);
  high = __builtin_shufflevector(a, b, int(lanes / 2 + i / 2 + i % 2 * lanes)...);
#else
  low = __builtin_shuffle(a, b, Indices{(i / 2 + i % 2 * lanes)...});
  high = __builtin_shuffle(a, b, Indices{(lanes / 2 + i / 2 + i % 2 * lanes)...});
#endif
}

// Transposes kLanes rows of kLanes columns. Each round interleaves row i with row i + kLanes / 2,
// which moves one bit of the column's index into the row's index.
template <class Real>
static inline void transpose(Vector<Real> (&rows)[kLanes<Real>]) {
  constexpr int lanes = kLanes<Real>;
  using Index = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  for (int round = 1; round < lanes; round *= 2) {
    Vector<Real> next[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      interleave<Vector<Real>, typename VectorOf<Index, lanes>::type>(
          rows[i], rows[i + lanes / 2], next[2 * i], next[2 * i + 1],
          std::make_index_sequence<lanes>{});
    }
    std::memcpy(rows, next, sizeof(next));
  }
}

}  // namespace peer::cpu::PEER_CAPABILITY
