// Retrieval by product keys: the k best of R·C experts for every token and head, exactly, without
// looking at R·C scores.
//
//   1. sub-scores   <q1, row_keys[r]> and <q2, col_keys[c]> of a block of tokens, in cache
//                   (sub_scores.h)
//   2. selection    the k best rows and the k best columns of every token, sorted (selection.h)
//   3. pairs        of the sums row + column, only those that can be among the k best
//                   (pair_pruning.h)
//
// Work item   a block of tokens and one head
// Traffic     the packed keys once per work item; nothing of size R or C per token leaves the cache
// Exactness   every sub-score is summed in the order of the key's elements, whatever the block; a
//             pair's score is one addition
// Order       higher score first; among equal scores the smaller (row rank, column rank), where
//             ranks break ties by the smaller key id. Scores are compared as ordered integers
//             (ordered.h), so NaN ranks highest and -0 equals 0
#include <algorithm>
#include <limits>

#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/sub_scores.h"
#include "kernels/cpu/vector.h"
#include "kernels/ordered.h"
#include "kernels/pair_pruning.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

// The pairs of ranks that can be chosen, in order of (row rank, column rank): so a pair's position
// decides between equal scores.
struct PairRanks {
  PairRanks(int64_t row_count, int64_t column_count, int64_t k)
      : count(count_candidate_pairs(row_count, column_count, k)), rows(count), columns(count) {
    int64_t position = 0;
    for (int64_t i = 0; i < row_count; ++i) {
      for (int64_t j = 0; j < count_candidate_columns(i, column_count, k); ++j) {
        rows[position] = int32_t(i);
        columns[position++] = int32_t(j);
      }
    }
  }

  int64_t count;
  Scratch<int32_t> rows, columns;
};

// One half of a token's candidates: the best keys, sorted. Padded, so that whole vectors of scores
// can be read from any place.
template <class Real>
struct BestKeys {
  explicit BestKeys(int64_t count)
      : count(count), ids(count), orders(count), scores(count + kLanes<Real>) {
    std::fill(scores.data(), scores.data() + count + kLanes<Real>, Real(0));
  }

  void select_from(Selection<Real>& selection, const ordered_t<Real>* key_scores, int64_t keys) {
    selection.select(key_scores, keys, count, ids.data(), orders.data());
    for (int64_t i = 0; i < count; ++i) {
      scores[i] = from_ordered<Real>(orders[i]);
    }
  }

  int64_t count;
  Scratch<int32_t> ids;
  Scratch<ordered_t<Real>> orders;
  Scratch<Real> scores;
};

// The sums of all pairs in PairRanks' order. Every row rank's sums are stored in whole vectors; the
// next one's overwrite what is too much.
template <class Real>
void add_pairs(const BestKeys<Real>& rows,
               const BestKeys<Real>& columns,
               int64_t k,
               int64_t count,
               ordered_t<Real>* sums) {
  constexpr int lanes = kLanes<Real>;
  int64_t position = 0;
  for (int64_t i = 0; position < count; ++i) {
    const int64_t partners = count_candidate_columns(i, columns.count, k);
    for (int64_t j = 0; j < partners; j += lanes) {
      const Vector<Real> sum = rows.scores[i] + load(columns.scores.data() + j);
      store_ordered<Real>(sums + position + j, to_ordered_vector<Real>(sum));
    }
    position += partners;
  }
  std::fill(sums + count, sums + round_up(count, kScoresPerWord), kBelowAll<Real>);
}

// The one case in which a sum of two halves is not monotone: infinities of opposite sign make NaN,
// which ranks highest although one of its halves may be last in its list. Then the candidates are
// the pairs of ranks and, of such pairs, the first k that are not among them.
template <class Real>
class OppositeInfinities {
 public:
  // Whether there may be such pairs, told from the sorted lists: +inf stands behind NaN only, and
  // where k NaNs hide it, their pairs fill the result.
  static bool possible(const BestKeys<Real>& rows, const BestKeys<Real>& columns) {
    return has_positive_infinity(rows) || has_positive_infinity(columns);
  }

  OppositeInfinities(const ordered_t<Real>* rows,
                     int64_t row_count,
                     const ordered_t<Real>* columns,
                     int64_t column_count,
                     int64_t k)
      : rows_{rows, row_count}, columns_{columns, column_count}, k_(k) {}

  // Writes the k best of `sums` and of the pairs that PairRanks leaves out.
  void select(const PairRanks& ranks,
              const ordered_t<Real>* sums,
              const BestKeys<Real>& best_rows,
              const BestKeys<Real>& best_columns,
              Real* scores,
              int64_t* indices) const {
    Scratch<Candidate> candidates(ranks.count + 2 * k_);
    int64_t count = 0;
    for (; count < ranks.count; ++count) {
      const int64_t i = ranks.rows[count], j = ranks.columns[count];
      candidates[count] = {sums[count], i * columns_.count + j,
                           best_rows.ids[i] * columns_.count + best_columns.ids[j]};
    }
    count += append_products(kInfinity, -kInfinity, candidates.data() + count);
    count += append_products(-kInfinity, kInfinity, candidates.data() + count);
    const auto is_better = [](const Candidate& a, const Candidate& b) {
      return a.order != b.order ? a.order > b.order : a.rank < b.rank;
    };
    std::partial_sort(candidates.data(), candidates.data() + k_, candidates.data() + count,
                      is_better);
    for (int64_t i = 0; i < k_; ++i) {
      scores[i] = from_ordered<Real>(candidates[i].order);
      indices[i] = candidates[i].id;
    }
  }

 private:
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

