// Product-key retrieval as the kernels of every device take it: the k best of R·C experts for every
// token and head. Expert r·C + c has the score <q1, row_keys[r]> + <q2, col_keys[c]>.
//
// Sub-scores  a sub-score is the product of half a query and a key. An infinite one counts as the
//             largest finite number of its sign in the accumulation type. So the sum of two
//             sub-scores is NaN only if one of them is
// Order       NaN first, then the higher score; among equal scores the smaller (row rank, column
//             rank), in which ranks break ties by the smaller key id. -0 equals 0
// Mask        disabled experts are struck out of that order. An unused key, all of whose experts
//             are disabled, ranks behind all others of its half. So the pairs of the other keys
//             keep their order
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/common.h"
#include "kernels/ordered.h"

namespace peer {

// The keys of one half of the queries.
template <class Element>
struct Keys {
  const Element* data;
  int64_t count;                 // keys per head
  int64_t head_stride;           // 0 if the heads share their keys
  const bool* unused = nullptr;  // (count), whether a key is unused; null without a mask
};

template <class Query>
struct ProductKeyTopk {
  using Real = accumulation_t<Query>;
  int64_t tokens;
  int64_t heads;
  int64_t half_width;  // dim_key / 2
  int64_t k;
  const Query* query;  // (T, H, dim_key)
  Keys<Query> rows, columns;
  Real* scores;                    // (T, H, k)
  int64_t* indices;                // (T, H, k)
  const bool* disabled = nullptr;  // (R·C), of which at least k are false; null without a mask
};

// The sub-score of an unused key, below that of every other key.
template <class Real>
PEER_HOST_DEVICE static inline ordered_t<Real> unused_key_order() {
  return to_ordered(-std::numeric_limits<Real>::infinity());
}

// Weighted sums of rows, for the gradient of the queries:
//
//   out[i] = Σ_p coefficients[i, p]·table[indices[i, p]]
template <class Real>
struct GatherSum {
  int64_t items;
  int64_t terms;
  int64_t width;
  const Real* coefficients;  // (items, terms)
  const int64_t* indices;    // (items, terms)
  Rows<const Real> table;
  Rows<Real> out;  // (items, width)
};

// The number of columns, the best ones, whose sum with the row of this rank can be among the k
// best. Every pair (i', j') with i' <= i and j' <= j comes before (i, j), because rounding is
// monotone and equal sums are ordered by rank: if (i + 1)(j + 1) > k, there are k better ones. At k
// = 16, 50 of 256 pairs are candidates.
template <class Integer>
PEER_HOST_DEVICE static constexpr Integer count_candidate_columns(Integer row_rank,
                                                                  Integer column_count,
                                                                  Integer k) {
  const Integer most = k / (row_rank + 1);
  return most < column_count ? most : column_count;
}

// The number of candidate pairs of the best rows. Candidates are listed in order of (row rank,
// column rank), so that the position in the list decides between equal sums.
template <class Integer>
PEER_HOST_DEVICE static constexpr Integer count_candidate_pairs(Integer row_count,
                                                                Integer column_count,
                                                                Integer k) {
  Integer pairs = 0;
  for (Integer i = 0; i < row_count && i < k; ++i) {
    pairs += count_candidate_columns(i, column_count, k);
  }
  return pairs;
}

}  // namespace peer
