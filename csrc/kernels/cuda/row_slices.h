// Rows cut into slices: some lanes of a warp hold one slice of a row, some vectors per lane.
//
// The vectors of the lanes are adjacent. A vector is 16 bytes of the rows that are summed. Rows of
// other element types, such as those of a table, are cut at the same columns. Rows that are not
// vectorizable are cut at the same columns too, but accessed element by element: the assignment of
// columns to lanes does not depend on addresses.
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

// How a slice is assigned to lanes: `lanes` of a warp hold `vecs` vectors each, of `vec_size`
// elements. With 16 lanes, a warp holds two slices, of two rows.
template <int vec_size, int vecs, int lanes = kWarp>
struct SliceForm {
  static_assert(kWarp % lanes == 0);

  static constexpr int kVecElements = vec_size;
  static constexpr int kVecs = vecs;
  static constexpr int kLanes = lanes;
  static constexpr int kColumns = lanes * vecs * vec_size;

  static __device__ int lane_in_slice() { return lane() % lanes; }
  // The first of the lane's columns in the slice that starts at slice_column.
  static __device__ int64_t lane_column(int64_t slice_column) {
    return slice_column + lane_in_slice() * vec_size;
  }
  // The distance of the lane's vector k from its first column.
  PEER_HOST_DEVICE static constexpr int vec_offset(int k) { return k * lanes * vec_size; }
};

constexpr int64_t count_slices(int64_t width, int slice_columns) {
  return (width + slice_columns - 1) / slice_columns;
}

// A lane's part of a slice of a row.
template <class Element, class Form>
struct Slice {
  Element* data;  // at the lane's first column
  int columns;    // of the slice from there on; zero or negative beyond the row's end
  bool is_vectorizable;

  __device__ Element* vec_address(int k) const { return data + Form::vec_offset(k); }
  // For vectorizable rows: a vector lies either in the row or beyond its end.
  __device__ bool has_vec(int k) const { return Form::vec_offset(k) < columns; }
  __device__ bool has_element(int k, int i) const { return Form::vec_offset(k) + i < columns; }
};

template <class Element, class Form>
struct SlicedRows {
  Element* data;
  int64_t stride;
  int64_t width;
  bool is_vectorizable;

  // The number of columns of a slice from a column of it on.
  __device__ int columns_from(int64_t column) const {
    const int64_t rest = width - column;
    return int(rest < Form::kColumns ? rest : Form::kColumns);
  }
  // row_offset: the distance of the row from the first one, in elements.
  __device__ Slice<Element, Form> slice_at(int64_t row_offset, int64_t lane_column) const {
    return {data + lane_column + row_offset, columns_from(lane_column), is_vectorizable};
  }
  __device__ Slice<Element, Form> slice(int64_t row, int64_t lane_column) const {
    return slice_at(row * stride, lane_column);
  }
  // columns: columns_from(lane_column), computed before.
  __device__ Slice<Element, Form> slice(int64_t row, int64_t lane_column, int columns) const {
    return {data + lane_column + row * stride, columns, is_vectorizable};
  }
};

template <class Form, class Element>
SlicedRows<Element, Form> slice_rows(Rows<Element> rows, int64_t width) {
  return {.data = rows.data,
          .stride = rows.stride,
          .width = width,
          .is_vectorizable = is_vectorizable<Form::kVecElements>(rows.data, rows.stride, width)};
}

// Calls body(k) for each of a lane's vectors.
template <class Form, class Body>
__device__ void for_each_vec(const Body& body) {
#pragma unroll
  for (int k = 0; k < Form::kVecs; ++k) {
    body(k);
  }
}

// Calls body(i) for each element of a vector.
template <class Form, class Body>
__device__ void for_each_element(const Body& body) {
#pragma unroll
  for (int i = 0; i < Form::kVecElements; ++i) {
    body(i);
  }
}

// A lane's vectors of a slice, as stored.
template <class Element, class Form>
struct RawSliceValues {
  RawVec<Element, Form::kVecElements> vecs[Form::kVecs];
};

// A lane's vectors of a slice, in the accumulation type.
template <class Real, class Form>
struct SliceValues {
  Vec<Real, Form::kVecElements> vecs[Form::kVecs];
};

