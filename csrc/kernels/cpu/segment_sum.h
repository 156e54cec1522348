// The sum over the pairs of one table row, for the pass that stores it (expert_pass.cpp) and for
// the pass that updates the row by it (row_update.cpp).
//
// Both passes name what they sum alike: width, pairs, pairs_per_row, coefficients and source. Not
// weighted means that every coefficient is one; streamed, that rows are written past the caches,
// which needs aligned ones.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vector.h"

namespace peer::cpu::PEER_CAPABILITY {

// A strip of a row that stays in registers while the pairs of a chunk pass by.
constexpr int kVectorsPerStrip = 4;

template <class Pass>
static inline auto* source_of_pair(const Pass& pass, int64_t number) {
  return pass.source.data + (number / pass.pairs_per_row) * pass.source.stride;
}

template <int vectors, bool weighted, bool streamed, class Pass, class Target>
static inline void sum_strip(const Pass& pass, const Chunk& chunk, int64_t column, Target* out) {
  using Real = typename Pass::Real;
  constexpr int lanes = kLanes<Real>;
  Vector<Real> sum[vectors] = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t number = pass.pairs[i].number;
    const auto* source = source_of_pair(pass, number) + column;
    if constexpr (weighted) {
      const Real coefficient = pass.coefficients[number];
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
    if constexpr (streamed) {
      stream(out + column + v * lanes, sum[v]);
    } else {
      store(out + column + v * lanes, sum[v]);
    }
  }
}

template <bool weighted, class Pass, class Target>
static inline void sum_tail(const Pass& pass, const Chunk& chunk, int64_t column, Target* out) {
  using Real = typename Pass::Real;
  const int64_t count = pass.width - column;
  Vector<Real> sum = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t number = pass.pairs[i].number;
    const Vector<Real> term = load_first(source_of_pair(pass, number) + column, count);
    if constexpr (weighted) {
      sum += pass.coefficients[number] * term;
    } else {
      sum += term;
    }
  }
  store_first(out + column, sum, count);
}

template <bool weighted, bool streamed = false, class Pass, class Target>
static inline void sum_chunk(const Pass& pass, const Chunk& chunk, Target* out) {
  constexpr int lanes = kLanes<typename Pass::Real>;
  int64_t column = 0;
  for (; column + kVectorsPerStrip * lanes <= pass.width; column += kVectorsPerStrip * lanes) {
    sum_strip<kVectorsPerStrip, weighted, streamed>(pass, chunk, column, out);
  }
  for (; column + lanes <= pass.width; column += lanes) {
    sum_strip<1, weighted, streamed>(pass, chunk, column, out);
  }
  if (column < pass.width) {
    sum_tail<weighted>(pass, chunk, column, out);
  }
}

// The partial sums of a run that was cut, in the order of its chunks.
template <class Real, class Target>
static inline void sum_split_segment(Rows<Real> partial_sums,
                                     int64_t width,
                                     const SplitSegment& run,
                                     Target* out) {
  constexpr int lanes = kLanes<Real>;
  const Real* partial = partial_sums.data + run.first * partial_sums.stride;
  for (int64_t column = 0; column < width; column += lanes) {
    const int64_t count = width - column < lanes ? width - column : lanes;
    Vector<Real> sum = {};
    for (int64_t i = 0; i < run.last - run.first; ++i) {
      sum += load_first(partial + i * partial_sums.stride + column, count);
    }
    store_first(out + column, sum, count);
  }
}

}  // namespace peer::cpu::PEER_CAPABILITY
