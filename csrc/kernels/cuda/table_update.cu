// Row update: a table row is changed by its gradient as soon as that is summed, so that no gradient
// is stored.
//
//   g[row] = Σ over the run's pairs of coefficients[pair]·source[pair / pairs_per_row]
//   w[row], state[row] = rule(w[row], state[row], g[row])
//
// The parts of rows are updated one after the other, each as rows of their own.
//
// Shapes      source (pairs / pairs_per_row, width)   table, momentum (N, width)
// One block   as in the expert pass, sums over up to 191 pairs, one warp for each KiB of a row of
//             the source. The warps of a block meet once for each row whose rule needs the mean of
//             its gradient's squares. Split runs are summed first, then updated by their sums, as
//             rows of a source are that are gradients already.
// Traffic     per pair, as in the expert pass; per row, the table's row, its momentum and state,
//             read and written once. Rows lie anywhere in a table far larger than any cache: they
//             are requested as far ahead as the source's, so that a warp reads them from the
//             second-level cache
// Exactness   g as in the expert pass, without its rounding; the mean of squares in an order that
//             depends on the width and the types alone; everything in the accumulation type, and
//             one rounding at the store. Where a row has more columns than the warps of a block
//             take at once, its sums are computed twice: for the mean, and to follow them
// Requires    as the expert pass; rows of the table distinct, below 2^31
#include <cmath>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/stochastic_rounding.h"
#include "kernels/random_bits.h"

namespace peer::cuda {

namespace {

// The rules of update_rule.h as one:
//
//   s = second_decay·s + second_gain·mean(g²)              with second moments
//   scale = lr / first_bias / (sqrt(s / second_bias) + eps)
//   m = decay·m + gain·g, or g                             without momentum
//   w = decay_factor·w - scale·m, or decay_factor·w - scale·(g + decay·m)  with nesterov
template <class Real>
struct Numbers {
  Real lr, decay_factor, eps = 0;
  Real decay = 0, gain = 1;
  Real second_decay = 1, second_gain = 1;
  double log_decay = 0, log_second_decay = 0;  // from which biases follow
  bool nesterov = false;
};

template <class Table, class Real = accumulation_t<Table>>
Numbers<Real> numbers_of(const UpdateRule<Table>& rule) {
  Numbers<Real> numbers = {Real(rule.lr), Real(rule.decay_factor)};
  numbers.eps = Real(rule.eps);
  numbers.decay = Real(rule.beta1);
  numbers.nesterov = rule.nesterov;
  if (rule.rule == Rule::rowwise_adam) {
    numbers.gain = Real(1 - rule.beta1);
    numbers.second_decay = Real(rule.beta2);
    numbers.second_gain = Real(1 - rule.beta2);
    numbers.log_decay = std::log(rule.beta1);
    numbers.log_second_decay = std::log(rule.beta2);
  }
  return numbers;
}

// A row's own numbers.
template <class Real>
struct RowState {
  Real second_moment;
  int32_t step;
};

template <class Table, int pack>
struct Update {
  using Real = accumulation_t<Table>;
  SlicedRows<Table, pack> table, momentum;
  int64_t first_column;  // of the part in the row
  Real* second_moments;  // null where the rule has none
  int64_t moments_per_row;
  int32_t* row_steps;
  bool ends_step;  // whether the part is the row's last
  Numbers<Real> numbers;
  bool rounds_stochastically;
  uint64_t key;

  __device__ bool needs_mean_of_squares() const { return second_moments != nullptr; }
  __device__ bool has_momentum() const { return momentum.data != nullptr; }

  __device__ RowState<Real> read_state(int32_t row) const {
    return {second_moments[row * moments_per_row], row_steps ? row_steps[row] : 0};
  }
  __device__ void write_state(int32_t row, const RowState<Real>& state) const {
    second_moments[row * moments_per_row] = state.second_moment;
    if (row_steps && ends_step) {
      row_steps[row] = state.step;
    }
  }
  __device__ RowState<Real> advance(const RowState<Real>& state, Real mean_of_squares) const {
    return {numbers.second_decay * state.second_moment + numbers.second_gain * mean_of_squares,
            state.step + 1};
  }

