// Elements of tables and inputs: widening them to the accumulation type, narrowing sums to the
// stored type, and vectors of them. A vector is 16 bytes, the widest memory access of a lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cuda/launch.h"

namespace peer::cuda {

// The number of elements in a vector.
template <class Element>
constexpr int kVecSize = 16 / int(sizeof(Element));

template <class Element>
__device__ accumulation_t<Element> widen(Element element) {
  return element;
}

template <>
__device__ inline float widen(BFloat16 element) {
  const uint32_t bits = uint32_t(element.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <>
__device__ inline float widen(Half element) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element.bits));
  return value;
#else
  const uint32_t sign = uint32_t(element.bits & 0x8000u) << 16;
  const uint32_t magnitude = element.bits & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // The exponent of the shifted bits is 112 too small, also for subnormals.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof(value));
  value *= 0x1p112f;
  return sign ? -value : value;
#endif
}

// Rounds to nearest, ties to even.
template <class Element>
__device__ Element narrow(accumulation_t<Element> value) {
  return value;
}

template <>
__device__ inline BFloat16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

template <>
__device__ inline Half narrow(float value) {
#ifdef __CUDA_ARCH__
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (value != value) {
    return {uint16_t(0x7e00u)};
  }
  if (magnitude >= 0x47800000u) {  // at least 65536
    return {uint16_t(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves a multiple of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, sizeof(absolute));
    absolute += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &absolute, sizeof(shifted));
    return {uint16_t(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
  return {uint16_t(sign | rounded >> 13)};
#endif
}

// Consecutive elements. One instruction moves them if their size is a power of two of at most 16
// bytes.
template <class Element, int count>
struct alignas(count * sizeof(Element) <= 16 ? count * sizeof(Element) : 16) Vec {
  Element values[count];
};

// The same elements as 32-bit words. 16-bit elements are extracted where they are used: extracted
// earlier, they would fill twice as many registers while loads are in flight.
template <class Element, int size = kVecSize<Element>>
struct alignas(Vec<Element, size>) [[gnu::may_alias]] RawVec {
  uint32_t words[size * sizeof(Element) / sizeof(uint32_t)];
};

template <class Element, int size>
__device__ RawVec<Element, size> to_raw(const Vec<Element, size>& vec) {
  RawVec<Element, size> raw;
  std::memcpy(&raw, &vec, sizeof(raw));
  return raw;
}

template <class Element, int size>
__device__ Vec<Element, size> from_raw(const RawVec<Element, size>& raw) {
  Vec<Element, size> vec;
  std::memcpy(&vec, &raw, sizeof(vec));
  return vec;
}

// Whether rows can be read and written in whole vectors: every row starts at a multiple of the
// vector's size and holds a whole number of vectors.
template <int vec_size, class Element>
bool is_vectorizable(const Element* data, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Vec<Element, vec_size>) == 0 &&
         stride % vec_size == 0 && width % vec_size == 0;
}

template <class Element>
bool is_vectorizable(const Element* data, int64_t stride, int64_t width) {
  return is_vectorizable<kVecSize<Element>>(data, stride, width);
}

}  // namespace peer::cuda
