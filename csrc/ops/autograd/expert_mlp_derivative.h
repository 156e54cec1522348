// The derivative of expert_mlp and of its backward operator, in a direction.
//
// Both are derivatives of L = <grad_out, out>: the backward operator gives its gradient with
// respect to x, weights and table, and its gradient with respect to grad_out is out itself. So the
// derivative of out and of these gradients in a direction is the Hessian matrix of L times the
// direction. That product is the tangent of either operator in forward mode. The matrix is
// symmetric, so the double backward is made of the same product.
//
// Frozen rows of the table are constants. They have no tangent, and L has no derivative by them, at
// any order.
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

// The derivatives of the `wanted` members in the direction, each in the shape and dtype of its
// variable. out has the dtype of grad_out, or of x if grad_out is undefined. A derivative is
// undefined if it is not wanted or is known to be zero. frozen: (N,) bool, or undefined.
std::array<at::Tensor, 4> differentiate_expert_mlp(const ExpertMlpVariables& point,
                                                   const ExpertMlpVariables& direction,
                                                   const at::Tensor& indices,
                                                   std::string_view activation,
                                                   const at::Tensor& frozen,
                                                   std::array<bool, 4> wanted);

}  // namespace peer::ops::autograd
