// Row update: a table row is changed by its gradient as soon as that is summed, so that no gradient
// is stored.
//
//   g[row, part] = Σ over the run's pairs of coefficients[part, pair]·source[pair / pairs_per_row,
//                  part]
//   w[row, part], state[row, part] = rule(w[row, part], state[row, part], g[row, part])
//
// Work item   a row of source, where these are the gradients; else as in the expert pass, one
//             chunk, then one split segment
// Traffic     per row, the table's row and its state, read and written once; g stays in the
//             first-level cache. Rows lie anywhere in a table far larger than any cache, so the
//             first lines of the rows to come are requested ahead
// Exactness   g as in the expert pass, without its rounding; the mean of squares in a fixed order;
//             everything in the accumulation type, and one rounding at the store
#include <cmath>

#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/segment_sum.h"
#include "kernels/cpu/stochastic_rounding.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

constexpr int64_t kRowsAhead = 4;
constexpr int64_t kBytesAhead = 256;

// What step of a row: a whole vector, or the first lanes of the last one.
struct Whole {};
struct First {
  int64_t count;
};

template <class Element>
Vector<accumulation_t<Element>> read(const Element* source, Whole) {
  return load(source);
}

template <class Element>
Vector<accumulation_t<Element>> read(const Element* source, First part) {
  return load_first(source, part.count);
}

// step(column, part) for all of a row.
template <class Real, class Step>
void for_each_vector(int64_t width, const Step& step) {
  int64_t column = 0;
  for (; column + kLanes<Real> <= width; column += kLanes<Real>) {
    step(column, Whole{});
  }
  if (column < width) {
    step(column, First{width - column});
  }
}

// How a row is rounded when it is written.
struct ToNearest {
  template <class Element>
  void write(Element* row, int64_t column, Vector<accumulation_t<Element>> value, Whole) const {
    store(row + column, value);
  }
  template <class Element>
  void write(Element* row,
             int64_t column,
             Vector<accumulation_t<Element>> value,
             First part) const {
    store_first(row + column, value, part.count);
  }
};

struct Stochastically {
  uint64_t row_key;
  int64_t first_column;  // of the part in the row

  template <class Element>
  void write(Element* row, int64_t column, Vector<accumulation_t<Element>> value, Whole) const {
    store_stochastic(row + column, value, random_words(row_key, first_column + column));
  }
  template <class Element>
  void write(Element* row,
             int64_t column,
             Vector<accumulation_t<Element>> value,
             First part) const {
    store_first_stochastic(row + column, value, random_words(row_key, first_column + column),
                           part.count);
  }
};

// Four sums side by side hide the latency of multiply-add.
template <class Real, class Gradient>
Real mean_of_squares(const Gradient* gradient, int64_t width) {
  constexpr int lanes = kLanes<Real>;
  constexpr int chains = 4;
  Vector<Real> sums[chains] = {};
  int64_t column = 0;
  for (; column + chains * lanes <= width; column += chains * lanes) {
    for (int c = 0; c < chains; ++c) {
      const Vector<Real> g = load(gradient + column + c * lanes);
      sums[c] += g * g;
    }
  }
  for_each_vector<Real>(width - column, [&](int64_t rest, auto part) {
    const Vector<Real> g = read(gradient + column + rest, part);
    sums[0] += g * g;
  });
  return sum_of_lanes<Real>((sums[0] + sums[1]) + (sums[2] + sums[3])) / Real(width);
}

// w = decay_factor·w - scale·g
template <class Table, class Gradient, class Rounding>
void descend(Table* w,
             const Gradient* gradient,
             int64_t width,
             accumulation_t<Table> decay_factor,
             accumulation_t<Table> scale,
             const Rounding& rounding) {
  for_each_vector<accumulation_t<Table>>(width, [&](int64_t column, auto part) {
    rounding.write(w, column,
                   decay_factor * read(w + column, part) - scale * read(gradient + column, part),
                   part);
  });
}

