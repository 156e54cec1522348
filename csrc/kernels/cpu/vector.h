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

static inline Vector<float> load(const BFloat16* source) {
  Bits16 bits;
  std::memcpy(&bits, source, sizeof(bits));
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, Bits32) << 16);
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

static inline void store(BFloat16* target, Vector<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 is_nan =
      bit_cast<Bits32>(v != v);  // all ones where NaN; rounding could turn a NaN into an infinity
  const Bits16 narrow = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Bits16);
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

// store past the caches. The address must be aligned to the size of the stored vector. These stores
// are ordered with others only after fence_nontemporal_stores().
template <class Element>
static inline void store_nontemporal(Element* target, Vector<accumulation_t<Element>> v) {
  Element stored[kLanes<accumulation_t<Element>>];
  store(stored, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(stored) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bit_cast<__m512i>(stored));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(stored) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), bit_cast<__m256i>(stored));
    return;
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(stored) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), bit_cast<__m128i>(stored));
    return;
  }
#endif
  std::memcpy(target, stored, sizeof(stored));
}

static inline void fence_nontemporal_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The last, incomplete vector of a row: missing lanes are read as zero and not written.

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
