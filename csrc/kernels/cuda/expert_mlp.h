// The two loops over rows of a table that every pass over tokens is made of, by one warp.
//
//   dot_with_rows        z[r] = <v, row r>
//   sum_weighted_rows    sums = Σ_r c[r]·row r, of some columns
//
// Rows lie anywhere in a table far larger than any cache, so what counts is how many bytes are
// requested before the first is used. A lane requests up to 16 packs of 16 bytes, some of each of
// the rows of a batch. Which lane takes which columns, and the order of every sum, are the same
// for all tiles.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

// What a warp requests at once: so many packs per lane, of each of so many rows. Aligned rows are
// read pack by pack, others element by element.
template <int rows, int packs, bool aligned>
struct RowTile {
  static constexpr int kRows = rows;
  static constexpr int kVecs = packs;
  static constexpr bool kIsAligned = aligned;
};

using WideTile = RowTile<4, 4, true>;    // for rows of more than 1 KiB
using NarrowTile = RowTile<8, 2, true>;  // for shorter ones
using UnalignedTile = RowTile<4, 1, false>;

template <class Tile, class Table>
constexpr int kTileColumns = Tile::kVecs * kWarp * kVecSize<Table>;

// The first column of a lane's pack in a tile.
template <class Table>
__device__ int column_of_pack(int first_column, int pack) {
  return first_column + (pack * kWarp + lane()) * kVecSize<Table>;
}

// A sum of rows is a sum of parts, each the sum of so many rows: where warps share a token out in
// whole parts, it does not matter to the bits how many parts each of them takes.
constexpr int kRowsPerPart = 4;

// A table and a number for each of the rows that are read of it: pair by pair, what the dot product
// was, or what the row is multiplied by.
template <class Table, class Number>
struct NumberedRows {
  Rows<const Table> table;
  Number* numbers = nullptr;
};

struct PairRange {
  int64_t first;
  int count;

  // What is left of it behind so many pairs.
  __device__ PairRange after(int pairs) const { return {first + pairs, count - pairs}; }
};

// The rows that pairs stand for: one each, or two each, next to each other, where the gate's table
// takes part.
template <class Table, class Number>
struct PairRows {
  const int64_t* indices;  // by pair
  NumberedRows<Table, Number> own;
  NumberedRows<Table, Number> gate = {};

  PEER_HOST_DEVICE bool has_gate() const { return gate.table.data != nullptr; }
  PEER_HOST_DEVICE int per_pair() const { return has_gate() ? 2 : 1; }

  // How many rows a range of pairs has.
  __device__ int count(PairRange pairs) const { return pairs.count << int(has_gate()); }
  // The pair of row r of a range, and which of its rows that is. Beyond the last pair, the last
  // one: so reading on behalf of rows that do not exist needs no branch.
  __device__ int64_t pair_of(PairRange pairs, int r) const {
    const int pair = r >> int(has_gate());
    return pairs.first + (pair < pairs.count ? pair : pairs.count - 1);
  }
  __device__ const NumberedRows<Table, Number>& source_of(int r) const {
    return (r & int(has_gate())) ? gate : own;
  }
};

template <int most, class Table, class Number>
__device__ void find_rows(const PairRows<Table, Number>& source,
                          PairRange pairs,
                          const Table* (&rows)[most]) {
  for (int r = 0; r < most; ++r) {
    const Rows<const Table> table = source.source_of(r).table;
    rows[r] = table.data + source.indices[source.pair_of(pairs, r)] * table.stride;
  }
}

// A pack as it came from memory. Elements of 16 bits are taken out of it where they are used: taken
// out before, they would fill twice the registers while loads are in flight.
using RawPack = Elements<uint32_t, 4>;

template <class Element>
__device__ Elements<Element, kVecSize<Element>> unpack(const RawPack& pack) {
  Elements<Element, kVecSize<Element>> elements;
  std::memcpy(&elements, &pack, sizeof(elements));
  return elements;
}