// m = decay·m + gain·g, then w = decay_factor·w - scale·m, with nesterov w = decay_factor·w -
// scale·(g + decay·m). m enters w before it is rounded.
template <bool nesterov, class Table, class Gradient, class Rounding>
void descend_with_momentum(Table* w,
                           Table* momentum,
                           const Gradient* gradient,
                           int64_t width,
                           accumulation_t<Table> decay,
                           accumulation_t<Table> gain,
                           accumulation_t<Table> decay_factor,
                           accumulation_t<Table> scale,
                           const Rounding& rounding,
                           const Rounding& momentum_rounding) {
  using Real = accumulation_t<Table>;
  for_each_vector<Real>(width, [&](int64_t column, auto part) {
    const Vector<Real> g = read(gradient + column, part);
    const Vector<Real> m = decay * read(momentum + column, part) + gain * g;
    momentum_rounding.write(momentum, column, m, part);
    const Vector<Real> direction = nesterov ? g + decay * m : m;
    rounding.write(w, column, decay_factor * read(w + column, part) - scale * direction, part);
  });
}

// A part of a row, and its state where the rule has any.
template <class Table>
struct Part {
  Table* w;
  Table* momentum;
  accumulation_t<Table>* second_moment;
  double step;
};

template <class Table, class Gradient, class Rounding>
void update_part(const UpdateRule<Table>& rule,
                 int64_t width,
                 const Part<Table>& part,
                 const Gradient* gradient,
                 const Rounding& rounding,
                 const Rounding& momentum_rounding) {
  using Real = accumulation_t<Table>;
  const Real decay_factor = Real(rule.decay_factor);
  const auto& [w, momentum, second_moment, step] = part;
  switch (rule.rule) {
    case Rule::rowwise_adagrad: {
      const Real sum = *second_moment += mean_of_squares<Real>(gradient, width);
      const Real scale = Real(rule.lr) / (std::sqrt(sum) + Real(rule.eps));
      descend(w, gradient, width, decay_factor, scale, rounding);
      break;
    }
    case Rule::sgd: {
      const Real lr = Real(rule.lr), decay = Real(rule.beta1);
      if (momentum == nullptr) {
        descend(w, gradient, width, decay_factor, lr, rounding);
      } else if (rule.nesterov) {
        descend_with_momentum<true>(w, momentum, gradient, width, decay, Real(1), decay_factor, lr,
                                    rounding, momentum_rounding);
      } else {
        descend_with_momentum<false>(w, momentum, gradient, width, decay, Real(1), decay_factor, lr,
                                     rounding, momentum_rounding);
      }
      break;
    }
    case Rule::rowwise_adam: {
      const double first_bias = 1 - std::pow(rule.beta1, step);
      const double second_bias = 1 - std::pow(rule.beta2, step);
      Real& second = *second_moment;
      second =
          Real(rule.beta2) * second + Real(1 - rule.beta2) * mean_of_squares<Real>(gradient, width);
      const Real scale =
          Real(rule.lr / first_bias) / (std::sqrt(second / Real(second_bias)) + Real(rule.eps));
      descend_with_momentum<false>(w, momentum, gradient, width, Real(rule.beta1),
                                   Real(1 - rule.beta1), decay_factor, scale, rounding,
                                   momentum_rounding);
      break;
    }
  }
}

template <class Table, class Source, class Gradient>
void update_row(const TableUpdate<Table, Source>& update, int64_t row, const Gradient* gradient) {
  const UpdateRule<Table>& rule = update.rule;
  Table* const w = update.table.data + row * update.table.stride;
  Table* const momentum = rule.momentum ? rule.momentum.data + row * rule.momentum.stride : nullptr;
  const double step = rule.rule == Rule::rowwise_adam ? ++rule.row_steps[row] : 0;
  for (int64_t p = 0; p < update.parts; ++p) {
    const int64_t column = p * update.width;
    const Part<Table> part = {
        w + column,
        momentum ? momentum + column : nullptr,
        rule.second_moments ? rule.second_moments + row * update.parts + p : nullptr,
        step,
    };
    if (update.stochastic_rounding) {
      const Stochastically rounding{derive_key(update.key, 2 * uint64_t(row)), column};
      const Stochastically momentum_rounding{derive_key(update.key, 2 * uint64_t(row) + 1), column};
      update_part(rule, update.width, part, gradient + column, rounding, momentum_rounding);
    } else {
      update_part(rule, update.width, part, gradient + column, ToNearest{}, ToNearest{});
    }
  }
}

