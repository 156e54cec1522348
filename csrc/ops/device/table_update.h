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

// Updates the table by the rule that make_rule.template operator()<Table>() returns.
template <class Device, class Arguments, class MakeRule>
void update_table_on(const Arguments& args, const MakeRule& make_rule) {
  const Tensor& table = args.table;
  const RowGradient& gradient = args.gradient;
  const Rounding& rounding = args.rounding;
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
  const uint64_t key =
      derive_key(derive_key(uint64_t(rounding.seed.value_or(0)), uint64_t(rounding.step)),
                 uint64_t(rounding.stream));
  with_table_and_input_type(type, source.scalar_type(), [&]<class Table, class Source>() {
    TableUpdate<Table, Source> update = {
        .parts = table.dim() == 3 ? table.size(1) : 1,
        .width = table.size(-1),
        .table = mutable_rows_of<Table>(table),
        .rule = make_rule.template operator()<Table>(),
        .stochastic_rounding = rounding.seed.has_value() && type != accumulated,
        .key = key,
        .source = rows_of<Source>(source),
    };
    update.coefficients = const_data_or_null<accumulation_t<Table>>(coefficients);
    update.frozen = const_data_or_null<bool>(frozen);
    Device::update(update, indices, source, table.size(0));
  });
}

template <class Device>
void rowwise_adagrad_on(const RowwiseAdagradArguments& args) {
  check_rowwise_adagrad(args);
  update_table_on<Device>(args, [&]<class Table>() {
    return UpdateRule<Table>{
        .rule = Rule::rowwise_adagrad,
        .lr = args.lr,
        .decay_factor = decay_factor(args.lr, args.weight_decay),
        .eps = args.eps,
        .second_moments = data_of<accumulation_t<Table>>(args.sum_of_squares),
    };
  });
}

template <class Device>
void sgd_on(const SgdArguments& args) {
  check_sgd(args);
  update_table_on<Device>(args, [&]<class Table>() {
    UpdateRule<Table> rule = {
        .rule = Rule::sgd, .lr = args.lr, .decay_factor = decay_factor(args.lr, args.weight_decay)};
    if (args.momentum_buffer.has_value()) {
      rule.beta1 = args.momentum;
      rule.nesterov = args.nesterov;
      rule.momentum = mutable_rows_of<Table>(*args.momentum_buffer);
    }
    return rule;
  });
}

template <class Device>
void rowwise_adam_on(const RowwiseAdamArguments& args) {
  check_rowwise_adam(args);
  update_table_on<Device>(args, [&]<class Table>() {
    return UpdateRule<Table>{
        .rule = Rule::rowwise_adam,
        .lr = args.lr,
        .decay_factor = decay_factor(args.lr, args.weight_decay),
        .eps = args.eps,
        .beta1 = args.beta1,
        .beta2 = args.beta2,
        .momentum = mutable_rows_of<Table>(args.first_moment),
        .second_moments = data_of<accumulation_t<Table>>(args.second_moment),
        .row_steps = data_of<int32_t>(args.row_steps),
    };
  });
}

}  // namespace peer::ops