  struct Candidate {
    ordered_t<Real> order;
    int64_t rank;  // row rank · C + column rank
    int64_t id;
  };

  struct Half {
    const ordered_t<Real>* scores;
    int64_t count;

    int64_t first_rank_of(Real infinity) const {
      const ordered_t<Real> nan = std::numeric_limits<ordered_t<Real>>::max();
      int64_t before = 0;
      for (int64_t i = 0; i < count; ++i) {
        before += infinity > 0 ? scores[i] == nan : scores[i] != to_ordered(infinity);
      }
      return before;
    }
  };

  static bool has_positive_infinity(const BestKeys<Real>& best) {
    const Real* scores = best.scores.data();
    return std::any_of(scores, scores + best.count, [](Real score) { return score == kInfinity; });
  }

  int64_t append_products(Real row_value, Real column_value, Candidate* candidates) const {
    const ordered_t<Real> row_order = to_ordered(row_value);
    const ordered_t<Real> column_order = to_ordered(column_value);
    int64_t appended = 0;
    int64_t visited = 0;
    int64_t row_rank = rows_.first_rank_of(row_value);
    for (int64_t r = 0; r < rows_.count && visited < k_; ++r) {
      if (rows_.scores[r] != row_order) {
        continue;
      }
      int64_t column_rank = columns_.first_rank_of(column_value);
      for (int64_t c = 0; c < columns_.count && visited < k_; ++c) {
        if (columns_.scores[c] != column_order) {
          continue;
        }
        if (!is_candidate(row_rank, column_rank, k_)) {
          candidates[appended++] = {to_ordered(row_value + column_value),
                                    row_rank * columns_.count + column_rank,
                                    r * columns_.count + c};
        }
        ++column_rank;
        ++visited;
      }
      ++row_rank;
    }
    return appended;
  }

  Half rows_, columns_;
  int64_t k_;
};

}  // namespace

template <class Real>
void pack_keys(const PackKeys<Real>& pack, int64_t first, int64_t last) {
  const int64_t panels = (pack.count + kPanel<Real> - 1) / kPanel<Real>;
  for (int64_t item = first; item < last; ++item) {
    pack_panel(pack, item / panels, item % panels);
  }
}

template <class Real>
void retrieve(const ProductKeyTopk<Real>& retrieval, int64_t first, int64_t last) {
  const int64_t rows = retrieval.rows.keys;
  const int64_t columns = retrieval.columns.keys;
  const int64_t k = retrieval.k;
  const int64_t row_stride = padded_scores<Real>(rows);
  const int64_t column_stride = padded_scores<Real>(columns);
  const int64_t query_width = 2 * retrieval.half_width;
  const int64_t query_stride = retrieval.heads * query_width;
  const int64_t block = retrieval.tokens_per_block;

  Scratch<ordered_t<Real>> row_scores(block * row_stride);
  Scratch<ordered_t<Real>> column_scores(block * column_stride);
  BestKeys<Real> best_rows(std::min(k, rows));
  BestKeys<Real> best_columns(std::min(k, columns));
  const PairRanks ranks(best_rows.count, best_columns.count, k);
  Scratch<ordered_t<Real>> sums(round_up(ranks.count, kScoresPerWord) + kLanes<Real>);
  Selection<Real> selection(std::max({rows, columns, ranks.count}), k);
  Scratch<int32_t> best_pairs(k);
  Scratch<ordered_t<Real>> best_orders(k);

  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item % retrieval.heads;
    const int64_t first_token = item / retrieval.heads * block;
    const int64_t tokens = std::min(block, retrieval.tokens - first_token);
    const Real* query = retrieval.query + first_token * query_stride + head * query_width;
    score_keys(query, query_stride, tokens, retrieval.rows.data + head * retrieval.rows.head_stride,
               rows, retrieval.half_width, row_scores.data());
    score_keys(query + retrieval.half_width, query_stride, tokens,
               retrieval.columns.data + head * retrieval.columns.head_stride, columns,
               retrieval.half_width, column_scores.data());

    for (int64_t t = 0; t < tokens; ++t) {
      const ordered_t<Real>* token_rows = row_scores.data() + t * row_stride;
      const ordered_t<Real>* token_columns = column_scores.data() + t * column_stride;
      const int64_t target = ((first_token + t) * retrieval.heads + head) * k;
      Real* scores = retrieval.scores + target;
      int64_t* indices = retrieval.indices + target;

      best_rows.select_from(selection, token_rows, rows);
      best_columns.select_from(selection, token_columns, columns);
      add_pairs(best_rows, best_columns, k, ranks.count, sums.data());
      if (OppositeInfinities<Real>::possible(best_rows, best_columns)) {
        OppositeInfinities<Real>(token_rows, rows, token_columns, columns, k)
            .select(ranks, sums.data(), best_rows, best_columns, scores, indices);
        continue;
      }
      selection.select(sums.data(), ranks.count, k, best_pairs.data(), best_orders.data());
      for (int64_t i = 0; i < k; ++i) {
        const int64_t row = best_rows.ids[ranks.rows[best_pairs[i]]];
        const int64_t column = best_columns.ids[ranks.columns[best_pairs[i]]];
        scores[i] = from_ordered<Real>(best_orders[i]);
        indices[i] = row * columns + column;
      }
    }
  }
}

template void pack_keys(const PackKeys<float>&, int64_t, int64_t);
template void pack_keys(const PackKeys<double>&, int64_t, int64_t);
template void retrieve(const ProductKeyTopk<float>&, int64_t, int64_t);
template void retrieve(const ProductKeyTopk<double>&, int64_t, int64_t);

}  // namespace peer::cpu::PEER_CAPABILITY
