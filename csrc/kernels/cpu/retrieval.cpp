// Retrieval by product keys: the k best of R·C experts for every token and head, exactly, without
// looking at R·C scores.
//
//   1. sub-scores   <q1, row_keys[r]> and <q2, col_keys[c]> of a block of tokens, in cache
//   2. selection    the k best rows and the k best columns of every token, sorted
//   3. pairs        of the sums row + column, only those that can be among the k best
//
// Work item   a block of kTokensPerBlock tokens and one head
// Traffic     the packed keys once per work item; nothing of size R or C per token leaves the cache
// Exactness   every sub-score is summed in the order of the key's elements, whatever the block; a
//             pair's score is one addition
// Order       higher score first; among equal scores the smaller (row rank, column rank), where
//             ranks break ties by the smaller key id. Scores are compared as ordered integers
//             (ordered.h), so NaN ranks highest and -0 equals 0
#include <algorithm>
#include <limits>

#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/vector.h"
#include "kernels/ordered.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

template <class Real>
constexpr int64_t kPanel = 2 * kLanes<Real>;

// Tokens whose sub-scores with one panel are held in registers: enough independent sums to hide the
// latency of multiply-add.
constexpr int kTokensInRegisters = 4;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int tokens, class Real>
void multiply_panel(const Real* query,
                    int64_t query_stride,
                    const Real* panel,
                    int64_t half_width,
                    Real* scores,
                    int64_t scores_stride) {
  constexpr int lanes = kLanes<Real>;
  Vector<Real> low[tokens] = {};
  Vector<Real> high[tokens] = {};
  for (int64_t j = 0; j < half_width; ++j) {
    const Vector<Real> keys_low = load(panel + j * kPanel<Real>);
    const Vector<Real> keys_high = load(panel + j * kPanel<Real> + lanes);
    for (int t = 0; t < tokens; ++t) {
      const Real q = query[t * query_stride + j];
      low[t] += q * keys_low;
      high[t] += q * keys_high;
    }
  }
  for (int t = 0; t < tokens; ++t) {
    store(scores + t * scores_stride, low[t]);
    store(scores + t * scores_stride + lanes, high[t]);
  }
}

// scores[t, r] = <query[t], keys[r]> for a block of tokens; rows are padded to whole panels.
template <class Real>
void score_keys(const Real* query,
                int64_t query_stride,
                int64_t tokens,
                const Real* panels,
                int64_t keys,
                int64_t half_width,
                Real* scores) {
  const int64_t scores_stride = divide_up(keys, kPanel<Real>) * kPanel<Real>;
  for (int64_t first = 0; first < keys; first += kPanel<Real>) {
    const Real* panel = panels + first * half_width;
    int64_t t = 0;
    for (; t + kTokensInRegisters <= tokens; t += kTokensInRegisters) {
      multiply_panel<kTokensInRegisters>(query + t * query_stride, query_stride, panel, half_width,
                                         scores + t * scores_stride + first, scores_stride);
    }
    for (; t < tokens; ++t) {
      multiply_panel<1>(query + t * query_stride, query_stride, panel, half_width,
                        scores + t * scores_stride + first, scores_stride);
    }
  }
}

// A key of one half, or a pair of keys, as selection sees it.
template <class Real>
struct Candidate {
  ordered_t<Real> order;
  int64_t rank;  // decides between equal scores: the key's id, or row rank · C + column rank
  int64_t id;
  Real score;
};

// Leaves the k best candidates, sorted, at the front.
template <class Real>
void keep_best(Candidate<Real>* candidates, int64_t count, int64_t k) {
  const auto is_better = [](const Candidate<Real>& a, const Candidate<Real>& b) {
    return a.order != b.order ? a.order > b.order : a.rank < b.rank;
  };
  std::partial_sort(candidates, candidates + k, candidates + count, is_better);
}

template <class Real>
using OrderedVector = typename VectorOf<ordered_t<Real>, kLanes<Real>>::type;

template <class Real>
OrderedVector<Real> to_ordered_vector(Vector<Real> scores) {
  using Integer = ordered_t<Real>;
  const OrderedVector<Real> bits = bit_cast<OrderedVector<Real>>(scores + Real(0));
  const OrderedVector<Real> order =
      bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max());
  return scores != scores ? OrderedVector<Real>{} + std::numeric_limits<Integer>::max() : order;
}

