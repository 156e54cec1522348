// Updates of a table's rows: a row is updated by its gradient as soon as the gradient is summed, so
// that no gradient is stored.
//
//   g[row] = Σ over the segment's pairs of coefficients[pair]·source[pair / pairs_per_row]
//   w[row], state[row] = rule(w[row], state[row], g[row])
//
// A row whose gradient is zero in all parts is not updated. The parts of rows are updated one after
// the other, each by a launch of its own, so that one part of the source at a time fills the L2
// cache. A zero part waits for a nonzero one: each launch knows from those before which rows have
// a nonzero gradient. If it is the first to find one, it updates the earlier parts by zeros.
//
// Shapes      source (pairs / pairs_per_row, width)   table, momentum (N, width)
// One block   as in table_grad: sums over up to 191 pairs, one warp for every 2 KiB of a row of the
//             source. A block of one warp knows all of a row. With several warps, and if the rule
//             needs the mean of g², the block synchronises once per row, and learns whether a slice
//             of any warp is nonzero. Without the mean, warps synchronise only behind the last row:
//             a warp updates its slice at once if it is nonzero, and otherwise then, if another
//             slice of the row is. Split segments are summed to partial sums first; a second launch
//             treats those sums as gradient rows
// One thread  when the block reads its terms, the keys of the random bits of some of their rows
// Traffic     per pair, as in table_grad; per row, the table's row, its momentum and state, read
//             and written once. Rows lie anywhere in a table far larger than any cache. They are
//             prefetched as early as the source's rows, so that a warp reads them from the L2
//             cache. Frozen rows take no traffic. Rows with zero gradients are read, not written.
//             The rows with nonzero gradients take 24 bytes per block and part
// Exactness   g as in table_grad, without its rounding; the mean of g² in an order that depends
//             only on the width and the types; all arithmetic in the accumulation type, with one
//             rounding at the store. If a row has more columns than a block takes at once, its sums
//             are computed twice: for the mean, then for the update
// Requires    as table_grad; rows of the table distinct and below 2^31
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/check_row.h"
#include "kernels/cuda/part_update.h"
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/table_update.h"
#include "kernels/cuda/term_set.h"

namespace peer::cuda {

namespace {

// Whether any value of a warp's slice is nonzero. NaN is. Decided on the bits, of which one
// instruction combines three words.
template <class Real, class Form>
__device__ bool has_nonzero(const SliceValues<Real, Form>& values) {
  using Bits = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;
  Bits all = 0;
  for_each_vec<Form>([&](int k) {
    for_each_element<Form>([&](int i) {
      Bits bits;
      std::memcpy(&bits, &values.vecs[k].values[i], sizeof(bits));
      all |= bits;
    });
  });
  const bool is_nonzero = Bits(all << 1) != 0;  // without the sign
  return __ballot_sync(kAllLanes, is_nonzero) != 0;
}

// What the warps of a block know together. All threads of the block must call its functions.
template <class Real>
class BlockReduce {
 public:
  struct WarpSum {
    Real squares;
    bool is_nonzero;
  };

  // In shared memory. Two buffers, because a warp is at most one result ahead of another.
  struct Storage {
    WarpSum warp_sums[2][kMaxWarpsPerTile];
    union {
      Real row_sums[kMaxTerms];  // by the term that ends a row's sum
      unsigned warp_sets[2][kMaxWarpsPerTile][TermSet::kWords];  // of rules without sums
    };
  };

  explicit __device__ BlockReduce(Storage* storage) : storage_(storage) {}

