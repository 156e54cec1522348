#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "kernels/activation.h"

namespace peer::ops {

using at::Tensor;

using ExpertMlp = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x,
                                                     const Tensor& weights,
                                                     const Tensor& indices,
                                                     const Tensor& table,
                                                     std::string_view activation,
                                                     bool sparse_grad);
using ExpertMlpBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& grad_out,
                                                             const Tensor& x,
                                                             const Tensor& weights,
                                                             const Tensor& indices,
                                                             const Tensor& table,
                                                             const Tensor& hidden,
                                                             const Tensor& gate,
                                                             std::string_view activation,
                                                             bool sparse_grad,
                                                             std::array<bool, 3> output_mask);

// Positions in the backward operator's results and its output_mask.
enum ExpertMlpGradient { kGradX, kGradWeights, kGradTable };

// Through the dispatcher, from the top.
ExpertMlp expert_mlp;
ExpertMlpBackward expert_mlp_backward;

// Through the dispatcher, from the keys in `below` on.
std::tuple<Tensor, Tensor, Tensor> redispatch_expert_mlp(c10::DispatchKeySet below,
                                                         const Tensor& x,
                                                         const Tensor& weights,
                                                         const Tensor& indices,
                                                         const Tensor& table,
                                                         std::string_view activation,
                                                         bool sparse_grad);
std::tuple<Tensor, Tensor, Tensor> redispatch_expert_mlp_backward(c10::DispatchKeySet below,
                                                                  const Tensor& grad_out,
                                                                  const Tensor& x,
                                                                  const Tensor& weights,
                                                                  const Tensor& indices,
                                                                  const Tensor& table,
                                                                  const Tensor& hidden,
                                                                  const Tensor& gate,
                                                                  std::string_view activation,
                                                                  bool sparse_grad,
                                                                  std::array<bool, 3> output_mask);

// None where no activation has the name.
std::optional<Activation> activation_named(std::string_view name);

// The parts of experts (..., parts, D) as views (..., D): down, gate and up, or down and up.
struct ExpertParts {
  ExpertParts() = default;
  explicit ExpertParts(const Tensor& experts);

  Tensor down, up;
  Tensor gate;  // undefined without one
};

inline bool has_gate(const Tensor& experts) { return experts.sym_size(-2) == 3; }

// What every kernel of the operator requires of its arguments, whatever the device. Reads no data.
// Returns the parsed activation.
Activation check_expert_mlp(const Tensor& x,
                            const Tensor& weights,
                            const Tensor& indices,
                            const Tensor& table,
                            std::string_view activation);
Activation check_expert_mlp_backward(const char* op,
                                     const Tensor& x,
                                     const Tensor& weights,
                                     const Tensor& indices,
                                     const Tensor& table,
                                     const Tensor& hidden,
                                     const Tensor& gate,
                                     std::string_view activation);

// For the kernels that compute only: while compiled autograd records a graph, the incoming gradient
// is a stand-in of another shape.
void check_expert_mlp_grad_out(const char* op, const Tensor& grad_out, const Tensor& x);

}  // namespace peer::ops
