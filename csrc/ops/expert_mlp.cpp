#include "ops/expert_mlp.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/checks.h"
#include "peer/functional.h"

namespace peer {

at::Tensor expert_mlp(const at::Tensor& x,
                      const at::Tensor& weights,
                      const at::Tensor& indices,
                      const at::Tensor& table,
                      std::string_view activation,
                      bool sparse_grad) {
  return std::get<0>(ops::expert_mlp(x, weights, indices, table, activation, sparse_grad));
}

namespace ops {

namespace {

const auto& forward_handle() {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("peer::expert_mlp", "").typed<ExpertMlp>();
  return handle;
}

const auto& backward_handle() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("peer::expert_mlp_backward", "")
                                 .typed<ExpertMlpBackward>();
  return handle;
}

Activation parse_activation(const char* op, std::string_view name) {
  const auto activation = activation_named(name);
  TORCH_CHECK_VALUE(activation.has_value(), "peer::", op,
                    ": expected activation gelu, gelu_tanh, relu, silu, identity or relu2, got '",
                    name, "'");
  return *activation;
}

Activation check_inputs(const char* op,
                        const Tensor& x,
                        const Tensor& weights,
                        const Tensor& indices,
                        const Tensor& table,
                        std::string_view activation) {
  TORCH_CHECK_VALUE(x.dim() == 2, "peer::", op, ": expected x of shape [tokens, dim], got ",
                    x.sym_sizes());
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.sym_size(0) == x.sym_size(0), "peer::", op,
                    ": expected indices of shape [", x.sym_size(0),
                    ", experts per token] to match x, got ", indices.sym_sizes());
  TORCH_CHECK_VALUE(weights.sym_sizes() == indices.sym_sizes(), "peer::", op,
                    ": expected weights of indices' shape ", indices.sym_sizes(), ", got ",
                    weights.sym_sizes());
  TORCH_CHECK_VALUE(table.dim() == 3 && (table.sym_size(1) == 2 || has_gate(table)) &&
                        table.sym_size(2) == x.sym_size(1),
                    "peer::", op, ": expected table of shape [experts, 2 or 3, ", x.sym_size(1),
                    "] to match x, got ", table.sym_sizes());
  check_index_dtype(op, indices);
  check_floating(op, "x", x);
  check_floating(op, "weights", weights);
  check_floating(op, "table", table);
  const bool is_double = table.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == is_double &&
                       (weights.scalar_type() == at::kDouble) == is_double,
                   "peer::", op, ": float64 goes with float64 only, got x ", x.scalar_type(),
                   ", weights ", weights.scalar_type(), " and table ", table.scalar_type());
  check_same_device(op, "weights", weights, "x", x);
  check_same_device(op, "indices", indices, "x", x);
  check_same_device(op, "table", table, "x", x);
  check_strided(op, "x", x);
  check_strided(op, "table", table);
  return parse_activation(op, activation);
}

}  // namespace

std::optional<Activation> activation_named(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> known[] = {
      {"gelu", Activation::gelu},         {"gelu_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu},         {"silu", Activation::silu},
      {"identity", Activation::identity}, {"relu2", Activation::relu2},
  };
  for (const auto& [known_name, activation] : known) {
    if (name == known_name) {
      return activation;
    }
  }
  return std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp(const Tensor& x,
                                              const Tensor& weights,
                                              const Tensor& indices,
                                              const Tensor& table,
                                              std::string_view activation,
                                              bool sparse_grad) {
  return forward_handle().call(x, weights, indices, table, activation, sparse_grad);
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward(const Tensor& grad_out,
                                                       const Tensor& x,
                                                       const Tensor& weights,
                                                       const Tensor& indices,
                                                       const Tensor& table,
                                                       const Tensor& hidden,
                                                       const Tensor& gate,
                                                       std::string_view activation,
                                                       bool sparse_grad,
                                                       std::array<bool, 3> output_mask) {
  return backward_handle().call(grad_out, x, weights, indices, table, hidden, gate, activation,
                                sparse_grad, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> redispatch_expert_mlp(c10::DispatchKeySet below,
                                                         const Tensor& x,
                                                         const Tensor& weights,
                                                         const Tensor& indices,
                                                         const Tensor& table,
                                                         std::string_view activation,
                                                         bool sparse_grad) {
  return forward_handle().redispatch(below, x, weights, indices, table, activation, sparse_grad);
}

std::tuple<Tensor, Tensor, Tensor> redispatch_expert_mlp_backward(c10::DispatchKeySet below,
                                                                  const Tensor& grad_out,
                                                                  const Tensor& x,
                                                                  const Tensor& weights,
                                                                  const Tensor& indices,
                                                                  const Tensor& table,
                                                                  const Tensor& hidden,
                                                                  const Tensor& gate,
                                                                  std::string_view activation,
                                                                  bool sparse_grad,
                                                                  std::array<bool, 3> output_mask) {
  return backward_handle().redispatch(below, grad_out, x, weights, indices, table, hidden, gate,
                                      activation, sparse_grad, output_mask);
}

ExpertParts::ExpertParts(const Tensor& experts)
    : down(experts.select(-2, 0)),
      up(experts.select(-2, -1)),
      gate(has_gate(experts) ? experts.select(-2, 1) : Tensor()) {}

Activation check_expert_mlp(const Tensor& x,
                            const Tensor& weights,
                            const Tensor& indices,
                            const Tensor& table,
                            std::string_view activation) {
  return check_inputs("expert_mlp", x, weights, indices, table, activation);
}

Activation check_expert_mlp_backward(const char* op,
                                     const Tensor& x,
                                     const Tensor& weights,
                                     const Tensor& indices,
                                     const Tensor& table,
                                     const Tensor& hidden,
                                     const Tensor& gate,
                                     std::string_view activation) {
  const Activation parsed = check_inputs(op, x, weights, indices, table, activation);
  TORCH_CHECK_VALUE(hidden.sym_sizes() == indices.sym_sizes(), "peer::", op,
                    ": expected hidden of indices' shape ", indices.sym_sizes(), ", got ",
                    hidden.sym_sizes());
  TORCH_CHECK_VALUE(!has_gate(table) || gate.sym_sizes() == indices.sym_sizes(), "peer::", op,
                    ": expected gate of indices' shape ", indices.sym_sizes(), ", got ",
                    gate.sym_sizes());
  check_floating(op, "hidden", hidden);
  check_same_device(op, "hidden", hidden, "x", x);
  check_same_device(op, "gate", gate, "x", x);
  return parsed;
}

void check_expert_mlp_grad_out(const char* op, const Tensor& grad_out, const Tensor& x) {
  TORCH_CHECK_VALUE(grad_out.sizes() == x.sizes(), "peer::", op, ": expected grad_out of shape ",
                    x.sizes(), ", got ", grad_out.sizes());
  check_floating(op, "grad_out", grad_out);
  check_strided(op, "grad_out", grad_out);
  check_same_device(op, "grad_out", grad_out, "x", x);
}

}  // namespace ops
}  // namespace peer
