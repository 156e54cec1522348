// The two loops over rows of a table that expert_mlp consists of, for one warp:
//
//   dot_with_rows        z[r] = <v, row r>
//   sum_weighted_rows    sums = Σ_r c[r]·row r, for the columns of one tile
//
// The rows lie anywhere in a table far larger than any cache, so throughput depends on the number
// of bytes in flight. A lane requests up to 16 vectors before it uses the first: some vectors of
// each row of a tile. The assignment of columns to lanes and the order of every sum are the same
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

// What a warp requests at once: `vecs` vectors per lane of each of `rows` rows. Rows that are not
// vectorizable are read element by element.
template <int rows, int vecs, bool is_vectorized>
struct RowTile {
  static constexpr int kRows = rows;
  static constexpr int kVecs = vecs;
  static constexpr bool kIsVectorized = is_vectorized;
};

using WideTile = RowTile<4, 4, true>;    // for rows of more than 1 KiB
using NarrowTile = RowTile<8, 2, true>;  // for shorter rows
using ScalarTile = RowTile<4, 1, false>;

template <class Tile, class Table>
constexpr int kTileColumns = Tile::kVecs * kWarp * kVecSize<Table>;

// The first column of a lane's vector in a tile.
template <class Table>
__device__ int column_of_vec(int first_column, int vec) {
  return first_column + (vec * kWarp + lane()) * kVecSize<Table>;
}

// Rows are summed in groups of this size, then the sums of the groups are added. Warps that divide
// a token's rows at group boundaries get the same bits for any number of groups per warp.
constexpr int kRowsPerGroup = 4;

// A table, and one scalar per pair: the dot product with the pair's row, or the coefficient of the
// row.
template <class Table, class Scalar>
struct RowsAndScalars {
  Rows<const Table> table;
  Scalar* scalars = nullptr;
};

struct PairRange {
  int64_t first;
  int count;

  __device__ PairRange without_first(int pairs) const { return {first + pairs, count - pairs}; }
};

// The rows of pairs: one row per pair, or two adjacent ones if there is a gate.
template <class Table, class Scalar>
struct PairRows {
  const int64_t* indices;  // by pair
  RowsAndScalars<Table, Scalar> main;
  RowsAndScalars<Table, Scalar> gate = {};

  PEER_HOST_DEVICE bool has_gate() const { return gate.table.data != nullptr; }
  PEER_HOST_DEVICE int rows_per_pair() const { return has_gate() ? 2 : 1; }

  __device__ int count_rows(PairRange pairs) const { return pairs.count << int(has_gate()); }
  // The pair of row r of a range. Rows beyond the last pair map to the last pair, so that they can
  // be read without a branch.
  __device__ int64_t pair_of_row(PairRange pairs, int r) const {
    const int pair = r >> int(has_gate());
    return pairs.first + (pair < pairs.count ? pair : pairs.count - 1);
  }
  __device__ const RowsAndScalars<Table, Scalar>& source_of_row(int r) const {
    return (r & int(has_gate())) ? gate : main;
  }
};

template <int max_rows, class Table, class Scalar>
__device__ void find_rows(const PairRows<Table, Scalar>& source,
                          PairRange pairs,
                          const Table* (&rows)[max_rows]) {
  for (int r = 0; r < max_rows; ++r) {
    const Rows<const Table> table = source.source_of_row(r).table;
    rows[r] = table.data + source.indices[source.pair_of_row(pairs, r)] * table.stride;
  }
}

// `count` elements of a row from a column on; zeros beyond the row's width. A vectorizable row has
// either all of them or none. For data that is read again: through the L1 cache.
template <bool is_vectorized, int count, class Element>
__device__ Vec<Element, count> load_columns(const Element* row, int column, int width) {
  Vec<Element, count> elements = {};
  if constexpr (is_vectorized) {
    if (column < width) {
      elements = *reinterpret_cast<const Vec<Element, count>*>(row + column);
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

// Emulates, on the CPU, the GPU's trap on a misaligned access.
__device__ inline void trap_unless_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    __trap();
  }
}

// Writes whole vectors to an aligned address.
template <class Element, int count>
__device__ void store_vecs(const Vec<Element, count>& elements, Element* target) {
#ifdef __CUDA_ARCH__
  RawVec<Element> vecs[sizeof(elements) / sizeof(RawVec<Element>)];
  std::memcpy(vecs, &elements, sizeof(elements));
  for (int k = 0; k < int(sizeof(elements) / sizeof(RawVec<Element>)); ++k) {
    reinterpret_cast<RawVec<Element>*>(target)[k] = vecs[k];
  }
#else
  trap_unless_aligned(target);
  std::memcpy(target, &elements, sizeof(elements));
#endif
}

// The counterpart of load_columns. Writes the elements that lie in the row.
template <bool is_vectorized, class Element, int count>
__device__ void store_columns(const Vec<Element, count>& elements,
                              Element* row,
                              int column,
                              int width) {
  if constexpr (is_vectorized) {
    if (column < width) {
      store_vecs(elements, row + column);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      if (column + i < width) {
        row[column + i] = elements.values[i];
      }
    }
  }
}

// A vector of data that is not read again soon, such as a table row: it bypasses the L1 cache,
// which keeps what warps share. If not wanted, nothing is read and the result is zero. The
// predicate replaces a branch, which would separate the loads before it from those behind it.
template <class Element>
__device__ RawVec<Element> load_no_allocate_if(bool is_wanted, const Element* source) {
  RawVec<Element> vec;
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
      : "=&r"(vec.words[0]), "=&r"(vec.words[1]), "=&r"(vec.words[2]), "=&r"(vec.words[3])
      : "l"(source), "r"(uint32_t(is_wanted)));
#else
  vec = {};
  if (is_wanted) {
    trap_unless_aligned(source);
    std::memcpy(&vec, source, sizeof(vec));
  }
#endif
  return vec;
}

