// The derivative of expert_mlp and of its backward operator, in a direction.
//
// Both are derivatives of one function. The backward operator gives the gradient of
// L = <grad_out, out> with respect to x, the weights and the table; its gradient with respect to
// grad_out is out itself. So the derivative in a direction of out and of these gradients is the
// Hessian matrix of L times the direction. It is the tangent of either operator in forward mode,
// and because the matrix is symmetric, also what the double backward is made of.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>

namespace peer::ops::autograd {

// What L depends on: a point, or a direction. Undefined tensors are zero.
struct ExpertMlpVariables {
  at::Tensor grad_out, x, weights, table;
};

// The derivatives of L by its variables, in their order.
enum ExpertMlpDerivative { kOut, kOfX, kOfWeights, kOfTable };

// The derivatives of `wanted` members in the direction, each in the shape and dtype of its
// variable; out has the dtype of grad_out, or of x where there is none. Undefined where not wanted,
// or where zero is known.
std::array<at::Tensor, 4> differentiate_expert_mlp(const ExpertMlpVariables& point,
                                                   const ExpertMlpVariables& direction,
                                                   const at::Tensor& indices,
                                                   std::string_view activation,
                                                   std::array<bool, 4> wanted);

}  // namespace peer::ops::autograd
