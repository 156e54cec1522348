#include "ops/expert_mlp.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "peer/functional.h"

namespace peer {

at::Tensor expert_mlp(const at::Tensor& x,
                      const at::Tensor& weights,
                      const at::Tensor& indices,
                      const at::Tensor& table,
                      std::string_view activation,
                      bool sparse_grad,
                      const std::optional<at::Tensor>& frozen) {
  return std::get<0>(
      ops::ExpertMlpOp::call(x, weights, indices, table, activation, sparse_grad, frozen));
}

namespace ops {

namespace {

Activation parse_activation(const char* op, std::string_view name) {
  const auto activation = activation_named(name);
  TORCH_CHECK_VALUE(activation.has_value(), op,
                    ": expected activation gelu, gelu_tanh, relu, silu, identity or relu2, got '",
                    name, "'");
  return *activation;
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

ExpertParts::ExpertParts(const Tensor& experts)
    : down(experts.select(-2, 0)),
      up(experts.select(-2, -1)),
      gate(has_gate(experts) ? experts.select(-2, 1) : Tensor()) {}

Activation check_expert_mlp(const ExpertMlpInputs& inputs) {
  const auto& [op, x, weights, indices, table, activation, frozen] = inputs;
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": expected x of shape [tokens, dim], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.sym_size(0) == x.sym_size(0), op,
                    ": expected indices of shape [", x.sym_size(0),
                    ", experts per token] to match x, got ", indices.sym_sizes());
  TORCH_CHECK_VALUE(weights.sym_sizes() == indices.sym_sizes(), op,
                    ": expected weights of indices' shape ", indices.sym_sizes(), ", got ",
                    weights.sym_sizes());
  TORCH_CHECK_VALUE(table.dim() == 3 && (table.sym_size(1) == 2 || has_gate(table)) &&
                        table.sym_size(2) == x.sym_size(1),
                    op, ": expected table of shape [experts, 2 or 3, ", x.sym_size(1),
                    "] to match x, got ", table.sym_sizes());
  check_index_dtype(op, indices);
  check_floating(op, "x", x);
  check_floating(op, "weights", weights);
  check_floating(op, "table", table);
  const bool is_double = table.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == is_double &&
                       (weights.scalar_type() == at::kDouble) == is_double,
                   op, ": float64 goes with float64 only, got x ", x.scalar_type(), ", weights ",
                   weights.scalar_type(), " and table ", table.scalar_type());
  check_same_device(op, "weights", weights, "x", x);
  check_same_device(op, "indices", indices, "x", x);
  check_same_device(op, "table", table, "x", x);
  check_strided(op, "x", x);
  check_strided(op, "table", table);
  check_frozen(op, frozen, table);
  return parse_activation(op, activation);
}

Activation check_expert_mlp_backward(const ExpertMlpInputs& inputs,
                                     const Tensor& hidden,
                                     const Tensor& gate) {
  const Activation parsed = check_expert_mlp(inputs);
  const auto& [op, x, weights, indices, table, activation, frozen] = inputs;
  TORCH_CHECK_VALUE(hidden.sym_sizes() == indices.sym_sizes(), op,
                    ": expected hidden of indices' shape ", indices.sym_sizes(), ", got ",
                    hidden.sym_sizes());
  TORCH_CHECK_VALUE(!has_gate(table) || gate.sym_sizes() == indices.sym_sizes(), op,
                    ": expected gate of indices' shape ", indices.sym_sizes(), ", got ",
                    gate.sym_sizes());
  check_floating(op, "hidden", hidden);
  check_same_device(op, "hidden", hidden, "x", x);
  check_same_device(op, "gate", gate, "x", x);
  return parsed;
}

at::ScalarType grad_table_type(const ExpertMlpBackwardArguments& args) {
  const at::ScalarType stored = args.table.scalar_type();
  const at::ScalarType type = args.grad_table_dtype.value_or(stored);
  TORCH_CHECK_TYPE(type == stored || type == accumulation_type(stored), args.kName,
                   ": expected grad_table_dtype ", stored, " or ", accumulation_type(stored),
                   " for a table of ", stored, ", got ", type);
  return type;
}

std::optional<at::ScalarType> requested_grad_dtype(const Tensor& table) {
  const std::optional<at::ScalarType> requested = table.grad_dtype();
  const bool is_wider =
      requested != table.scalar_type() && requested == accumulation_type(table.scalar_type());
  return is_wider ? requested : std::nullopt;
}

void check_expert_mlp_grad_out(const char* op, const Tensor& grad_out, const Tensor& x) {
  TORCH_CHECK_VALUE(grad_out.sizes() == x.sizes(), op, ": expected grad_out of shape ", x.sizes(),
                    ", got ", grad_out.sizes());
  check_floating(op, "grad_out", grad_out);
  check_strided(op, "grad_out", grad_out);
  check_same_device(op, "grad_out", grad_out, "x", x);
}

}  // namespace ops
}  // namespace peer

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def(
      "expert_mlp(Tensor x, Tensor weights, Tensor indices, Tensor table, str activation, bool "
      "sparse_grad=False, Tensor? frozen=None) -> (Tensor out, Tensor hidden, Tensor gate)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward(Tensor grad_out, Tensor x, Tensor weights, Tensor indices, Tensor "
      "table, Tensor hidden, Tensor gate, str activation, bool sparse_grad, bool[3] output_mask, "
      "Tensor? frozen=None, ScalarType? grad_table_dtype=None) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