// Some elements of a row from a column on, those beyond its width zero; aligned ones lie in it all
// or none. For what will be read again: through the first-level cache.
template <bool is_aligned, int count, class Element>
__device__ Elements<Element, count> load_elements(const Element* row, int column, int width) {
  Elements<Element, count> elements = {};
  if constexpr (is_aligned) {
    if (column < width) {
      elements = *reinterpret_cast<const Elements<Element, count>*>(row + column);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      if (column + i < width) {
        elements.values[i] = row[column + i];
      }
    }
  }
  return elements;
}

// What a device does of its own accord.
__device__ inline void trap_unless_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(RawPack) != 0) {
    __trap();
  }
}

// Whole packs to where they are aligned.
template <class Element, int count>
__device__ void store_packs(const Elements<Element, count>& elements, Element* target) {
#ifdef __CUDA_ARCH__
  RawPack packs[sizeof(elements) / sizeof(RawPack)];
  std::memcpy(packs, &elements, sizeof(elements));
  for (int k = 0; k < int(sizeof(elements) / sizeof(RawPack)); ++k) {
    reinterpret_cast<RawPack*>(target)[k] = packs[k];
  }
#else
  trap_unless_aligned(target);
  std::memcpy(target, &elements, sizeof(elements));
#endif
}

// The counterpart of load_elements: writes those that lie in the row.
template <bool is_aligned, class Element, int count>
__device__ void store_elements(const Elements<Element, count>& elements,
                               Element* row,
                               int column,
                               int width) {
  if constexpr (is_aligned) {
    if (column < width) {
      store_packs(elements, row + column);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      if (column + i < width) {
        row[column + i] = elements.values[i];
      }
    }
  }
}

// A pack of what will not be read again soon, such as of table rows: past the first-level cache,
// which is left to what warps share. Zero, and not read, where it is not wanted; that takes no
// branch, which would keep loads on its two sides from being in flight together.
__device__ inline RawPack load_once_if(bool is_wanted, const void* source) {
  RawPack pack;
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n"
      ".reg .pred is_wanted;\n"
      "setp.ne.u32 is_wanted, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@is_wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(pack.values[0]), "=&r"(pack.values[1]), "=&r"(pack.values[2]), "=&r"(pack.values[3])
      : "l"(source), "r"(uint32_t(is_wanted)));
#else
  pack = {};
  if (is_wanted) {
    trap_unless_aligned(source);
    std::memcpy(&pack, source, sizeof(pack));
  }
#endif
  return pack;
}

// A pack of a table's row; zero beyond the width.
template <bool is_aligned, class Table>
__device__ RawPack load_pack(const Table* row, int column, int width) {
  if constexpr (is_aligned) {
    return load_once_if(column < width, row + column);
  } else {
    RawPack pack;
    const auto elements = load_elements<false, kVecSize<Table>>(row, column, width);
    std::memcpy(&pack, &elements, sizeof(pack));
    return pack;
  }
}

// A lane's packs of a batch of rows; zero where there is no row or no column.
template <class Tile>
struct LoadedTile {
  RawPack packs[Tile::kRows][Tile::kVecs];
};

template <class Tile, class Table>
__device__ LoadedTile<Tile> load_tile(const Table* const (&rows)[Tile::kRows],
                                      int count,
                                      int first_column,
                                      int width) {
  LoadedTile<Tile> tile;
  for (int r = 0; r < Tile::kRows; ++r) {
    for (int k = 0; k < Tile::kVecs; ++k) {
      tile.packs[r][k] = load_pack<Tile::kIsAligned>(
          rows[r], column_of_pack<Table>(first_column, k), r < count ? width : 0);
    }
  }
  __syncwarp();  // or else the compiler would use the first packs before it requests the last
  return tile;
}