  // What m is multiplied by. 1 - decay^step is exact to the last places however close to 0.
  __device__ Real scale(const RowState<Real>& state) const {
    Real second_moment = state.second_moment;
    Real lr = numbers.lr;
    if (row_steps) {
      lr /= -std::expm1(Real(state.step * numbers.log_decay));
      second_moment /= -std::expm1(Real(state.step * numbers.log_second_decay));
    }
    return lr / (std::sqrt(second_moment) + numbers.eps);
  }

  // Before the warp reads the row.
  __device__ void prefetch_row(int32_t row, int64_t column) const {
    request(table.slice(row, column));
    if (has_momentum()) {
      request(momentum.slice(row, column));
    }
    if (needs_mean_of_squares() && threadIdx.x == 0) {
      prefetch_l2(second_moments + row * moments_per_row);
      if (row_steps) {
        prefetch_l2(row_steps + row);
      }
    }
  }
};

// A lane's part of a slice of a row of the table, and of its momentum.
template <class Table, int pack>
class TableSlice {
 public:
  using Real = accumulation_t<Table>;

  __device__ TableSlice(const Update<Table, pack>& update, int32_t row, int64_t column)
      : update_(update), row_(row), column_(column) {}

  __device__ void read() {
    w_ = load(update_.table.slice(row_, column_));
    if (update_.has_momentum()) {
      m_ = load(update_.momentum.slice(row_, column_));
    }
  }

  // m enters w before it is rounded.
  __device__ void follow(const LaneValues<Real, pack>& gradient, Real scale) {
    const Numbers<Real>& numbers = update_.numbers;
    const uint64_t table_key = key_of(2 * uint64_t(row_));
    const uint64_t momentum_key = update_.has_momentum() ? key_of(2 * uint64_t(row_) + 1) : 0;
    for_each_pack([&](int p) {
      Pack direction = gradient.packs[p];
      if (update_.has_momentum()) {
        Pack m = widen_pack(m_.packs[p]);
        for_each_element<pack>([&](int i) {
          const Real g = direction.values[i];
          m.values[i] = numbers.decay * m.values[i] + numbers.gain * g;
          direction.values[i] = numbers.nesterov ? g + numbers.decay * m.values[i] : m.values[i];
        });
        store_pack(update_.momentum.slice(row_, column_), p, round(m, momentum_key, p));
      }
      Pack w = widen_pack(w_.packs[p]);
      for_each_element<pack>([&](int i) {
        w.values[i] = numbers.decay_factor * w.values[i] - scale * direction.values[i];
      });
      store_pack(update_.table.slice(row_, column_), p, round(w, table_key, p));
    });
  }

 private:
  using Pack = Elements<Real, pack>;

  __device__ uint64_t key_of(uint64_t number) const {
    return update_.rounds_stochastically ? derive_key(update_.key, number) : 0;
  }

  __device__ RawPack<Table, pack> round(const Pack& wide, uint64_t row_key, int p) const {
    if (!update_.rounds_stochastically) {
      return narrow_pack<Table>(wide);
    }
    const uint32_t column = uint32_t(update_.first_column + column_) + pack_offset<pack>(p);
    Elements<Table, pack> result;
    for_each_element<pack>([&](int i) {
      result.values[i] =
          narrow_stochastically<Table>(wide.values[i], random_word(row_key, column + i));
    });
    return raw(result);
  }

  const Update<Table, pack>& update_;
  const int32_t row_;
  const int64_t column_;
  RawValues<Table, pack> w_ = {}, m_ = {};
};

// Behind the tile's memory, what the warps of a block tell each other.
template <class Real>
struct BlockReduceStorage {
  Real warp_sums[2][kMaxWarps];
  Real row_sums[kMaxTerms];  // by the term with which a row's sum ends
};

// Sums over the columns that the warps of a block have. All threads of the block take part.
template <class Real>
class BlockReduce {
 public:
  explicit __device__ BlockReduce(BlockReduceStorage<Real>* memory) : memory_(memory) {}

