// Sub-scores: the products of queries with one half of the keys, for a block of queries at a time,
// so that they are selected from while they are in cache.
//
// Packing     panels of kKeysPerPanel keys, each (half_width, kKeysPerPanel), so that a step of the
//             product reads consecutive vectors. Panels are padded with zeros
// Product     kQueriesInRegisters queries times one panel, or two panels with 32 registers: enough
//             independent sums to hide the latency of multiply-add
// Exactness   every sub-score is summed in the order of the key's elements, whatever the block, so
//             a query's result does not depend on its neighbours
// Infinities  an infinite sub-score becomes the largest finite number of its sign
// Result      ordered integers (ordered.h), which selection compares
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/cpu/product_key_topk.h"
#include "kernels/cpu/vector.h"
#include "kernels/ordered.h"

namespace peer::cpu::PEER_CAPABILITY {

constexpr int kVectorsPerPanel = 3;
constexpr int kQueriesInRegisters = 4;
constexpr int kPanelsInRegisters = kVectorBytes == 64 ? 2 : 1;

template <class Real>
constexpr int64_t kKeysPerPanel = kVectorsPerPanel * kLanes<Real>;

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

// The same for a sub-score: an infinity becomes the largest finite number of its sign, whose bits
// are those of the infinity minus one. Masks take the place of constants, which would occupy
// registers that the product needs.
template <class Real>
static inline OrderedVector<Real> sub_scores_to_ordered(Vector<Real> scores) {
  using Integers = OrderedVector<Real>;
  using Unsigned = typename VectorOf<std::make_unsigned_t<ordered_t<Real>>, kLanes<Real>>::type;
  const Vector<Real> zero_if_finite = scores - scores;
  Integers bits = bit_cast<Integers>(scores + Real(0));
  bits += zero_if_finite != zero_if_finite;  // true is -1
  const Integers is_negative = bits >> (8 * sizeof(Real) - 1);
  const Integers is_nan = scores != scores;
  const Integers order = bits ^ Integers(Unsigned(is_negative) >> 1);
  return (order & ~is_nan) | Integers(Unsigned(is_nan) >> 1);
}

// The value of padding: less than the order of any score, -inf included.
template <class Real>
constexpr ordered_t<Real> kBelowAll = std::numeric_limits<ordered_t<Real>>::min();

// Rows of sub-scores are padded to whole panels, and to whole words of the selection's bit masks.
constexpr int64_t kScoresPerWord = 64;

template <class Real>
static inline int64_t padded_scores(int64_t keys) {
  return round_up(round_up(keys, kKeysPerPanel<Real>), kScoresPerWord);
}

template <class Real>
static inline void pack_panel(const PackKeys<Real>& pack, int64_t head, int64_t panel) {
  constexpr int lanes = kLanes<Real>;
  const int64_t width = pack.half_width;
  const int64_t padded = round_up(pack.count, kKeysPerPanel<Real>);
  const Real* keys = pack.keys + head * pack.count * width;
  Real* packed = pack.packed + (head * padded + panel * kKeysPerPanel<Real>)*width;
  for (int64_t part = 0; part < kKeysPerPanel<Real>; part += lanes) {
    const int64_t key = panel * kKeysPerPanel<Real> + part;
    int64_t j = 0;
    if (key + lanes <= pack.count) {
      for (; j + lanes <= width; j += lanes) {
        Vector<Real> square[lanes];
        for (int r = 0; r < lanes; ++r) {
          square[r] = load(keys + (key + r) * width + j);
        }
        transpose<Real>(square);
        for (int r = 0; r < lanes; ++r) {
          store(packed + (j + r) * kKeysPerPanel<Real> + part, square[r]);
        }
      }
    }
    for (; j < width; ++j) {
      for (int64_t r = 0; r < lanes; ++r) {
        packed[j * kKeysPerPanel<Real> + part + r] =
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
  const int64_t panel_size = half_width * kKeysPerPanel<Real>;
  Vector<Real> sum[queries][vectors] = {};
  for (int64_t j = 0; j < half_width; ++j) {
    Vector<Real> keys[vectors];
    for (int v = 0; v < vectors; ++v) {
      keys[v] = load(panel + (v / kVectorsPerPanel) * panel_size + j * kKeysPerPanel<Real> +
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
                          sub_scores_to_ordered<Real>(sum[t][v]));
    }
  }
}

// The panels of a step times every query of the block, so that the panels stay in the first-level
// cache.
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
  const int64_t panels = (keys + kKeysPerPanel<Real> - 1) / kKeysPerPanel<Real>;
  const int64_t panel_size = half_width * kKeysPerPanel<Real>;
  int64_t p = 0;
  for (; p + kPanelsInRegisters <= panels; p += kPanelsInRegisters) {
    score_panels<kPanelsInRegisters>(query, query_stride, queries, packed + p * panel_size,
                                     half_width, scores + p * kKeysPerPanel<Real>, stride);
  }
  for (; p < panels; ++p) {
    score_panels<1>(query, query_stride, queries, packed + p * panel_size, half_width,
                    scores + p * kKeysPerPanel<Real>, stride);
  }
  for (int64_t t = 0; t < queries; ++t) {
    std::fill(scores + t * stride + keys, scores + (t + 1) * stride, kBelowAll<Real>);
  }
}

}  // namespace peer::cpu::PEER_CAPABILITY
