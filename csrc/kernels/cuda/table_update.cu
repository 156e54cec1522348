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
//             and written once. Rows lie anywhere in a table far larger than any cache. They are
//             prefetched as early as the source's rows, so that a warp reads them from the L2 cache
// Exactness   g as in table_grad, without its rounding; the mean of g² in an order that depends
//             only on the width and the types; all arithmetic in the accumulation type, with one
//             rounding at the store. If a row has more columns than a block takes at once, its sums
//             are computed twice: for the mean, then for the update
// Requires    as table_grad; rows of the table distinct and below 2^31
#include <cmath>

#include "kernels/cuda/part_update.h"
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/table_update.h"

namespace peer::cuda {

namespace {

// Sums over the columns of all warps of a block. All threads of the block must call its functions.
template <class Real>
class BlockReduce {
 public:
  // In shared memory.
  struct Storage {
    Real warp_sums[2][kMaxWarpsPerTile];  // two buffers: a warp is at most one sum ahead of another
    Real row_sums[kMaxTerms];             // by the term that ends a row's sum
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
