// Rows by slices: a warp has 1 KiB of a row of the source of a sum, two packs of 16 bytes in every
// lane.
//
// The packs of a warp's lanes lie side by side. `pack` is the number of elements in one; rows of
// other types, such as those of a table, are taken by the same columns. Rows whose packs are not
// aligned are taken by the same columns too, but element by element: which lane adds what does not
// depend on addresses.
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

template <int pack>
constexpr int kSliceColumns = kWarp * kVecsPerLane * pack;

constexpr int64_t count_slices(int64_t width, int slice_columns) {
  return (width + slice_columns - 1) / slice_columns;
}

// The first of the lane's columns in the slice that begins at this one.
template <int pack>
__device__ int64_t lane_column(int64_t slice_column) {
  return slice_column + lane() * pack;
}

// How far behind it a pack of the lane begins.
template <int pack>
PEER_HOST_DEVICE constexpr int pack_offset(int p) {
  return p * kWarp * pack;
}

// Elements side by side as they lie in memory. Those of 16 bits are taken out where they are used:
// taken out before, they would fill twice the registers, and moving them takes instructions.
template <class Element, int pack>
struct alignas(Elements<Element, pack>) [[gnu::may_alias]] RawPack {
  uint32_t words[pack * sizeof(Element) / sizeof(uint32_t)];
};

template <class Element, int pack>
__device__ RawPack<Element, pack> raw(const Elements<Element, pack>& elements) {
  RawPack<Element, pack> result;
  std::memcpy(&result, &elements, sizeof(result));
  return result;
}

// A lane's part of a slice of a row.
template <class Element, int pack>
struct Slice {
  Element* data;  // of the lane's first column
  int columns;    // of the row from there on, as far as it matters; none, or less, beyond its end
  bool is_packed;

  __device__ Element* pack_address(int p) const { return data + pack_offset<pack>(p); }
  // Whole packs are in the row or beyond its end.
  __device__ bool has_pack(int p) const { return pack_offset<pack>(p) < columns; }
  __device__ bool has(int p, int i) const { return pack_offset<pack>(p) + i < columns; }
};

// Rows that are taken slice by slice.
template <class Element, int pack>
struct SlicedRows {
  Element* data;
  int64_t stride;
  int64_t width;
  bool is_packed;

  // How many columns of a slice there are from a lane's first one on.
  __device__ int columns_from(int64_t lane_column) const {
    const int64_t rest = width - lane_column;
    return int(rest < kSliceColumns<pack> ? rest : kSliceColumns<pack>);
  }
  // Of the row that begins so many elements behind the first.
  __device__ Slice<Element, pack> slice_at(int64_t row_offset, int64_t lane_column) const {
    return {data + lane_column + row_offset, columns_from(lane_column), is_packed};
  }
  __device__ Slice<Element, pack> slice(int64_t row, int64_t lane_column) const {
    return slice_at(row * stride, lane_column);
  }
};

template <int pack, class Element>
SlicedRows<Element, pack> sliced(Rows<Element> rows, int64_t width) {
  return {rows.data, rows.stride, width, is_packed<pack>(rows.data, rows.stride, width)};
}

// body(p) for each of a lane's packs, body(i) for each element of a pack.

template <class Body>
__device__ void for_each_pack(const Body& body) {
#pragma unroll
  for (int p = 0; p < kVecsPerLane; ++p) {
    body(p);
  }
}

template <int pack, class Body>
__device__ void for_each_element(const Body& body) {
#pragma unroll
  for (int i = 0; i < pack; ++i) {
    body(i);
  }
}

// What a lane has of a slice, and what it computes for it.

template <class Element, int pack>
struct RawValues {
  RawPack<Element, pack> packs[kVecsPerLane];
};

template <class Real, int pack>
struct LaneValues {
  Elements<Real, pack> packs[kVecsPerLane];
};

