// A table row is updated by its gradient as soon as the gradient is summed, so that no gradient is
// stored.
//
//   g[row, part] = Σ over the segment's pairs of
//                  coefficients[part, pair]·source[pair / pairs_per_row, part]
//   w[row, part], state[row, part] = rule(w[row, part], state[row, part], g[row, part])
//
// Rows that are frozen or have a gradient of zeros are left alone.
//
// Shapes      source (·, parts·width)   table, momentum (N, parts·width)
//             second_moments (N, parts)
// Work item   a row of the source, if its rows are the gradients; otherwise one pair, if single
//             pairs are apart, one chunk, then one split segment
// Traffic     per row, the table's row and its state, read and written once; g stays in the
//             first-level cache. Rows lie anywhere in a table far larger than any cache, so the
//             row after the next one is prefetched, each line while the same line of the current
//             row is updated
// Exactness   g as in table_grad.cpp, without its rounding; the mean of squares in a fixed order;
//             everything in the accumulation type, and one rounding at the store
// Requires    pairs sorted by owner, stably, or distinct rows; nothing of widths, strides and
//             alignments
#include "kernels/cpu/table_update.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/gathered_rows.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/segment_sum.h"
#include "kernels/cpu/stochastic_rounding.h"

namespace peer::cpu {

namespace PEER_CAPABILITY {

namespace {

constexpr int64_t kRowsAhead = 2;

// A step through a row: two whole vectors, or the first elements of the last two.
struct WholeStep {};
struct LastStep {
  int64_t count;
};

template <class Element>
TwoVectors<accumulation_t<Element>> read(const Element* source, WholeStep) {
  return load_two(source);
}

template <class Element>
TwoVectors<accumulation_t<Element>> read(const Element* source, LastStep step) {
  return load_first_of_two(source, step.count);
}

// visit(column, step) for all of a row. Inlined, so that what the visit captures stays in
// registers.
template <class Real, class Visit>
[[gnu::always_inline]] inline void for_each_step(int64_t width, const Visit& visit) {
  constexpr int64_t step = 2 * kLanes<Real>;
  int64_t column = 0;
  for (; column + step <= width; column += step) {
    visit(column, WholeStep{});
  }
  if (column < width) {
    visit(column, LastStep{.count = width - column});
  }
}

// How the columns of a part are rounded when they are stored.
struct RoundToNearest {
  template <class Element>
  void store(Element* target, int64_t /*column*/, TwoVectors<accumulation_t<Element>> value) const {
    store_two(target, value);
  }
};

struct RoundStochastically {
  uint64_t row_key;
  int64_t first_place;  // of the part

