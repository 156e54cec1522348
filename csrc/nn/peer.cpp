#include "peer/nn/peer.h"

#include <ostream>

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
      given_router->options.num_experts().num_experts() == given_experts->options.num_experts(),
      "expected a router and a pool of the same num_experts, got ",
      given_router->options.num_experts(), " and ", given_experts->options.num_experts());
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

void PEERImpl::pretty_print(std::ostream& stream) const {
  stream << "peer::nn::PEER(dropout=" << dropout << ")";
}

Tensor PEERImpl::forward(const Tensor& x, const Tensor& padding_mask) {
  const auto [weights, indices] = router->forward(x, padding_mask);
  return experts->forward(x, torch::dropout(weights, dropout, is_training()), indices);
}

}  // namespace peer::nn
