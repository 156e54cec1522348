// The activations of an expert and their derivatives.
//
// Everything is static, because the header is compiled once per CPU capability: an inline function
// shared between those objects could bring instructions of one capability into another.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common.h"

namespace peer {

enum class Activation : int32_t { gelu, gelu_tanh, relu, silu, identity, relu2 };

template <class Real>
PEER_HOST_DEVICE static inline Real standard_normal_cdf(Real z) {
  return Real(0.5) * (Real(1) + std::erf(z * Real(0.70710678118654752440)));
}

template <class Real>
PEER_HOST_DEVICE static inline Real standard_normal_pdf(Real z) {
  return Real(0.39894228040143267794) * std::exp(Real(-0.5) * z * z);
}

// The argument of the hyperbolic tangent in gelu_tanh, sqrt(2 / pi)·(z + 0.044715·z³), and its
// derivative.
template <class Real>
PEER_HOST_DEVICE static inline Real gelu_tanh_inner(Real z) {
  return Real(0.79788456080286535588) * (z + Real(0.044715) * z * z * z);
}

template <class Real>
PEER_HOST_DEVICE static inline Real gelu_tanh_inner_derivative(Real z) {
  return Real(0.79788456080286535588) * (Real(1) + Real(0.134145) * z * z);
}

template <class Real>
PEER_HOST_DEVICE static inline Real sigmoid(Real z) {
  return Real(1) / (Real(1) + std::exp(-z));
}

template <Activation activation, class Real>
PEER_HOST_DEVICE static inline Real activate(Real z) {
  if constexpr (activation == Activation::gelu) {
    return z * standard_normal_cdf(z);
  } else if constexpr (activation == Activation::gelu_tanh) {
    return Real(0.5) * z * (Real(1) + std::tanh(gelu_tanh_inner(z)));
  } else if constexpr (activation == Activation::relu) {
    return z < Real(0) ? Real(0) : z;  // written so that NaN passes through
  } else if constexpr (activation == Activation::silu) {
    return z * sigmoid(z);
  } else if constexpr (activation == Activation::identity) {
    return z;
  } else {
    const Real positive = z < Real(0) ? Real(0) : z;
    return positive * positive;
  }
}

// The derivative at z; 0 at the kink of relu, as in PyTorch.
template <Activation activation, class Real>
PEER_HOST_DEVICE static inline Real activate_derivative(Real z) {
  if constexpr (activation == Activation::gelu) {
    return standard_normal_cdf(z) + z * standard_normal_pdf(z);
  } else if constexpr (activation == Activation::gelu_tanh) {
    const Real t = std::tanh(gelu_tanh_inner(z));
    return Real(0.5) * (Real(1) + t) +
           Real(0.5) * z * (Real(1) - t * t) * gelu_tanh_inner_derivative(z);
  } else if constexpr (activation == Activation::relu) {
    return z <= Real(0) ? Real(0) : Real(1);
  } else if constexpr (activation == Activation::silu) {
    const Real s = sigmoid(z);
    return s * (Real(1) + z * (Real(1) - s));
  } else if constexpr (activation == Activation::identity) {
    return Real(1);
  } else {
    return z < Real(0) ? Real(0) : Real(2) * z;
  }
}

// Calls body.template operator()<activation>() for the activation chosen at run time.
template <class Body>
PEER_HOST_DEVICE static inline void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::gelu:
      return body.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return body.template operator()<Activation::gelu_tanh>();
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::silu:
      return body.template operator()<Activation::silu>();
    case Activation::identity:
      return body.template operator()<Activation::identity>();
    case Activation::relu2:
      return body.template operator()<Activation::relu2>();
  }
}

}  // namespace peer