// Reads a lane's part of a slice; zeros beyond the row's end.
template <class Element, class Form, class Mutable = std::remove_const_t<Element>>
__device__ RawSliceValues<Mutable, Form> load(const Slice<Element, Form>& slice) {
  using RawElements = RawVec<Mutable, Form::kVecElements>;
  RawSliceValues<Mutable, Form> values = {};
  if (slice.is_vectorizable) {
    for_each_vec<Form>([&](int k) {
      if (slice.has_vec(k)) {
        values.vecs[k] = *reinterpret_cast<const RawElements*>(slice.vec_address(k));
      }
    });
  } else {
    for_each_vec<Form>([&](int k) {
      Vec<Mutable, Form::kVecElements> elements = {};
      for_each_element<Form>([&](int i) {
        if (slice.has_element(k, i)) {
          elements.values[i] = slice.vec_address(k)[i];
        }
      });
      values.vecs[k] = to_raw(elements);
    });
  }
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

template <CacheHint hint = CacheHint::none, class Element, class Form>
__device__ void store_vec(const Slice<Element, Form>& slice,
                          int k,
                          const RawVec<Element, Form::kVecElements>& values) {
  if (!slice.is_vectorizable) {
    const Vec<Element, Form::kVecElements> elements = from_raw(values);
    for_each_element<Form>([&](int i) {
      if (slice.has_element(k, i)) {
        slice.vec_address(k)[i] = elements.values[i];
      }
    });
  } else if (slice.has_vec(k)) {
    write<hint>(slice.vec_address(k), values);
  }
}

template <class Element, class Form>
__device__ void store(const Slice<Element, Form>& slice,
                      const RawSliceValues<Element, Form>& values) {
  for_each_vec<Form>([&](int k) { store_vec(slice, k, values.vecs[k]); });
}

template <class Real, class Form>
__device__ void store(const Slice<Real, Form>& slice, const SliceValues<Real, Form>& values) {
  for_each_vec<Form>([&](int k) { store_vec(slice, k, to_raw(values.vecs[k])); });
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
#pragma unroll
    for (int i = 0; i < vec_size; ++i) {
      result.values[i] = widen(elements.values[i]);
    }
  }
  return result;
}

// The units of 16 bytes that hold these bytes.
struct PrefetchRange {
  uint64_t begin;  // address in global memory
  uint32_t bytes;
};

PEER_HOST_DEVICE inline PrefetchRange prefetch_range(const void* first, int bytes) {
  constexpr uint64_t kUnit = 16;
  const uint64_t address = reinterpret_cast<uint64_t>(first);
  const uint64_t begin = address / kUnit * kUnit;
  return {begin, uint32_t((address + bytes - begin + kUnit - 1) / kUnit * kUnit)};
}

// Prefetches the cache line of an address into the L2 cache.
__device__ inline void prefetch_l2(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// Prefetches memory into the L2 cache, all lines at once. Called by all threads of the block.
__device__ inline void prefetch_l2(const void* begin, const void* end) {
  constexpr int64_t line = 128;
  const auto* last = static_cast<const char*>(end);
  for (const char* address = static_cast<const char*>(begin) + threadIdx.x * line; address < last;
       address += blockDim.x * line) {
    prefetch_l2(address);
  }
}

// Prefetches a slice into the L2 cache. Called by all lanes of a warp that holds one slice, with
// the slice's first column. Before sm_90, every lane prefetches one line. Since sm_90, one lane
// prefetches all bytes by one instruction, in units of 16 bytes.
template <class Element, class Form>
__device__ void prefetch_l2(const SlicedRows<Element, Form>& rows,
                            int64_t row,
                            int64_t slice_column) {
  static_assert(Form::kLanes == kWarp);
  const int columns = rows.columns_from(slice_column);
  if (columns <= 0) {
    return;
  }
  const Element* const first = rows.data + row * rows.stride + slice_column;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (lane() == 0) {
    const PrefetchRange range = prefetch_range(first, columns * int(sizeof(Element)));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(range.begin), "r"(range.bytes));
  }
#else
  constexpr int elements_per_line = 128 / int(sizeof(Element));
#pragma unroll
  for (int i = 0; i < Form::kColumns; i += kWarp * elements_per_line) {
    const int offset = i + lane() * elements_per_line;
    if (offset < columns) {
      prefetch_l2(first + offset);
    }
  }
#endif
}

}  // namespace peer::cuda
