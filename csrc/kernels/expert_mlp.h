// expert_mlp and its backward as the kernels of every device take them.
//
// Table is the element type of expert tables, Input the element type of x, out and their gradients:
// the accumulation type of the table or, on CUDA, the table's own type.
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
  Rows<const Table> w_down, w_up, w_gate;  // (N, D); w_gate may be null
  Input* out;                              // (T, D)
  Real* hidden;                            // (T, P)
  Real* gate;                              // (T, P) with w_gate
};

// Backward. With s = <grad_out, w_up[e]>:
//
//   grad_weights      = s·act(hidden)·gate
//   down_coefficients = s·weights·act'(hidden)·gate
//   gate_coefficients = s·weights·act(hidden)
//   up_coefficients   = weights·act(hidden)·gate
//   grad_x            = Σ_p down_coefficients·w_down[e] + gate_coefficients·w_gate[e]
//
// The gradients of the tables are sums of x and grad_out times these coefficients.
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
  const Real* gate;         // (T, P) with w_gate
  Input* grad_x;            // (T, D), or null
  Real* grad_weights;       // (T, P)
  Real* down_coefficients;  // (T, P)
  Real* gate_coefficients;  // (T, P) with w_gate
  Real* up_coefficients;    // (T, P)
};

}  // namespace peer
