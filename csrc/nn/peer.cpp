#include "peer/nn/peer.h"

#include <ostream>

#include "nn/growth.h"
#include "nn/masks.h"

namespace peer::nn {

using torch::Tensor;

namespace {

void check_dropout(double dropout) {
  TORCH_CHECK_VALUE(dropout >= 0.0 && dropout <= 1.0, "expected dropout between 0 and 1, got ",
                    dropout);
}

}  // namespace

ProductKeyRouterOptions PEEROptions::router() const {
  return ProductKeyRouterOptions(dim())
      .num_experts(num_experts())
      .heads(heads())
      .num_experts_per_head(num_experts_per_head())
      .dim_key(dim_key())
      .scores(scores())
      .query_norm(query_norm())
      .query_bias(query_bias())
      .share_keys(share_keys())
      .key_norm(key_norm())
      .device(device())
      .dtype(dtype());
}

ExpertPoolOptions PEEROptions::experts() const {
  return ExpertPoolOptions(dim())
      .num_experts(num_experts().num_experts())
      .activation(activation())
      .glu(glu())
      .num_experts_per_token(heads() * num_experts_per_head())
      .sparse_grad(sparse_grad())
      .zero_init_out(zero_init_out())
      .device(device())
      .dtype(dtype());
}

PEERImpl::PEERImpl(const PEEROptions& options) : dropout(options.dropout()) {
  check_dropout(dropout);
  router = register_module("router", ProductKeyRouter(options.router()));
  experts = register_module("experts", ExpertPool(options.experts()));
}

PEERImpl::PEERImpl(ProductKeyRouter given_router, ExpertPool given_experts, double dropout)
    : dropout(dropout) {
  check_dropout(dropout);
  TORCH_CHECK_VALUE(given_router->options.dim() == given_experts->options.dim(),
                    "expected a router and a pool of the same dim, got ",
                    given_router->options.dim(), " and ", given_experts->options.dim());
  TORCH_CHECK_VALUE(
      given_router->options.num_experts().num_experts() <= given_experts->options.num_experts(),
      "expected a pool of at least the router's num_experts ", given_router->options.num_experts(),
      ", got ", given_experts->options.num_experts());
  router = register_module("router", std::move(given_router));
  experts = register_module("experts", std::move(given_experts));
}

// What clone() calls, to have parts of the same sizes to copy into.
void PEERImpl::reset() {
  router = register_module("router", ProductKeyRouter(router->options));
  experts = register_module("experts", ExpertPool(experts->options));
}

void PEERImpl::reset_parameters() {
  router->reset_parameters();
  experts->reset_parameters();
}

void PEERImpl::grow(int64_t rows, const Tensor& keys) {
  const Tensor new_keys = router->make_row_keys(rows, keys);
  const Grid grid = router->options.num_experts();
  const int64_t missing = (grid.rows + rows) * grid.columns - experts->options.num_experts();
  require_growable("router.row_keys", router->row_keys);
  if (missing > 0) {
    experts->grow(missing);
  }
  router->append_row_keys(new_keys);
}

// The layer's part of a mask over the pool, (R, C).
Tensor PEERImpl::grid_of(const Tensor& mask) const {
  return mask.narrow(0, 0, num_experts()).view({router->options.num_experts().rows, -1});
}

void PEERImpl::freeze_experts(const Tensor& given, bool keys, std::optional<bool> network) {
  const Tensor mask = as_mask(given, experts->options.num_experts(), experts->weight.device());
  experts->freeze_experts(mask);
  if (keys && given.defined()) {
    const Tensor grid = grid_of(mask);
    router->freeze_keys(grid.any(1), grid.any(0));
  } else if (keys) {
    router->freeze_keys();
  }
  if (network.value_or(!given.defined())) {
    router->freeze_network();
  }
}

void PEERImpl::unfreeze_experts(const Tensor& given, bool keys, std::optional<bool> network) {
  experts->unfreeze_experts(given);
  if (keys && is_set(experts->frozen)) {
    const Tensor grid = grid_of(experts->frozen);
    router->unfreeze_keys(grid.any(1).logical_not(), grid.any(0).logical_not());
  } else if (keys) {
    router->unfreeze_keys();
  }
  if (network.value_or(!given.defined())) {
    router->unfreeze_network();
  }
}

void PEERImpl::disable_experts(const Tensor& given) {
  const Tensor mask = as_mask(given, experts->options.num_experts(), experts->weight.device());
  const Tensor disabled = is_set(experts->disabled) ? experts->disabled.logical_or(mask) : mask;
  const int64_t enabled = num_experts() - grid_of(disabled).sum().item<int64_t>();
  TORCH_CHECK_VALUE(
      enabled >= router->options.num_experts_per_head(),
      "expected at least num_experts_per_head=", router->options.num_experts_per_head(),
      " enabled experts, but ", enabled, " of ", num_experts(), " would be left");
  experts->disable_experts(mask);
}

void PEERImpl::enable_experts(const Tensor& given) { experts->enable_experts(given); }

void PEERImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::PEER(dropout=" << dropout << ")";
}

Tensor PEERImpl::forward(const Tensor& x, const Tensor& padding_mask) {
  const Tensor disabled =
      is_set(experts->disabled) ? experts->disabled.narrow(0, 0, num_experts()) : experts->disabled;
  const auto [weights, indices] = router->forward(x, padding_mask, disabled);
  const Tensor kept = torch::dropout(weights, dropout, is_training());
  if (!padding_mask.defined()) {
    return experts->forward(x, kept, indices);
  }
  // The first fill keeps the tokens in the padding out of the backward pass, the second one the
  // gradients of their outputs.
  const Tensor padding = padding_mask.unsqueeze(-1);
  return experts->forward(x.masked_fill(padding, 0.0), kept, indices).masked_fill(padding, 0.0);
}

}  // namespace peer::nn
