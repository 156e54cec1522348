// The update of one part of a table's rows by their gradients, for table_update.cu:
//
//   Hyperparameters    those of every rule, in one form
//   Keeps              what a rule keeps for a row
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

// What a rule keeps for a row. Kernels are compiled for each combination: momentum fills registers.
// Rules with both also count the row's steps.
template <bool has_momentum, bool has_second_moments>
struct Keeps {
  static constexpr bool kMomentum = has_momentum;
  static constexpr bool kSecondMoments = has_second_moments;
  static constexpr bool kSteps = has_momentum && has_second_moments;
};

// Calls body.template operator()<Keeps>() for a rule.
template <class Table, class Body>
void with_what_rule_keeps(const UpdateRule<Table>& rule, const Body& body) {
  switch (rule.rule) {
    case Rule::rowwise_adagrad:
      return body.template operator()<Keeps<false, true>>();
    case Rule::sgd:
      return rule.momentum ? body.template operator()<Keeps<true, false>>()
                           : body.template operator()<Keeps<false, false>>();
    case Rule::rowwise_adam:
      return body.template operator()<Keeps<true, true>>();
  }
}

template <class Real>
struct RowState {
  Real second_moment;
  int32_t step;
};

// The keys of the random bits of a row of the table, and of its momentum if there is one.
template <bool has_momentum>
struct RowKeys {
  uint64_t table;
  __device__ uint64_t momentum() const { return 0; }
};

template <>
struct RowKeys<true> {
  uint64_t table, momentum_key;
  __device__ uint64_t momentum() const { return momentum_key; }
};

// The update of one part of the rows.
template <class TableElement, class SliceForm, class RuleKeeps>
struct PartUpdate {
  using Table = TableElement;
  using Form = SliceForm;
  using Rule = RuleKeeps;
  using Real = accumulation_t<Table>;
  using Keys = RowKeys<Rule::kMomentum>;
  SlicedRows<Table, Form> table, momentum;
  Real* second_moments;
  int32_t* row_steps;
  int part, parts;
  Hyperparameters<Real> hyperparameters;
  bool stochastic_rounding;
  uint64_t key;

  // The last part ends the row's step.
  __device__ bool is_last_part() const { return part == parts - 1; }

  // The update of an earlier part of the rows.
  __device__ PartUpdate of_part(int earlier) const {
    const int distance = part - earlier;
    PartUpdate update = *this;
    update.table.data -= distance * table.width;
    if constexpr (Rule::kMomentum) {
      update.momentum.data -= distance * table.width;
    }
    if constexpr (Rule::kSecondMoments) {
      update.second_moments -= distance;
    }
    update.part = earlier;
    return update;
  }

  __device__ RowState<Real> read_state(int32_t row) const {
    return {second_moments[int64_t(row) * parts], Rule::kSteps ? row_steps[row] : 0};
  }
  __device__ void write_state(int32_t row, const RowState<Real>& state) const {
    second_moments[int64_t(row) * parts] = state.second_moment;
    if (Rule::kSteps && is_last_part()) {
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
    if constexpr (Rule::kSteps) {
      lr /= -std::expm1(Real(state.step * hyperparameters.log_beta1));
      second_moment /= -std::expm1(Real(state.step * hyperparameters.log_beta2));
    }
    return lr / (std::sqrt(second_moment) + hyperparameters.eps);
  }

  __device__ Keys derive_keys(int32_t row) const {
    const uint64_t table_key = derive_key(key, 2 * uint64_t(row));
    if constexpr (Rule::kMomentum) {
      return {table_key, derive_key(key, 2 * uint64_t(row) + 1)};
    } else {
      return {table_key};
    }
  }
  // The place of a column of the part among the random bits of a row.
  __device__ uint32_t place_of(int64_t column) const {
    return first_place_of_part(part, table.width) + uint32_t(column);
  }

  // Updates the columns of a warp's slice by gradients of zero. Each lane takes one element at a
  // time: this is rare, and the vectors of TableSlice would raise the kernel's number of registers.
  __device__ void update_slice_by_zeros(int32_t row, int64_t slice_column, Real scale) const {
    const int columns = table.columns_from(slice_column);
    const Keys keys = derive_keys(row);
#pragma unroll 1
    for (int i = lane(); i < columns; i += kWarp) {
      const int64_t column = slice_column + i;
      Real direction = 0;
      if constexpr (Rule::kMomentum) {
        Table& stored = momentum.data[row * momentum.stride + column];
        const Real m = hyperparameters.update_momentum(widen(stored), 0);
        direction = hyperparameters.direction(m, 0);
        stored = round(m, keys.momentum(), column);
      }
      Table& stored = table.data[row * table.stride + column];
      const Real w = hyperparameters.update_weight(widen(stored), scale, direction);
      stored = round(w, keys.table, column);
    }
  }

  __device__ Table round(Real wide, uint64_t row_key, int64_t column) const {
    return stochastic_rounding
               ? narrow_stochastically<Table>(wide, random_bits(row_key, place_of(column)))
               : narrow<Table>(wide);
  }

  // Called by all lanes of a warp, before it reads the row.
  __device__ void prefetch_row(int32_t row, int64_t slice_column) const {
    prefetch_l2(table, row, slice_column);
    if constexpr (Rule::kMomentum) {
      prefetch_l2(momentum, row, slice_column);
    }
    if (Rule::kSecondMoments && threadIdx.x == 0) {
      prefetch_l2(second_moments + int64_t(row) * parts);
      if constexpr (Rule::kSteps) {
        prefetch_l2(row_steps + row);
      }
    }
  }
};

// A lane's part of a slice of a row of the table, and of its momentum.
template <class Update>
class TableSlice {
 public:
  using Table = typename Update::Table;
  using Form = typename Update::Form;
  using Real = typename Update::Real;