// sums[r] = this lane's share of <v, row r>
template <class Tile, class Table, class Input, class Real>
__device__ void dot_with_rows(const Input* v,
                              int width,
                              const PairRows<Table, Real>& source,
                              PairRange pairs,
                              Real (&sums)[Tile::kRows]) {
  const Table* rows[Tile::kRows];
  find_rows(source, pairs, rows);
  const int count = source.count(pairs);
  for (int r = 0; r < Tile::kRows; ++r) {
    sums[r] = 0;
  }
  for (int first = 0; first < width; first += kTileColumns<Tile, Table>) {
    const LoadedTile<Tile> tile = load_tile<Tile>(rows, count, first, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      const auto part = load_elements<Tile::kIsAligned, kVecSize<Table>>(
          v, column_of_pack<Table>(first, k), width);
      for (int r = 0; r < Tile::kRows; ++r) {
        const auto row = unpack<Table>(tile.packs[r][k]);
        for (int i = 0; i < kVecSize<Table>; ++i) {
          sums[r] = std::fma(widen(part.values[i]), widen(row.values[i]), sums[r]);
        }
      }
    }
  }
}

// Lane l gets the sum over the lanes of values[l % count]. Every exchange halves the number of
// values in question: count + log2(32 / count) - 1 shuffles, not 5·count. The sums are those of a
// butterfly from neighbours outwards, whatever the count.
template <int count, class Real>
__device__ Real sum_transposed(Real (&values)[count]) {
  int distance = 1;
  for (int remaining = count; remaining > 1; remaining /= 2) {
    const bool is_odd = lane() & distance;
    for (int i = 0; i < remaining / 2; ++i) {
      const Real kept = is_odd ? values[2 * i + 1] : values[2 * i];
      const Real given = is_odd ? values[2 * i] : values[2 * i + 1];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
    distance *= 2;
  }
  for (; distance < kWarp; distance *= 2) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  }
  return values[0];
}

// A lane's sums, of the columns that it reads in a tile.
template <class Tile, class Table>
struct ColumnSums {
  Elements<accumulation_t<Table>, kVecSize<Table>> packs[Tile::kVecs];
};

// The sum of the rows of a range of pairs, in columns [first_column, first_column + kTileColumns).
template <class Tile, class Table, class Real>
__device__ ColumnSums<Tile, Table> sum_weighted_rows(const PairRows<Table, const Real>& source,
                                                     PairRange pairs,
                                                     int first_column,
                                                     int width) {
  ColumnSums<Tile, Table> sums = {};
  for (int done = 0; done < pairs.count; done += Tile::kRows / source.per_pair()) {
    const PairRange rest = pairs.after(done);
    const int count = source.count(rest);
    const Table* rows[Tile::kRows];
    find_rows(source, rest, rows);
    Real c[Tile::kRows];
    for (int r = 0; r < Tile::kRows; ++r) {
      const Real number = source.source_of(r).numbers[source.pair_of(rest, r)];
      c[r] = r < count ? number : Real(0);
    }
    const LoadedTile<Tile> tile = load_tile<Tile>(rows, count, first_column, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      for (int part = 0; part < Tile::kRows; part += kRowsPerPart) {
        Elements<Real, kVecSize<Table>> part_sums = {};
        for (int r = part; r < part + kRowsPerPart; ++r) {
          const auto row = unpack<Table>(tile.packs[r][k]);
          for (int i = 0; i < kVecSize<Table>; ++i) {
            part_sums.values[i] = std::fma(c[r], widen(row.values[i]), part_sums.values[i]);
          }
        }
        for (int i = 0; i < kVecSize<Table>; ++i) {
          sums.packs[k].values[i] += part_sums.values[i];
        }
      }
    }
  }
  return sums;
}

template <class Table, class Number>
bool are_packed(const PairRows<Table, Number>& source, int width) {
  const auto [own, own_stride] = source.own.table;
  const auto [gate, gate_stride] = source.gate.table;
  return is_packed(own, own_stride, width) && is_packed(gate, gate_stride, width);
}

}  // namespace peer::cuda
