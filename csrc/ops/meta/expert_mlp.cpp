#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace peer::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor> expert_mlp_meta(const Tensor& x,
                                                   const Tensor& weights,
                                                   const Tensor& indices,
                                                   const Tensor& table,
                                                   std::string_view activation,
                                                   bool /*sparse_grad*/) {
  check_expert_mlp(x, weights, indices, table, activation);
  const at::TensorOptions accumulated = x.options().dtype(accumulation_type(table.scalar_type()));
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(indices.sym_sizes(), accumulated),
          has_gate(table) ? at::empty_symint(indices.sym_sizes(), accumulated)
                          : at::empty({0}, accumulated)};
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_meta(const Tensor& /*grad_out*/,
                                                            const Tensor& x,
                                                            const Tensor& weights,
                                                            const Tensor& indices,
                                                            const Tensor& table,
                                                            const Tensor& hidden,
                                                            const Tensor& gate,
                                                            std::string_view activation,
                                                            bool sparse_grad,
                                                            std::array<bool, 3> output_mask) {
  check_expert_mlp_backward("expert_mlp_backward", x, weights, indices, table, hidden, gate,
                            activation);
  // Not a NotImplementedError: FakeTensor would replace that, and the sentence with it, by one of
  // its own.
  TORCH_CHECK(!(sparse_grad && output_mask[kGradTable]),
              "peer::expert_mlp: sparse_grad=True works in eager mode only, because the number of "
              "retrieved experts is not "
              "known when a graph is traced; use sparse_grad=False with torch.compile");
  const auto like = [](bool is_wanted, const Tensor& tensor) {
    return is_wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : Tensor();
  };
  return {like(output_mask[kGradX], x), like(output_mask[kGradWeights], weights),
          like(output_mask[kGradTable], table)};
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_coefficients_meta(
    const Tensor& /*grad_out*/,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& table,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation) {
  check_expert_mlp_backward("expert_mlp_backward_coefficients", x, weights, indices, table, hidden,
                            gate, activation);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(weights.sym_sizes(), weights.options()),
          at::empty_symint({table.sym_size(1), indices.sym_size(0), indices.sym_size(1)},
                           x.options().dtype(accumulation_type(table.scalar_type())))};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("expert_mlp", expert_mlp_meta);
  m.impl("expert_mlp_backward", expert_mlp_backward_meta);
  m.impl("expert_mlp_backward_coefficients", expert_mlp_backward_coefficients_meta);
}

}  // namespace peer::ops
