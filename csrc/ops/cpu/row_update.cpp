#include "ops/row_update.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/random_bits.h"
#include "ops/checks.h"
#include "ops/cpu/glue.h"

namespace peer::ops::cpu {

namespace {

// A row takes a fraction of a microsecond.
constexpr int64_t kRowsPerTask = 64;

// Distinct rows in their order: each is its own pair, so there is nothing to sort or to sum.
bool ascend_strictly(const Tensor& contiguous_indices) {
  const int64_t* indices = contiguous_indices.const_data_ptr<int64_t>();
  const int64_t count = contiguous_indices.numel();
  for (int64_t i = 1; i < count; ++i) {
    if (indices[i] <= indices[i - 1]) {
      return false;
    }
  }
  return true;
}

// What rows are multiplied by before they follow their gradients.
double kept_by_decay(double lr, double weight_decay) { return 1 - lr * weight_decay; }

template <class Element>
Rows<Element> mutable_rows_of(const Tensor& tensor) {
  return {data_of<Element>(tensor), tensor.stride(0)};
}

template <class Table, class Source>
void update_by(const UpdateKernels<Table, Source>& kernel,
               RowUpdate<Table, Source> update,
               const Tensor& indices,
               const Tensor& source,
               int64_t rows) {
  if (!indices.defined() ||
      (update.coefficients == nullptr && indices.dim() == 1 && ascend_strictly(indices))) {
    update.ids = indices.defined() ? indices.const_data_ptr<int64_t>() : nullptr;
    at::parallel_for(0, source.size(0), kRowsPerTask,
                     [&](int64_t first, int64_t last) { kernel.update_rows(update, first, last); });
    return;
  }
  const SortedPairs sorted(indices, rows, OutputRows::by_owner);
  const Tensor partial_sums =
      at::empty({sorted.plan.partial_rows, update.width},
                source.options().dtype(accumulation_type(source.scalar_type())));
  update.pairs_per_row = indices.numel() / source.size(0);
  update.pairs = sorted.pairs.data();
  update.chunks = sorted.plan.chunks.data();
  update.split_runs = sorted.plan.split_runs.data();
  update.partial_sums = mutable_rows_of<accumulation_t<Table>>(partial_sums);
  at::parallel_for(0, sorted.plan.chunks.size(), kRowsPerTask,
                   [&](int64_t first, int64_t last) { kernel.update_chunks(update, first, last); });
  at::parallel_for(0, sorted.plan.split_runs.size(), 1, [&](int64_t first, int64_t last) {
    kernel.update_split_runs(update, first, last);
  });
}

// Updates the table by the rule that make_rule.template operator()<Table>() returns.
template <class MakeRule>
void update_table(const char* op,
                  const Tensor& table,
                  const RowGradient& gradient,
                  const Rounding& rounding,
                  const MakeRule& make_rule) {
  const Tensor indices = gradient.indices.has_value() ? gradient.indices->contiguous() : Tensor();
  if (indices.defined()) {
    check_index_range(op, indices, table.size(0));
  }
  if (gradient.source.numel() == 0 || (indices.defined() && indices.numel() == 0)) {
    return;
  }
  const at::ScalarType type = table.scalar_type();
  const at::ScalarType accumulated = accumulation_type(type);
  const bool is_narrow = gradient.source.scalar_type() == type && type != accumulated;
  const Tensor source =
      with_contiguous_rows(is_narrow ? gradient.source : gradient.source.to(accumulated));
  const Tensor coefficients = gradient.coefficients.has_value()
                                  ? contiguous_as(*gradient.coefficients, accumulated)
                                  : Tensor();
  const uint64_t key =
      derive_key(derive_key(uint64_t(rounding.seed.value_or(0)), uint64_t(rounding.step)),
                 uint64_t(rounding.stream));
  with_table_type(type, [&]<class Table>() {
    const auto update = [&]<class Source>() {
      update_by<Table, Source>(
          kernels().template experts<Table>().template update<Source>(),
          {.width = table.size(1),
           .table = mutable_rows_of<Table>(table),
           .rule = make_rule.template operator()<Table>(),
           .stochastic_rounding = rounding.seed.has_value() && type != accumulated,
           .key = key,
           .source = rows_of<Source>(source),
           .coefficients = coefficients.defined()
                               ? const_data_of<accumulation_t<Table>>(coefficients)
                               : nullptr},
          indices, source, table.size(0));
    };
    if (is_narrow) {
      update.template operator()<Table>();
    } else {
      update.template operator()<accumulation_t<Table>>();
    }
  });
}

void rowwise_adagrad_cpu(const Tensor& table,
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
  update_table("rowwise_adagrad_", table, gradient, {seed, step, stream}, [&]<class Table>() {
    return UpdateRule<Table>{.rule = Rule::rowwise_adagrad,
                             .lr = lr,
                             .kept = kept_by_decay(lr, weight_decay),
                             .eps = eps,
                             .second_moments = data_of<accumulation_t<Table>>(sum_of_squares)};
  });
}

void sgd_cpu(const Tensor& table,
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
  update_table("sgd_", table, gradient, {seed, step, stream}, [&]<class Table>() {
    UpdateRule<Table> rule = {.rule = Rule::sgd, .lr = lr, .kept = kept_by_decay(lr, weight_decay)};
    if (momentum_buffer.has_value()) {
      rule.beta1 = momentum;
      rule.nesterov = nesterov;
      rule.momentum = mutable_rows_of<Table>(*momentum_buffer);
    }
    return rule;
  });
}

void rowwise_adam_cpu(const Tensor& table,
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
  update_table("rowwise_adam_", table, gradient, {seed, step, stream}, [&]<class Table>() {
    return UpdateRule<Table>{.rule = Rule::rowwise_adam,
                             .lr = lr,
                             .kept = kept_by_decay(lr, weight_decay),
                             .eps = eps,
                             .beta1 = beta1,
                             .beta2 = beta2,
                             .momentum = mutable_rows_of<Table>(first_moment),
                             .second_moments = data_of<accumulation_t<Table>>(second_moment),
                             .row_steps = data_of<int32_t>(row_steps)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("rowwise_adagrad_", rowwise_adagrad_cpu);
  m.impl("sgd_", sgd_cpu);
  m.impl("rowwise_adam_", rowwise_adam_cpu);
}

}  // namespace peer::ops::cpu
