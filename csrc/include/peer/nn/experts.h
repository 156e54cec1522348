#pragma once

#include <peer/export.h>
#include <peer/nn/grid.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>

namespace peer::nn {

// Options of ExpertPool.
struct PEER_API ExpertPoolOptions {
  explicit ExpertPoolOptions(int64_t dim) : dim_(dim) {}

  // Input width.
  TORCH_ARG(int64_t, dim);
  // N.
  TORCH_ARG(int64_t, num_experts) = int64_t{1024} * 1024;
  // Output width, dim unless given.
  TORCH_ARG(std::optional<int64_t>, dim_out);
  // "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" or "relu2" (the square of ReLU).
  TORCH_ARG(std::string, activation) = "gelu";
  // Whether the experts have a linear gate, a third table.
  TORCH_ARG(bool, glu) = false;
  // P, for how many experts of a token the initialisation is scaled.
  TORCH_ARG(int64_t, num_experts_per_token) = 128;
  // Whether the tables get coalesced sparse gradients, which hold the retrieved rows.
  TORCH_ARG(bool, sparse_grad) = false;
  // Whether w_up starts at zero.
  TORCH_ARG(bool, zero_init_out) = false;
  TORCH_ARG(std::optional<torch::Device>, device);
  TORCH_ARG(std::optional<torch::Dtype>, dtype);
};

// N experts, each an MLP with one hidden neuron: Python's peer.ExpertPool.
//
// State: w_down (N, dim), w_up (N, dim_out) and, with glu, w_gate (N, dim).
class PEER_API ExpertPoolImpl : public torch::nn::Cloneable<ExpertPoolImpl> {
 public:
  explicit ExpertPoolImpl(const ExpertPoolOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // The weighted sum (..., dim_out) of the experts that each token of x (..., dim) names, by
  // weights and indices (..., H, K) or (..., P).
  torch::Tensor forward(const torch::Tensor& x,
                        const torch::Tensor& weights,
                        const torch::Tensor& indices);

  int64_t dim_out() const { return options.dim_out().value_or(options.dim()); }

  ExpertPoolOptions options;
  torch::Tensor w_down, w_up, w_gate;
};

TORCH_MODULE(ExpertPool);

}  // namespace peer::nn
