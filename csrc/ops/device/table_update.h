// The operators that update rows on a device, which adds to what common.h asks of it
//
//   update(TableUpdate, indices, source, rows)  by sums over the indices; row by row where there
//   are
//                                             none
#pragma once

#include "kernels/random_bits.h"
#include "kernels/table_update.h"
#include "ops/device/common.h"
#include "ops/table_update.h"

namespace peer::ops {

// What rows are multiplied by before they follow their gradients.
inline double decay_factor_of(double lr, double weight_decay) { return 1 - lr * weight_decay; }

// Updates the table by the rule that make_rule.template operator()<Table>() returns.
template <class Device, class MakeRule>
void update_table_on(const char* op,
                     const Tensor& table,
                     const RowGradient& gradient,
                     const Rounding& rounding,
                     const MakeRule& make_rule) {
  const c10::DeviceGuard guard(table.device());
  const Tensor indices = gradient.indices.has_value() ? gradient.indices->contiguous() : Tensor();
  if (indices.defined()) {
    Device::check_index_range(op, indices, table.size(0));
  }
  check_sortable<Device>(op, table, indices.defined() ? indices.numel() : 0, table.size(0));
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
    Device::update(update, indices, source, table.size(0));
  });
}

template <class Device>
void rowwise_adagrad_on(const Tensor& table,
                        const Tensor& sum_of_squares,
                        const std::optional<Tensor>& indices,
                        const Tensor& source,
                        const std::optional<Tensor>& coefficients,
                        double lr,
                        double eps,
                        double weight_decay,
                        std::optional<int64_t> seed,
                        int64_t step,
                        int64_t stream) {
  const RowGradient gradient = {indices, source, coefficients};
  check_rowwise_adagrad(table, sum_of_squares, gradient);
  update_table_on<Device>(
      "rowwise_adagrad_", table, gradient, {seed, step, stream}, [&]<class Table>() {
        return UpdateRule<Table>{.rule = Rule::rowwise_adagrad,
                                 .lr = lr,
                                 .decay_factor = decay_factor_of(lr, weight_decay),
                                 .eps = eps,
                                 .second_moments = data_of<accumulation_t<Table>>(sum_of_squares)};
      });
}

template <class Device>
void sgd_on(const Tensor& table,
            const std::optional<Tensor>& momentum_buffer,
            const std::optional<Tensor>& indices,
            const Tensor& source,
            const std::optional<Tensor>& coefficients,
            double lr,
            double momentum,
            bool nesterov,
            double weight_decay,
            std::optional<int64_t> seed,
            int64_t step,
            int64_t stream) {
  const RowGradient gradient = {indices, source, coefficients};
  check_sgd(table, momentum_buffer, gradient, momentum);
  update_table_on<Device>("sgd_", table, gradient, {seed, step, stream}, [&]<class Table>() {
    UpdateRule<Table> rule = {
        .rule = Rule::sgd, .lr = lr, .decay_factor = decay_factor_of(lr, weight_decay)};
    if (momentum_buffer.has_value()) {
      rule.beta1 = momentum;
      rule.nesterov = nesterov;
      rule.momentum = mutable_rows_of<Table>(*momentum_buffer);
    }
    return rule;
  });
}

template <class Device>
void rowwise_adam_on(const Tensor& table,
                     const Tensor& first_moment,
                     const Tensor& second_moment,
                     const Tensor& row_steps,
                     const std::optional<Tensor>& indices,
                     const Tensor& source,
                     const std::optional<Tensor>& coefficients,
                     double lr,
                     double beta1,
                     double beta2,
                     double eps,
                     double weight_decay,
                     std::optional<int64_t> seed,
                     int64_t step,
                     int64_t stream) {
  const RowGradient gradient = {indices, source, coefficients};
  check_rowwise_adam(table, first_moment, second_moment, row_steps, gradient);
  update_table_on<Device>(
      "rowwise_adam_", table, gradient, {seed, step, stream}, [&]<class Table>() {
        return UpdateRule<Table>{.rule = Rule::rowwise_adam,
                                 .lr = lr,
                                 .decay_factor = decay_factor_of(lr, weight_decay),
                                 .eps = eps,
                                 .beta1 = beta1,
                                 .beta2 = beta2,
                                 .momentum = mutable_rows_of<Table>(first_moment),
                                 .second_moments = data_of<accumulation_t<Table>>(second_moment),
                                 .row_steps = data_of<int32_t>(row_steps)};
      });
}

}  // namespace peer::ops
