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

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"
#include "kernels/rows.h"

namespace peer::cuda {

constexpr int kPacksPerLane = 2;

template <int pack>
constexpr int kSliceColumns = kWarp * kPacksPerLane * pack;

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

// What a lane has of a slice.
template <class Element, int pack>
struct LaneValues {
  Elements<Element, pack> packs[kPacksPerLane];
};

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
  constexpr uintptr_t alignment = alignof(Elements<Element, pack>);
  const bool is_packed = reinterpret_cast<uintptr_t>(rows.data) % alignment == 0 &&
                         rows.stride % pack == 0 && width % pack == 0;
  return {rows.data, rows.stride, width, is_packed};
}

// body(p) for each of a lane's packs, body(i) for each element of a pack.

template <class Body>
__device__ void for_each_pack(const Body& body) {
#pragma unroll
  for (int p = 0; p < kPacksPerLane; ++p) {
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

// Zeros beyond the row's end.
template <class Element, int pack, class Mutable = std::remove_const_t<Element>>
__device__ LaneValues<Mutable, pack> load(const Slice<Element, pack>& slice) {
  LaneValues<Mutable, pack> values = {};
  for_each_pack([&](int p) {
    if (!slice.is_packed) {
      for_each_element<pack>([&](int i) {
        if (slice.has(p, i)) {
          values.packs[p].values[i] = slice.pack_address(p)[i];
        }
      });
    } else if (slice.has_pack(p)) {
      values.packs[p] = *reinterpret_cast<const Elements<Mutable, pack>*>(slice.pack_address(p));
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
template <Kept kept, class Element, int count>
__device__ void write(Element* target, const Elements<Element, count>& elements) {
  using Word = std::conditional_t<sizeof(elements) % sizeof(uint4) == 0, uint4, uint2>;
  constexpr int word_count = sizeof(elements) / sizeof(Word);
  Word words[word_count];
  std::memcpy(words, &elements, sizeof(elements));
#pragma unroll
  for (int i = 0; i < word_count; ++i) {
    Word* const place = reinterpret_cast<Word*>(target) + i;
    if constexpr (kept == Kept::briefly) {
      __stcs(place, words[i]);
    } else {
      *place = words[i];
    }
  }
}

template <Kept kept = Kept::as_usual, class Element, int pack>
__device__ void store_pack(const Slice<Element, pack>& slice,
                           int p,
                           const Elements<Element, pack>& elements) {
  if (!slice.is_packed) {
    for_each_element<pack>([&](int i) {
      if (slice.has(p, i)) {
        slice.pack_address(p)[i] = elements.values[i];
      }
    });
  } else if (slice.has_pack(p)) {
    write<kept>(slice.pack_address(p), elements);
  }
}

// Two at a time, which GPUs since sm_80 do in one instruction.
template <class Element>
__device__ Elements<Element, 2> narrow_two(accumulation_t<Element> first,
                                           accumulation_t<Element> second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Element) == 2) {
    uint32_t word;
    if constexpr (std::is_same_v<Element, BFloat16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    }
    Elements<Element, 2> elements;
    std::memcpy(&elements, &word, sizeof(elements));
    return elements;
  }
#endif
  return {narrow<Element>(first), narrow<Element>(second)};
}

template <class Element, int pack>
__device__ Elements<Element, pack> narrow_pack(
    const Elements<accumulation_t<Element>, pack>& wide) {
  Elements<Element, pack> result;
#pragma unroll
  for (int i = 0; i < pack; i += 2) {
    const auto two = narrow_two<Element>(wide.values[i], wide.values[i + 1]);
    std::memcpy(result.values + i, &two, sizeof(two));
  }
  return result;
}

template <class Element, int pack>
__device__ Elements<accumulation_t<Element>, pack> widen_pack(
    const Elements<Element, pack>& elements) {
  Elements<accumulation_t<Element>, pack> result;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    // Both halves of a word, by one instruction each, which compilers do not find.
#pragma unroll
    for (int i = 0; i < pack; i += 2) {
      uint32_t word;
      std::memcpy(&word, elements.values + i, sizeof(word));
      const uint32_t halves[] = {word << 16, word & 0xffff0000u};
      std::memcpy(result.values + i, halves, sizeof(halves));
    }
  } else {
    for_each_element<pack>([&](int i) { result.values[i] = widen(elements.values[i]); });
  }
  return result;
}

// Asks for an address's line to be brought to the second-level cache.
__device__ inline void request_line(const void* address) {
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
    request_line(slice.data + offset);
  }
}

}  // namespace peer::cuda