  // The sum over the columns of all warps. is_nonzero: set to whether any warp has a nonzero value.
  template <class Form>
  __device__ Real sum_of_squares(const SliceValues<Real, Form>& values, bool& is_nonzero) {
    Real squares = 0;
    for_each_vec<Form>([&](int k) {
      Real of_vec = 0;  // sums of their own hide the latency of multiply-add
      for_each_element<Form>([&](int i) {
        const Real value = values.vecs[k].values[i];
        of_vec = std::fma(value, value, of_vec);
      });
      squares += of_vec;
    });
    squares = warp_reduce_sum(squares);
    is_nonzero = !(squares == 0) || has_nonzero(values);  // squares of small values are zero
    if (has_one_warp()) {
      __syncwarp();  // every lane has read the row's state
      return squares;
    }
    WarpSum* const warp_sums = storage_->warp_sums[buffer_];
    buffer_ ^= 1;
    if (lane() == 0) {
      warp_sums[warp_in_block()] = {squares, is_nonzero};
    }
    __syncthreads();
    Real total = 0;
#pragma unroll 1
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
      const WarpSum sum = warp_sums[warp];
      total += sum.squares;
      is_nonzero |= sum.is_nonzero;
    }
    return total;
  }

  // The union of the sets of all warps.
  __device__ TermSet unite(const TermSet& set) {
    if (has_one_warp()) {
      return set;
    }
    auto* const warp_sets = storage_->warp_sets[buffer_];
    buffer_ ^= 1;
    set.store(warp_sets[warp_in_block()]);
    __syncthreads();
    TermSet all;
#pragma unroll 1
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
      all = all | TermSet::load(warp_sets[warp]);
    }
    return all;
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
  static __device__ bool has_one_warp() { return blockDim.x == kWarp; }

  Storage* storage_;
  int buffer_ = 0;
};

// Updates the slices of a row that the warp has passed: those of the earlier parts, and the first
// `rounds` of the update's own part. Their gradients are zero. has_updated_state: whether the own
// part has written its state. Must be called by all threads of the block if the rule has second
// moments.
template <class Update, class SliceColumnOfRound>
__device__ void update_by_zeros(const Update& update,
                                int32_t row,
                                bool has_updated_state,
                                int rounds_per_row,
                                int rounds,
                                const SliceColumnOfRound& slice_column_of_round) {
  using Real = typename Update::Real;
#pragma unroll 1
  for (int p = 0; p <= update.part; ++p) {
    const Update part = update.of_part(p);
    const bool is_earlier = p < update.part;
    Real scale = part.hyperparameters.lr;
    if (Update::Rule::kSecondMoments && is_earlier) {
      __syncthreads();  // the step of the last part is written
      RowState<Real> state = part.read_state(row);
      __syncthreads();  // every warp has read the state
      if (has_updated_state && update.is_last_part()) {
        --state.step;
      }
      state = part.advance(state, 0);
      if (threadIdx.x == 0) {
        part.write_state(row, state);
      }
      scale = part.scale(state);
    }
#pragma unroll 1
    for (int round = 0; round < (is_earlier ? rounds_per_row : rounds); ++round) {
      part.update_slice_by_zeros(row, slice_column_of_round(round), scale);
    }
  }
}

// What a block has in shared memory behind its tile: the keys of the rows by the terms that end
// their sums, for tables that are rounded; then what its warps know together, if there are several.
template <class Update>
struct UpdateStorage {
  using Keys = typename Update::Keys;
  using ReduceStorage = typename BlockReduce<typename Update::Real>::Storage;
  static constexpr bool kHasKeys = sizeof(typename Update::Table) == sizeof(uint16_t);
  static constexpr int64_t kKeyBytes = kHasKeys ? kMaxTerms * int64_t(sizeof(Keys)) : 0;

  static constexpr int64_t bytes(int warps) {
    return kKeyBytes + (warps > 1 ? int64_t(sizeof(ReduceStorage)) : 0);
  }
  __device__ Keys* keys() const { return reinterpret_cast<Keys*>(memory); }
  __device__ ReduceStorage* reduce() const {
    return reinterpret_cast<ReduceStorage*>(memory + kKeyBytes);
  }

