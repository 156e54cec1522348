// The sum over one chunk, one single pair or one split segment, for the kernels that store it
// (table_grad.cpp) and for those that update a row by it (table_update.cpp).
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cpu/segment_work.h"
#include "kernels/cpu/vector.h"
#include "kernels/segments.h"

namespace peer::cpu::PEER_CAPABILITY {

// The sources of a chunk's pairs. A division for each pair, done once for all parts.
class ChunkSources {
 public:
  ChunkSources(const Pair* pairs, const Chunk& chunk, int64_t pairs_per_row)
      : count(chunk.last - chunk.first) {
    for (int64_t i = 0; i < count; ++i) {
      pair_ids[i] = pairs[chunk.first + i].id;
      rows[i] = pair_ids[i] / pairs_per_row;
    }
  }

  int64_t count;
  int64_t pair_ids[kPairsPerChunk];
  int64_t rows[kPairsPerChunk];
};

// What is summed over a chunk for one part of a row: Σ coefficients[i]·rows[i].
template <class Source, class Accumulator>
class ChunkTerms {
 public:
  using Real = Accumulator;

  // coefficients: by pair id, or null: all one.
  ChunkTerms(const ChunkSources& sources, const Real* coefficients, Rows<const Source> source)
      : count(sources.count) {
    for (int64_t i = 0; i < count; ++i) {
      this->coefficients[i] = coefficients ? coefficients[sources.pair_ids[i]] : Real(1);
      rows[i] = source.data + sources.rows[i] * source.stride;
    }
  }

  int64_t count;
  Real coefficients[kPairsPerChunk];
  const Source* rows[kPairsPerChunk];
};

// The same for a pair that is its whole segment.
template <class Source, class Accumulator>
struct SingleTerm {
  using Real = Accumulator;

  static constexpr int64_t count = 1;
  Real coefficients[1];
  const Source* rows[1];
};

// A strip is the columns of a row that stay in registers while the terms of a chunk pass by. It has
// `steps` steps of two vectors.
template <int steps, bool nontemporal, class Terms, class Target>
static inline void sum_strip(const Terms& terms, int64_t column, Target* out) {
  using Real = typename Terms::Real;
  constexpr int width = 2 * kLanes<Real>;
  TwoVectors<Real> sum[steps] = {};
  for (int64_t i = 0; i < terms.count; ++i) {
    const Real coefficient = terms.coefficients[i];
    const auto* const row = terms.rows[i] + column;
    for (int s = 0; s < steps; ++s) {
      sum[s] = sum[s] + coefficient * load_two(row + s * width);
    }
  }
  for (int s = 0; s < steps; ++s) {
    if constexpr (nontemporal) {
      store_nontemporal(out + column + s * width, sum[s]);
    } else {
      store_two(out + column + s * width, sum[s]);
    }
  }
}

template <class Terms, class Target>
static inline void sum_last_columns(const Terms& terms,
                                    int64_t width,
                                    int64_t column,
                                    Target* out) {
  using Real = typename Terms::Real;
  for (; column < width; column += kLanes<Real>) {
    const int64_t count = width - column < kLanes<Real> ? width - column : kLanes<Real>;
    Vector<Real> sum = {};
    for (int64_t i = 0; i < terms.count; ++i) {
      sum += terms.coefficients[i] * load_first(terms.rows[i] + column, count);
    }
    store_first(out + column, sum, count);
  }
}

// nontemporal: whole steps are written past the caches; `out` must be aligned to kVectorBytes.
template <bool nontemporal = false, class Terms, class Target>
static inline void sum_terms(const Terms& terms, int64_t width, Target* out) {
  constexpr int step = 2 * kLanes<typename Terms::Real>;
  constexpr int steps_per_strip = 4;
  int64_t column = 0;
  for (; column + steps_per_strip * step <= width; column += steps_per_strip * step) {
    sum_strip<steps_per_strip, nontemporal>(terms, column, out);
  }
  for (; column + step <= width; column += step) {
    sum_strip<1, nontemporal>(terms, column, out);
  }
  sum_last_columns(terms, width, column, out);
}

// Adds the partial sums of a split segment in the order of its chunks.
template <class Real, class Target>
static inline void sum_split_segment(Rows<Real> partial_sums,
                                     int64_t width,
                                     const SplitSegment& segment,
                                     Target* out) {
  constexpr int lanes = kLanes<Real>;
  const Real* partial = partial_sums.data + segment.first * partial_sums.stride;
  for (int64_t column = 0; column < width; column += lanes) {
    const int64_t count = width - column < lanes ? width - column : lanes;
    Vector<Real> sum = {};
    for (int64_t i = 0; i < segment.last - segment.first; ++i) {
      sum += load_first(partial + i * partial_sums.stride + column, count);
    }
    store_first(out + column, sum, count);
  }
}

// The chunks ahead of the current one whose coefficients are prefetched. Pairs come in the order of
// their owners, so their coefficients lie anywhere in the list.
constexpr int64_t kChunksAhead = 8;

template <class Real>
static inline void prefetch_coefficients(const SegmentWork<Real>& segments,
                                         const Chunk& chunk,
                                         const Real* coefficients) {
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    __builtin_prefetch(coefficients + segments.pairs[i].id);
  }
}

}  // namespace peer::cpu::PEER_CAPABILITY
