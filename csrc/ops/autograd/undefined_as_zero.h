// Sums and products in which an undefined tensor is zero, as undefined gradients and tangents are.
// A product with an undefined factor is undefined and costs nothing.
#pragma once

#include <ATen/ATen.h>

namespace peer::ops::autograd {

inline at::Tensor sum(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined()) {
    return b;
  }
  return b.defined() ? a + b : a;
}

template <class... Rest>
at::Tensor sum(const at::Tensor& a, const at::Tensor& b, const Rest&... rest) {
  return sum(sum(a, b), rest...);
}

template <class... Factors>
at::Tensor product(const at::Tensor& first, const Factors&... factors) {
  if (!first.defined() || (!factors.defined() || ...)) {
    return at::Tensor();
  }
  at::Tensor result = first;
  ((result = result * factors), ...);
  return result;
}

inline at::Tensor to_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.defined() ? tensor.to(type) : tensor;
}

}  // namespace peer::ops::autograd