// The group-maximum filter. Elements i with equal i mod `groups` form a group. Each maximum is an
// element, so at least k elements reach the k-th largest maximum, and everything below it can be
// dropped unseen: of 1024 random scores about k + 2 survive.
template <class Real>
ordered_t<Real> lower_bound_of_kth(const Real* scores,
                                   int64_t count,
                                   int64_t k,
                                   int64_t groups,
                                   ordered_t<Real>* maxima) {
  constexpr int lanes = kLanes<Real>;
  std::fill(maxima, maxima + groups, std::numeric_limits<ordered_t<Real>>::min());
  int64_t first = 0;
  for (; first + groups <= count; first += groups) {
    for (int64_t g = 0; g < groups; g += lanes) {
      const OrderedVector<Real> order = to_ordered_vector<Real>(load(scores + first + g));
      OrderedVector<Real> maximum;
      std::memcpy(&maximum, maxima + g, sizeof(maximum));
      maximum = order > maximum ? order : maximum;
      std::memcpy(maxima + g, &maximum, sizeof(maximum));
    }
  }
  for (int64_t i = first; i < count; ++i) {
    const ordered_t<Real> order = to_ordered(scores[i]);
    maxima[i - first] = order > maxima[i - first] ? order : maxima[i - first];
  }
  const auto descending = [](ordered_t<Real> a, ordered_t<Real> b) { return a > b; };
  std::nth_element(maxima, maxima + k - 1, maxima + groups, descending);
  return maxima[k - 1];
}

int64_t filter_groups(int64_t k) {
  int64_t groups = 64;
  while (groups < 2 * k) {
    groups *= 2;
  }
  return groups;
}

// The k best of `count` scores, sorted, at the front of `candidates`, which has room for all.
template <class Real>
void select_keys(const Real* scores,
                 int64_t count,
                 int64_t k,
                 ordered_t<Real>* maxima,
                 Candidate<Real>* candidates) {
  const int64_t groups = filter_groups(k);
  const ordered_t<Real> threshold = count >= 4 * groups
                                        ? lower_bound_of_kth(scores, count, k, groups, maxima)
                                        : std::numeric_limits<ordered_t<Real>>::min();
  int64_t survivors = 0;
  for (int64_t i = 0; i < count; ++i) {
    const ordered_t<Real> order = to_ordered(scores[i]);
    if (order >= threshold) {
      candidates[survivors++] = {order, i, i, scores[i]};
    }
  }
  keep_best(candidates, survivors, k);
}

// Pairs that can be among the k best. With both lists sorted, pair (i, j) comes after every pair
// (i', j') with i' <= i and j' <= j, since rounding is monotone and equal sums are ordered by rank:
// if (i + 1)(j + 1) > k there are k better ones.
constexpr bool can_be_chosen(int64_t row_rank, int64_t column_rank, int64_t k) {
  return (row_rank + 1) * (column_rank + 1) <= k;
}

int64_t count_pairs(int64_t k) {
  int64_t pairs = 0;
  for (int64_t i = 1; i <= k; ++i) {
    pairs += k / i;
  }
  return pairs;
}

// The one case in which a sum of two halves is not monotone: infinities of opposite sign make NaN,
// which ranks highest although one of its halves may be last in its list. Appends the first k such
// pairs, in order of rank, that the lists do not already contain.
template <class Real>
class OppositeInfinities {
 public:
  OppositeInfinities(const Real* rows, int64_t row_count, const Real* columns, int64_t column_count)
      : rows_{rows, row_count}, columns_{columns, column_count} {}

  int64_t append(int64_t k, Candidate<Real>* candidates) const {
    const int64_t count = append_products(kInfinity, -kInfinity, k, candidates);
    return count + append_products(-kInfinity, kInfinity, k, candidates + count);
  }

 private:
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

  struct Half {
    const Real* scores;
    int64_t count;

    int64_t first_rank_of(Real infinity) const {
      int64_t before = 0;
      for (int64_t i = 0; i < count; ++i) {
        before += infinity > 0 ? scores[i] != scores[i] : scores[i] != infinity;
      }
      return before;
    }
  };

  int64_t append_products(Real row_value,
                          Real column_value,
                          int64_t k,
                          Candidate<Real>* candidates) const {
    int64_t appended = 0;
    int64_t visited = 0;
    int64_t row_rank = rows_.first_rank_of(row_value);
    for (int64_t r = 0; r < rows_.count && visited < k; ++r) {
      if (rows_.scores[r] != row_value) {
        continue;
      }
      int64_t column_rank = columns_.first_rank_of(column_value);
      for (int64_t c = 0; c < columns_.count && visited < k; ++c) {
        if (columns_.scores[c] != column_value) {
          continue;
        }
        if (!can_be_chosen(row_rank, column_rank, k)) {
          const Real score = row_value + column_value;
          candidates[appended++] = {to_ordered(score), row_rank * columns_.count + column_rank,
                                    r * columns_.count + c, score};
        }
        ++column_rank;
        ++visited;
      }
      ++row_rank;
    }
    return appended;
  }

