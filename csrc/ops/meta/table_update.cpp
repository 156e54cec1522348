#include "ops/table_update.h"

#include <torch/library.h>

namespace peer::ops {

namespace {

void rowwise_adagrad_meta(const Tensor& table,
                          const Tensor& sum_of_squares,
                          const std::optional<Tensor>& indices,
                          const Tensor& source,
                          const std::optional<Tensor>& coefficients,
                          double /*lr*/,
                          double /*eps*/,
                          double /*weight_decay*/,
                          std::optional<int64_t> /*seed*/,
                          int64_t /*step*/,
                          int64_t /*stream*/) {
  check_rowwise_adagrad(table, sum_of_squares, {indices, source, coefficients});
}

void sgd_meta(const Tensor& table,
              const std::optional<Tensor>& momentum_buffer,
              const std::optional<Tensor>& indices,
              const Tensor& source,
              const std::optional<Tensor>& coefficients,
              double /*lr*/,
              double momentum,
              bool /*nesterov*/,
              double /*weight_decay*/,
              std::optional<int64_t> /*seed*/,
              int64_t /*step*/,
              int64_t /*stream*/) {
  check_sgd(table, momentum_buffer, {indices, source, coefficients}, momentum);
}

void rowwise_adam_meta(const Tensor& table,
                       const Tensor& first_moment,
                       const Tensor& second_moment,
                       const Tensor& row_steps,
                       const std::optional<Tensor>& indices,
                       const Tensor& source,
                       const std::optional<Tensor>& coefficients,
                       double /*lr*/,
                       double /*beta1*/,
                       double /*beta2*/,
                       double /*eps*/,
                       double /*weight_decay*/,
                       std::optional<int64_t> /*seed*/,
                       int64_t /*step*/,
                       int64_t /*stream*/) {
  check_rowwise_adam(table, first_moment, second_moment, row_steps,
                     {indices, source, coefficients});
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("rowwise_adagrad_", rowwise_adagrad_meta);
  m.impl("sgd_", sgd_meta);
  m.impl("rowwise_adam_", rowwise_adam_meta);
}

}  // namespace peer::ops
