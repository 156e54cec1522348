// Rows cut into slices: a warp holds one slice of a row, two vectors per lane. A slice of the rows
// that are summed is 1 KiB.
//
// The vectors of a warp's lanes are adjacent. vec_size is the number of elements in a vector of the
// summed rows. Rows of other element types, such as those of a table, are cut at the same columns.
// Rows that are not vectorizable are cut at the same columns too, but accessed element by element:
// the assignment of columns to lanes does not depend on addresses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/common.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

constexpr int kVecsPerLane = 2;

template <int vec_size>
constexpr int kSliceColumns = kWarp * kVecsPerLane * vec_size;

constexpr int64_t count_slices(int64_t width, int slice_columns) {
  return (width + slice_columns - 1) / slice_columns;
}

// The first of the lane's columns in the slice that starts at slice_column.
template <int vec_size>
__device__ int64_t lane_column(int64_t slice_column) {
  return slice_column + lane() * vec_size;
}

// The distance of the lane's vector k from its first column.
template <int vec_size>
PEER_HOST_DEVICE constexpr int vec_offset(int k) {
  return k * kWarp * vec_size;
}

// A lane's part of a slice of a row.
template <class Element, int vec_size>
struct Slice {
  Element* data;  // at the lane's first column
  int columns;    // of the slice from there on; zero or negative beyond the row's end
  bool is_vectorizable;

  __device__ Element* vec_address(int k) const { return data + vec_offset<vec_size>(k); }
  // For vectorizable rows: a vector lies either in the row or beyond its end.
  __device__ bool has_vec(int k) const { return vec_offset<vec_size>(k) < columns; }
  __device__ bool has_element(int k, int i) const { return vec_offset<vec_size>(k) + i < columns; }
};

template <class Element, int vec_size>
struct SlicedRows {
  Element* data;
  int64_t stride;
  int64_t width;
  bool is_vectorizable;

  // The number of columns of a slice from a lane's first column on.
  __device__ int columns_from(int64_t lane_column) const {
    const int64_t rest = width - lane_column;
    return int(rest < kSliceColumns<vec_size> ? rest : kSliceColumns<vec_size>);
  }
  // row_offset: the distance of the row from the first one, in elements.
  __device__ Slice<Element, vec_size> slice_at(int64_t row_offset, int64_t lane_column) const {
    return {data + lane_column + row_offset, columns_from(lane_column), is_vectorizable};
  }
  __device__ Slice<Element, vec_size> slice(int64_t row, int64_t lane_column) const {
    return slice_at(row * stride, lane_column);
  }
};

template <int vec_size, class Element>
SlicedRows<Element, vec_size> slice_rows(Rows<Element> rows, int64_t width) {
  return {.data = rows.data,
          .stride = rows.stride,
          .width = width,
          .is_vectorizable = is_vectorizable<vec_size>(rows.data, rows.stride, width)};
}

// Calls body(k) for each of a lane's vectors.
template <class Body>
__device__ void for_each_vec(const Body& body) {
#pragma unroll
  for (int k = 0; k < kVecsPerLane; ++k) {
    body(k);
  }
}

// Calls body(i) for each element of a vector.
template <int vec_size, class Body>
__device__ void for_each_element(const Body& body) {
#pragma unroll
  for (int i = 0; i < vec_size; ++i) {
    body(i);
  }
}

// A lane's vectors of a slice, as stored.
template <class Element, int vec_size>
struct RawSliceValues {
  RawVec<Element, vec_size> vecs[kVecsPerLane];
};

// A lane's vectors of a slice, in the accumulation type.
template <class Real, int vec_size>
struct SliceValues {
  Vec<Real, vec_size> vecs[kVecsPerLane];
};

// Reads a lane's part of a slice; zeros beyond the row's end.
template <class Element, int vec_size, class Mutable = std::remove_const_t<Element>>
__device__ RawSliceValues<Mutable, vec_size> load(const Slice<Element, vec_size>& slice) {
  RawSliceValues<Mutable, vec_size> values = {};
  for_each_vec([&](int k) {
    if (!slice.is_vectorizable) {
      Vec<Mutable, vec_size> elements = {};
      for_each_element<vec_size>([&](int i) {
        if (slice.has_element(k, i)) {
          elements.values[i] = slice.vec_address(k)[i];
        }
      });
      values.vecs[k] = to_raw(elements);
    } else if (slice.has_vec(k)) {
      values.vecs[k] = *reinterpret_cast<const RawVec<Mutable, vec_size>*>(slice.vec_address(k));
    }
  });
  return values;
}