// A vector of a table's row; zeros beyond the width.
template <bool is_vectorized, class Table>
__device__ RawVec<Table> load_table_vec(const Table* row, int column, int width) {
  if constexpr (is_vectorized) {
    return load_no_allocate_if(column < width, row + column);
  } else {
    return to_raw(load_columns<false, kVecSize<Table>>(row, column, width));
  }
}

// A lane's vectors of a tile; zeros where the tile has no row or no column.
template <class Tile, class Table>
struct LoadedTile {
  RawVec<Table> vecs[Tile::kRows][Tile::kVecs];
};

template <class Tile, class Table>
__device__ LoadedTile<Tile, Table> load_tile(const Table* const (&rows)[Tile::kRows],
                                             int row_count,
                                             int first_column,
                                             int width) {
  LoadedTile<Tile, Table> tile;
  for (int r = 0; r < Tile::kRows; ++r) {
    for (int k = 0; k < Tile::kVecs; ++k) {
      tile.vecs[r][k] = load_table_vec<Tile::kIsVectorized>(
          rows[r], column_of_vec<Table>(first_column, k), r < row_count ? width : 0);
    }
  }
  __syncwarp();  // keeps the compiler from using the first vectors before it requests the last
  return tile;
}

// sums[r] = this lane's part of <v, row r>
template <class Tile, class Table, class Input, class Real>
__device__ void dot_with_rows(const Input* v,
                              int width,
                              const PairRows<Table, Real>& source,
                              PairRange pairs,
                              Real (&sums)[Tile::kRows]) {
  const Table* rows[Tile::kRows];
  find_rows(source, pairs, rows);
  const int row_count = source.count_rows(pairs);
  for (int r = 0; r < Tile::kRows; ++r) {
    sums[r] = 0;
  }
  for (int first = 0; first < width; first += kTileColumns<Tile, Table>) {
    const LoadedTile<Tile, Table> tile = load_tile<Tile>(rows, row_count, first, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      const auto part = load_columns<Tile::kIsVectorized, kVecSize<Table>>(
          v, column_of_vec<Table>(first, k), width);
      for (int r = 0; r < Tile::kRows; ++r) {
        const auto row = from_raw(tile.vecs[r][k]);
        for (int i = 0; i < kVecSize<Table>; ++i) {
          sums[r] = std::fma(widen(part.values[i]), widen(row.values[i]), sums[r]);
        }
      }
    }
  }
}

// Warp sums of `count` values at once: lane l gets the sum over the lanes of values[l % count].
// Every exchange halves the number of values, so it takes count + log2(32 / count) - 1 shuffles
// instead of 5·count. The order of each sum does not depend on count.
template <int count, class Real>
__device__ Real warp_reduce_sums(Real (&values)[count]) {
  int distance = 1;
  for (int remaining = count; remaining > 1; remaining /= 2) {
    const bool is_odd = lane() & distance;
    for (int i = 0; i < remaining / 2; ++i) {
      const Real own = is_odd ? values[2 * i + 1] : values[2 * i];
      const Real sent = is_odd ? values[2 * i] : values[2 * i + 1];
      values[i] = own + __shfl_xor_sync(kAllLanes, sent, distance);
    }
    distance *= 2;
  }
  for (; distance < kWarp; distance *= 2) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  }
  return values[0];
}

// A lane's sums for the columns that it reads of a tile.
template <class Tile, class Table>
struct ColumnSums {
  Vec<accumulation_t<Table>, kVecSize<Table>> vecs[Tile::kVecs];
};

// The weighted sum of the rows of a range of pairs, for kTileColumns columns from first_column on.
template <class Tile, class Table, class Real>
__device__ ColumnSums<Tile, Table> sum_weighted_rows(const PairRows<Table, const Real>& source,
                                                     PairRange pairs,
                                                     int first_column,
                                                     int width) {
  ColumnSums<Tile, Table> sums = {};
  for (int done = 0; done < pairs.count; done += Tile::kRows / source.rows_per_pair()) {
    const PairRange rest = pairs.without_first(done);
    const int row_count = source.count_rows(rest);
    const Table* rows[Tile::kRows];
    find_rows(source, rest, rows);
    Real c[Tile::kRows];
    for (int r = 0; r < Tile::kRows; ++r) {
      const Real coefficient = source.source_of_row(r).scalars[source.pair_of_row(rest, r)];
      c[r] = r < row_count ? coefficient : Real(0);
    }
    const LoadedTile<Tile, Table> tile = load_tile<Tile>(rows, row_count, first_column, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      for (int group = 0; group < Tile::kRows; group += kRowsPerGroup) {
        Vec<Real, kVecSize<Table>> group_sums = {};
        for (int r = group; r < group + kRowsPerGroup; ++r) {
          const auto row = from_raw(tile.vecs[r][k]);
          for (int i = 0; i < kVecSize<Table>; ++i) {
            group_sums.values[i] = std::fma(c[r], widen(row.values[i]), group_sums.values[i]);
          }
        }
        for (int i = 0; i < kVecSize<Table>; ++i) {
          sums.vecs[k].values[i] += group_sums.values[i];
        }
      }
    }
  }
  return sums;
}

template <class Table, class Scalar>
bool are_vectorizable(const PairRows<Table, Scalar>& source, int width) {
  const auto is_table_vectorizable = [&](const Rows<const Table>& table) {
    return is_vectorizable(table.data, table.stride, width);
  };
  return is_table_vectorizable(source.main.table) && is_table_vectorizable(source.gate.table);
}

}  // namespace peer::cuda