template <class Element>
void prefetch_head(Rows<Element> rows, int64_t row, int64_t width) {
  const char* head = reinterpret_cast<const char*>(rows.data + row * rows.stride);
  const int64_t row_bytes = width * int64_t(sizeof(Element));
  const int64_t bytes = row_bytes < kBytesAhead ? row_bytes : kBytesAhead;
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(head + byte, /*for writing*/ 1);
  }
}

template <class Table, class Source>
void prefetch_row(const TableUpdate<Table, Source>& update, int64_t row) {
  const int64_t width = update.parts * update.width;
  prefetch_head(update.table, row, width);
  if (update.rule.momentum) {
    prefetch_head(update.rule.momentum, row, width);
  }
  if (update.rule.second_moments != nullptr) {
    __builtin_prefetch(update.rule.second_moments + row * update.parts, 1);
  }
}

// Of all parts, side by side.
template <class Table, class Source, class Real>
void sum_chunk_of_parts(const TableUpdate<Table, Source>& update, const Chunk& chunk, Real* out) {
  TableUpdate<Table, Source> part = update;
  for (int64_t p = 0; p < update.parts; ++p) {
    part.source = update.source.from_column(p * update.width);
    if (update.coefficients != nullptr) {
      part.coefficients = update.coefficients + p * update.pair_count;
      sum_chunk<true>(part, chunk, out + p * update.width);
    } else {
      sum_chunk<false>(part, chunk, out + p * update.width);
    }
  }
}

}  // namespace

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    if (i + kRowsAhead < last) {
      prefetch_row(update, update.ids ? update.ids[i + kRowsAhead] : i + kRowsAhead);
    }
    update_row(update, update.ids ? update.ids[i] : i,
               update.source.data + i * update.source.stride);
  }
}

template <class Table, class Source>
void update_chunks(const TableUpdate<Table, Source>& update, int64_t first, int64_t last) {
  Scratch<accumulation_t<Table>> gradient(update.parts * update.width);
  for (int64_t c = first; c < last; ++c) {
    if (c + kRowsAhead < last && !update.chunks[c + kRowsAhead].is_partial) {
      prefetch_row(update, update.chunks[c + kRowsAhead].row);
    }
    const Chunk& chunk = update.chunks[c];
    if (chunk.is_partial) {
      sum_chunk_of_parts(update, chunk,
                         update.partial_sums.data + chunk.row * update.partial_sums.stride);
    } else {
      sum_chunk_of_parts(update, chunk, gradient.data());
      update_row(update, chunk.row, gradient.data());
    }
  }
}

template <class Table, class Source>
void update_split_segments(const TableUpdate<Table, Source>& update, int64_t first, int64_t last) {
  const int64_t width = update.parts * update.width;
  Scratch<accumulation_t<Table>> gradient(width);
  for (int64_t r = first; r < last; ++r) {
    const SplitSegment& run = update.split_segments[r];
    sum_split_segment(update.partial_sums, width, run, gradient.data());
    update_row(update, run.row, gradient.data());
  }
}

#define PEER_INSTANTIATE(Table, Source)                                             \
  template void update_rows(const TableUpdate<Table, Source>&, int64_t, int64_t);   \
  template void update_chunks(const TableUpdate<Table, Source>&, int64_t, int64_t); \
  template void update_split_segments(const TableUpdate<Table, Source>&, int64_t, int64_t);

PEER_INSTANTIATE(float, float)
PEER_INSTANTIATE(double, double)
PEER_INSTANTIATE(BFloat16, BFloat16)
PEER_INSTANTIATE(BFloat16, float)
PEER_INSTANTIATE(Half, Half)
PEER_INSTANTIATE(Half, float)

#undef PEER_INSTANTIATE

}  // namespace peer::cpu::PEER_CAPABILITY
