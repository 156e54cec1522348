#include "ops/table_update.h"

#include <torch/library.h>

#include "ops/checks.h"

namespace peer::ops {

namespace {

// State with one number per row of the table, or per part of a row.
void check_row_state(const char* op,
                     const char* name,
                     const Tensor& state,
                     c10::SymIntArrayRef shape,
                     at::ScalarType type,
                     const Tensor& table) {
  TORCH_CHECK_VALUE(state.sym_sizes() == shape, op, ": expected ", name, " of shape ", shape,
                    " to match table, got ", state.sym_sizes());
  TORCH_CHECK_TYPE(state.scalar_type() == type, op, ": expected ", name, " of dtype ", type,
                   ", got ", state.scalar_type());
  check_strided(op, name, state);
  TORCH_CHECK_VALUE(state.is_contiguous(), op, ": expected ", name,
                    " to be contiguous, got strides ", state.sym_strides());
  check_same_device(op, name, state, "table", table);
}

void check_second_moments(const char* op,
                          const char* name,
                          const Tensor& state,
                          const Tensor& table) {
  check_row_state(op, name, state, table.sym_sizes().slice(0, table.dim() - 1),
                  accumulation_type(table.scalar_type()), table);
}

// State with one row per row of the table.
void check_momentum(const char* op, const char* name, const Tensor& state, const Tensor& table) {
  TORCH_CHECK_VALUE(state.sym_sizes() == table.sym_sizes(), op, ": expected ", name,
                    " of table's shape ", table.sym_sizes(), ", got ", state.sym_sizes());
  check_same_dtype(op, name, state, "table", table);
  check_rows(op, name, state);
  check_same_device(op, name, state, "table", table);
}

}  // namespace

void check_rows(const char* op, const char* name, const Tensor& tensor) {
  check_strided(op, name, tensor);
  const bool are_apart =
      tensor.sym_size(0) <= 1 || tensor.sym_stride(0) * tensor.sym_size(0) >= tensor.sym_numel();
  TORCH_CHECK_VALUE(has_contiguous_rows(tensor) && are_apart, op, ": expected ", name,
                    " with contiguous rows that do not overlap, got strides ",
                    tensor.sym_strides());
}

void check_gradient(const char* op,
                    const Tensor& table,
                    const RowGradient& gradient,
                    const std::optional<Tensor>& frozen) {
  const auto& [indices, source, coefficients] = gradient;
  TORCH_CHECK_VALUE(table.dim() == 2 || table.dim() == 3, op,
                    ": expected table of shape [rows, width] or [rows, parts, width], got ",
                    table.sym_sizes());
  check_floating(op, "table", table);
  check_rows(op, "table", table);
  check_strided(op, "source", source);
  TORCH_CHECK_VALUE(
      source.dim() == table.dim() && source.sym_sizes().slice(1) == table.sym_sizes().slice(1), op,
      ": expected source of shape [*, ", table.dim() == 3 ? c10::str(table.sym_size(1), ", ") : "",
      table.sym_size(-1), "] to match table, got ", source.sym_sizes());
  check_floating(op, "source", source);
  TORCH_CHECK_TYPE((source.scalar_type() == at::kDouble) == (table.scalar_type() == at::kDouble),
                   op, ": float64 goes with float64 only, got source ", source.scalar_type(),
                   " and table ", table.scalar_type());
  check_same_device(op, "source", source, "table", table);
  check_frozen(op, frozen, table);
  if (!indices.has_value()) {
    TORCH_CHECK_VALUE(source.sym_size(0) == table.sym_size(0), op,
                      ": expected source of table's shape ", table.sym_sizes(),
                      " without indices, got ", source.sym_sizes());
    TORCH_CHECK_VALUE(!coefficients.has_value(), op, ": expected no coefficients without indices");
    return;
  }
  check_index_dtype(op, *indices);
  check_same_device(op, "indices", *indices, "table", table);
  TORCH_CHECK_VALUE(
      (indices->dim() == 1 || indices->dim() == 2) && indices->sym_size(0) == source.sym_size(0),
      op, ": expected indices of shape [", source.sym_size(0), "] or [", source.sym_size(0),
      ", experts per token] to match source, got ", indices->sym_sizes());
  if (coefficients.has_value()) {
    std::vector<c10::SymInt> shape = indices->sym_sizes().vec();
    if (table.dim() == 3) {
      shape.insert(shape.begin(), table.sym_size(1));
    }
    TORCH_CHECK_VALUE(coefficients->sym_sizes() == c10::SymIntArrayRef(shape), op,
                      ": expected coefficients of shape ", c10::SymIntArrayRef(shape),
                      " to match indices and table's parts, got ", coefficients->sym_sizes());
    check_floating(op, "coefficients", *coefficients);
    check_strided(op, "coefficients", *coefficients);
    check_same_device(op, "coefficients", *coefficients, "table", table);
  }
}

void check_state(const char* op,
                 const Tensor& table,
                 const RowwiseAdagrad::State& state,
                 const RowwiseAdagrad::Options& /*options*/) {
  check_second_moments(op, "sum_of_squares", state.sum_of_squares, table);
}

void check_state(const char* op,
                 const Tensor& table,
                 const Sgd::State& state,
                 const Sgd::Options& options) {
  if (state.momentum_buffer.has_value()) {
    check_momentum(op, "momentum_buffer", *state.momentum_buffer, table);
  } else {
    TORCH_CHECK_VALUE(options.momentum == 0, op, ": expected momentum_buffer, because momentum is ",
                      options.momentum);
  }
}

void check_state(const char* op,
                 const Tensor& table,
                 const RowwiseAdam::State& state,
                 const RowwiseAdam::Options& /*options*/) {
  check_momentum(op, "first_moment", state.first_moment, table);
  check_second_moments(op, "second_moment", state.second_moment, table);
  check_row_state(op, "row_steps", state.row_steps, table.sym_sizes().slice(0, 1), at::kInt, table);
}

}  // namespace peer::ops

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def(
      "rowwise_adagrad_(Tensor(a!) table, Tensor(b!) sum_of_squares, Tensor? indices, Tensor "
      "source, Tensor? coefficients, float lr, float eps, float weight_decay, int? seed=None, int "
      "step=0, int stream=0, Tensor? frozen=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sgd_(Tensor(a!) table, Tensor(b!)? momentum_buffer, Tensor? indices, Tensor source, Tensor? "
      "coefficients, float lr, float momentum, bool nesterov, float weight_decay, int? seed=None, "
      "int step=0, int stream=0, Tensor? frozen=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rowwise_adam_(Tensor(a!) table, Tensor(b!) first_moment, Tensor(c!) second_moment, "
      "Tensor(d!) row_steps, Tensor? indices, Tensor source, Tensor? coefficients, float lr, float "
      "beta1, float beta2, float eps, float weight_decay, int? seed=None, int step=0, int "
      "stream=0, Tensor? frozen=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}
