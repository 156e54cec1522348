#include "peer/nn/router.h"

#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>

#include <cmath>
#include <ostream>

#include "nn/factory.h"
#include "nn/growth.h"
#include "nn/masks.h"
#include "peer/functional.h"

namespace peer::nn {

using torch::Tensor;

namespace {

// Keys at the length sqrt(1/3), in their dtype, computed in at least float. That is the root mean
// square length of keys that are uniform in the cube ±1 / sqrt(dim_key / 2).
Tensor normalised(const Tensor& keys) {
  const Tensor wide = keys.to(torch::promoteTypes(keys.scalar_type(), torch::kFloat));
  const Tensor squares = wide.square().sum(-1, /*keepdim=*/true);
  // A key of zeros stays zero, and its gradients are finite, of any order.
  const Tensor safe = squares.masked_fill(squares < 1e-24, 1.0 / 3);
  return (wide * (3 * safe).rsqrt()).to(keys.scalar_type());
}

// The length of the noise on a copy of a key, relative to the key.
constexpr double kKeyNoise = 0.5;

void check(const ProductKeyRouterOptions& options) {
  TORCH_CHECK_VALUE(options.dim() >= 1, "expected dim to be positive, got ", options.dim());
  TORCH_CHECK_VALUE(options.heads() >= 1, "expected heads to be positive, got ", options.heads());
  TORCH_CHECK_VALUE(
      options.dim_key() >= 2 && options.dim_key() % 2 == 0,
      "expected an even dim_key, because its halves score the rows and the columns, got ",
      options.dim_key());
  TORCH_CHECK_VALUE(!options.key_norm() || options.dim_key() >= 4,
                    "expected dim_key of at least 4 with key_norm, because a key of one number has "
                    "no direction to learn, got ",
                    options.dim_key());
  const int64_t num_experts = options.num_experts().num_experts();
  TORCH_CHECK_VALUE(
      options.num_experts_per_head() >= 1 && options.num_experts_per_head() <= num_experts,
      "expected num_experts_per_head between 1 and the number of experts ", num_experts, ", got ",
      options.num_experts_per_head());
  TORCH_CHECK_VALUE(
      options.scores() == "softmax" || options.scores() == "sigmoid" || options.scores() == "relu",
      "expected scores to be one of 'softmax', 'sigmoid', 'relu', got '", options.scores(), "'");
  TORCH_CHECK_VALUE(options.scores() != "softmax" || options.num_experts_per_head() > 1,
                    "the softmax over one expert per head is always 1, so the router "
                    "would get no gradient: use scores 'sigmoid' or 'relu', or "
                    "num_experts_per_head > 1");
}

Tensor with_kept(const Tensor& keys, const Tensor& frozen, const Tensor& kept) {
  // The graph keeps a mask of its own, so that a later change does not affect it.
  return is_set(frozen) ? torch::where(frozen.clone().unsqueeze(-1), kept, keys) : keys;
}

// The kept values are normalised already. To normalise them again would change their last bits.
Tensor effective(const Tensor& keys, bool key_norm, const Tensor& frozen, const Tensor& kept) {
  return with_kept(key_norm ? normalised(keys) : keys, frozen, kept);
}

Tensor key_mask(const char* name, const Tensor& mask, int64_t size, const Tensor& keys) {
  const auto options = torch::dtype(torch::kBool).device(keys.device());
  if (!mask.defined()) {
    return torch::ones({size}, options);
  }
  TORCH_CHECK_VALUE(mask.scalar_type() == torch::kBool && mask.sizes() == torch::IntArrayRef{size},
                    "expected ", name, " as a bool mask of shape [", size, "], got ",
                    mask.scalar_type(), " of shape ", mask.sizes());
  return mask.to(keys.device());
}

QueryNormOptions norm_options(const ProductKeyRouterOptions& options) {
  return QueryNormOptions(options.query_norm(), options.heads(), options.dim_key())
      .device(options.device())
      .dtype(options.dtype());
}

}  // namespace

QueryNetworkImpl::QueryNetworkImpl(const ProductKeyRouterOptions& options) : options(options) {
  reset();
}

void QueryNetworkImpl::reset() {
  const int64_t features = options.heads() * options.dim_key();
  weight = register_parameter("weight", torch::empty({features, options.dim()}, factory(options)));
  bias = options.query_bias()
             ? register_parameter("bias", torch::empty({features}, factory(options)))
             : register_parameter("bias", Tensor(), /*requires_grad=*/false);
  reset_parameters();
}

void QueryNetworkImpl::reset_parameters() {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (bias.defined()) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(options.dim()));
    torch::nn::init::uniform_(bias, -bound, bound);
  }
}

void QueryNetworkImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::QueryNetwork(" << options.dim() << ", "
         << options.heads() * options.dim_key() << ", bias=" << std::boolalpha
         << options.query_bias() << ")";
}

Tensor QueryNetworkImpl::forward(const Tensor& x) {
  return torch::nn::functional::linear(x, weight, bias);
}

ProductKeyRouterImpl::ProductKeyRouterImpl(const ProductKeyRouterOptions& options)
    : options(options) {
  check(options);
  reset();
}

void ProductKeyRouterImpl::reset() {
  query = register_module("query", QueryNetwork(options));
  norm = register_module("norm", QueryNorm(norm_options(options)));
  const auto keys = [&](int64_t count) {
    const int64_t half = options.dim_key() / 2;
    return options.share_keys() ? torch::empty({count, half}, factory(options))
                                : torch::empty({options.heads(), count, half}, factory(options));
  };
  row_keys = register_parameter("row_keys", keys(options.num_experts().rows));
  col_keys = register_parameter("col_keys", keys(options.num_experts().columns));
  register_again(*this, "frozen_rows", frozen_rows);
  register_again(*this, "frozen_columns", frozen_columns);
  register_again(*this, "kept_row_keys", kept_row_keys);
  register_again(*this, "kept_col_keys", kept_col_keys);
  register_again(*this, "frozen", frozen);
  reset_keys();
}

std::shared_ptr<torch::nn::Module> ProductKeyRouterImpl::clone(
    const std::optional<torch::Device>& device) const {
  auto copy = Cloneable<ProductKeyRouterImpl>::clone(device);
  static_cast<ProductKeyRouterImpl&>(*copy).apply_frozen_state();
  return copy;
}

void ProductKeyRouterImpl::reset_parameters() {
  unfreeze_keys();
  unfreeze_network();
  query->reset_parameters();
  norm->reset_parameters();
  reset_keys();
}

void ProductKeyRouterImpl::reset_keys() {
  const torch::NoGradGuard no_grad;
  for (const Tensor& keys : {row_keys, col_keys}) {
    keys.copy_(normalised(torch::nn::init::normal_(keys)));
  }
}

std::tuple<Tensor, Tensor> ProductKeyRouterImpl::effective_keys() const {
  return {effective(row_keys, options.key_norm(), frozen_rows, kept_row_keys),
          effective(col_keys, options.key_norm(), frozen_columns, kept_col_keys)};
}

void ProductKeyRouterImpl::freeze_keys(const Tensor& rows, const Tensor& columns) {
  const torch::NoGradGuard no_grad;
  const Tensor row_mask = key_mask("rows", rows, options.num_experts().rows, row_keys);
  const Tensor column_mask = key_mask("columns", columns, options.num_experts().columns, col_keys);
  const auto [present_rows, present_columns] = effective_keys();
  const auto freeze = [&](const Tensor& keys, const Tensor& mask, const Tensor& present,
                          std::pair<const char*, Tensor&> frozen,
                          std::pair<const char*, Tensor&> kept) {
    clear_gradient(keys, mask, /*dim=*/-2);
    const Tensor all = union_of(frozen.second, mask);
    set_buffer(*this, kept.first, kept.second,
               is_set(all) ? present.detach().clone() : torch::empty({0}, present.options()));
    set_buffer(*this, frozen.first, frozen.second, all);
  };
  freeze(row_keys, row_mask, present_rows, {"frozen_rows", frozen_rows},
         {"kept_row_keys", kept_row_keys});
  freeze(col_keys, column_mask, present_columns, {"frozen_columns", frozen_columns},
         {"kept_col_keys", kept_col_keys});
}

