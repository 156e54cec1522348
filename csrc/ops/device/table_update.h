// The operators that update tables, on a device. Besides what common.h lists, a device has
//
//   update(TableUpdate, indices, source, rows)
//
// which updates rows by sums over the indices, or row by row if `indices` is undefined.
#pragma once

#include "kernels/random_bits.h"
#include "kernels/table_update.h"
#include "ops/device/common.h"
#include "ops/table_update.h"

namespace peer::ops {

// Rows are multiplied by this factor before they are updated.
inline double decay_factor(double lr, double weight_decay) { return 1 - lr * weight_decay; }

template <class Table>
UpdateRule<Table> make_rule(const RowwiseAdagrad::State& state,
                            const RowwiseAdagrad::Options& options) {
  return {
      .rule = Rule::rowwise_adagrad,
      .lr = options.lr,
      .decay_factor = decay_factor(options.lr, options.weight_decay),
      .eps = options.eps,
      .second_moments = data_of<accumulation_t<Table>>(state.sum_of_squares),
  };
}

template <class Table>
UpdateRule<Table> make_rule(const Sgd::State& state, const Sgd::Options& options) {
  UpdateRule<Table> rule = {.rule = Rule::sgd,
                            .lr = options.lr,
                            .decay_factor = decay_factor(options.lr, options.weight_decay)};
  if (state.momentum_buffer.has_value()) {
    rule.beta1 = options.momentum;
    rule.nesterov = options.nesterov;
    rule.momentum = mutable_rows_of<Table>(*state.momentum_buffer);
  }
  return rule;
}

template <class Table>
UpdateRule<Table> make_rule(const RowwiseAdam::State& state, const RowwiseAdam::Options& options) {
  return {
      .rule = Rule::rowwise_adam,
      .lr = options.lr,
      .decay_factor = decay_factor(options.lr, options.weight_decay),
      .eps = options.eps,
      .beta1 = options.beta1,
      .beta2 = options.beta2,
      .momentum = mutable_rows_of<Table>(state.first_moment),
      .second_moments = data_of<accumulation_t<Table>>(state.second_moment),
      .row_steps = data_of<int32_t>(state.row_steps),
  };
}

// args: of an update, or of a fused update. source: rows in a dtype that the kernels take.
// coefficients, frozen: as the kernels take them, or undefined.
template <class Table, class Source, class Arguments>
TableUpdate<Table, Source> make_update(const Arguments& args,
                                       const Tensor& source,
                                       const Tensor& coefficients,
                                       const Tensor& frozen) {
  const Tensor& table = args.table;
  const Rounding& rounding = args.rounding;
  TableUpdate<Table, Source> update = {
      .parts = table.dim() == 3 ? table.size(1) : 1,
      .width = table.size(-1),
      .table = mutable_rows_of<Table>(table),
      .rule = make_rule<Table>(args.state, args.options),
      .stochastic_rounding = rounding.seed.has_value() && sizeof(Table) == 2,
      .key = derive_key(derive_key(uint64_t(rounding.seed.value_or(0)), uint64_t(rounding.step)),
                        uint64_t(rounding.stream)),
      .source = rows_of<Source>(source),
  };
  update.coefficients = const_data_or_null<accumulation_t<Table>>(coefficients);
  update.frozen = const_data_or_null<bool>(frozen);
  return update;
}

template <class Device, class Rule>
void update_table_on(const UpdateArguments<Rule>& args) {
  check_update(args);
  const Tensor& table = args.table;
  const RowGradient& gradient = args.gradient;
  const c10::DeviceGuard guard(table.device());
  const Tensor indices = gradient.indices.has_value() ? gradient.indices->contiguous() : Tensor();
  if (indices.defined()) {
    Device::check_index_range(args.kName, indices, table.size(0));
  }
  check_sortable<Device>(args.kName, table, indices.defined() ? indices.numel() : 0, table.size(0));
  if (gradient.source.numel() == 0 || (indices.defined() && indices.numel() == 0)) {
    return;
  }
  const at::ScalarType type = table.scalar_type();
  const at::ScalarType accumulated = accumulation_type(type);
  const bool is_narrow = gradient.source.scalar_type() == type;
  const Tensor given = is_narrow ? gradient.source : gradient.source.to(accumulated);
  const Tensor source = has_contiguous_rows(given) ? given : given.contiguous();
  const Tensor coefficients = gradient.coefficients.has_value()
                                  ? contiguous_as(*gradient.coefficients, accumulated)
                                  : Tensor();
  const Tensor frozen = contiguous_mask(args.frozen);
  with_table_and_input_type(type, source.scalar_type(), [&]<class Table, class Source>() {
    Device::update(make_update<Table, Source>(args, source, coefficients, frozen), indices, source,
                   table.size(0));
  });
}

}  // namespace peer::ops