  Half rows_, columns_;
};

// Whether a half can take part in such a pair with +inf, told from its sorted list: +inf stands
// behind NaN only, and where k NaNs hide it, their pairs fill the result.
template <class Real>
bool has_positive_infinity(const Candidate<Real>* best, int64_t count) {
  const auto is_infinite = [](const Candidate<Real>& key) {
    return key.score == std::numeric_limits<Real>::infinity();
  };
  return std::any_of(best, best + count, is_infinite);
}

}  // namespace

template <class Real>
void pack_keys(const Real* keys, int64_t count, int64_t half_width, Real* packed) {
  for (int64_t first = 0; first < count; first += kPanel<Real>) {
    Real* panel = packed + first * half_width;
    for (int64_t j = 0; j < half_width; ++j) {
      for (int64_t r = 0; r < kPanel<Real>; ++r) {
        panel[j * kPanel<Real> + r] =
            first + r < count ? keys[(first + r) * half_width + j] : Real(0);
      }
    }
  }
}

template <class Real>
void retrieve(const Retrieval<Real>& retrieval, int64_t first, int64_t last) {
  const int64_t rows = retrieval.rows.keys;
  const int64_t columns = retrieval.columns.keys;
  const int64_t k = retrieval.k;
  const int64_t row_k = std::min(k, rows);
  const int64_t column_k = std::min(k, columns);
  const int64_t row_stride = divide_up(rows, kPanel<Real>) * kPanel<Real>;
  const int64_t column_stride = divide_up(columns, kPanel<Real>) * kPanel<Real>;
  const int64_t query_width = 2 * retrieval.half_width;
  const int64_t query_stride = retrieval.heads * query_width;

  Scratch<Real> row_scores(kTokensPerBlock * row_stride);
  Scratch<Real> column_scores(kTokensPerBlock * column_stride);
  Scratch<ordered_t<Real>> maxima(filter_groups(std::max(row_k, column_k)));
  Scratch<Candidate<Real>> best_rows(rows);
  Scratch<Candidate<Real>> best_columns(columns);
  Scratch<Candidate<Real>> pairs(count_pairs(k) + 2 * k);

  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item % retrieval.heads;
    const int64_t first_token = item / retrieval.heads * kTokensPerBlock;
    const int64_t tokens = std::min(kTokensPerBlock, retrieval.tokens - first_token);
    const Real* query = retrieval.query + first_token * query_stride + head * query_width;
    score_keys(query, query_stride, tokens, retrieval.rows.data + head * retrieval.rows.head_stride,
               rows, retrieval.half_width, row_scores.data());
    score_keys(query + retrieval.half_width, query_stride, tokens,
               retrieval.columns.data + head * retrieval.columns.head_stride, columns,
               retrieval.half_width, column_scores.data());

    for (int64_t t = 0; t < tokens; ++t) {
      const Real* token_rows = row_scores.data() + t * row_stride;
      const Real* token_columns = column_scores.data() + t * column_stride;
      select_keys(token_rows, rows, row_k, maxima.data(), best_rows.data());
      select_keys(token_columns, columns, column_k, maxima.data(), best_columns.data());

      int64_t count = 0;
      for (int64_t i = 0; i < row_k; ++i) {
        for (int64_t j = 0; j < column_k && can_be_chosen(i, j, k); ++j) {
          const Real score = best_rows[i].score + best_columns[j].score;
          pairs[count++] = {to_ordered(score), i * columns + j,
                            best_rows[i].id * columns + best_columns[j].id, score};
        }
      }
      if (has_positive_infinity(best_rows.data(), row_k) ||
          has_positive_infinity(best_columns.data(), column_k)) {
        const OppositeInfinities<Real> infinities(token_rows, rows, token_columns, columns);
        count += infinities.append(k, pairs.data() + count);
      }
      keep_best(pairs.data(), count, k);

      const int64_t target = ((first_token + t) * retrieval.heads + head) * k;
      for (int64_t i = 0; i < k; ++i) {
        retrieval.scores[target + i] = pairs[i].score;
        retrieval.indices[target + i] = pairs[i].id;
      }
    }
  }
}

template void pack_keys(const float*, int64_t, int64_t, float*);
template void pack_keys(const double*, int64_t, int64_t, double*);
template void retrieve(const Retrieval<float>&, int64_t, int64_t);
template void retrieve(const Retrieval<double>&, int64_t, int64_t);

}  // namespace peer::cpu::PEER_CAPABILITY
