#include "peer/nn/experts.h"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "nn/factory.h"
#include "nn/growth.h"
#include "nn/masks.h"
#include "ops/expert_mlp.h"
#include "peer/functional.h"

namespace peer::nn {

using torch::Tensor;

namespace {

void check(const ExpertPoolOptions& options) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"dim", options.dim()},
      {"num_experts", options.num_experts()},
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

// CPU tables lie in huge pages, because their rows are read at random.
Tensor make_table(const ExpertPoolOptions& options) {
  const auto made_with = factory(options);
  const std::vector<int64_t> sizes = {options.num_experts(), options.glu() ? 3 : 2, options.dim()};
  return made_with.device().is_cpu()
             ? empty_huge(sizes, c10::typeMetaToScalarType(made_with.dtype()))
             : torch::empty(sizes, made_with);
}

// Draws into contiguous memory, then copies. For memory that is not contiguous, or has fewer than
// 16 elements, torch draws other numbers, and slowly. Blocks of a multiple of 16 elements get the
// same numbers as the whole part at once.
void draw_normal(const Tensor& part, double std) {
  std::vector<int64_t> sizes(std::max<int64_t>(part.size(0) / 4096, 1), 4096);
  sizes.back() += part.size(0) - 4096 * static_cast<int64_t>(sizes.size());
  for (const Tensor& rows : part.split_with_sizes(sizes)) {
    rows.copy_(torch::empty_like(rows, torch::MemoryFormat::Contiguous).normal_(0.0, std));
  }
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
  // clone() calls reset() in a copy that still has the table of the original.
  const auto grad_dtype = weight.defined() ? ops::requested_grad_dtype(weight) : std::nullopt;
  weight = register_parameter("weight", make_table(options));
  if (grad_dtype.has_value()) {
    weight.set_grad_dtype(grad_dtype);
  }
  register_again(*this, "frozen", frozen);
  register_again(*this, "disabled", disabled);
  draw_experts(weight, options.zero_init_out());
}

void ExpertPoolImpl::reset_parameters() {
  unfreeze_experts();
  enable_experts();
  draw_experts(weight, options.zero_init_out());
}

void ExpertPoolImpl::freeze_experts(const Tensor& experts) {
  const Tensor mask = as_mask(experts, options.num_experts(), weight.device());
  set_buffer(*this, "frozen", frozen, union_of(frozen, mask));
  clear_gradient(weight, mask);
}

void ExpertPoolImpl::unfreeze_experts(const Tensor& experts) {
  const Tensor mask = as_mask(experts, options.num_experts(), weight.device());
  set_buffer(*this, "frozen", frozen, without(frozen, mask));
}

void ExpertPoolImpl::disable_experts(const Tensor& experts) {
  const Tensor mask = as_mask(experts, options.num_experts(), weight.device());
  set_buffer(*this, "disabled", disabled, union_of(disabled, mask));
}

void ExpertPoolImpl::enable_experts(const Tensor& experts) {
  const Tensor mask = as_mask(experts, options.num_experts(), weight.device());
  set_buffer(*this, "disabled", disabled, without(disabled, mask));
}

void ExpertPoolImpl::grow(int64_t experts) {
  TORCH_CHECK_VALUE(experts >= 1, "expected experts to be positive, got ", experts);
  require_growable("the weight of a pool", weight);
  append_experts(
      torch::zeros({1}, weight.options()).expand({experts, weight.size(1), weight.size(2)}));
  draw_experts(weight.narrow(0, weight.size(0) - experts, experts), /*zero_out=*/true);
}

void ExpertPoolImpl::append_experts(const Tensor& rows) {
  append_rows(weight, 0, rows);
  options.num_experts(weight.size(0));
  set_buffer(*this, "frozen", frozen, with_more(frozen, rows.size(0)));
  set_buffer(*this, "disabled", disabled, with_more(disabled, rows.size(0)));
}

// Draws experts (M, parts, dim) into rows of the table.
void ExpertPoolImpl::draw_experts(const Tensor& rows, bool zero_out) {
  const torch::NoGradGuard no_grad;
  const double std_in = std::pow(static_cast<double>(options.dim()), -0.5);
  draw_normal(rows.select(1, 0), std_in);
  if (options.glu()) {
    draw_normal(rows.select(1, 1), std_in);
  }
  const Tensor up = rows.select(1, -1);
  if (zero_out) {
    up.zero_();
  } else {
    draw_normal(up, std::pow(static_cast<double>(options.num_experts_per_token()), -0.5));
  }
}

void ExpertPoolImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::ExpertPool(dim=" << options.dim()
         << ", num_experts=" << options.num_experts() << ", activation=" << options.activation()
         << ", glu=" << std::boolalpha << options.glu() << ", sparse_grad=" << options.sparse_grad()
         << ")";
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
  return expert_mlp(as_rows(x), as_rows(token_weights), as_rows(token_indices), weight,
                    options.activation(), options.sparse_grad(), as_optional(frozen))
      .view(x.sizes());
}

}  // namespace peer::nn
