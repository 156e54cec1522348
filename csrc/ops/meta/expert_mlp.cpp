#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace peer::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor> expert_mlp_meta(const Tensor& x,
                                                   const Tensor& weights,
                                                   const Tensor& indices,
                                                   const Tensor& w_down,
                                                   const Tensor& w_up,
                                                   const std::optional<Tensor>& w_gate,
                                                   std::string_view activation,
                                                   bool /*sparse_grad*/) {
  check_expert_mlp(x, weights, indices, w_down, w_up, w_gate, activation);
  const at::TensorOptions accumulated = x.options().dtype(accumulation_type(w_down.scalar_type()));
  return {at::empty_symint({x.sym_size(0), w_up.sym_size(1)}, x.options()),
          at::empty_symint(indices.sym_sizes(), accumulated),
          w_gate.has_value() ? at::empty_symint(indices.sym_sizes(), accumulated)
                             : at::empty({0}, accumulated)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_meta(
    const Tensor& /*grad_out*/,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation,
    bool sparse_grad,
    std::array<bool, 5> output_mask) {
  check_expert_mlp_backward("expert_mlp_backward", x, weights, indices, w_down, w_up, w_gate,
                            hidden, gate, activation);
  // Not a NotImplementedError: FakeTensor would replace that, and the sentence with it, by one of
  // its own.
  TORCH_CHECK(
      !(sparse_grad && (output_mask[kGradDown] || output_mask[kGradUp] || output_mask[kGradGate])),
      "peer::expert_mlp: sparse_grad=True works in eager mode only, because the number of "
      "retrieved experts is not "
      "known when a graph is traced; use sparse_grad=False with torch.compile");
  const auto like = [](bool is_wanted, const Tensor& tensor) {
    return is_wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : Tensor();
  };
  return {like(output_mask[kGradX], x), like(output_mask[kGradWeights], weights),
          like(output_mask[kGradDown], w_down), like(output_mask[kGradUp], w_up),
          w_gate.has_value() ? like(output_mask[kGradGate], *w_gate) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_coefficients_meta(
    const Tensor& /*grad_out*/,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation) {
  const char* op = "expert_mlp_backward_coefficients";
  check_expert_mlp_backward(op, x, weights, indices, w_down, w_up, w_gate, hidden, gate,
                            activation);
  const at::TensorOptions accumulated = x.options().dtype(accumulation_type(w_down.scalar_type()));
  const auto coefficients = [&] { return at::empty_symint(indices.sym_sizes(), accumulated); };
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(weights.sym_sizes(), weights.options()), coefficients(), coefficients(),
          w_gate.has_value() ? coefficients() : at::empty({0}, accumulated)};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("expert_mlp", expert_mlp_meta);
  m.impl("expert_mlp_backward", expert_mlp_backward_meta);
  m.impl("expert_mlp_backward_coefficients", expert_mlp_backward_coefficients_meta);
}

}  // namespace peer::ops