  unsigned char* memory;
};

// frozen_rows: for a list of rows, which ones to leave out, or null.
// nonzero_rows: for each block, the rows in which a part before this one has a nonzero gradient, as
// the terms that end their sums. Read if there is a part before, written if there is one after.
template <class Source, class Update, class Real = typename Update::Real>
__global__ void update_kernel(TermList<Real> list,
                              int positions,
                              SlicedRows<const Source, typename Update::Form> source,
                              Update update,
                              SlicedRows<Real, typename Update::Form> partial_sums,
                              const bool* frozen_rows,
                              unsigned* nonzero_rows) {
  using Form = typename Update::Form;
  using Tile = TileStorage<Form, Source, Real>;
  constexpr bool needs_mean = Update::Rule::kSecondMoments;
  const int warps = int(blockDim.x) / kWarp;
  const int64_t width = update.table.width;
  const UpdateStorage<Update> storage = {peer_shared_memory + Tile::bytes(warps)};
  const auto prepare = [&](int i, const Term<Real>& term) {
    if (storage.kHasKeys && update.stochastic_rounding && is_row_of_output(term.target)) {
      storage.keys()[i] = update.derive_keys(term.target);
    }
  };
  const int count = frozen_rows ? read_trained_rows<Form, Source>(list, positions, source.stride,
                                                                  frozen_rows, prepare)
                                : read_terms<Form, Source>(list, positions, source.stride, prepare);
  BlockReduce<Real> block_reduce(storage.reduce());

  // If a row takes several rounds and the rule needs the mean of g², the first rounds compute only
  // the mean.
  const int columns_per_round = warps * Form::kColumns;
  const int rounds_per_row = int((width + columns_per_round - 1) / columns_per_round);
  const bool sums_twice = needs_mean && rounds_per_row > 1;
  const int mean_rounds = sums_twice ? rounds_per_row : 0;
  const int rounds = mean_rounds + rounds_per_row;
  const auto slice_column_of_round = [&](int round_of_row) {
    return int64_t(round_of_row) * columns_per_round + warp_in_block() * Form::kColumns;
  };

  // The rows with a nonzero gradient in earlier parts and rounds.
  const int64_t first_word = int64_t(blockIdx.x) * TermSet::kWords;
  TermSet nonzero = update.part > 0 ? TermSet::load(nonzero_rows + first_word) : TermSet();
  for (int round = 0; round < rounds; ++round) {
    const int64_t slice_column = slice_column_of_round(round % rounds_per_row);
    const int64_t column = Form::lane_column(slice_column);
    const int columns = update.table.columns_from(column);
    const bool is_mean_round = round < mean_rounds;
    TermSet found;  // the rows with a nonzero gradient in this round, as far as the warp knows
    const auto prefetch_row = [&](int32_t target) {
      if (!is_mean_round && is_row_of_output(target)) {
        update.prefetch_row(target, slice_column);
      }
    };
    const auto finish = [&](int i, int32_t target, const SliceValues<Real, Form>& gradient) {
      if (!is_row_of_output(target)) {
        store(partial_sums.slice(partial_row_of(target), column), gradient);
        return;
      }
      TableSlice<Update> slice(update, target, column, columns);
      if (!is_mean_round) {
        slice.read();
      }
      bool is_nonzero;
      const auto is_updated = [&] { return is_nonzero || nonzero.has(i); };
      Real scale = update.hyperparameters.lr;
      if constexpr (needs_mean) {
        // Every lane reads the state before the barrier; one thread writes it behind the barrier.
        const RowState<Real> before = update.read_state(target);
        const Real squares = block_reduce.sum_of_squares(gradient, is_nonzero);
        if (is_mean_round) {
          found.insert_if(is_nonzero, i);
          block_reduce.add_to_row_sum(i, round == 0, squares);
          return;
        }
        const RowState<Real> after =
            update.advance(before, (sums_twice ? block_reduce.row_sum(i) : squares) / Real(width));
        if (is_updated() && threadIdx.x == 0 && round == rounds - 1) {
          update.write_state(target, after);
        }
        scale = update.scale(after);
      } else {
        is_nonzero = has_nonzero(gradient);
      }
      found.insert_if(is_nonzero, i);
      if (!is_updated()) {
        return;
      }
      slice.apply_update(gradient, scale, storage.keys() + i);
    };
    add_terms<Real>(count, source, column, prefetch_row, finish);

    // Behind the barriers of the means of g², all warps have found the same rows.
    const TermSet found_by_block = needs_mean ? found : block_reduce.unite(found);
    const TermSet first_found = found_by_block - nonzero;
    nonzero = nonzero | found_by_block;
    // What the warp has passed of these rows is zero, and is updated now.
    const int rounds_before = is_mean_round ? 0 : round - mean_rounds;
    const bool has_earlier_slices = update.part > 0 || rounds_before > 0;
    (has_earlier_slices ? first_found : first_found - found).for_each([&](int i) {
      update_by_zeros(update, Tile::terms()[i].target, !is_mean_round, rounds_per_row,
                      rounds_before + (found.has(i) ? 0 : 1), slice_column_of_round);
    });
  }
  if (!update.is_last_part() && warp_in_block() == 0) {
    nonzero.store(nonzero_rows + first_word);
  }
}

// One id per thread. Without a sort, only this kernel sees ids that would be updated twice at once.
__global__ void check_distinct_ids(const int64_t* ids, int64_t count, int64_t table_rows) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) {
    return;
  }
  const int64_t id = ids[i];
  check_row(id, i, table_rows);
  if (i > 0 && ids[i - 1] >= id) {
    printf(
        "peer: index %lld at position %lld follows %lld: the indices of a sparse gradient were "
        "changed in place\n",
        (long long)(id), (long long)(i), (long long)(ids[i - 1]));
    __trap();
  }
}

