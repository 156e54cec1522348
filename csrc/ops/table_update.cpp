#include "ops/table_update.h"

#include "ops/checks.h"

namespace peer::ops {

namespace {

// Written in place, so the rows must be as the kernels want them: contiguous, and none over
// another.
void check_rows(const char* op, const char* name, const Tensor& tensor) {
  check_strided(op, name, tensor);
  const bool are_apart =
      tensor.sym_size(0) <= 1 || tensor.sym_stride(0) * tensor.sym_size(0) >= tensor.sym_numel();
  TORCH_CHECK_VALUE(has_contiguous_rows(tensor) && are_apart, "peer::", op, ": expected ", name,
                    " with contiguous rows that do not overlap, got strides ",
                    tensor.sym_strides());
}

void check_table(const char* op, const Tensor& table, const RowGradient& gradient) {
  const auto& [indices, source, coefficients] = gradient;
  TORCH_CHECK_VALUE(table.dim() == 2 || table.dim() == 3, "peer::", op,
                    ": expected table of shape [rows, width] or [rows, parts, width], got ",
                    table.sym_sizes());
  check_floating(op, "table", table);
  check_rows(op, "table", table);
  check_strided(op, "source", source);
  TORCH_CHECK_VALUE(
      source.dim() == table.dim() && source.sym_sizes().slice(1) == table.sym_sizes().slice(1),
      "peer::", op, ": expected source of shape [*, ",
      table.dim() == 3 ? c10::str(table.sym_size(1), ", ") : "", table.sym_size(-1),
      "] to match table, got ", source.sym_sizes());
  check_floating(op, "source", source);
  TORCH_CHECK_TYPE((source.scalar_type() == at::kDouble) == (table.scalar_type() == at::kDouble),
                   "peer::", op, ": float64 goes with float64 only, got source ",
                   source.scalar_type(), " and table ", table.scalar_type());
  check_same_device(op, "source", source, "table", table);
  if (!indices.has_value()) {
    TORCH_CHECK_VALUE(source.sym_size(0) == table.sym_size(0), "peer::", op,
                      ": expected source of table's shape ", table.sym_sizes(),
                      " where no indices are given, got ", source.sym_sizes());
    TORCH_CHECK_VALUE(!coefficients.has_value(), "peer::", op,
                      ": expected no coefficients where no indices are given");
    return;
  }
  check_index_dtype(op, *indices);
  check_same_device(op, "indices", *indices, "table", table);
  TORCH_CHECK_VALUE(
      (indices->dim() == 1 || indices->dim() == 2) && indices->sym_size(0) == source.sym_size(0),
      "peer::", op, ": expected indices of shape [", source.sym_size(0), "] or [",
      source.sym_size(0), ", experts per token] to match source, got ", indices->sym_sizes());
  if (coefficients.has_value()) {
    std::vector<c10::SymInt> shape = indices->sym_sizes().vec();
    if (table.dim() == 3) {
      shape.insert(shape.begin(), table.sym_size(1));
    }
    TORCH_CHECK_VALUE(coefficients->sym_sizes() == c10::SymIntArrayRef(shape), "peer::", op,
                      ": expected coefficients of shape ", c10::SymIntArrayRef(shape),
                      " to match indices and table's parts, got ", coefficients->sym_sizes());
    check_floating(op, "coefficients", *coefficients);
    check_strided(op, "coefficients", *coefficients);
    check_same_device(op, "coefficients", *coefficients, "table", table);
  }
}

// A number for each row of the table, or for each part of its rows.
void check_numbers(const char* op,
                   const char* name,
                   const Tensor& state,
                   c10::SymIntArrayRef shape,
                   at::ScalarType type,
                   const Tensor& table) {
  TORCH_CHECK_VALUE(state.sym_sizes() == shape, "peer::", op, ": expected ", name, " of shape ",
                    shape, " to match table, got ", state.sym_sizes());
  TORCH_CHECK_TYPE(state.scalar_type() == type, "peer::", op, ": expected ", name, " of dtype ",
                   type, ", got ", state.scalar_type());
  check_strided(op, name, state);
  TORCH_CHECK_VALUE(state.is_contiguous(), "peer::", op, ": expected ", name,
                    " to be contiguous, got strides ", state.sym_strides());
  check_same_device(op, name, state, "table", table);
}

void check_second_moments(const char* op,
                          const char* name,
                          const Tensor& state,
                          const Tensor& table) {
  check_numbers(op, name, state, table.sym_sizes().slice(0, table.dim() - 1),
                accumulation_type(table.scalar_type()), table);
}

// A row for each row of the table.
void check_momentum(const char* op, const char* name, const Tensor& state, const Tensor& table) {
  TORCH_CHECK_VALUE(state.sym_sizes() == table.sym_sizes(), "peer::", op, ": expected ", name,
                    " of table's shape ", table.sym_sizes(), ", got ", state.sym_sizes());
  check_same_dtype(op, name, state, "table", table);
  check_rows(op, name, state);
  check_same_device(op, name, state, "table", table);
}

}  // namespace

void check_rowwise_adagrad(const Tensor& table,
                           const Tensor& sum_of_squares,
                           const RowGradient& gradient) {
  const char* op = "rowwise_adagrad_";
  check_table(op, table, gradient);
  check_second_moments(op, "sum_of_squares", sum_of_squares, table);
}

void check_sgd(const Tensor& table,
               const std::optional<Tensor>& momentum_buffer,
               const RowGradient& gradient,
               double momentum) {
  const char* op = "sgd_";
  check_table(op, table, gradient);
  if (momentum_buffer.has_value()) {
    check_momentum(op, "momentum_buffer", *momentum_buffer, table);
  } else {
    TORCH_CHECK_VALUE(momentum == 0, "peer::", op,
                      ": expected momentum_buffer, because momentum is ", momentum);
  }
}

void check_rowwise_adam(const Tensor& table,
                        const Tensor& first_moment,
                        const Tensor& second_moment,
                        const Tensor& row_steps,
                        const RowGradient& gradient) {
  const char* op = "rowwise_adam_";
  check_table(op, table, gradient);
  check_momentum(op, "first_moment", first_moment, table);
  check_second_moments(op, "second_moment", second_moment, table);
  check_numbers(op, "row_steps", row_steps, table.sym_sizes().slice(0, 1), at::kInt, table);
}

}  // namespace peer::ops