  template <class Element>
  void store(Element* target, int64_t column, TwoVectors<float> value) const {
    store_two_stochastically(target, value, RandomBits(row_key, first_place + column));
  }
};

template <class Element, class Rounding>
void write(Element* part,
           int64_t column,
           TwoVectors<accumulation_t<Element>> value,
           const Rounding& rounding,
           WholeStep) {
  rounding.store(part + column, column, value);
}

template <class Element, class Rounding>
void write(Element* part,
           int64_t column,
           TwoVectors<accumulation_t<Element>> value,
           const Rounding& rounding,
           LastStep step) {
  Element padded[2 * kLanes<accumulation_t<Element>>];
  rounding.store(padded, column, value);
  std::memcpy(part + column, padded, step.count * sizeof(Element));
}

// Whether all numbers are zero, of either sign. On the bits, because numbers may be compared with
// denormals taken as zero. The first blocks of nearly all gradients decide.
template <class Element>
bool is_zero(const Element* gradient, int64_t width) {
  using Bits = std::conditional_t<sizeof(Element) == 8, uint64_t,
                                  std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>>;
  constexpr int64_t block = kVectorBytes / sizeof(Element);
  for (int64_t begin = 0; begin < width; begin += block) {
    const int64_t end = begin + block < width ? begin + block : width;
    Bits magnitudes = 0;
    for (int64_t i = begin; i < end; ++i) {
      magnitudes |= Bits(bit_cast<Bits>(gradient[i]) << 1);
    }
    if (magnitudes != 0) {
      return false;
    }
  }
  return true;
}

// Four sums side by side hide the latency of multiply-add.
template <class Real, class Gradient>
Real mean_of_squares(const Gradient* gradient, int64_t width) {
  constexpr int64_t step = 2 * kLanes<Real>;
  TwoVectors<Real> sums[2] = {};
  int64_t column = 0;
  for (; column + 2 * step <= width; column += 2 * step) {
    for (int64_t i = 0; i < 2; ++i) {
      const TwoVectors<Real> g = load_two(gradient + column + i * step);
      sums[i] = sums[i] + g * g;
    }
  }
  for_each_step<Real>(width - column, [&](int64_t rest, auto step_kind) {
    const TwoVectors<Real> g = read(gradient + column + rest, step_kind);
    sums[0] = sums[0] + g * g;
  });
  const TwoVectors<Real> sum = sums[0] + sums[1];
  return reduce_add<Real>(sum.first + sum.second) / Real(width);
}

// A part of a row, and its state if the rule has any. ahead: the same part of a later row.
template <class Table>
struct Part {
  Table* w;
  Table* momentum;
  accumulation_t<Table>* second_moment;
  const Table* w_ahead;
  const Table* momentum_ahead;
};

template <class Element>
void prefetch_step(const Element* part, int64_t column) {
  constexpr int64_t bytes = 2 * kLanes<accumulation_t<Element>> * sizeof(Element);
  prefetch_bytes</*for_writing=*/true>(part + column, bytes);
}

// w = decay_factor·w - scale·g
template <class Table, class Gradient, class Rounding>
void descend(const Part<Table>& part,
             const Gradient* gradient,
             int64_t width,
             accumulation_t<Table> decay_factor,
             accumulation_t<Table> scale,
             Rounding rounding) {
  Table* const w = part.w;
  const Table* const ahead = part.w_ahead;
  for_each_step<accumulation_t<Table>>(width, [=](int64_t column, auto step) {
    prefetch_step(ahead, column);
    const auto g = read(gradient + column, step);
    write(w, column, decay_factor * read(w + column, step) - scale * g, rounding, step);
  });
}

// m = beta·m + gain·g, then w = decay_factor·w - scale·m, with nesterov
// w = decay_factor·w - scale·(g + beta·m). m enters w before it is rounded.
template <class Real>
struct MomentumStep {
  Real beta, gain;
  Real decay_factor, scale;
};

template <bool nesterov, class Table, class Gradient, class Rounding>
void descend_with_momentum(const Part<Table>& part,
                           const Gradient* gradient,
                           int64_t width,
                           MomentumStep<accumulation_t<Table>> rule,
                           Rounding rounding,
                           Rounding momentum_rounding) {
  Table* const w = part.w;
  Table* const momentum = part.momentum;
  const Table* const w_ahead = part.w_ahead;
  const Table* const momentum_ahead = part.momentum_ahead;
  for_each_step<accumulation_t<Table>>(width, [=](int64_t column, auto step) {
    prefetch_step(w_ahead, column);
    prefetch_step(momentum_ahead, column);
    const auto g = read(gradient + column, step);
    const auto m = rule.beta * read(momentum + column, step) + rule.gain * g;
    write(momentum, column, m, momentum_rounding, step);
    const auto direction = nesterov ? g + rule.beta * m : m;
    write(w, column, rule.decay_factor * read(w + column, step) - rule.scale * direction, rounding,
          step);
  });
}

// 1 - beta^t of the moments of row-wise Adam, where t is the row's number of steps.
struct BiasCorrections {
  double first, second;
};

template <class Table, class Gradient, class Rounding>
void update_part(const UpdateRule<Table>& rule,
                 int64_t width,
                 const Part<Table>& part,
                 const BiasCorrections& bias,
                 const Gradient* gradient,
                 const Rounding& rounding,
                 const Rounding& momentum_rounding) {
  using Real = accumulation_t<Table>;
  const Real decay_factor = Real(rule.decay_factor);
  switch (rule.rule) {
    case Rule::rowwise_adagrad: {
      const Real sum = *part.second_moment += mean_of_squares<Real>(gradient, width);
      const Real scale = Real(rule.lr) / (std::sqrt(sum) + Real(rule.eps));
      descend(part, gradient, width, decay_factor, scale, rounding);
      break;
    }
    case Rule::sgd: {
      const Real lr = Real(rule.lr);
      const MomentumStep<Real> momentum_step = {
          .beta = Real(rule.beta1), .gain = Real(1), .decay_factor = decay_factor, .scale = lr};
      if (part.momentum == nullptr) {
        descend(part, gradient, width, decay_factor, lr, rounding);
      } else if (rule.nesterov) {
        descend_with_momentum<true>(part, gradient, width, momentum_step, rounding,
                                    momentum_rounding);
      } else {
        descend_with_momentum<false>(part, gradient, width, momentum_step, rounding,
                                     momentum_rounding);
      }
      break;
    }
    case Rule::rowwise_adam: {
      Real& second = *part.second_moment;
      second =
          Real(rule.beta2) * second + Real(1 - rule.beta2) * mean_of_squares<Real>(gradient, width);
      const Real scale =
          Real(rule.lr / bias.first) / (std::sqrt(second / Real(bias.second)) + Real(rule.eps));
      const MomentumStep<Real> momentum_step = {.beta = Real(rule.beta1),
                                                .gain = Real(1 - rule.beta1),
                                                .decay_factor = decay_factor,
                                                .scale = scale};
      descend_with_momentum<false>(part, gradient, width, momentum_step, rounding,
                                   momentum_rounding);
      break;
    }
  }
}

// ahead: a row that is updated later, or this one.
template <class Table, class Source, class Gradient>
void update_row(const TableUpdate<Table, Source>& update,
                int64_t row,
                int64_t ahead,
                const Gradient* gradient) {
  const UpdateRule<Table>& rule = update.rule;
  if (rule.second_moments != nullptr) {
    __builtin_prefetch(rule.second_moments + ahead * update.parts, 1);
  }
  if (rule.row_steps != nullptr) {
    __builtin_prefetch(rule.row_steps + ahead, 1);
  }
  if (is_zero(gradient, update.parts * update.width)) {
    return;
  }
  Table* const w = update.table.data + row * update.table.stride;
  Table* const momentum = rule.momentum ? rule.momentum.data + row * rule.momentum.stride : nullptr;
  const int64_t w_distance = (ahead - row) * update.table.stride;
  const int64_t momentum_distance = (ahead - row) * rule.momentum.stride;
  BiasCorrections bias = {};
  if (rule.rule == Rule::rowwise_adam) {
    const double step = ++rule.row_steps[row];
    bias = {.first = 1 - std::pow(rule.beta1, step), .second = 1 - std::pow(rule.beta2, step)};
  }
  for (int64_t p = 0; p < update.parts; ++p) {
    const int64_t column = p * update.width;
    const Part<Table> part = {
        .w = w + column,
        .momentum = momentum ? momentum + column : nullptr,
        .second_moment =
            rule.second_moments ? rule.second_moments + row * update.parts + p : nullptr,
        .w_ahead = w + w_distance + column,
        .momentum_ahead = momentum ? momentum + momentum_distance + column : nullptr,
    };
    if constexpr (sizeof(Table) == 2) {
      if (update.stochastic_rounding) {
        const int64_t place = first_place_of_part(p, update.width);
        const RoundStochastically rounding = {derive_key(update.key, 2 * uint64_t(row)), place};
        const RoundStochastically momentum_rounding = {
            derive_key(update.key, 2 * uint64_t(row) + 1), place};
        update_part(rule, update.width, part, bias, gradient + column, rounding, momentum_rounding);
        continue;
      }
    }
    update_part(rule, update.width, part, bias, gradient + column, RoundToNearest{},
                RoundToNearest{});
  }
}

// The sums of all parts, side by side.
template <class Table, class Source, class Real>
void sum_chunk_of_parts(const TableUpdate<Table, Source>& update,
                        const SegmentWork<Real>& segments,
                        const Chunk& chunk,
                        Real* out) {
  const ChunkSources sources(segments.pairs, chunk, update.pairs_per_row);
  for (int64_t p = 0; p < update.parts; ++p) {
    const int64_t column = p * update.width;
    const ChunkTerms<Source, Real> terms(
        sources, update.coefficients ? update.coefficients + p * segments.pair_count : nullptr,
        update.source.from_column(column));
    sum_terms(terms, update.width, out + column);
  }
}

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update,
                 const int64_t* ids,
                 int64_t first,
                 int64_t last) {
  const auto row_of = [&](int64_t i) { return ids ? ids[i] : i; };
  const auto is_frozen = [&](int64_t row) { return update.frozen && update.frozen[row]; };
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = row_of(i);
    if (!is_frozen(row)) {
      const int64_t ahead = i + kRowsAhead < last ? row_of(i + kRowsAhead) : row;
      update_row(update, row, is_frozen(ahead) ? row : ahead,
                 update.source.data + i * update.source.stride);
    }
  }
}

template <class Table, class Source>
void update_chunks(const TableUpdate<Table, Source>& update,
                   const SegmentWork<accumulation_t<Table>>& segments,
                   int64_t first,
                   int64_t last) {
  Scratch<accumulation_t<Table>> gradient(update.parts * update.width);
  for (int64_t c = first; c < last; ++c) {
    if (c + kChunksAhead < last && update.coefficients) {
      for (int64_t p = 0; p < update.parts; ++p) {
        prefetch_coefficients(segments, segments.chunks[c + kChunksAhead],
                              update.coefficients + p * segments.pair_count);
      }
    }
    const Chunk& chunk = segments.chunks[c];
    if (chunk.is_partial) {
      sum_chunk_of_parts(update, segments, chunk,
                         segments.partial_sums.data + chunk.row * segments.partial_sums.stride);
    } else {
      const Chunk& ahead = segments.chunks[c + kRowsAhead < last ? c + kRowsAhead : c];
      sum_chunk_of_parts(update, segments, chunk, gradient.data());
      update_row(update, chunk.row, ahead.is_partial ? chunk.row : ahead.row, gradient.data());
    }
  }
}

template <class Table, class Source>
void update_single_pairs(const TableUpdate<Table, Source>& update,
                         const SegmentWork<accumulation_t<Table>>& segments,
                         int64_t first,
                         int64_t last) {
  using Real = accumulation_t<Table>;
  Scratch<Real> gradient(update.parts * update.width);
  for (int64_t id = first; id < last; ++id) {
    const int64_t row = segments.single_rows[id];
    if (row < 0) {
      continue;
    }
    const Source* const source =
        update.source.data + id / update.pairs_per_row * update.source.stride;
    for (int64_t p = 0; p < update.parts; ++p) {
      const int64_t column = p * update.width;
      const Real coefficient =
          update.coefficients ? update.coefficients[p * segments.pair_count + id] : Real(1);
      const SingleTerm<Source, Real> term = {{coefficient}, {source + column}};
      sum_terms(term, update.width, gradient.data() + column);
    }
    // The pass over the tokens has just read the rows of this block of pairs. The memory would idle
    // during the update, so the row at the same place of the next block is prefetched.
    const int64_t next = id + kRowsInFlight;
    const int64_t ahead = next < segments.pair_count ? segments.single_rows[next] : -1;
    update_row(update, row, ahead < 0 ? row : ahead, gradient.data());
  }
}

template <class Table, class Source>
void update_split_segments(const TableUpdate<Table, Source>& update,
                           const SegmentWork<accumulation_t<Table>>& segments,
                           int64_t first,
                           int64_t last) {
  const int64_t width = update.parts * update.width;
  Scratch<accumulation_t<Table>> gradient(width);
  for (int64_t i = first; i < last; ++i) {
    const SplitSegment& segment = segments.split_segments[i];
    sum_split_segment(segments.partial_sums, width, segment, gradient.data());
    update_row(update, segment.row, segment.row, gradient.data());
  }
}

template <class Table, class Source>
constexpr TableUpdateFunctions<Table, Source> kFunctions = {
    .update_rows = update_rows<Table, Source>,
    .update_chunks = update_chunks<Table, Source>,
    .update_single_pairs = update_single_pairs<Table, Source>,
    .update_split_segments = update_split_segments<Table, Source>,
};

}  // namespace

}  // namespace PEER_CAPABILITY

constinit const TableUpdateKernels TableUpdateKernels::PEER_CAPABILITY = {
    PEER_CAPABILITY::kFunctions<float, float>,       PEER_CAPABILITY::kFunctions<double, double>,
    PEER_CAPABILITY::kFunctions<BFloat16, BFloat16>, PEER_CAPABILITY::kFunctions<BFloat16, float>,
    PEER_CAPABILITY::kFunctions<Half, Half>,         PEER_CAPABILITY::kFunctions<Half, float>,
};

}  // namespace peer::cpu
