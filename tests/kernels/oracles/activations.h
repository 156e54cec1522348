// The activations from their definitions, in double.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/activation.h"

namespace peer::test {

inline double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return z / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::relu:
      return std::max(z, 0.0);
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::identity:
      return z;
    case Activation::relu2:
      return z > 0 ? z * z : 0;
  }
  return NAN;
}

inline double derivative(Activation activation, double z) {
  constexpr double h = 1e-5;
  if (activation == Activation::relu) {
    return z > 0;
  }
  return (activate(activation, z + h) - activate(activation, z - h)) / (2 * h);
}

inline constexpr Activation kActivations[] = {Activation::gelu,     Activation::gelu_tanh,
                                              Activation::relu,     Activation::silu,
                                              Activation::identity, Activation::relu2};

}  // namespace peer::test