  // columns: of the slice from the lane's first column on.
  __device__ TableSlice(const Update& update, int32_t row, int64_t column, int columns)
      : update_(update), row_(row), column_(column), columns_(columns) {}

  __device__ void read() {
    w_ = load(update_.table.slice(row_, column_, columns_));
    if constexpr (Update::Rule::kMomentum) {
      m_ = load(update_.momentum.slice(row_, column_, columns_));
    }
  }

  // keys: read only with stochastic rounding.
  __device__ void apply_update(const SliceValues<Real, Form>& gradient,
                               Real scale,
                               const typename Update::Keys* keys) {
    if constexpr (sizeof(Table) == sizeof(uint16_t)) {
      if (update_.stochastic_rounding) {
        const typename Update::Keys row_keys = *keys;
        const uint32_t place = update_.place_of(column_);
        apply(
            gradient, scale,
            [&](const WideVec& wide, int k) {
              return narrow_vec_stochastically<Table>(wide, row_keys.table,
                                                      place + Form::vec_offset(k));
            },
            [&](const WideVec& wide, int k) {
              return narrow_vec_stochastically<Table>(wide, row_keys.momentum(),
                                                      place + Form::vec_offset(k));
            });
        return;
      }
    }
    const auto round = [](const WideVec& wide, int) { return narrow_vec<Table>(wide); };
    apply(gradient, scale, round, round);
  }

 private:
  using WideVec = Vec<Real, Form::kVecElements>;

  // The update of w uses m before m is rounded.
  template <class RoundWeights, class RoundMomentum>
  __device__ void apply(const SliceValues<Real, Form>& gradient,
                        Real scale,
                        const RoundWeights& round_weights,
                        const RoundMomentum& round_momentum) {
    const Hyperparameters<Real>& hyperparameters = update_.hyperparameters;
    for_each_vec<Form>([&](int k) {
      WideVec direction = gradient.vecs[k];
      if constexpr (Update::Rule::kMomentum) {
        WideVec m = widen_vec(m_.vecs[k]);
        for_each_element<Form>([&](int i) {
          const Real g = direction.values[i];
          m.values[i] = hyperparameters.update_momentum(m.values[i], g);
          direction.values[i] = hyperparameters.direction(m.values[i], g);
        });
        store_vec(update_.momentum.slice(row_, column_, columns_), k, round_momentum(m, k));
      }
      WideVec w = widen_vec(w_.vecs[k]);
      for_each_element<Form>([&](int i) {
        w.values[i] = hyperparameters.update_weight(w.values[i], scale, direction.values[i]);
      });
      store_vec(update_.table.slice(row_, column_, columns_), k, round_weights(w, k));
    });
  }

  const Update& update_;
  const int32_t row_;
  const int64_t column_;
  const int columns_;
  RawSliceValues<Table, Form> w_ = {}, m_ = {};
};

}  // namespace peer::cuda
