// Product-key retrieval by the scores of all pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "support.h"

namespace peer::test {

// The products of half a query with some keys, in the order of the keys' elements; exact for the
// small integers that most tests use. An infinite product counts as the largest finite number of
// its sign.
template <class Sum, class Query>
std::vector<Sum> sub_scores(const Query* query,
                            const Query* keys,
                            int64_t count,
                            int64_t half_width) {
  std::vector<Sum> result(count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < half_width; ++j) {
      result[i] += Sum(to_double(query[j])) * Sum(to_double(keys[i * half_width + j]));
    }
    if (std::isinf(result[i])) {
      result[i] = std::copysign(std::numeric_limits<Sum>::max(), result[i]);
    }
  }
  return result;
}

// NaN above all, then by value; -0 equals 0.
template <class Real>
bool is_above(Real a, Real b) {
  return std::isnan(a) ? !std::isnan(b) : a > b;
}

template <class Real>
std::vector<int64_t> ranks(const std::vector<Real>& scores) {
  std::vector<int64_t> order(scores.size()), rank(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return is_above(scores[a], scores[b]); });
  for (size_t i = 0; i < order.size(); ++i) {
    rank[order[i]] = i;
  }
  return rank;
}

// The k best of all pairs but the disabled ones, sorted by score and then by (row rank, column
// rank). `disabled` has a place for every pair, or is empty.
template <class Real>
std::vector<std::pair<Real, int64_t>> brute_force(const std::vector<Real>& rows,
                                                  const std::vector<Real>& columns,
                                                  int64_t k,
                                                  const std::vector<char>& disabled = {}) {
  const std::vector<int64_t> row_ranks = ranks(rows), column_ranks = ranks(columns);
  struct Expert {
    Real score;
    int64_t row_rank, column_rank, id;
  };
  std::vector<Expert> experts;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t c = 0; c < columns.size(); ++c) {
      const size_t id = r * columns.size() + c;
      if (disabled.empty() || !disabled[id]) {
        experts.push_back({rows[r] + columns[c], row_ranks[r], column_ranks[c], int64_t(id)});
      }
    }
  }
  const auto is_better = [](const Expert& a, const Expert& b) {
    if (is_above(a.score, b.score) || is_above(b.score, a.score)) {
      return is_above(a.score, b.score);
    }
    return std::tie(a.row_rank, a.column_rank) < std::tie(b.row_rank, b.column_rank);
  };
  std::partial_sort(experts.begin(), experts.begin() + k, experts.end(), is_better);
  std::vector<std::pair<Real, int64_t>> result;
  for (int64_t i = 0; i < k; ++i) {
    result.emplace_back(experts[i].score, experts[i].id);
  }
  return result;
}

// The number of places in which the result of one head and token differs from brute force on its
// sub-scores.
template <class Real>
int64_t count_wrong(const std::vector<Real>& rows,
                    const std::vector<Real>& columns,
                    int64_t k,
                    const Real* scores,
                    const int64_t* indices,
                    const std::vector<char>& disabled = {}) {
  const auto expected = brute_force(rows, columns, k, disabled);
  int64_t wrong = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto [score, index] = expected[i];
    const bool same_score = std::isnan(score) ? std::isnan(scores[i]) : scores[i] == score;
    wrong += !same_score || indices[i] != index;
  }
  return wrong;
}

}  // namespace peer::test
