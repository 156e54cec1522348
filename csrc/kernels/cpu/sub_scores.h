// Sub-scores: the products of queries with one half of the keys, for a block of queries at a time,
// so that they are selected from while they are in cache.
//
// Packing   panels of kPanel keys, each (half_width, kPanel): a step of the product reads
//           consecutive vectors. Panels are padded with zeros
// Product   kQueriesInRegisters queries times one panel (two where there are 32 registers): as many
//           independent sums as hide the latency of multiply-add
// Exactness every sub-score is summed in the order of the key's elements, whatever the block, so a
//           query's result does not depend on its neighbours
// Result    ordered integers (ordered.h), which is what selection compares
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vector.h"
#include "kernels/ordered.h"

namespace peer::cpu::PEER_CAPABILITY {

constexpr int kVectorsPerPanel = 3;
constexpr int kQueriesInRegisters = 4;
constexpr int kPanelsInRegisters = kVectorBytes == 64 ? 2 : 1;

template <class Real>
constexpr int64_t kPanel = kVectorsPerPanel * kLanes<Real>;

static inline int64_t round_up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

// Integers as wide as the reals, lane by lane.
template <class Real>
using OrderedVector = typename VectorOf<ordered_t<Real>, kLanes<Real>>::type;

template <class Real>
static inline OrderedVector<Real> load_ordered(const ordered_t<Real>* source) {
  OrderedVector<Real> v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

template <class Real>
static inline void store_ordered(ordered_t<Real>* target, OrderedVector<Real> v) {
  std::memcpy(target, &v, sizeof(v));
}

// to_ordered of ordered.h, lane by lane.
template <class Real>
static inline OrderedVector<Real> to_ordered_vector(Vector<Real> scores) {
  using Integer = ordered_t<Real>;
  const OrderedVector<Real> bits = bit_cast<OrderedVector<Real>>(scores + Real(0));
  const OrderedVector<Real> order =
      bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max());
  return scores != scores ? OrderedVector<Real>{} + std::numeric_limits<Integer>::max() : order;
}

// Less than the order of any score, -inf included: what padding holds.
template <class Real>
constexpr ordered_t<Real> kBelowAll = std::numeric_limits<ordered_t<Real>>::min();

// Rows of sub-scores are padded to whole panels, and to whole words of the selection's bit masks.
constexpr int64_t kScoresPerWord = 64;

template <class Real>
static inline int64_t padded_scores(int64_t keys) {
  return round_up(round_up(keys, kPanel<Real>), kScoresPerWord);
}

template <class Real>
static inline void pack_panel(const PackKeys<Real>& pack, int64_t head, int64_t panel) {
  constexpr int lanes = kLanes<Real>;
  const int64_t width = pack.half_width;
  const int64_t padded = round_up(pack.count, kPanel<Real>);
  const Real* keys = pack.keys + head * pack.count * width;
  Real* packed = pack.packed + (head * padded + panel * kPanel<Real>)*width;
  for (int64_t part = 0; part < kPanel<Real>; part += lanes) {
    const int64_t key = panel * kPanel<Real> + part;
    int64_t j = 0;
    if (key + lanes <= pack.count) {
      for (; j + lanes <= width; j += lanes) {
        Vector<Real> square[lanes];
        for (int r = 0; r < lanes; ++r) {
          square[r] = load(keys + (key + r) * width + j);
        }
        transpose<Real>(square);
        for (int r = 0; r < lanes; ++r) {
          store(packed + (j + r) * kPanel<Real> + part, square[r]);
        }
      }
    }
    for (; j < width; ++j) {
      for (int64_t r = 0; r < lanes; ++r) {
        packed[j * kPanel<Real> + part + r] =
            key + r < pack.count ? keys[(key + r) * width + j] : Real(0);
      }
    }
  }
}

template <int queries, int panels, class Real>
static inline void multiply_panels(const Real* query,
                                   int64_t query_stride,
                                   const Real* panel,
                                   int64_t half_width,
                                   ordered_t<Real>* scores,
                                   int64_t scores_stride) {
  constexpr int lanes = kLanes<Real>;
  constexpr int vectors = panels * kVectorsPerPanel;
  const int64_t panel_size = half_width * kPanel<Real>;
  Vector<Real> sum[queries][vectors] = {};
  for (int64_t j = 0; j < half_width; ++j) {
    Vector<Real> keys[vectors];
    for (int v = 0; v < vectors; ++v) {
      keys[v] = load(panel + (v / kVectorsPerPanel) * panel_size + j * kPanel<Real> +
                     (v % kVectorsPerPanel) * lanes);
    }
    for (int t = 0; t < queries; ++t) {
      const Real q = query[t * query_stride + j];
      for (int v = 0; v < vectors; ++v) {
        sum[t][v] += q * keys[v];
      }
    }
  }
  for (int t = 0; t < queries; ++t) {
    for (int v = 0; v < vectors; ++v) {
      store_ordered<Real>(scores + t * scores_stride + v * lanes,
                          to_ordered_vector<Real>(sum[t][v]));
    }
  }
}

// The panels of a step with every query of the block, so that they are read from the cache nearest.
template <int panels, class Real>
static inline void score_panels(const Real* query,
                                int64_t query_stride,
                                int64_t queries,
                                const Real* panel,
                                int64_t half_width,
                                ordered_t<Real>* scores,
                                int64_t scores_stride) {
  int64_t t = 0;
  for (; t + kQueriesInRegisters <= queries; t += kQueriesInRegisters) {
    multiply_panels<kQueriesInRegisters, panels>(query + t * query_stride, query_stride, panel,
                                                 half_width, scores + t * scores_stride,
                                                 scores_stride);
  }
  for (; t < queries; ++t) {
    multiply_panels<1, panels>(query + t * query_stride, query_stride, panel, half_width,
                               scores + t * scores_stride, scores_stride);
  }
}

// scores[t, r] = <query[t], keys[r]>, padded with kBelowAll to padded_scores(keys).
template <class Real>
static inline void score_keys(const Real* query,
                              int64_t query_stride,
                              int64_t queries,
                              const Real* packed,
                              int64_t keys,
                              int64_t half_width,
                              ordered_t<Real>* scores) {
  const int64_t stride = padded_scores<Real>(keys);
  const int64_t panels = (keys + kPanel<Real> - 1) / kPanel<Real>;
  const int64_t panel_size = half_width * kPanel<Real>;
  int64_t p = 0;
  for (; p + kPanelsInRegisters <= panels; p += kPanelsInRegisters) {
    score_panels<kPanelsInRegisters>(query, query_stride, queries, packed + p * panel_size,
                                     half_width, scores + p * kPanel<Real>, stride);
  }
  for (; p < panels; ++p) {
    score_panels<1>(query, query_stride, queries, packed + p * panel_size, half_width,
                    scores + p * kPanel<Real>, stride);
  }
  for (int64_t t = 0; t < queries; ++t) {
    std::fill(scores + t * stride + keys, scores + (t + 1) * stride, kBelowAll<Real>);
  }
}

}  // namespace peer::cpu::PEER_CAPABILITY
