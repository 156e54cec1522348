// expert_mlp on a device, which adds to what common.h asks of it
//
//   forward(const Experts&, const TokenOutputs&)
//   backward(const Experts&, const TokenGradients&)
//
// the token passes, which forward_pass and backward_pass make of these. The table's gradient is
// sums over the retrievals, which one sort serves all.
#pragma once

#include <ATen/ops/empty.h>

#include "kernels/expert_mlp.h"
#include "ops/device/common.h"
#include "ops/expert_mlp.h"

namespace peer::ops {

// What the token pass reads in both directions, as the kernels want it.
struct Experts {
  Experts(Activation parsed,
          const Tensor& given_indices,
          const Tensor& given_weights,
          const Tensor& given_table)
      : activation(parsed),
        indices(given_indices.contiguous()),
        weights(contiguous_as(given_weights, accumulation_type(given_table.scalar_type()))),
        table(with_contiguous_columns(given_table)),
        parts(table) {}

  int64_t count() const { return table.size(0); }
  int64_t per_token() const { return indices.size(1); }
  int64_t dim() const { return table.size(2); }
  at::ScalarType type() const { return table.scalar_type(); }
  bool have_gates() const { return parts.gate.defined(); }

  template <class Table>
  Rows<const Table> gate_rows() const {
    return have_gates() ? rows_of<Table>(parts.gate) : Rows<const Table>{};
  }

  Activation activation;
  Tensor indices, weights, table;
  ExpertParts parts;
};

// The token pass forward: x and out in the input dtype, the others in that of accumulation.
struct TokenOutputs {
  Tensor x;
  Tensor out, hidden;
  Tensor gate;  // empty without gates
};

// The gradients with respect to what belongs to tokens, and the coefficients that the table's
// gradient is made of, (parts, T, P) in the order of its parts. grad_out and grad_x are in the
// input dtype, the others in that of accumulation.
struct TokenGradients {
  Tensor indices, grad_out, hidden;
  Tensor gate;    // undefined without gates
  Tensor grad_x;  // undefined where not wanted
  Tensor grad_weights, coefficients;

