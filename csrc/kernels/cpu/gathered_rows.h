// The loops over rows of a table that are gathered by index.
//
//   dot_with_rows        z[p] = <v, rows[p]>
//   add_weighted_rows    y += Σ_p c[p]·rows[p]
//   sum_weighted_rows    y = Σ_p c[p]·rows[p]
//
// Rows lie anywhere in a table far larger than any cache, so the cost is the latency of DRAM.
// kRowsInFlight rows are read side by side while the next group is prefetched. At the end of a
// list, the next group is the beginning of `then`, the list that the caller reads next. The order
// of every sum depends on p and the lane only, not on the group.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cpu/vector.h"

namespace peer::cpu::PEER_CAPABILITY {

// Each row has an accumulator of its own. With 16 registers, more than 8 of them would be spilled.
//
// Rows up to kShortRowBytes are prefetched whole, each line while the same line of the current
// group is read. Of longer rows only the heads are prefetched, at once, and the hardware's
// prefetcher continues from there. Where the second way becomes the faster one was measured: on
// processors with AVX-512 later than on those without.
#if defined(__AVX512F__)
constexpr int kRowsInFlight = 16;
constexpr int64_t kShortRowBytes = 2048;
#else
constexpr int kRowsInFlight = 8;
constexpr int64_t kShortRowBytes = 1024;
#endif
constexpr int64_t kHeadBytes = 256;

// Rows of a table in the order in which they are read.
template <class Table>
struct RowList {
  Rows<const Table> table = {};
  const int64_t* indices = nullptr;
  int64_t count = 0;

  const Table* row(int64_t p) const { return table.data + indices[p] * table.stride; }
  RowList from(int64_t p) const { return {table, indices + p, count - p}; }
};

// The rows of a group, and those to prefetch meanwhile. If there are fewer of those, the rest are
// rows of the group itself, which costs nothing but the instructions.
template <int rows, class Table>
struct RowGroup {
  RowGroup(const RowList<Table>& list, const RowList<Table>& then) {
    const RowList<Table> next = list.count > rows ? list.from(rows) : then;
    for (int r = 0; r < rows; ++r) {
      current[r] = list.row(r);
      ahead[r] = r < next.count ? next.row(r) : current[r];
    }
  }

  const Table* current[rows];
  const Table* ahead[rows];
};

template <bool is_short, int rows, class Table, class Real>
static inline void dot_group(const Real* v,
                             int64_t width,
                             const RowGroup<rows, Table>& group,
                             Real* z) {
  constexpr int lanes = kLanes<Real>;
  constexpr int64_t step_bytes = 2 * lanes * sizeof(Table);
  Vector<Real> sum[rows] = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    const TwoVectors<Real> part = load_two(v + i);
    for (int r = 0; r < rows; ++r) {
      const TwoVectors<Real> row = load_two(group.current[r] + i);
      if constexpr (is_short) {
        prefetch_bytes(group.ahead[r] + i, step_bytes);
      }
      sum[r] += part.first * row.first;
      sum[r] += part.second * row.second;
    }
  }
  for (; i < width; i += lanes) {
    const int64_t count = width - i < lanes ? width - i : lanes;
    const Vector<Real> part = load_first(v + i, count);
    for (int r = 0; r < rows; ++r) {
      sum[r] += part * load_first(group.current[r] + i, count);
    }
  }
  for (int r = 0; r < rows; ++r) {
    z[r] = reduce_add<Real>(sum[r]);
  }
}

template <bool is_short, int rows, class Table, class Real>
static inline void add_group(const Real* c,
                             int64_t width,
                             const RowGroup<rows, Table>& group,
                             Real* y) {
  constexpr int lanes = kLanes<Real>;
  constexpr int64_t step_bytes = 2 * lanes * sizeof(Table);
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    TwoVectors<Real> sum = load_two(y + i);
    for (int r = 0; r < rows; ++r) {
      if constexpr (is_short) {
        prefetch_bytes(group.ahead[r] + i, step_bytes);
      }
      sum = sum + c[r] * load_two(group.current[r] + i);
    }
    store_two(y + i, sum);
  }
  for (; i < width; i += lanes) {
    const int64_t count = width - i < lanes ? width - i : lanes;
    Vector<Real> sum = load_first(y + i, count);
    for (int r = 0; r < rows; ++r) {
      sum += c[r] * load_first(group.current[r] + i, count);
    }
    store_first(y + i, sum, count);
  }
}

// visit.operator()<is_short>(p, group) for groups of kRowsInFlight rows, then for single rows.
template <class Table, class Visit>
static inline void for_each_group(const RowList<Table>& list,
                                  const RowList<Table>& then,
                                  int64_t width,
                                  const Visit& visit) {
  const bool is_short = width * int64_t(sizeof(Table)) <= kShortRowBytes;
  int64_t p = 0;
  for (; p + kRowsInFlight <= list.count; p += kRowsInFlight) {
    const RowGroup<kRowsInFlight, Table> group(list.from(p), then);
    if (is_short) {
      visit.template operator()<true>(p, group);
    } else {
      for (const Table* row : group.ahead) {
        prefetch_bytes(row, kHeadBytes);
      }
      visit.template operator()<false>(p, group);
    }
  }
  for (; p < list.count; ++p) {
    visit.template operator()<false>(p, RowGroup<1, Table>(list.from(p), {}));
  }
}

template <class Table, class Real>
static inline void dot_with_rows(const Real* v,
                                 int64_t width,
                                 const RowList<Table>& list,
                                 const RowList<Table>& then,
                                 Real* z) {
  for_each_group(list, then, width, [&]<bool is_short>(int64_t p, const auto& group) {
    dot_group<is_short>(v, width, group, z + p);
  });
}

template <class Table, class Real>
static inline void add_weighted_rows(const Real* c,
                                     int64_t width,
                                     const RowList<Table>& list,
                                     const RowList<Table>& then,
                                     Real* y) {
  for_each_group(list, then, width, [&]<bool is_short>(int64_t p, const auto& group) {
    add_group<is_short>(c + p, width, group, y);
  });
}

template <class Table, class Real>
static inline void sum_weighted_rows(const Real* c,
                                     int64_t width,
                                     const RowList<Table>& list,
                                     const RowList<Table>& then,
                                     Real* y) {
  std::memset(y, 0, width * sizeof(Real));
  add_weighted_rows(c, width, list, then, y);
}

}  // namespace peer::cpu::PEER_CAPABILITY
