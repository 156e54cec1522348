// The update of one part of a table's rows by their gradients, for table_update.cu:
//
//   Hyperparameters    those of every rule, in one form
//   PartUpdate         the arrays of the part; a row's state and scale
//   TableSlice         the update of a slice of a row, by one warp
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/common.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/stochastic_rounding.h"
#include "kernels/random_bits.h"
#include "kernels/table_update.h"

namespace peer::cuda {

// All rules of kernels/table_update.h in one form:
//
//   v = second_moment_decay·v + second_moment_gain·mean(g²)     if there are second moments
//   scale = lr                                                  without second moments
//         = lr / (sqrt(v) + eps)                                without a count of steps
//         = lr / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//   m = momentum_decay·m + momentum_gain·g                      or m = g, without momentum
//   w = decay_factor·w - scale·m                                or, with nesterov,
//   w = decay_factor·w - scale·(g + momentum_decay·m)
//
// In the last lines, what scale is multiplied by is the direction.
template <class Real>
struct Hyperparameters {
  Real lr, decay_factor, eps = 0;
  Real momentum_decay = 0, momentum_gain = 1;
  Real second_moment_decay = 1, second_moment_gain = 1;
  double log_beta1 = 0, log_beta2 = 0;  // for beta^t
  bool nesterov = false;

  __device__ Real update_momentum(Real m, Real g) const {
    return momentum_decay * m + momentum_gain * g;
  }
  __device__ Real direction(Real updated_m, Real g) const {
    return nesterov ? g + momentum_decay * updated_m : updated_m;
  }
  __device__ Real update_weight(Real w, Real scale, Real direction) const {
    return decay_factor * w - scale * direction;
  }
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
  Real* second_moments;  // null if the rule has none
  int32_t* row_steps;
  int part, parts;
  Hyperparameters<Real> hyperparameters;
  bool stochastic_rounding;
  uint64_t key;

  __device__ bool needs_mean_of_squares() const { return second_moments != nullptr; }
  __device__ bool has_momentum() const { return momentum.data != nullptr; }
  // The last part ends the row's step.
  __device__ bool is_last_part() const { return part == parts - 1; }

  // The update of an earlier part of the rows.
  __device__ PartUpdate of_part(int earlier) const {
    const int distance = part - earlier;
    PartUpdate update = *this;
    update.table.data -= distance * table.width;
    if (has_momentum()) {
      update.momentum.data -= distance * table.width;
    }
    if (needs_mean_of_squares()) {
      update.second_moments -= distance;
    }
    update.part = earlier;
    return update;
  }

  __device__ RowState<Real> read_state(int32_t row) const {
    return {second_moments[int64_t(row) * parts], row_steps ? row_steps[row] : 0};
  }
  __device__ void write_state(int32_t row, const RowState<Real>& state) const {
    second_moments[int64_t(row) * parts] = state.second_moment;
    if (row_steps && is_last_part()) {
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

  // Keys of the random bits of a row of the table and of its momentum.
  __device__ uint64_t derive_table_key(int32_t row) const {
    return stochastic_rounding ? derive_key(key, 2 * uint64_t(row)) : 0;
  }
  __device__ uint64_t derive_momentum_key(int32_t row) const {
    return stochastic_rounding ? derive_key(key, 2 * uint64_t(row) + 1) : 0;
  }
  // The place of a column of the part among the random bits of a row.
  __device__ uint32_t place_of(int64_t column) const {
    return first_place_of_part(part, table.width) + uint32_t(column);
  }

  // Updates the columns of a warp's slice by gradients of zero. Each lane takes one element at a
  // time: this is rare, and the vectors of TableSlice would raise the kernel's number of registers.
  __device__ void update_slice_by_zeros(int32_t row, int64_t slice_column, Real scale) const {
    const int64_t rest = table.width - slice_column;
    const int columns = int(rest < kSliceColumns<vec_size> ? rest : kSliceColumns<vec_size>);
#pragma unroll 1
    for (int i = lane(); i < columns; i += kWarp) {
      const int64_t column = slice_column + i;
      Real direction = 0;
      if (has_momentum()) {
        Table& stored = momentum.data[row * momentum.stride + column];
        const Real m = hyperparameters.update_momentum(widen(stored), 0);
        direction = hyperparameters.direction(m, 0);
        stored = round(m, derive_momentum_key(row), column);
      }
      Table& stored = table.data[row * table.stride + column];
      const Real w = hyperparameters.update_weight(widen(stored), scale, direction);
      stored = round(w, derive_table_key(row), column);
    }
  }

  __device__ Table round(Real wide, uint64_t row_key, int64_t column) const {
    return stochastic_rounding
               ? narrow_stochastically<Table>(wide, random_bits(row_key, place_of(column)))
               : narrow<Table>(wide);
  }

  // Called before the warp reads the row.
  __device__ void prefetch_row(int32_t row, int64_t column) const {
    prefetch_l2(table.slice(row, column));
    if (has_momentum()) {
      prefetch_l2(momentum.slice(row, column));
    }
    if (needs_mean_of_squares() && threadIdx.x == 0) {
      prefetch_l2(second_moments + int64_t(row) * parts);
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
    const uint64_t table_key = update_.derive_table_key(row_);
    const uint64_t momentum_key = update_.has_momentum() ? update_.derive_momentum_key(row_) : 0;
    for_each_vec([&](int k) {
      WideVec direction = gradient.vecs[k];
      if (update_.has_momentum()) {
        WideVec m = widen_vec(m_.vecs[k]);
        for_each_element<vec_size>([&](int i) {
          const Real g = direction.values[i];
          m.values[i] = hyperparameters.update_momentum(m.values[i], g);
          direction.values[i] = hyperparameters.direction(m.values[i], g);
        });
        store_vec(update_.momentum.slice(row_, column_), k, round(m, momentum_key, k));
      }
      WideVec w = widen_vec(w_.vecs[k]);
      for_each_element<vec_size>([&](int i) {
        w.values[i] = hyperparameters.update_weight(w.values[i], scale, direction.values[i]);
      });
      store_vec(update_.table.slice(row_, column_), k, round(w, table_key, k));
    });
  }

 private:
  using WideVec = Vec<Real, vec_size>;

  __device__ RawVec<Table, vec_size> round(const WideVec& wide, uint64_t row_key, int k) const {
    if (!update_.stochastic_rounding) {
      return narrow_vec<Table>(wide);
    }
    return narrow_vec_stochastically<Table>(wide, row_key,
                                            update_.place_of(column_) + vec_offset<vec_size>(k));
  }

  const PartUpdate<Table, vec_size>& update_;
  const int32_t row_;
  const int64_t column_;
  RawSliceValues<Table, vec_size> w_ = {}, m_ = {};
};

}  // namespace peer::cuda