void ProductKeyRouterImpl::unfreeze_keys(const Tensor& rows, const Tensor& columns) {
  const torch::NoGradGuard no_grad;
  const Tensor row_mask = key_mask("rows", rows, options.num_experts().rows, row_keys);
  const Tensor column_mask = key_mask("columns", columns, options.num_experts().columns, col_keys);
  const auto unfreeze = [&](Tensor& keys, const Tensor& mask,
                            std::pair<const char*, Tensor&> frozen,
                            std::pair<const char*, Tensor&> kept) {
    if (!is_set(frozen.second)) {
      return;
    }
    keys.copy_(with_kept(keys, frozen.second, kept.second));
    set_buffer(*this, frozen.first, frozen.second, without(frozen.second, mask));
    if (!is_set(frozen.second)) {
      set_buffer(*this, kept.first, kept.second, torch::empty({0}, kept.second.options()));
    }
  };
  unfreeze(row_keys, row_mask, {"frozen_rows", frozen_rows}, {"kept_row_keys", kept_row_keys});
  unfreeze(col_keys, column_mask, {"frozen_columns", frozen_columns},
           {"kept_col_keys", kept_col_keys});
}

void ProductKeyRouterImpl::freeze_network() {
  set_buffer(*this, "frozen", frozen,
             torch::ones({}, torch::dtype(torch::kBool).device(row_keys.device())));
  apply_frozen_state();
}

void ProductKeyRouterImpl::unfreeze_network() {
  if (is_set(frozen)) {
    set_buffer(*this, "frozen", frozen, torch::empty({0}, frozen.options()));
    apply_frozen_state();
  }
}

void ProductKeyRouterImpl::apply_frozen_state() {
  const bool is_frozen = is_set(frozen);
  norm->are_statistics_frozen = is_frozen;
  std::vector<Tensor> parameters = query->parameters();
  for (const Tensor& parameter : norm->parameters()) {
    parameters.push_back(parameter);
  }
  for (Tensor& parameter : parameters) {
    parameter.requires_grad_(!is_frozen);
    if (is_frozen) {
      parameter.mutable_grad() = Tensor();
    }
  }
}

void ProductKeyRouterImpl::grow(int64_t rows, const Tensor& keys) {
  const Tensor new_keys = make_row_keys(rows, keys);
  require_growable("the row_keys of a router", row_keys);
  append_row_keys(new_keys);
}

Tensor ProductKeyRouterImpl::make_row_keys(int64_t rows, const Tensor& keys) const {
  const torch::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(rows >= 1, "expected rows to be positive, got ", rows);
  const int64_t half = options.dim_key() / 2;
  std::vector<int64_t> shape = row_keys.sizes().vec();
  shape[shape.size() - 2] = rows;
  if (keys.defined()) {
    TORCH_CHECK_TYPE(keys.is_floating_point(), "expected keys as a floating-point tensor, got ",
                     keys.scalar_type());
    TORCH_CHECK_VALUE(keys.sizes() == torch::IntArrayRef(shape) ||
                          keys.sizes() == torch::IntArrayRef({rows, half}),
                      "expected keys of shape ", torch::IntArrayRef(shape), ", got ", keys.sizes());
    return keys.detach().to(row_keys.options()).expand(shape);
  }
  const int64_t old = options.num_experts().rows;
  const Tensor order = torch::randperm(old, torch::dtype(torch::kLong).device(row_keys.device()))
                           .repeat({(rows + old - 1) / old})
                           .narrow(0, 0, rows);
  const Tensor source = std::get<0>(effective_keys())
                            .index_select(-2, order)
                            .to(torch::promoteTypes(row_keys.scalar_type(), torch::kFloat));
  const Tensor length = source.norm(2, {-1}, /*keepdim=*/true);
  const Tensor noise =
      torch::randn_like(source) *
      (kKeyNoise * length / std::pow(static_cast<double>(options.dim_key()) / 2, 0.5));
  const Tensor noisy = source + noise;
  return (noisy / noisy.norm(2, {-1}, /*keepdim=*/true).clamp_min(1e-12) * length)
      .to(row_keys.scalar_type());
}

