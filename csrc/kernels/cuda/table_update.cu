// Updates of a table's rows: a row is updated by its gradient as soon as the gradient is summed, so
// that no gradient is stored.
//
//   g[row] = Σ over the segment's pairs of coefficients[pair]·source[pair / pairs_per_row]
//   w[row], state[row] = rule(w[row], state[row], g[row])
//
// The parts of rows are updated one after the other, each like a row of its own.
//
// Shapes      source (pairs / pairs_per_row, width)   table, momentum (N, width)
// One block   as in table_grad: sums over up to 191 pairs, one warp per KiB of a row of the source.
//             If the rule needs the mean of g², the block synchronises once per row. Split segments
//             are summed to partial sums first; a second launch treats those sums as gradient rows
// Traffic     per pair, as in table_grad; per row, the table's row, its momentum and state, read
// and
//             written once. Rows lie anywhere in a table far larger than any cache. They are
//             prefetched as early as the source's rows, so that a warp reads them from the L2 cache
// Exactness   g as in table_grad, without its rounding; the mean of g² in an order that depends
// only
//             on the width and the types; all arithmetic in the accumulation type, with one
//             rounding at the store. If a row has more columns than a block takes at once, its sums
//             are computed twice: for the mean, then for the update
// Requires    as table_grad; rows of the table distinct and below 2^31
#include <cmath>

#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/stochastic_rounding.h"
#include "kernels/cuda/table_update.h"
#include "kernels/random_bits.h"

namespace peer::cuda {

namespace {

// All rules of kernels/table_update.h in one form:
//
//   v = second_moment_decay·v + second_moment_gain·mean(g²)     if there are second moments
//   scale = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//   m = momentum_decay·m + momentum_gain·g                      m = g without momentum
//   w = decay_factor·w - scale·m                                nesterov: g + momentum_decay·m for
//   m
template <class Real>
struct Hyperparameters {
  Real lr, decay_factor, eps = 0;
  Real momentum_decay = 0, momentum_gain = 1;
  Real second_moment_decay = 1, second_moment_gain = 1;
  double log_beta1 = 0, log_beta2 = 0;  // for beta^t
  bool nesterov = false;
};

template <class Table, class Real = accumulation_t<Table>>
Hyperparameters<Real> hyperparameters_of(const UpdateRule<Table>& rule) {
  Hyperparameters<Real> hyperparameters = {
      .lr = Real(rule.lr),
      .decay_factor = Real(rule.decay_factor),
      .eps = Real(rule.eps),
      .momentum_decay = Real(rule.beta1),
      .nesterov = rule.nesterov,
  };
  if (rule.rule == Rule::rowwise_adam) {
    hyperparameters.momentum_gain = Real(1 - rule.beta1);
    hyperparameters.second_moment_decay = Real(rule.beta2);
    hyperparameters.second_moment_gain = Real(1 - rule.beta2);
    hyperparameters.log_beta1 = std::log(rule.beta1);
    hyperparameters.log_beta2 = std::log(rule.beta2);
  }
  return hyperparameters;
}

template <class Real>
struct RowState {
  Real second_moment;
  int32_t step;
};

// The update of one part of the rows.
template <class Table, int vec_size>
struct PartUpdate {
  using Real = accumulation_t<Table>;
  SlicedRows<Table, vec_size> table, momentum;
  int64_t first_column;  // of the part in the row
  Real* second_moments;  // null if the rule has none
  int64_t moments_per_row;
  int32_t* row_steps;
  bool is_last_part;  // which ends the row's step
  Hyperparameters<Real> hyperparameters;
  bool stochastic_rounding;
  uint64_t key;

  __device__ bool needs_mean_of_squares() const { return second_moments != nullptr; }
  __device__ bool has_momentum() const { return momentum.data != nullptr; }

  __device__ RowState<Real> read_state(int32_t row) const {
    return {second_moments[row * moments_per_row], row_steps ? row_steps[row] : 0};
  }
  __device__ void write_state(int32_t row, const RowState<Real>& state) const {
    second_moments[row * moments_per_row] = state.second_moment;
    if (row_steps && is_last_part) {
      row_steps[row] = state.step;
    }
  }
  __device__ RowState<Real> advance(const RowState<Real>& state, Real mean_of_squares) const {
    return {hyperparameters.second_moment_decay * state.second_moment +
                hyperparameters.second_moment_gain * mean_of_squares,
            state.step + 1};
  }

