// Product-key retrieval: the k best of R·C experts for every token and head, exactly, without
// computing R·C scores.
//
//   1. sub-scores   <q1, row_keys[r]> and <q2, col_keys[c]> of a block of tokens, in cache
//                   (sub_scores.h)
//   2. selection    the k best rows and the k best columns of every token, sorted (selection.h)
//   3. pairs        the sums row + column, only of candidates (count_candidate_columns), or only of
//                   enabled pairs (EnabledPairs)
//
// Shapes      query (T, H, dim_key)   keys (R or C, dim_key / 2), shared or for each head
//             scores, indices (T, H, k)
// Work item   a block of tokens and one head
// Traffic     the packed keys once per work item; nothing of size R or C per token leaves the cache
// Exactness   every sub-score is summed in the order of the key's elements, whatever the block; a
//             pair's score is one addition
// Order       as in kernels/product_key_topk.h. Scores are compared as ordered integers (ordered.h)
// Requires    k up to R·C; R, C and the candidates below 2^31
#include "kernels/cpu/product_key_topk.h"

#include <algorithm>

#include "kernels/cpu/gathered_rows.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/sub_scores.h"
#include "kernels/cpu/vector.h"
#include "kernels/ordered.h"

namespace peer::cpu {

namespace PEER_CAPABILITY {

namespace {

// The ranks of the candidate pairs, in order of (row rank, column rank), so that the position
// decides between equal scores.
struct CandidateRanks {
  CandidateRanks(int64_t row_count, int64_t column_count, int64_t k)
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

// The best keys of one half of a query, sorted. Padded, so that whole vectors of scores can be read
// from any place.
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

// The sums of all candidates, in the order of CandidateRanks. The sums of a row are stored in whole
// vectors; those of the next row overwrite the excess.
template <class Real>
void add_candidates(const BestKeys<Real>& rows,
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

template <class Real>
void pack_keys(const PackKeys<Real>& pass, int64_t first, int64_t last) {
  const int64_t panels = (pass.count + kKeysPerPanel<Real> - 1) / kKeysPerPanel<Real>;
  for (int64_t item = first; item < last; ++item) {
    pack_panel(pass, item / panels, item % panels);
  }
}

// The sub-scores of a block's queries, in the places of unused keys their least value.
template <class Real>
void bury_unused_keys(const Keys<Real>& keys, int64_t tokens, ordered_t<Real>* scores) {
  const int64_t stride = padded_scores<Real>(keys.count);
  for (int64_t key = 0; key < keys.count; ++key) {
    if (keys.unused[key]) {
      for (int64_t t = 0; t < tokens; ++t) {
        scores[t * stride + key] = unused_key_order<Real>();
      }
    }
  }
}

// The sub-scores of the queries of one work item, as ordered integers.
template <class Real>
class BlockScores {
 public:
  BlockScores(const ProductKeyTopk<Real>& pass, int64_t tokens_per_block)
      : pass_(pass),
        tokens_per_block_(tokens_per_block),
        row_stride_(padded_scores<Real>(pass.rows.count)),
        column_stride_(padded_scores<Real>(pass.columns.count)),
        row_scores_(tokens_per_block * row_stride_),
        column_scores_(tokens_per_block * column_stride_) {}

  void score(int64_t item) {
    const int64_t query_width = 2 * pass_.half_width;
    const int64_t query_stride = pass_.heads * query_width;
    head_ = item % pass_.heads;
    first_token_ = item / pass_.heads * tokens_per_block_;
    tokens_ = std::min(tokens_per_block_, pass_.tokens - first_token_);
    const Real* query = pass_.query + first_token_ * query_stride + head_ * query_width;
    score_keys(query, query_stride, tokens_, pass_.rows.data + head_ * pass_.rows.head_stride,
               pass_.rows.count, pass_.half_width, row_scores_.data());
    score_keys(query + pass_.half_width, query_stride, tokens_,
               pass_.columns.data + head_ * pass_.columns.head_stride, pass_.columns.count,
               pass_.half_width, column_scores_.data());
  }

  int64_t tokens() const { return tokens_; }
  ordered_t<Real>* rows(int64_t t) { return row_scores_.data() + t * row_stride_; }
  ordered_t<Real>* columns(int64_t t) { return column_scores_.data() + t * column_stride_; }

  // Where the results of a query begin.
  int64_t target(int64_t t) const { return ((first_token_ + t) * pass_.heads + head_) * pass_.k; }

 private:
  const ProductKeyTopk<Real>& pass_;
  int64_t tokens_per_block_;
  int64_t row_stride_, column_stride_;
  Scratch<ordered_t<Real>> row_scores_, column_scores_;
  int64_t head_ = 0, first_token_ = 0, tokens_ = 0;
};

template <class Real>
void retrieve_from_all(const ProductKeyTopk<Real>& pass,
                       int64_t tokens_per_block,
                       int64_t first,
                       int64_t last) {
  const int64_t rows = pass.rows.count;
  const int64_t columns = pass.columns.count;
  const int64_t k = pass.k;
  BlockScores<Real> block(pass, tokens_per_block);
  BestKeys<Real> best_rows(std::min(k, rows));
  BestKeys<Real> best_columns(std::min(k, columns));
  const CandidateRanks ranks(best_rows.count, best_columns.count, k);
  Scratch<ordered_t<Real>> sums(round_up(ranks.count, kScoresPerWord) + kLanes<Real>);
  Selection<Real> selection(std::max({rows, columns, ranks.count}), k);
  Scratch<int32_t> best_candidates(k);
  Scratch<ordered_t<Real>> best_orders(k);

  for (int64_t item = first; item < last; ++item) {
    block.score(item);
    for (int64_t t = 0; t < block.tokens(); ++t) {
      best_rows.select_from(selection, block.rows(t), rows);
      best_columns.select_from(selection, block.columns(t), columns);
      add_candidates(best_rows, best_columns, k, ranks.count, sums.data());
      selection.select(sums.data(), ranks.count, k, best_candidates.data(), best_orders.data());

      Real* scores = pass.scores + block.target(t);
      int64_t* indices = pass.indices + block.target(t);
      for (int64_t i = 0; i < k; ++i) {
        const int64_t row = best_rows.ids[ranks.rows[best_candidates[i]]];
        const int64_t column = best_columns.ids[ranks.columns[best_candidates[i]]];
        scores[i] = from_ordered<Real>(best_orders[i]);
        indices[i] = row * columns + column;
      }
    }
  }
}

// The k best enabled pairs of one query.
//
// Scan        the best rows, from the best on, and in each the best columns, from the best on. This
//             is the order of (row rank, column rank), so among equal sums the first is the best.
//             A row ends at the first sum that is not above the k-th best so far, because the later
//             ones are not above it either. The scan ends when the first sum of a row is not
// Depth       only the best keys of each half are sorted. If a pair of another key may be among the
//             k best, the scan begins again with more keys, at last with all
template <class Real>
class EnabledPairs {
 public:
  explicit EnabledPairs(const ProductKeyTopk<Real>& pass)
      : pass_(pass), best_(pass.k), nearest_(pass, 2 * pass.k) {}

  // Writes the results.
  void select(const ordered_t<Real>* row_scores,
              const ordered_t<Real>* column_scores,
              int64_t target) {
    bool is_found = scan(nearest_, row_scores, column_scores);
    for (int64_t depth = 8 * pass_.k; !is_found; depth *= 4) {
      SortedKeys more(pass_, depth);
      is_found = scan(more, row_scores, column_scores) || more.are_all(pass_);
    }
    std::sort_heap(best_.data(), best_.data() + count_, is_better);
    for (int64_t i = 0; i < count_; ++i) {
      pass_.scores[target + i] = from_ordered<Real>(best_[i].order);
      pass_.indices[target + i] = best_[i].expert;
    }
  }

 private:
  using Order = ordered_t<Real>;

  struct Pair {
    Order order;
    int32_t row_rank = 0, column_rank = 0;
    int64_t expert = -1;
  };

  static bool is_better(const Pair& a, const Pair& b) {
    if (a.order != b.order) {
      return a.order > b.order;
    }
    return a.row_rank != b.row_rank ? a.row_rank < b.row_rank : a.column_rank < b.column_rank;
  }

  // The best keys of both halves.
  struct SortedKeys {
    SortedKeys(const ProductKeyTopk<Real>& pass, int64_t depth)
        : rows(std::min(depth, pass.rows.count)),
          columns(std::min(depth, pass.columns.count)),
          selection(std::max(pass.rows.count, pass.columns.count), depth) {}

    bool are_all(const ProductKeyTopk<Real>& pass) const {
      return rows.count == pass.rows.count && columns.count == pass.columns.count;
    }

    BestKeys<Real> rows, columns;
    Selection<Real> selection;
  };

  // Finds the best enabled pairs of the best keys. Whether no other pair can be among them.
  bool scan(SortedKeys& keys, const Order* row_scores, const Order* column_scores) {
    keys.rows.select_from(keys.selection, row_scores, pass_.rows.count);
    keys.columns.select_from(keys.selection, column_scores, pass_.columns.count);
    count_ = 0;
    // The best pair that the scanned rows can have beyond the sorted columns.
    Pair unseen = {.order = kBelowAll<Real>};
    for (int64_t i = 0; i < keys.rows.count; ++i) {
      const int64_t columns = scan_row(keys, i);
      if (columns == 0) {
        return is_better(best_[0], unseen);
      }
      if (columns == keys.columns.count && columns < pass_.columns.count) {
        const Pair next = {sum(keys, i, columns - 1), int32_t(i), int32_t(columns)};
        unseen = is_better(next, unseen) ? next : unseen;
      }
    }
    return keys.rows.count == pass_.rows.count && count_ == pass_.k && is_better(best_[0], unseen);
  }

  // The number of columns before the row's end.
  int64_t scan_row(const SortedKeys& keys, int64_t i) {
    const int64_t first_expert = keys.rows.ids[i] * pass_.columns.count;
    for (int64_t j = 0; j < keys.columns.count; ++j) {
      const Order order = sum(keys, i, j);
      if (count_ == pass_.k && order <= best_[0].order) {
        return j;
      }
      const int64_t expert = first_expert + keys.columns.ids[j];
      if (!pass_.disabled[expert]) {
        add({order, int32_t(i), int32_t(j), expert});
      }
    }
    return keys.columns.count;
  }

  static Order sum(const SortedKeys& keys, int64_t i, int64_t j) {
    return to_ordered(keys.rows.scores[i] + keys.columns.scores[j]);
  }

  // Replaces the worst pair if there are k.
  void add(const Pair& pair) {
    if (count_ == pass_.k) {
      std::pop_heap(best_.data(), best_.data() + count_, is_better);
      --count_;
    }
    best_[count_++] = pair;
    std::push_heap(best_.data(), best_.data() + count_, is_better);
  }

  const ProductKeyTopk<Real>& pass_;
  int64_t count_ = 0;   // of the pairs so far
  Scratch<Pair> best_;  // (k), a heap with the worst pair first
  SortedKeys nearest_;
};

template <class Real>
void retrieve_from_enabled(const ProductKeyTopk<Real>& pass,
                           int64_t tokens_per_block,
                           int64_t first,
                           int64_t last) {
  BlockScores<Real> block(pass, tokens_per_block);
  EnabledPairs<Real> pairs(pass);
  for (int64_t item = first; item < last; ++item) {
    block.score(item);
    bury_unused_keys(pass.rows, block.tokens(), block.rows(0));
    bury_unused_keys(pass.columns, block.tokens(), block.columns(0));
    for (int64_t t = 0; t < block.tokens(); ++t) {
      pairs.select(block.rows(t), block.columns(t), block.target(t));
    }
  }
}

template <class Real>
void gather_sum(const GatherSum<Real>& pass, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const auto rows_of = [&](int64_t item) {
      return RowList<Real>{pass.table, pass.indices + item * pass.terms, pass.terms};
    };
    sum_weighted_rows(pass.coefficients + i * pass.terms, pass.width, rows_of(i),
                      i + 1 < last ? rows_of(i + 1) : RowList<Real>{},
                      pass.out.data + i * pass.out.stride);
  }
}

template <class Real>
constexpr ProductKeyTopkFunctions<Real> kFunctions = {
    .keys_per_panel = kKeysPerPanel<Real>,
    .pack_keys = pack_keys<Real>,
    .retrieve_from_all = retrieve_from_all<Real>,
    .retrieve_from_enabled = retrieve_from_enabled<Real>,
    .gather_sum = gather_sum<Real>,
};

}  // namespace

}  // namespace PEER_CAPABILITY

constinit const ProductKeyTopkKernels ProductKeyTopkKernels::PEER_CAPABILITY = {
    PEER_CAPABILITY::kFunctions<float>,
    PEER_CAPABILITY::kFunctions<double>,
};

}  // namespace peer::cpu