  template <class Real>
  Real* coefficients_of_part(int64_t part) const {
    return data_of<Real>(coefficients) + part * indices.numel();
  }
};

template <class Table, class Input>
ExpertMlpForward<Table, Input> forward_pass(const Experts& experts, const TokenOutputs& tokens) {
  using Real = accumulation_t<Table>;
  return {
      .tokens = tokens.x.size(0),
      .experts = experts.count(),
      .experts_per_token = experts.per_token(),
      .dim = experts.dim(),
      .activation = experts.activation,
      .x = const_data_of<Input>(tokens.x),
      .weights = const_data_of<Real>(experts.weights),
      .indices = experts.indices.const_data_ptr<int64_t>(),
      .w_down = rows_of<Table>(experts.parts.down),
      .w_up = rows_of<Table>(experts.parts.up),
      .w_gate = experts.gate_rows<Table>(),
      .out = data_of<Input>(tokens.out),
      .hidden = data_of<Real>(tokens.hidden),
      .gate = data_of<Real>(tokens.gate),
  };
}

template <class Table, class Input>
ExpertMlpBackward<Table, Input> backward_pass(const Experts& experts,
                                              const TokenGradients& tokens) {
  using Real = accumulation_t<Table>;
  return {
      .tokens = tokens.grad_out.size(0),
      .experts = experts.count(),
      .experts_per_token = experts.per_token(),
      .dim = experts.dim(),
      .activation = experts.activation,
      .grad_out = const_data_of<Input>(tokens.grad_out),
      .weights = const_data_of<Real>(experts.weights),
      .indices = experts.indices.const_data_ptr<int64_t>(),
      .w_down = rows_of<Table>(experts.parts.down),
      .w_up = rows_of<Table>(experts.parts.up),
      .w_gate = experts.gate_rows<Table>(),
      .hidden = const_data_of<Real>(tokens.hidden),
      .gate = const_data_or_null<Real>(tokens.gate),
      .grad_x = data_or_null<Input>(tokens.grad_x),
      .grad_weights = data_of<Real>(tokens.grad_weights),
      .down_coefficients = tokens.coefficients_of_part<Real>(0),
      .gate_coefficients = experts.have_gates() ? tokens.coefficients_of_part<Real>(1) : nullptr,
      .up_coefficients = tokens.coefficients_of_part<Real>(experts.table.size(1) - 1),
  };
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> expert_mlp_on(const Tensor& x,
                                                 const Tensor& weights,
                                                 const Tensor& indices,
                                                 const Tensor& table,
                                                 std::string_view activation,
                                                 bool /*sparse_grad*/) {
  const Activation parsed = check_expert_mlp(x, weights, indices, table, activation);
  const c10::DeviceGuard guard(x.device());
  const Experts experts(parsed, indices, weights, table);
  Device::check_index_range("expert_mlp", experts.indices, experts.count());

  const Tensor inputs = as_input<Device>(x, experts.type());
  const at::TensorOptions accumulated = experts.weights.options();
  const TokenOutputs tokens = {
      .x = inputs,
      .out = at::empty(x.sizes(), inputs.options()),
      .hidden = at::empty(indices.sizes(), accumulated),
      .gate = experts.have_gates() ? at::empty(indices.sizes(), accumulated)
                                   : at::empty({0}, accumulated),
  };
  Device::forward(experts, tokens);
  return {tokens.out.to(x.scalar_type()), tokens.hidden, tokens.gate};
}

template <class Device>
TokenGradients token_gradients_on(const char* op,
                                  const Tensor& grad_out,
                                  const Tensor& x,
                                  const Tensor& weights,
                                  const Tensor& indices,
                                  const Tensor& table,
                                  const Tensor& hidden,
                                  const Tensor& gate,
                                  std::string_view activation,
                                  bool wants_grad_x) {
  const Activation parsed =
      check_expert_mlp_backward(op, x, weights, indices, table, hidden, gate, activation);
  check_expert_mlp_grad_out(op, grad_out, x);
  const Experts experts(parsed, indices, weights, table);
  Device::check_index_range(op, experts.indices, experts.count());

  const at::TensorOptions accumulated = experts.weights.options();
  const Tensor incoming = as_input<Device>(grad_out, experts.type());
  const at::ScalarType type = accumulation_type(experts.type());
  const TokenGradients gradients = {
      .indices = experts.indices,
      .grad_out = incoming,
      .hidden = contiguous_as(hidden, type),
      .gate = experts.have_gates() ? contiguous_as(gate, type) : Tensor(),
      .grad_x = wants_grad_x ? at::empty(x.sizes(), incoming.options()) : Tensor(),
      .grad_weights = at::empty(indices.sizes(), accumulated),
      .coefficients = at::empty({table.size(1), indices.size(0), indices.size(1)}, accumulated),
  };
  Device::backward(experts, gradients);
  return gradients;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_on(const Tensor& grad_out,
                                                          const Tensor& x,
                                                          const Tensor& weights,
                                                          const Tensor& indices,
                                                          const Tensor& table,
                                                          const Tensor& hidden,
                                                          const Tensor& gate,
                                                          std::string_view activation,
                                                          bool sparse_grad,
                                                          std::array<bool, 3> output_mask) {
  const char* op = "expert_mlp_backward";
  const c10::DeviceGuard guard(x.device());
  const TokenGradients tokens = token_gradients_on<Device>(
      op, grad_out, x, weights, indices, table, hidden, gate, activation, output_mask[kGradX]);
  Tensor grad_table;
  if (output_mask[kGradTable]) {
    check_sortable<Device>(op, table, tokens.indices.numel(), table.size(0));
    const typename Device::TableGradient gradient(tokens.indices, table.size(0), sparse_grad);
    std::vector<Tensor> sources(table.size(1), as_input<Device>(x, table.scalar_type()));
    sources.back() = tokens.grad_out;
    grad_table = gradient.sum(tokens.coefficients, sources, table.options());
  }
  return {tokens.grad_x.defined() ? tokens.grad_x.to(x.scalar_type()) : Tensor(),
          output_mask[kGradWeights] ? tokens.grad_weights.to(weights.scalar_type()) : Tensor(),
          grad_table};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_coefficients_on(
    const Tensor& grad_out,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& table,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation) {
  const c10::DeviceGuard guard(x.device());
  const TokenGradients tokens =
      token_gradients_on<Device>("expert_mlp_backward_coefficients", grad_out, x, weights, indices,
                                 table, hidden, gate, activation, /*wants_grad_x=*/true);
  return {tokens.grad_x.to(x.scalar_type()), tokens.grad_weights.to(weights.scalar_type()),
          tokens.coefficients};
}

}  // namespace peer::ops
