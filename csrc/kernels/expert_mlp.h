// The passes over tokens as the kernels of every device take them.
//
// Table is the element type of expert tables, Input that of activations: of the table's
// accumulation, or, on devices whose kernels say so, the table's own.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/common.h"

namespace peer {

// Forward.
//
//   hidden = <x, w_down[e]>       gate = <x, w_gate[e]>, or 1 without w_gate
//   out = Σ_p weights·act(hidden)·gate·w_up[e]
template <class Table, class Input = accumulation_t<Table>>
struct ExpertMlpForward {
  using Real = accumulation_t<Table>;
  int64_t tokens;             // T
  int64_t experts;            // N
  int64_t experts_per_token;  // P
  int64_t dim;                // D
  Activation activation;
  const Input* x;                          // (T, D)
  const Real* weights;                     // (T, P)
  const int64_t* indices;                  // (T, P)
  Rows<const Table> w_down, w_up, w_gate;  // (N, D); w_gate or none
  Input* out;                              // (T, D)
  Real* hidden;                            // (T, P)
  Real* gate;                              // (T, P) where w_gate is given
};

// Backward. With s = <grad_out, w_up[e]>:
//
//   grad_weights      = s·act(hidden)·gate
//   down_coefficients = s·weights·act'(hidden)·gate
//   gate_coefficients = s·weights·act(hidden)
//   up_coefficients   = weights·act(hidden)·gate
//   grad_x            = Σ_p down_coefficients·w_down[e] + gate_coefficients·w_gate[e]
//
// The coefficients are what the expert pass multiplies x and grad_out by.
template <class Table, class Input = accumulation_t<Table>>
struct ExpertMlpBackward {
  using Real = accumulation_t<Table>;
  int64_t tokens;
  int64_t experts;
  int64_t experts_per_token;
  int64_t dim;
  Activation activation;
  const Input* grad_out;   // (T, D)
  const Real* weights;     // (T, P)
  const int64_t* indices;  // (T, P)
  Rows<const Table> w_down, w_up, w_gate;
  const Real* hidden;       // (T, P)
  const Real* gate;         // (T, P) where w_gate is given
  Input* grad_x;            // (T, D), or null
  Real* grad_weights;       // (T, P)
  Real* down_coefficients;  // (T, P)
  Real* gate_coefficients;  // (T, P) where w_gate is given
  Real* up_coefficients;    // (T, P)
};

}  // namespace peer
