// The loops over rows of a table that are gathered by index.
//
//   dot_with_rows        z[p] = <v, table[indices[p]]>
//   add_weighted_rows    y += Σ_p c[p]·table[indices[p]]
//   sum_weighted_rows    y = Σ_p c[p]·table[indices[p]]
//
// Rows lie anywhere in a table far larger than any cache, so the cost is the latency of DRAM.
// kRowsInFlight rows are read side by side, each with its own accumulator, while the first lines of
// the next group are prefetched; the hardware's prefetcher continues from there. The order of every
// sum depends on p and the lane only, not on the group.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common.h"
#include "kernels/cpu/vector.h"

namespace peer::cpu::PEER_CAPABILITY {

constexpr int kRowsInFlight = 8;
constexpr int64_t kPrefetchedBytes = 256;

template <class Table>
static inline void prefetch_heads(Rows<const Table> table, const int64_t* indices, int64_t count) {
  const int64_t rows = count < kRowsInFlight ? count : kRowsInFlight;
  for (int64_t p = 0; p < rows; ++p) {
    const char* head = reinterpret_cast<const char*>(table.data + indices[p] * table.stride);
    for (int64_t byte = 0; byte < kPrefetchedBytes; byte += 64) {
      __builtin_prefetch(head + byte);
    }
  }
}

template <int rows, class Table, class Real>
static inline void dot_group(const Real* v,
                             int64_t width,
                             Rows<const Table> table,
                             const int64_t* indices,
                             Real* z) {
  constexpr int lanes = kLanes<Real>;
  const Table* row[rows];
  Vector<Real> sum[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = table.data + indices[r] * table.stride;
    sum[r] = Vector<Real>{};
  }
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    const Vector<Real> part = load(v + i);
    for (int r = 0; r < rows; ++r) {
      sum[r] += part * load(row[r] + i);
    }
  }
  if (i < width) {
    const Vector<Real> part = load_first(v + i, width - i);
    for (int r = 0; r < rows; ++r) {
      sum[r] += part * load_first(row[r] + i, width - i);
    }
  }
  for (int r = 0; r < rows; ++r) {
    z[r] = reduce_add<Real>(sum[r]);
  }
}

template <class Table, class Real>
static inline void dot_with_rows(const Real* v,
                                 int64_t width,
                                 Rows<const Table> table,
                                 const int64_t* indices,
                                 int64_t count,
                                 Real* z) {
  int64_t p = 0;
  for (; p + kRowsInFlight <= count; p += kRowsInFlight) {
    prefetch_heads(table, indices + p + kRowsInFlight, count - p - kRowsInFlight);
    dot_group<kRowsInFlight>(v, width, table, indices + p, z + p);
  }
  for (; p < count; ++p) {
    dot_group<1>(v, width, table, indices + p, z + p);
  }
}

template <int rows, class Table, class Real>
static inline void add_group(const Real* c,
                             Rows<const Table> table,
                             const int64_t* indices,
                             int64_t width,
                             Real* y) {
  constexpr int lanes = kLanes<Real>;
  const Table* row[rows];
  for (int r = 0; r < rows; ++r) {
    row[r] = table.data + indices[r] * table.stride;
  }
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    Vector<Real> sum = load(y + i);
    for (int r = 0; r < rows; ++r) {
      sum += c[r] * load(row[r] + i);
    }
    store(y + i, sum);
  }
  if (i < width) {
    Vector<Real> sum = load_first(y + i, width - i);
    for (int r = 0; r < rows; ++r) {
      sum += c[r] * load_first(row[r] + i, width - i);
    }
    store_first(y + i, sum, width - i);
  }
}

template <class Table, class Real>
static inline void add_weighted_rows(const Real* c,
                                     Rows<const Table> table,
                                     const int64_t* indices,
                                     int64_t count,
                                     int64_t width,
                                     Real* y) {
  int64_t p = 0;
  for (; p + kRowsInFlight <= count; p += kRowsInFlight) {
    prefetch_heads(table, indices + p + kRowsInFlight, count - p - kRowsInFlight);
    add_group<kRowsInFlight>(c + p, table, indices + p, width, y);
  }
  for (; p < count; ++p) {
    add_group<1>(c + p, table, indices + p, width, y);
  }
}

template <class Table, class Real>
static inline void sum_weighted_rows(const Real* c,
                                     Rows<const Table> table,
                                     const int64_t* indices,
                                     int64_t count,
                                     int64_t width,
                                     Real* y) {
  std::memset(y, 0, width * sizeof(Real));
  add_weighted_rows(c, table, indices, count, width, y);
}

}  // namespace peer::cpu::PEER_CAPABILITY