  // The factor of m. expm1 gives 1 - beta^t to the last bits, however close to 0 it is.
  __device__ Real scale(const RowState<Real>& state) const {
    Real second_moment = state.second_moment;
    Real lr = hyperparameters.lr;
    if (row_steps) {
      lr /= -std::expm1(Real(state.step * hyperparameters.log_beta1));
      second_moment /= -std::expm1(Real(state.step * hyperparameters.log_beta2));
    }
    return lr / (std::sqrt(second_moment) + hyperparameters.eps);
  }

  // Called before the warp reads the row.
  __device__ void prefetch_row(int32_t row, int64_t column) const {
    prefetch_l2(table.slice(row, column));
    if (has_momentum()) {
      prefetch_l2(momentum.slice(row, column));
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
template <class Table, int vec_size>
class TableSlice {
 public:
  using Real = accumulation_t<Table>;

  __device__ TableSlice(const PartUpdate<Table, vec_size>& update, int32_t row, int64_t column)
      : update_(update), row_(row), column_(column) {}

  __device__ void read() {
    w_ = load(update_.table.slice(row_, column_));
    if (update_.has_momentum()) {
      m_ = load(update_.momentum.slice(row_, column_));
    }
  }

  // The update of w uses m before m is rounded.
  __device__ void apply_update(const SliceValues<Real, vec_size>& gradient, Real scale) {
    const Hyperparameters<Real>& hyperparameters = update_.hyperparameters;
    const uint64_t table_key = derive_row_key(2 * uint64_t(row_));
    const uint64_t momentum_key =
        update_.has_momentum() ? derive_row_key(2 * uint64_t(row_) + 1) : 0;
    for_each_vec([&](int k) {
      WideVec direction = gradient.vecs[k];
      if (update_.has_momentum()) {
        WideVec m = widen_vec(m_.vecs[k]);
        for_each_element<vec_size>([&](int i) {
          const Real g = direction.values[i];
          m.values[i] =
              hyperparameters.momentum_decay * m.values[i] + hyperparameters.momentum_gain * g;
          direction.values[i] = hyperparameters.nesterov
                                    ? g + hyperparameters.momentum_decay * m.values[i]
                                    : m.values[i];
        });
        store_vec(update_.momentum.slice(row_, column_), k, round(m, momentum_key, k));
      }
      WideVec w = widen_vec(w_.vecs[k]);
      for_each_element<vec_size>([&](int i) {
        w.values[i] = hyperparameters.decay_factor * w.values[i] - scale * direction.values[i];
      });
      store_vec(update_.table.slice(row_, column_), k, round(w, table_key, k));
    });
  }

 private:
  using WideVec = Vec<Real, vec_size>;

  __device__ uint64_t derive_row_key(uint64_t number) const {
    return update_.stochastic_rounding ? derive_key(update_.key, number) : 0;
  }

  __device__ RawVec<Table, vec_size> round(const WideVec& wide, uint64_t row_key, int k) const {
    if (!update_.stochastic_rounding) {
      return narrow_vec<Table>(wide);
    }
    const uint32_t column = uint32_t(update_.first_column + column_) + vec_offset<vec_size>(k);
    Vec<Table, vec_size> result;
    for_each_element<vec_size>([&](int i) {
      result.values[i] =
          narrow_stochastically<Table>(wide.values[i], random_word(row_key, column + i));
    });
    return to_raw(result);
  }

  const PartUpdate<Table, vec_size>& update_;
  const int32_t row_;
  const int64_t column_;
  RawSliceValues<Table, vec_size> w_ = {}, m_ = {};
};

// Sums over the columns of all warps of a block. All threads of the block must call its functions.
template <class Real>
class BlockReduce {
 public:
  // In shared memory.
  struct Storage {
    Real warp_sums[2][kMaxWarps];  // two buffers: a warp is at most one sum ahead of another
    Real row_sums[kMaxTerms];      // by the term that ends a row's sum
  };

  explicit __device__ BlockReduce(Storage* storage) : storage_(storage) {}

  template <int vec_size>
  __device__ Real sum_of_squares(const SliceValues<Real, vec_size>& values) {
    Real squares = 0;
    for_each_vec([&](int k) {
      for_each_element<vec_size>([&](int i) {
        const Real value = values.vecs[k].values[i];
        squares = std::fma(value, value, squares);
      });
    });
    squares = warp_reduce_sum(squares);
    Real* const warp_sums = storage_->warp_sums[buffer_];
    buffer_ ^= 1;
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

  // Accumulates the sums of a row whose columns take several rounds. The barrier of the next
  // sum_of_squares makes row_sum valid.
  __device__ void add_to_row_sum(int i, bool is_first, Real sum) {
    if (threadIdx.x == 0) {
      storage_->row_sums[i] = is_first ? sum : storage_->row_sums[i] + sum;
    }
  }
  __device__ Real row_sum(int i) const { return storage_->row_sums[i]; }

 private:
  Storage* storage_;
  int buffer_ = 0;
};

template <class Table, class Source, class Real, int vec_size = kVecSize<Source>>
__global__ void update_kernel(TermList<Real> list,
                              int positions,
                              SlicedRows<const Source, vec_size> source,
                              PartUpdate<Table, vec_size> update,
                              SlicedRows<Real, vec_size> partial_sums) {
  const int warps = int(blockDim.x) / kWarp;
  const int64_t width = update.table.width;
  const int count = read_terms<Source>(list, positions, source.stride);
  BlockReduce<Real> block_reduce(reinterpret_cast<typename BlockReduce<Real>::Storage*>(
      peer_shared_memory + TileStorage<Source, Real>::bytes(warps)));

  // If a row takes several rounds and the rule needs the mean of g², the first rounds compute only
  // the mean.
  const int columns_per_round = warps * kSliceColumns<vec_size>;
  const int rounds_per_row = int((width + columns_per_round - 1) / columns_per_round);
  const bool sums_twice = update.needs_mean_of_squares() && rounds_per_row > 1;
  const int mean_rounds = sums_twice ? rounds_per_row : 0;
  const int rounds = mean_rounds + rounds_per_row;
  for (int round = 0; round < rounds; ++round) {
    const int64_t first = int64_t(round % rounds_per_row) * columns_per_round;
    const int64_t column = lane_column<vec_size>(first + warp_in_block() * kSliceColumns<vec_size>);
    const bool is_mean_round = round < mean_rounds;
    const auto prefetch_row = [&](int32_t target) {
      if (!is_mean_round && is_row_of_output(target)) {
        update.prefetch_row(target, column);
      }
    };
    const auto finish = [&](int i, int32_t target, const SliceValues<Real, vec_size>& gradient) {
      if (!is_row_of_output(target)) {
        store(partial_sums.slice(partial_row_of(target), column), gradient);
        return;
      }
      TableSlice<Table, vec_size> slice(update, target, column);
      if (!is_mean_round) {
        slice.read();
      }
      Real scale = update.hyperparameters.lr;
      if (update.needs_mean_of_squares()) {
        // Every warp reads the state before the barrier; one thread writes it behind the barrier.
        const RowState<Real> before = update.read_state(target);
        const Real squares = block_reduce.sum_of_squares(gradient);
        if (is_mean_round) {
          block_reduce.add_to_row_sum(i, round == 0, squares);
          return;
        }
        const RowState<Real> after =
            update.advance(before, (sums_twice ? block_reduce.row_sum(i) : squares) / Real(width));
        if (threadIdx.x == 0 && round == rounds - 1) {
          update.write_state(target, after);
        }
        scale = update.scale(after);
      }
      slice.apply_update(gradient, scale);
    };
    add_terms<Source, Real>(count, source, column, prefetch_row, finish);
  }
}

template <class Table, class Source, class Real, int vec_size>
void update_by_terms(const TermList<Real>& list,
                     const SlicedRows<const Source, vec_size>& source,
                     const PartUpdate<Table, vec_size>& update,
                     const SlicedRows<Real, vec_size>& partial_sums,
                     const Context& context) {
  const TileShape shape = choose_tile_shape<vec_size>(list.max_count, update.table.width);
  launch(update_kernel<Table, Source, Real>,
         launch_shape<Source, Real>(shape, list.max_count,
                                    sizeof(typename BlockReduce<Real>::Storage)),
         context.stream, list, shape.positions, source, update, partial_sums);
}

template <int vec_size, class Table, class Source>
PartUpdate<Table, vec_size> update_of_part(const TableUpdate<Table, Source>& update, int64_t part) {
  const UpdateRule<Table>& rule = update.rule;
  const bool has_momentum = rule.rule != Rule::rowwise_adagrad;
  const int64_t column = part * update.width;
  const Rows<Table> momentum = has_momentum ? rule.momentum.from_column(column) : Rows<Table>{};
  return {
      .table = slice_rows<vec_size>(update.table.from_column(column), update.width),
      .momentum = slice_rows<vec_size>(momentum, update.width),
      .first_column = column,
      .second_moments = rule.rule != Rule::sgd ? rule.second_moments + part : nullptr,
      .moments_per_row = update.parts,
      .row_steps = rule.rule == Rule::rowwise_adam ? rule.row_steps : nullptr,
      .is_last_part = part == update.parts - 1,
      .hyperparameters = hyperparameters_of(rule),
      .stochastic_rounding = update.stochastic_rounding,
      .key = update.key,
  };
}

template <int vec_size, class Table, class Source>
SlicedRows<const Source, vec_size> source_of_part(const TableUpdate<Table, Source>& update,
                                                  int64_t part) {
  return slice_rows<vec_size>(update.source.from_column(part * update.width), update.width);
}

}  // namespace

template <class Table, class Source>
void update_by_segments(const TableUpdate<Table, Source>& update,
                        const Segments& segments,
                        const Context& context) {
  using Real = accumulation_t<Table>;
  constexpr int vec_size = kVecSize<Source>;
  constexpr int sum_vec_size = kVecSize<Real>;
  if (segments.count == 0 || update.width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(segments, update.width, context);
  for (int64_t part = 0; part < update.parts; ++part) {
    const Real* coefficients =
        update.coefficients ? update.coefficients + part * segments.count : nullptr;
    update_by_terms(terms_of_pairs(segments, coefficients, update.pairs_per_row),
                    source_of_part<vec_size>(update, part), update_of_part<vec_size>(update, part),
                    partial_sums.template rows<vec_size>(), context);
    add_partial_sums(segments, partial_sums, partial_sums.template rows<sum_vec_size>(),
                     /*is_in_place=*/true, context);
    update_by_terms(
        terms_of_split_segments<Real>(segments), partial_sums.template as_source<sum_vec_size>(),
        update_of_part<sum_vec_size>(update, part), SlicedRows<Real, sum_vec_size>{}, context);
  }
}

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update, int64_t rows, const Context& context) {
  using Real = accumulation_t<Table>;
  constexpr int vec_size = kVecSize<Source>;
  if (rows == 0 || update.width == 0) {
    return;
  }
  for (int64_t part = 0; part < update.parts; ++part) {
    update_by_terms(terms_of_rows<Real>(rows), source_of_part<vec_size>(update, part),
                    update_of_part<vec_size>(update, part), SlicedRows<Real, vec_size>{}, context);
  }
}

template void update_by_segments(const TableUpdate<float, float>&, const Segments&, const Context&);
template void update_by_segments(const TableUpdate<double, double>&,
                                 const Segments&,
                                 const Context&);
template void update_by_segments(const TableUpdate<BFloat16, BFloat16>&,
                                 const Segments&,
                                 const Context&);
template void update_by_segments(const TableUpdate<BFloat16, float>&,
                                 const Segments&,
                                 const Context&);
template void update_by_segments(const TableUpdate<Half, Half>&, const Segments&, const Context&);
template void update_by_segments(const TableUpdate<Half, float>&, const Segments&, const Context&);
template void update_rows(const TableUpdate<float, float>&, int64_t, const Context&);
template void update_rows(const TableUpdate<double, double>&, int64_t, const Context&);
template void update_rows(const TableUpdate<BFloat16, BFloat16>&, int64_t, const Context&);
template void update_rows(const TableUpdate<BFloat16, float>&, int64_t, const Context&);
template void update_rows(const TableUpdate<Half, Half>&, int64_t, const Context&);
template void update_rows(const TableUpdate<Half, float>&, int64_t, const Context&);

}  // namespace peer::cuda
