// Forward mode, in the form of PyTorch's generated code: a kernel at the Autograd key splits its
// dual inputs into primals and tangents, and gives its output a tangent.
//
// There is one level, 0. torch.func nests transforms by wrapping tensors, and calls the kernel once
// per transform.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

namespace peer::ops::autograd {

template <class... Tensors>
bool any_has_tangent(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

// The tensor without its tangent. Its history stays, so that tangents can be differentiated.
inline at::Tensor primal_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->_fw_primal(/*level=*/0) : at::Tensor();
}

// Undefined if there is none.
inline at::Tensor tangent_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->_fw_grad(/*level=*/0) : at::Tensor();
}

// The parts of several tensors, as the members of a struct.
template <class Struct, class... Tensors>
Struct primals_of(const Tensors&... tensors) {
  return {primal_of(tensors)...};
}

template <class Struct, class... Tensors>
Struct tangents_of(const Tensors&... tensors) {
  return {tangent_of(tensors)...};
}

// An undefined tangent is zero, and leaves the output unchanged.
inline void set_tangent(const at::Tensor& output, const at::Tensor& tangent) {
  if (output.defined() && tangent.defined()) {
    output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  }
}

}  // namespace peer::ops::autograd
