#pragma once

#include <peer/export.h>
#include <peer/nn/grid.h>
#include <peer/nn/norms.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <tuple>

namespace peer::nn {

// Options of ProductKeyRouter. The defaults are those of the paper.
struct PEER_API ProductKeyRouterOptions {
  explicit ProductKeyRouterOptions(int64_t dim) : dim_(dim) {}

  // Input width.
  TORCH_ARG(int64_t, dim);
  // N, a perfect square, or the grid {rows, columns}.
  TORCH_ARG(Grid, num_experts) = int64_t{1024} * 1024;
  // H, the independent query networks.
  TORCH_ARG(int64_t, heads) = 8;
  // K, at most N.
  TORCH_ARG(int64_t, num_experts_per_head) = 16;
  // Query width per head, even. One half scores the rows, the other the columns.
  TORCH_ARG(int64_t, dim_key) = 256;
  // How the K scores of a head become weights: "softmax", "sigmoid" or "relu".
  TORCH_ARG(std::string, scores) = "softmax";
  // "batch", "layer", "rms", or none.
  TORCH_ARG(std::optional<std::string>, query_norm) = "batch";
  // Whether the query network has a bias before the normalisation.
  TORCH_ARG(bool, query_bias) = false;
  // Whether all heads use the same keys.
  TORCH_ARG(bool, share_keys) = true;
  // Whether keys are scaled to the length sqrt(1/3) at every call, so that training moves their
  // directions only. A key of zeros stays zero.
  TORCH_ARG(bool, key_norm) = false;
  TORCH_ARG(std::optional<torch::Device>, device);
  TORCH_ARG(std::optional<torch::Dtype>, dtype);
};

// The linear map from tokens to the queries of all heads.
//
// State: weight (H·dim_key, dim) and, if asked for, bias (H·dim_key).
class PEER_API QueryNetworkImpl : public torch::nn::Cloneable<QueryNetworkImpl> {
 public:
  explicit QueryNetworkImpl(const ProductKeyRouterOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);

  ProductKeyRouterOptions options;
  torch::Tensor weight, bias;
};

TORCH_MODULE(QueryNetwork);

// Retrieves experts for tokens by product keys: Python's peer.ProductKeyRouter.
//
// State: query.weight, query.bias, norm.*, row_keys (R, dim_key/2), col_keys (C, dim_key/2). Keys
// that are not shared have a leading dimension H. While keys are frozen: frozen_rows (R) and
// kept_row_keys, frozen_columns (C) and kept_col_keys. While the query network is frozen: frozen.
class PEER_API ProductKeyRouterImpl : public torch::nn::Cloneable<ProductKeyRouterImpl> {
 public:
  explicit ProductKeyRouterImpl(const ProductKeyRouterOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  // Weights (..., H, K) and the ids of the experts (..., H, K), int64, for x (..., dim).
  //
  // padding_mask: (...) bool, true for padding. Padding is routed as zeros and with zero weights.
  // What stands there, NaN included, has no influence on statistics or gradients.
  //
  // disabled: (R·C) bool, true for experts that are not retrieved.
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x,
                                                   const torch::Tensor& padding_mask = {},
                                                   const torch::Tensor& disabled = {});

  // The row keys and column keys that retrieval uses: normalised with key_norm, and frozen keys
  // with the values that they kept.
  std::tuple<torch::Tensor, torch::Tensor> effective_keys() const;

  // Retrieval goes on using the present values of frozen keys, whatever an optimizer does to the
  // parameters. Masks (R) and (C) bool; all keys if undefined.
  void freeze_keys(const torch::Tensor& rows = {}, const torch::Tensor& columns = {});
  void unfreeze_keys(const torch::Tensor& rows = {}, const torch::Tensor& columns = {});

  // The parameters of the query network and of its normalisation do not require grad while they are
  // frozen, and batch normalisation uses its running statistics, in training too.
  void freeze_network();
  void unfreeze_network();

  // Appends rows of keys, so that each head also scores rows·C more experts. Old keys and old ids
  // do not change, and row_keys stays the same parameter. keys: those of make_row_keys. Throws
  // c10::Error, and changes nothing, while row_keys has a gradient or is part of a graph.
  void grow(int64_t rows, const torch::Tensor& keys = {});

  // The keys of new rows, (rows, dim_key / 2) or (H, rows, dim_key / 2): those given, in the shape
  // of this router, or noisy copies of old keys at their length.
  torch::Tensor make_row_keys(int64_t rows, const torch::Tensor& keys = {}) const;

  // Appends rows to keys that can grow.
  void append_row_keys(const torch::Tensor& keys);

  ProductKeyRouterOptions options;
  QueryNetwork query = nullptr;
  QueryNorm norm = nullptr;
  torch::Tensor row_keys, col_keys;
  // Undefined or empty while nothing is frozen.
  torch::Tensor frozen_rows, frozen_columns, kept_row_keys, kept_col_keys, frozen;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())},
                           {2, torch::nn::AnyValue(torch::Tensor())})

 private:
  void reset_keys();
  void apply_frozen_state();
};

TORCH_MODULE(ProductKeyRouter);

// Writes the normalised keys of all routers with key_norm in a module into their parameters, for
// inference: Python's peer.fold_key_norm_. Outputs are equal bit for bit, and key_norm is false
// afterwards. Throws ValueError if there is no such router.
PEER_API void fold_key_norm(torch::nn::Module& module);

}  // namespace peer::nn
