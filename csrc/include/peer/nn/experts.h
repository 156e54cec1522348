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

  // Width of input and output.
  TORCH_ARG(int64_t, dim);
  // N.
  TORCH_ARG(int64_t, num_experts) = int64_t{1024} * 1024;
  // "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" or "relu2" (the square of ReLU).
  TORCH_ARG(std::string, activation) = "gelu";
  // Whether the experts have a linear gate.
  TORCH_ARG(bool, glu) = false;
  // P: the initialisation is scaled for this many experts per token.
  TORCH_ARG(int64_t, num_experts_per_token) = 128;
  // Whether the table's gradient is a coalesced sparse tensor that holds the retrieved rows.
  TORCH_ARG(bool, sparse_grad) = false;
  // Whether w_up starts at zero.
  TORCH_ARG(bool, zero_init_out) = false;
  TORCH_ARG(std::optional<torch::Device>, device);
  TORCH_ARG(std::optional<torch::Dtype>, dtype);
};

// N experts, each an MLP with one hidden neuron: Python's peer.ExpertPool.
//
// State: weight (N, parts, dim). An expert is a row with the parts [down, up] or, with glu,
// [down, gate, up]. While experts are frozen or disabled, frozen and disabled, (N) bool.
class PEER_API ExpertPoolImpl : public torch::nn::Cloneable<ExpertPoolImpl> {
 public:
  explicit ExpertPoolImpl(const ExpertPoolOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // The weighted sum (..., dim) of the retrieved experts of each token, for x (..., dim) and for
  // weights and indices (..., H, K) or (..., P).
  torch::Tensor forward(const torch::Tensor& x,
                        const torch::Tensor& weights,
                        const torch::Tensor& indices);

  // Frozen experts get no gradient, and peer's row updates never write them. Gradients to tokens
  // and router weights still flow through them. `experts`: ids, or a mask (N) bool; all experts if
  // undefined. Throws ValueError, TypeError or IndexError if it is neither.
  void freeze_experts(const torch::Tensor& experts = {});
  void unfreeze_experts(const torch::Tensor& experts = {});

  // Layers of this pool never retrieve disabled experts.
  void disable_experts(const torch::Tensor& experts);
  void enable_experts(const torch::Tensor& experts = {});

  // Appends experts with random input weights and zero output. Old experts and their ids do not
  // change, and weight stays the same parameter. Its optimizer must be made anew. Throws
  // c10::Error, and changes nothing, while weight has a gradient or is part of a graph.
  void grow(int64_t experts);

  // Appends rows (M, parts, dim) to a table that can grow, without drawing them.
  void append_experts(const torch::Tensor& rows);

  // The parts of all experts, (N, dim): views of weight. w_gate is undefined without glu.
  torch::Tensor w_down() const { return weight.select(1, 0); }
  torch::Tensor w_gate() const { return options.glu() ? weight.select(1, 1) : torch::Tensor(); }
  torch::Tensor w_up() const { return weight.select(1, -1); }

  ExpertPoolOptions options;
  torch::Tensor weight;
  torch::Tensor frozen, disabled;  // undefined or empty while they mark nothing

 private:
  void draw_experts(const torch::Tensor& rows, bool zero_out);
};

TORCH_MODULE(ExpertPool);

}  // namespace peer::nn