void ProductKeyRouterImpl::append_row_keys(const Tensor& keys) {
  append_rows(row_keys, row_keys.dim() - 2, keys);
  options.num_experts(Grid(row_keys.size(-2), options.num_experts().columns));
  if (is_set(frozen_rows)) {
    set_buffer(*this, "kept_row_keys", kept_row_keys,
               torch::cat({kept_row_keys, keys.to(kept_row_keys.options())}, -2));
    set_buffer(*this, "frozen_rows", frozen_rows, with_more(frozen_rows, keys.size(-2)));
  }
}

void ProductKeyRouterImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::ProductKeyRouter(dim=" << options.dim()
         << ", num_experts=" << options.num_experts() << ", heads=" << options.heads()
         << ", num_experts_per_head=" << options.num_experts_per_head()
         << ", dim_key=" << options.dim_key() << ", scores=" << options.scores()
         << ", share_keys=" << std::boolalpha << options.share_keys()
         << ", key_norm=" << options.key_norm() << ")";
}

std::tuple<Tensor, Tensor> ProductKeyRouterImpl::forward(const Tensor& x,
                                                         const Tensor& padding_mask,
                                                         const Tensor& disabled) {
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == options.dim(), "expected x of shape [..., ",
                    options.dim(), "], got ", x.sizes());
  if (padding_mask.defined()) {
    TORCH_CHECK_TYPE(padding_mask.scalar_type() == torch::kBool,
                     "expected padding_mask of dtype bool, true for padding, got ",
                     padding_mask.scalar_type());
    TORCH_CHECK_VALUE(padding_mask.sizes() == x.sizes().slice(0, x.dim() - 1),
                      "expected padding_mask of shape ", x.sizes().slice(0, x.dim() - 1),
                      " to match x, got ", padding_mask.sizes());
  }
  // Zero weights are not enough, because 0 * NaN is NaN.
  const Tensor tokens = padding_mask.defined() ? x.masked_fill(padding_mask.unsqueeze(-1), 0.0) : x;
  const Tensor queries =
      norm->forward(query->forward(tokens).reshape({-1, options.heads() * options.dim_key()}),
                    padding_mask.defined() ? padding_mask.reshape(-1) : padding_mask);
  const auto [used_row_keys, used_col_keys] = effective_keys();
  const auto [scores, indices] =
      product_key_topk(queries.view({-1, options.heads(), options.dim_key()}), used_row_keys,
                       used_col_keys, options.num_experts_per_head(), as_optional(disabled));
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = options.heads();
  shape.push_back(options.num_experts_per_head());
  Tensor weights = router_weights(scores, options.scores()).view(shape);
  if (padding_mask.defined()) {
    weights = weights.masked_fill(padding_mask.unsqueeze(-1).unsqueeze(-1), 0.0);
  }
  return {weights, indices.view(shape)};
}

void fold_key_norm(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  std::vector<ProductKeyRouterImpl*> routers;
  module.apply([&](torch::nn::Module& part) {
    auto* router = dynamic_cast<ProductKeyRouterImpl*>(&part);
    if (router != nullptr && router->options.key_norm()) {
      routers.push_back(router);
    }
  });
  TORCH_CHECK_VALUE(!routers.empty(),
                    "expected a module with a router whose key_norm is true, found none");
  // All before the first write, because routers may share a parameter.
  std::vector<std::tuple<Tensor, Tensor>> effective;
  for (const ProductKeyRouterImpl* router : routers) {
    effective.push_back(router->effective_keys());
  }
  for (size_t i = 0; i < routers.size(); ++i) {
    routers[i]->row_keys.copy_(std::get<0>(effective[i]));
    routers[i]->col_keys.copy_(std::get<1>(effective[i]));
    routers[i]->options.key_norm(false);
  }
}

}  // namespace peer::nn