  // A warp can be one sum ahead of another, not two: there is place for the numbers of two.
  template <int pack>
  __device__ Real sum_of_squares(const LaneValues<Real, pack>& values) {
    Real squares = 0;
    for_each_pack([&](int p) {
      for_each_element<pack>([&](int i) {
        const Real value = values.packs[p].values[i];
        squares = std::fma(value, value, squares);
      });
    });
    squares = warp_reduce_sum(squares);
    Real* const warp_sums = memory_->warp_sums[turn_];
    turn_ ^= 1;
    if (lane() == 0) {
      warp_sums[warp_in_block()] = squares;
    }
    __syncthreads();
    Real total = 0;
#pragma unroll 1
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
      total += warp_sums[warp];
    }
    return total;
  }

  // Of rows whose columns are taken in several rounds. A row's sum is read after its next sum of
  // squares, and so after a barrier.
  __device__ void add_to_row(int i, bool is_first, Real sum) {
    if (threadIdx.x == 0) {
      memory_->row_sums[i] = is_first ? sum : memory_->row_sums[i] + sum;
    }
  }
  __device__ Real sum_of_row(int i) const { return memory_->row_sums[i]; }

 private:
  BlockReduceStorage<Real>* memory_;
  int turn_ = 0;
};

template <class Table, class Source, class Real, int pack = kVecSize<Source>>
__global__ void update_tiles(TermList<Real> list,
                             int positions,
                             SlicedRows<const Source, pack> source,
                             Update<Table, pack> update,
                             SlicedRows<Real, pack> partial_sums) {
  const int warps = int(blockDim.x) / kWarp;
  const int64_t width = update.table.width;
  const int count = read_terms<Source>(list, positions, source.stride);
  BlockReduce<Real> team(reinterpret_cast<BlockReduceStorage<Real>*>(
      peer_shared_memory + TileMemory<Source, Real>::bytes(warps)));

  const int columns_per_round = warps * kSliceColumns<pack>;
  const int rounds_per_row = int((width + columns_per_round - 1) / columns_per_round);
  const bool sums_twice = update.needs_mean_of_squares() && rounds_per_row > 1;
  const int measuring_rounds = sums_twice ? rounds_per_row : 0;
  const int rounds = measuring_rounds + rounds_per_row;
  for (int round = 0; round < rounds; ++round) {
    const int64_t first = int64_t(round % rounds_per_row) * columns_per_round;
    const int64_t column = lane_column<pack>(first + warp_in_block() * kSliceColumns<pack>);
    const bool is_measuring = round < measuring_rounds;
    const auto prefetch_row = [&](int32_t target) {
      if (!is_measuring && is_row_of_output(target)) {
        update.prefetch_row(target, column);
      }
    };
    const auto finish = [&](int i, int32_t target, const LaneValues<Real, pack>& gradient) {
      if (!is_row_of_output(target)) {
        store(partial_sums.slice(partial_row_of(target), column), gradient);
        return;
      }
      TableSlice<Table, pack> slice(update, target, column);
      if (!is_measuring) {
        slice.read();
      }
      Real scale = update.numbers.lr;
      if (update.needs_mean_of_squares()) {
        // Every warp reads the state before they meet, and one writes it after.
        const RowState<Real> before = update.read_state(target);
        const Real squares = team.sum_of_squares(gradient);
        if (is_measuring) {
          team.add_to_row(i, round == 0, squares);
          return;
        }
        const RowState<Real> after =
            update.advance(before, (sums_twice ? team.sum_of_row(i) : squares) / Real(width));
        if (threadIdx.x == 0 && round == rounds - 1) {
          update.write_state(target, after);
        }
        scale = update.scale(after);
      }
      slice.follow(gradient, scale);
    };
    add_terms<Source, Real>(count, source, column, prefetch_row, finish);
  }
}

template <class Table, class Source, class Real, int pack>
void update_by_terms(const TermList<Real>& list,
                     const SlicedRows<const Source, pack>& source,
                     const Update<Table, pack>& update,
                     const SlicedRows<Real, pack>& partial_sums,
                     const Context& context) {
  const TileShape shape = tile_shape<pack>(list.most, update.table.width);
  launch(update_tiles<Table, Source, Real>,
         launch_shape<Source, Real>(shape, list.most, sizeof(BlockReduceStorage<Real>)),
         context.stream, list, shape.positions, source, update, partial_sums);
}

template <int pack, class Table, class Source>
Update<Table, pack> update_of(const TableUpdate<Table, Source>& given, int64_t part) {
  const UpdateRule<Table>& rule = given.rule;
  const bool has_momentum = rule.rule != Rule::rowwise_adagrad;
  const int64_t column = part * given.width;
  return {
      sliced<pack>(given.table.from_column(column), given.width),
      sliced<pack>(has_momentum ? rule.momentum.from_column(column) : Rows<Table>{}, given.width),
      column,
      rule.rule != Rule::sgd ? rule.second_moments + part : nullptr,
      given.parts,
      rule.rule == Rule::rowwise_adam ? rule.row_steps : nullptr,
      part == given.parts - 1,
      numbers_of(rule),
      given.stochastic_rounding,
      given.key};
}

template <int pack, class Table, class Source>
SlicedRows<const Source, pack> source_of_part(const TableUpdate<Table, Source>& given,
                                              int64_t part) {
  return sliced<pack>(given.source.from_column(part * given.width), given.width);
}

}  // namespace