// How long written data stays in the L2 cache.
enum class CacheHint {
  none,
  evict_first,  // the data is not read again soon
};

// Writes a vector by accesses of 16 bytes, or of 8 bytes if its size is no multiple of 16.
template <CacheHint hint, class Element, int vec_size>
__device__ void write(Element* target, const RawVec<Element, vec_size>& values) {
  using Access = std::conditional_t<sizeof(values) % sizeof(uint4) == 0, uint4, uint2>;
  constexpr int count = sizeof(values) / sizeof(Access);
  Access parts[count];
  std::memcpy(parts, &values, sizeof(values));
#pragma unroll
  for (int i = 0; i < count; ++i) {
    Access* const place = reinterpret_cast<Access*>(target) + i;
    if constexpr (hint == CacheHint::evict_first) {
      __stcs(place, parts[i]);
    } else {
      *place = parts[i];
    }
  }
}

template <CacheHint hint = CacheHint::none, class Element, int vec_size>
__device__ void store_vec(const Slice<Element, vec_size>& slice,
                          int k,
                          const RawVec<Element, vec_size>& values) {
  if (!slice.is_vectorizable) {
    const Vec<Element, vec_size> elements = from_raw(values);
    for_each_element<vec_size>([&](int i) {
      if (slice.has_element(k, i)) {
        slice.vec_address(k)[i] = elements.values[i];
      }
    });
  } else if (slice.has_vec(k)) {
    write<hint>(slice.vec_address(k), values);
  }
}

template <class Element, int vec_size>
__device__ void store(const Slice<Element, vec_size>& slice,
                      const RawSliceValues<Element, vec_size>& values) {
  for_each_vec([&](int k) { store_vec(slice, k, values.vecs[k]); });
}

template <class Real, int vec_size>
__device__ void store(const Slice<Real, vec_size>& slice,
                      const SliceValues<Real, vec_size>& values) {
  for_each_vec([&](int k) { store_vec(slice, k, to_raw(values.vecs[k])); });
}

// Two elements in one word. GPUs since sm_80 convert both by one instruction.
template <class Element>
__device__ uint32_t narrow_two(float first, float second) {
  uint32_t word;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<Element, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
#else
  const Element two[] = {narrow<Element>(first), narrow<Element>(second)};
  std::memcpy(&word, two, sizeof(word));
#endif
  return word;
}

template <class Element, int vec_size>
__device__ RawVec<Element, vec_size> narrow_vec(
    const Vec<accumulation_t<Element>, vec_size>& wide) {
  if constexpr (sizeof(Element) == 2) {
    RawVec<Element, vec_size> result;
#pragma unroll
    for (int w = 0; w < vec_size / 2; ++w) {
      result.words[w] = narrow_two<Element>(wide.values[2 * w], wide.values[2 * w + 1]);
    }
    return result;
  } else {
    return to_raw(wide);
  }
}

template <class Element, int vec_size>
__device__ Vec<accumulation_t<Element>, vec_size> widen_vec(
    const RawVec<Element, vec_size>& values) {
  Vec<accumulation_t<Element>, vec_size> result;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    // One instruction per element, which compilers do not find by themselves.
#pragma unroll
    for (int w = 0; w < vec_size / 2; ++w) {
      const uint32_t halves[] = {values.words[w] << 16, values.words[w] & 0xffff0000u};
      std::memcpy(result.values + 2 * w, halves, sizeof(halves));
    }
  } else {
    const Vec<Element, vec_size> elements = from_raw(values);
    for_each_element<vec_size>([&](int i) { result.values[i] = widen(elements.values[i]); });
  }
  return result;
}

// Prefetches the cache line of an address into the L2 cache.
__device__ inline void prefetch_l2(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// Prefetches a slice into the L2 cache, one line per lane.
template <class Element, int vec_size>
__device__ void prefetch_l2(const Slice<Element, vec_size>& slice) {
  constexpr int elements_per_line = 128 / int(sizeof(Element));
  const int offset = lane() * (elements_per_line - vec_size);
  if (offset < slice.columns && lane() * elements_per_line < kSliceColumns<vec_size>) {
    prefetch_l2(slice.data + offset);
  }
}

}  // namespace peer::cuda