// Zeros beyond the row's end.
template <class Element, int pack, class Mutable = std::remove_const_t<Element>>
__device__ RawValues<Mutable, pack> load(const Slice<Element, pack>& slice) {
  RawValues<Mutable, pack> values = {};
  for_each_pack([&](int p) {
    if (!slice.is_packed) {
      Elements<Mutable, pack> elements = {};
      for_each_element<pack>([&](int i) {
        if (slice.has(p, i)) {
          elements.values[i] = slice.pack_address(p)[i];
        }
      });
      values.packs[p] = raw(elements);
    } else if (slice.has_pack(p)) {
      values.packs[p] = *reinterpret_cast<const RawPack<Mutable, pack>*>(slice.pack_address(p));
    }
  });
  return values;
}

// How long what is written stays in the second-level cache.
enum class Kept {
  as_usual,
  briefly,  // not to be read again soon: let it make way before what is
};

// By accesses of 16 bytes, or of 8 where there are no more.
template <Kept kept, class Element, int pack>
__device__ void write(Element* target, const RawPack<Element, pack>& values) {
  using Access = std::conditional_t<sizeof(values) % sizeof(uint4) == 0, uint4, uint2>;
  constexpr int count = sizeof(values) / sizeof(Access);
  Access parts[count];
  std::memcpy(parts, &values, sizeof(values));
#pragma unroll
  for (int i = 0; i < count; ++i) {
    Access* const place = reinterpret_cast<Access*>(target) + i;
    if constexpr (kept == Kept::briefly) {
      __stcs(place, parts[i]);
    } else {
      *place = parts[i];
    }
  }
}

template <Kept kept = Kept::as_usual, class Element, int pack>
__device__ void store_pack(const Slice<Element, pack>& slice,
                           int p,
                           const RawPack<Element, pack>& values) {
  if (!slice.is_packed) {
    Elements<Element, pack> elements;
    std::memcpy(&elements, &values, sizeof(elements));
    for_each_element<pack>([&](int i) {
      if (slice.has(p, i)) {
        slice.pack_address(p)[i] = elements.values[i];
      }
    });
  } else if (slice.has_pack(p)) {
    write<kept>(slice.pack_address(p), values);
  }
}

template <class Element, int pack>
__device__ void store(const Slice<Element, pack>& slice, const RawValues<Element, pack>& values) {
  for_each_pack([&](int p) { store_pack(slice, p, values.packs[p]); });
}

template <class Real, int pack>
__device__ void store(const Slice<Real, pack>& slice, const LaneValues<Real, pack>& values) {
  for_each_pack([&](int p) { store_pack(slice, p, raw(values.packs[p])); });
}

// Two to a word, which GPUs since sm_80 do in one instruction.
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

template <class Element, int pack>
__device__ RawPack<Element, pack> narrow_pack(const Elements<accumulation_t<Element>, pack>& wide) {
  if constexpr (sizeof(Element) == 2) {
    RawPack<Element, pack> result;
#pragma unroll
    for (int w = 0; w < pack / 2; ++w) {
      result.words[w] = narrow_two<Element>(wide.values[2 * w], wide.values[2 * w + 1]);
    }
    return result;
  } else {
    return raw(wide);
  }
}

template <class Element, int pack>
__device__ Elements<accumulation_t<Element>, pack> widen_pack(
    const RawPack<Element, pack>& values) {
  Elements<accumulation_t<Element>, pack> result;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    // A half of a word by one instruction, which compilers do not find.
#pragma unroll
    for (int w = 0; w < pack / 2; ++w) {
      const uint32_t halves[] = {values.words[w] << 16, values.words[w] & 0xffff0000u};
      std::memcpy(result.values + 2 * w, halves, sizeof(halves));
    }
  } else {
    Elements<Element, pack> elements;
    std::memcpy(&elements, &values, sizeof(elements));
    for_each_element<pack>([&](int i) { result.values[i] = widen(elements.values[i]); });
  }
  return result;
}

// Asks for an address's line to be brought to the second-level cache.
__device__ inline void prefetch_l2(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// A lane a line: before the warp reads the slice.
template <class Element, int pack>
__device__ void request(const Slice<Element, pack>& slice) {
  constexpr int elements_per_line = 128 / int(sizeof(Element));
  const int offset = lane() * (elements_per_line - pack);
  if (offset < slice.columns && lane() * elements_per_line < kSliceColumns<pack>) {
    prefetch_l2(slice.data + offset);
  }
}

}  // namespace peer::cuda