template <class Table, class Source>
void update_by_pairs(const TableUpdate<Table, Source>& update,
                     const Segments& pairs,
                     const Context& context) {
  using Real = accumulation_t<Table>;
  constexpr int pack = kVecSize<Source>;
  constexpr int sum_pack = kVecSize<Real>;
  if (pairs.count == 0 || update.width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(pairs, update.width, context);
  for (int64_t part = 0; part < update.parts; ++part) {
    const Real* coefficients =
        update.coefficients ? update.coefficients + part * pairs.count : nullptr;
    update_by_terms(terms_of_pairs(pairs, coefficients, update.pairs_per_row),
                    source_of_part<pack>(update, part), update_of<pack>(update, part),
                    partial_sums.template rows<pack>(), context);
    add_up_split_segments(pairs, partial_sums, partial_sums.template rows<sum_pack>(),
                          /*is_in_place=*/true, context);
    update_by_terms(terms_of_split_runs<Real>(pairs), partial_sums.template as_source<sum_pack>(),
                    update_of<sum_pack>(update, part), SlicedRows<Real, sum_pack>{}, context);
  }
}

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update, int64_t rows, const Context& context) {
  using Real = accumulation_t<Table>;
  constexpr int pack = kVecSize<Source>;
  if (rows == 0 || update.width == 0) {
    return;
  }
  for (int64_t part = 0; part < update.parts; ++part) {
    update_by_terms(terms_of_rows<Real>(rows), source_of_part<pack>(update, part),
                    update_of<pack>(update, part), SlicedRows<Real, pack>{}, context);
  }
}

template void update_by_pairs(const TableUpdate<float, float>&, const Segments&, const Context&);
template void update_by_pairs(const TableUpdate<double, double>&, const Segments&, const Context&);
template void update_by_pairs(const TableUpdate<BFloat16, BFloat16>&,
                              const Segments&,
                              const Context&);
template void update_by_pairs(const TableUpdate<BFloat16, float>&, const Segments&, const Context&);
template void update_by_pairs(const TableUpdate<Half, Half>&, const Segments&, const Context&);
template void update_by_pairs(const TableUpdate<Half, float>&, const Segments&, const Context&);
template void update_rows(const TableUpdate<float, float>&, int64_t, const Context&);
template void update_rows(const TableUpdate<double, double>&, int64_t, const Context&);
template void update_rows(const TableUpdate<BFloat16, BFloat16>&, int64_t, const Context&);
template void update_rows(const TableUpdate<BFloat16, float>&, int64_t, const Context&);
template void update_rows(const TableUpdate<Half, Half>&, int64_t, const Context&);
template void update_rows(const TableUpdate<Half, float>&, int64_t, const Context&);

}  // namespace peer::cuda
