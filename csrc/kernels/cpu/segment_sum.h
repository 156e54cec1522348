// The sum over one chunk or one split segment, for the kernels that store it (table_grad.cpp) and
// for those that update a row by it (table_update.cpp).
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cpu/segment_work.h"
#include "kernels/cpu/vector.h"

namespace peer::cpu::PEER_CAPABILITY {

// What is summed over pairs: coefficients[pair]·source[pair / pairs_per_row].
template <class Source, class Real>
struct Terms {
  const Pair* pairs;
  int64_t width;
  int64_t pairs_per_row;
  const Real* coefficients;  // by pair id; not read if the sum is not weighted
  Rows<const Source> source;

  const Source* row_of(int64_t pair_id) const {
    return source.data + (pair_id / pairs_per_row) * source.stride;
  }
};

// A strip is the columns of a row that stay in registers while the pairs of a chunk pass by.
constexpr int kVectorsPerStrip = 4;

template <int vectors, bool weighted, bool nontemporal, class Source, class Real, class Target>
static inline void sum_strip(const Terms<Source, Real>& terms,
                             const Chunk& chunk,
                             int64_t column,
                             Target* out) {
  constexpr int lanes = kLanes<Real>;
  Vector<Real> sum[vectors] = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t id = terms.pairs[i].id;
    const auto* source = terms.row_of(id) + column;
    if constexpr (weighted) {
      const Real coefficient = terms.coefficients[id];
      for (int v = 0; v < vectors; ++v) {
        sum[v] += coefficient * load(source + v * lanes);
      }
    } else {
      for (int v = 0; v < vectors; ++v) {
        sum[v] += load(source + v * lanes);
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    if constexpr (nontemporal) {
      store_nontemporal(out + column + v * lanes, sum[v]);
    } else {
      store(out + column + v * lanes, sum[v]);
    }
  }
}

template <bool weighted, class Source, class Real, class Target>
static inline void sum_tail(const Terms<Source, Real>& terms,
                            const Chunk& chunk,
                            int64_t column,
                            Target* out) {
  const int64_t count = terms.width - column;
  Vector<Real> sum = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t id = terms.pairs[i].id;
    const Vector<Real> term = load_first(terms.row_of(id) + column, count);
    if constexpr (weighted) {
      sum += terms.coefficients[id] * term;
    } else {
      sum += term;
    }
  }
  store_first(out + column, sum, count);
}

// weighted: false if every coefficient is one. nontemporal: whole vectors are written past the
// caches; `out` must be aligned to vectors.
template <bool weighted, bool nontemporal = false, class Source, class Real, class Target>
static inline void sum_chunk(const Terms<Source, Real>& terms, const Chunk& chunk, Target* out) {
  constexpr int lanes = kLanes<Real>;
  int64_t column = 0;
  for (; column + kVectorsPerStrip * lanes <= terms.width; column += kVectorsPerStrip * lanes) {
    sum_strip<kVectorsPerStrip, weighted, nontemporal>(terms, chunk, column, out);
  }
  for (; column + lanes <= terms.width; column += lanes) {
    sum_strip<1, weighted, nontemporal>(terms, chunk, column, out);
  }
  if (column < terms.width) {
    sum_tail<weighted>(terms, chunk, column, out);
  }
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

}  // namespace peer::cpu::PEER_CAPABILITY
