#pragma once

#include <peer/export.h>
#include <peer/nn/experts.h>
#include <peer/nn/grid.h>
#include <peer/nn/router.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>

namespace peer::nn {

// Options of PEER: those of its router and of its pool. The defaults are those of the paper.
struct PEER_API PEEROptions {
  explicit PEEROptions(int64_t dim) : dim_(dim) {}

  // Width of input and output.
  TORCH_ARG(int64_t, dim);
  // N, a perfect square, or the grid {rows, columns}.
  TORCH_ARG(Grid, num_experts) = int64_t{1024} * 1024;
  // H.
  TORCH_ARG(int64_t, heads) = 8;
  // K, at most N.
  TORCH_ARG(int64_t, num_experts_per_head) = 16;
  // Query width per head, even.
  TORCH_ARG(int64_t, dim_key) = 256;
  // The activation of the experts: "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" or
  // "relu2".
  TORCH_ARG(std::string, activation) = "gelu";
  // Whether the experts have a linear gate.
  TORCH_ARG(bool, glu) = false;
  // How the K scores of a head become weights: "softmax", "sigmoid" or "relu".
  TORCH_ARG(std::string, scores) = "softmax";
  // "batch", "layer", "rms", or none.
  TORCH_ARG(std::optional<std::string>, query_norm) = "batch";
  // Whether the query network has a bias before the normalisation.
  TORCH_ARG(bool, query_bias) = false;
  // Whether all heads use the same keys.
  TORCH_ARG(bool, share_keys) = true;
  // Whether keys are scaled to one length at every call, so that training moves their directions
  // only.
  TORCH_ARG(bool, key_norm) = false;
  // The probability that, in training, a retrieved expert is dropped for a token.
  TORCH_ARG(double, dropout) = 0.0;
  // Whether the table's gradient is a coalesced sparse tensor.
  TORCH_ARG(bool, sparse_grad) = false;
  // Whether w_up, and with it the layer's output, starts at zero.
  TORCH_ARG(bool, zero_init_out) = false;
  TORCH_ARG(std::optional<torch::Device>, device);
  TORCH_ARG(std::optional<torch::Dtype>, dtype);

 public:
  // The options of each part.
  ProductKeyRouterOptions router() const;
  ExpertPoolOptions experts() const;
};

// Parameter Efficient Expert Retrieval, a feed-forward layer with a million tiny experts: Python's
// peer.PEER. Each of H heads retrieves K of N experts for a token x and weighs them by their
// scores:
//
//   y = Σ_h Σ_p g_hp(x)·act(<x, w_down[e_hp]>)·w_up[e_hp]
//
// With the same options and the same seed, its initial parameters equal those of Python's module
// bit for bit. Its state has the same names: those of router and experts, with these prefixes.
//
//   peer::nn::PEER layer(peer::nn::PEEROptions(512).num_experts(1024 * 1024));
//   torch::Tensor y = layer(x);  // x (..., 512)
class PEER_API PEERImpl : public torch::nn::Cloneable<PEERImpl> {
 public:
  explicit PEERImpl(int64_t dim) : PEERImpl(PEEROptions(dim)) {}
  explicit PEERImpl(const PEEROptions& options);
  // From a router and a pool. Several layers may share one pool; a layer uses its first R·C
  // experts.
  PEERImpl(ProductKeyRouter router, ExpertPool experts, double dropout = 0.0);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // (..., dim) in x's dtype, for x (..., dim).
  //
  // padding_mask: (...) bool, true for padding. Its outputs are zeros. What stands in the padding,
  // NaN included, and the gradients of its outputs have no influence.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& padding_mask = {});

  int64_t num_experts() const { return router->options.num_experts().num_experts(); }

  // Appends rows to the grid, and with each row C experts with random input weights and zero
  // output. Old experts, keys and ids do not change. The parameters stay the same, but optimizers
  // must be made anew. keys (rows, dim_key / 2), or (H, rows, dim_key / 2) if the heads do not
  // share keys; noisy copies of old keys if undefined. The pool grows only if it has too few
  // experts. Throws c10::Error, and changes nothing, while a parameter has a gradient or is part of
  // a graph.
  void grow(int64_t rows, const torch::Tensor& keys = {});

  // Freezes experts, given as ids or as a mask (N) bool over the pool: training changes neither
  // their rows of the table nor, with `keys`, the row keys and column keys that they use. `router`
  // freezes the query network and the statistics of its normalisation. Without `experts`, it
  // freezes all experts, all keys and, unless `router` is false, the query network.
  void freeze_experts(const torch::Tensor& experts = {},
                      bool keys = true,
                      std::optional<bool> router = {});
  // Lets experts learn again, and with `keys` the keys that no frozen expert uses.
  void unfreeze_experts(const torch::Tensor& experts = {},
                        bool keys = true,
                        std::optional<bool> router = {});

  // No token retrieves disabled experts. At least K experts of the layer must stay enabled.
  void disable_experts(const torch::Tensor& experts);
  void enable_experts(const torch::Tensor& experts = {});

  ProductKeyRouter router = nullptr;
  ExpertPool experts = nullptr;
  double dropout;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(torch::Tensor())})

 private:
  torch::Tensor grid_of(const torch::Tensor& mask) const;
};

TORCH_MODULE(PEER);

}  // namespace peer::nn