template <class Update, class Source>
Update update_of_part(const TableUpdate<typename Update::Table, Source>& update, int64_t part) {
  using Form = typename Update::Form;
  using Keeps = typename Update::Rule;
  const auto& rule = update.rule;
  const int64_t column = part * update.width;
  Rows<typename Update::Table> momentum;
  if constexpr (Keeps::kMomentum) {
    momentum = rule.momentum.from_column(column);
  }
  return {
      .table = slice_rows<Form>(update.table.from_column(column), update.width),
      .momentum = slice_rows<Form>(momentum, update.width),
      .second_moments = Keeps::kSecondMoments ? rule.second_moments + part : nullptr,
      .row_steps = Keeps::kSteps ? rule.row_steps : nullptr,
      .part = int(part),
      .parts = int(update.parts),
      .hyperparameters = hyperparameters_of(rule),
      .stochastic_rounding = update.stochastic_rounding,
      .key = update.key,
  };
}

// A form for the rows of a source. It depends on nothing but their width and type, as the order in
// which squares are added does.
template <class Source, class Body>
void with_update_form(int64_t width, const Body& body) {
  constexpr int vec_size = kVecSize<Source>;
  if (width <= SliceForm<vec_size, 2>::kColumns) {
    body.template operator()<SliceForm<vec_size, 2>>();
  } else {
    body.template operator()<SliceForm<vec_size, 4>>();
  }
}

// Launches the updates of all parts by lists of equally many terms.
template <class Source, class Update>
class PartLauncher {
 public:
  using Real = typename Update::Real;
  using Form = typename Update::Form;

  PartLauncher(int64_t max_terms, int64_t width, int64_t parts, const Context& context)
      : context_(context),
        shape_(choose_tile_shape<Form, Source, Real>(max_terms, width)),
        launch_(launch_shape<Form, Source, Real>(shape_,
                                                 max_terms,
                                                 UpdateStorage<Update>::bytes(shape_.warps))),
        nonzero_rows_(context.array<unsigned>(parts > 1 ? launch_.blocks * TermSet::kWords : 0)) {}

