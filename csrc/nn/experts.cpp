#include "peer/nn/experts.h"

#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "nn/factory.h"
#include "ops/expert_mlp.h"
#include "peer/functional.h"

namespace peer::nn {

using torch::Tensor;

namespace {

void check(const ExpertPoolOptions& options) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"dim", options.dim()},
      {"num_experts", options.num_experts()},
      {"dim_out", options.dim_out().value_or(options.dim())},
      {"num_experts_per_token", options.num_experts_per_token()},
  };
  for (const auto& [name, value] : sizes) {
    TORCH_CHECK_VALUE(value >= 1, "expected ", name, " to be positive, got ", value);
  }
  TORCH_CHECK_VALUE(
      ops::activation_named(options.activation()).has_value(),
      "expected activation to be one of 'gelu', 'gelu_tanh', 'relu', 'silu', 'identity', "
      "'relu2', got '",
      options.activation(), "'");
}

// On the CPU in large pages, because the rows are read at random.
Tensor make_table(const ExpertPoolOptions& options, int64_t width) {
  const auto made_with = factory(options);
  const std::vector<int64_t> sizes = {options.num_experts(), width};
  return made_with.device().is_cpu()
             ? empty_huge(sizes, c10::typeMetaToScalarType(made_with.dtype()))
             : torch::empty(sizes, made_with);
}

// (..., n) to (T, n).
Tensor as_rows(const Tensor& tensor) {
  return tensor.dim() > 1 ? tensor.flatten(0, -2) : tensor.unsqueeze(0);
}

}  // namespace

ExpertPoolImpl::ExpertPoolImpl(const ExpertPoolOptions& options) : options(options) {
  check(options);
  reset();
}

void ExpertPoolImpl::reset() {
  w_down = register_parameter("w_down", make_table(options, options.dim()));
  w_up = register_parameter("w_up", make_table(options, dim_out()));
  w_gate = options.glu() ? register_parameter("w_gate", make_table(options, options.dim()))
                         : register_parameter("w_gate", Tensor(), /*requires_grad=*/false);
  reset_parameters();
}

void ExpertPoolImpl::reset_parameters() {
  const double std_in = std::pow(static_cast<double>(options.dim()), -0.5);
  torch::nn::init::normal_(w_down, 0.0, std_in);
  if (w_gate.defined()) {
    torch::nn::init::normal_(w_gate, 0.0, std_in);
  }
  if (options.zero_init_out()) {
    torch::nn::init::zeros_(w_up);
  } else {
    torch::nn::init::normal_(w_up, 0.0,
                             std::pow(static_cast<double>(options.num_experts_per_token()), -0.5));
  }
}

void ExpertPoolImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::ExpertPool(dim=" << options.dim()
         << ", num_experts=" << options.num_experts() << ", dim_out=" << dim_out()
         << ", activation=" << options.activation() << ", glu=" << std::boolalpha << options.glu()
         << ", sparse_grad=" << options.sparse_grad() << ")";
}

Tensor ExpertPoolImpl::forward(const Tensor& x, const Tensor& weights, const Tensor& indices) {
  TORCH_CHECK_VALUE(weights.sizes() == indices.sizes(),
                    "peer::expert_mlp: expected weights of indices' shape ", indices.sizes(),
                    ", got ", weights.sizes());
  const bool has_heads = weights.dim() == x.dim() + 1;
  const Tensor token_weights = has_heads ? weights.flatten(-2) : weights;
  const Tensor token_indices = has_heads ? indices.flatten(-2) : indices;
  const bool is_matching =
      x.dim() > 0 && token_weights.dim() == x.dim() &&
      token_weights.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(is_matching,
                    "peer::expert_mlp: expected weights of shape [..., experts per "
                    "token] or [..., heads, experts per head] to match x of shape ",
                    x.sizes(), ", got ", weights.sizes());
  std::optional<Tensor> gate;
  if (w_gate.defined()) {
    gate = w_gate;
  }
  const Tensor out = expert_mlp(as_rows(x), as_rows(token_weights), as_rows(token_indices), w_down,
                                w_up, gate, options.activation(), options.sparse_grad());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = w_up.size(-1);
  return out.view(shape);
}

}  // namespace peer::nn