  // The parts must be updated in their order.
  void update(const TermList<Real>& list,
              const SlicedRows<const Source, Form>& source,
              const Update& update,
              const SlicedRows<Real, Form>& partial_sums,
              const bool* frozen_rows = nullptr) const {
    launch(update_kernel<Source, Update>, launch_, context_.stream, list, shape_.positions, source,
           update, partial_sums, frozen_rows, nonzero_rows_.get());
  }

 private:
  const Context& context_;
  TileShape shape_;
  LaunchShape launch_;
  std::shared_ptr<unsigned> nonzero_rows_;
};

}  // namespace

template <class Table, class Source>
void update_by_segments(const TableUpdate<Table, Source>& update,
                        const Segments& segments,
                        const Context& context) {
  using Real = accumulation_t<Table>;
  const int64_t parts = update.parts, width = update.width;
  if (segments.count == 0 || width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(segments, width, context);
  with_what_rule_keeps(update.rule, [&]<class RuleKeeps>() {
    with_update_form<Source>(width, [&]<class Form>() {
      with_update_form<Real>(width, [&]<class SumForm>() {
        using ByPairs = PartUpdate<Table, Form, RuleKeeps>;
        using BySplitSegments = PartUpdate<Table, SumForm, RuleKeeps>;
        const PartLauncher<Source, ByPairs> by_pairs(segments.count, width, parts, context);
        const PartLauncher<Real, BySplitSegments> by_split_segments(segments.max_split_segments,
                                                                    width, parts, context);
        for (int64_t part = 0; part < parts; ++part) {
          const Real* coefficients =
              update.coefficients ? update.coefficients + part * segments.count : nullptr;
          by_pairs.update(terms_of_pairs(segments, coefficients, update.pairs_per_row),
                          slice_rows<Form>(update.source.from_column(part * width), width),
                          update_of_part<ByPairs>(update, part),
                          partial_sums.template rows<Form>());
          add_partial_sums(segments, partial_sums,
                           partial_sums.template rows<PartialSumForm<Real>>(),
                           /*is_in_place=*/true, context);
          by_split_segments.update(terms_of_split_segments<Real>(segments),
                                   partial_sums.template as_source<SumForm>(),
                                   update_of_part<BySplitSegments>(update, part), {});
        }
      });
    });
  });
}

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update,
                 const int64_t* ids,
                 int64_t count,
                 int64_t table_rows,
                 const Context& context) {
  using Real = accumulation_t<Table>;
  const int64_t width = update.width;
  if (count == 0 || width == 0) {
    return;
  }
  if (ids != nullptr) {
    constexpr int kThreads = 512;
    launch(check_distinct_ids, {(count + kThreads - 1) / kThreads, kThreads}, context.stream, ids,
           count, table_rows);
  }
  with_what_rule_keeps(update.rule, [&]<class RuleKeeps>() {
    with_update_form<Source>(width, [&]<class Form>() {
      using Update = PartUpdate<Table, Form, RuleKeeps>;
      const PartLauncher<Source, Update> by_rows(count, width, update.parts, context);
      for (int64_t part = 0; part < update.parts; ++part) {
        by_rows.update(terms_of_rows<Real>(count, ids),
                       slice_rows<Form>(update.source.from_column(part * width), width),
                       update_of_part<Update>(update, part), {}, update.frozen);
      }
    });
  });
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
template void update_rows(const TableUpdate<float, float>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);
template void update_rows(const TableUpdate<double, double>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);
template void update_rows(const TableUpdate<BFloat16, BFloat16>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);
template void update_rows(const TableUpdate<BFloat16, float>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);
template void update_rows(const TableUpdate<Half, Half>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);
template void update_rows(const TableUpdate<Half, float>&,
                          const int64_t*,
                          int64_t,
                          int64_t,
                          const Context&);

}  // namespace peer::cuda
