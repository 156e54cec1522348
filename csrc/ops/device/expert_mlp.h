// expert_mlp on a device, which adds to what glue.h asks of it
//
//   forward(const Experts&, const TokenOutputs&)
//   backward(const Experts&, const TokenGradients&)
//
// the token passes, which forward_pass and backward_pass make of these. The tables' gradients are
// sums over the retrievals, which one sort serves all.
#pragma once

#include <ATen/ops/empty.h>

#include "kernels/token_pass.h"
#include "ops/device/glue.h"
#include "ops/expert_mlp.h"

namespace peer::ops {

// What the token pass reads in both directions, as the kernels want it.
struct Experts {
  Experts(Activation parsed,
          const Tensor& given_indices,
          const Tensor& given_weights,
          const Tensor& given_down,
          const Tensor& given_up,
          const std::optional<Tensor>& given_gate)
      : activation(parsed),
        indices(given_indices.contiguous()),
        weights(contiguous_as(given_weights, accumulation_type(given_down.scalar_type()))),
        w_down(with_contiguous_rows(given_down)),
        w_up(with_contiguous_rows(given_up)),
        w_gate(given_gate.has_value() ? with_contiguous_rows(*given_gate) : Tensor()) {}

  int64_t count() const { return w_down.size(0); }
  int64_t per_token() const { return indices.size(1); }
  at::ScalarType type() const { return w_down.scalar_type(); }

  template <class Table>
  Rows<const Table> gate_rows() const {
    return w_gate.defined() ? rows_of<Table>(w_gate) : Rows<const Table>{};
  }

  Activation activation;
  Tensor indices, weights, w_down, w_up;
  Tensor w_gate;  // undefined without one
};

// The token pass forward: x and out in the input dtype, the others in that of accumulation.
struct TokenOutputs {
  Tensor x;
  Tensor out, hidden;
  Tensor gate;  // empty without w_gate
};

// The gradients with respect to what belongs to tokens, and the coefficients that the tables'
// gradients are made of. grad_out and grad_x are in the input dtype, the others in that of
// accumulation.
struct TokenGradients {
  Tensor indices, grad_out, hidden;
  Tensor gate;    // undefined without w_gate
  Tensor grad_x;  // undefined where not wanted
  Tensor grad_weights, down_coefficients, up_coefficients;
  Tensor gate_coefficients;  // undefined without w_gate
};

template <class Table, class Input>
TokenForward<Table, Input> forward_pass(const Experts& experts, const TokenOutputs& tokens) {
  using Real = accumulation_t<Table>;
  return {
      .tokens = tokens.x.size(0),
      .experts = experts.count(),
      .experts_per_token = experts.per_token(),
      .dim = tokens.x.size(1),
      .dim_out = tokens.out.size(1),
      .activation = experts.activation,
      .x = const_data_of<Input>(tokens.x),
      .weights = const_data_of<Real>(experts.weights),
      .indices = experts.indices.const_data_ptr<int64_t>(),
      .w_down = rows_of<Table>(experts.w_down),
      .w_up = rows_of<Table>(experts.w_up),
      .w_gate = experts.gate_rows<Table>(),
      .out = data_of<Input>(tokens.out),
      .hidden = data_of<Real>(tokens.hidden),
      .gate = data_of<Real>(tokens.gate),
  };
}

template <class Table, class Input>
TokenBackward<Table, Input> backward_pass(const Experts& experts, const TokenGradients& tokens) {
  using Real = accumulation_t<Table>;
  return {
      .tokens = tokens.grad_out.size(0),
      .experts = experts.count(),
      .experts_per_token = experts.per_token(),
      .dim = experts.w_down.size(1),
      .dim_out = experts.w_up.size(1),
      .activation = experts.activation,
      .grad_out = const_data_of<Input>(tokens.grad_out),
      .weights = const_data_of<Real>(experts.weights),
      .indices = experts.indices.const_data_ptr<int64_t>(),
      .w_down = rows_of<Table>(experts.w_down),
      .w_up = rows_of<Table>(experts.w_up),
      .w_gate = experts.gate_rows<Table>(),
      .hidden = const_data_of<Real>(tokens.hidden),
      .gate = const_data_or_null<Real>(tokens.gate),
      .grad_x = data_or_null<Input>(tokens.grad_x),
      .grad_weights = data_of<Real>(tokens.grad_weights),
      .down_coefficients = data_of<Real>(tokens.down_coefficients),
      .gate_coefficients = data_or_null<Real>(tokens.gate_coefficients),
      .up_coefficients = data_of<Real>(tokens.up_coefficients),
  };
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> expert_mlp_on(const Tensor& x,
                                                 const Tensor& weights,
                                                 const Tensor& indices,
                                                 const Tensor& w_down,
                                                 const Tensor& w_up,
                                                 const std::optional<Tensor>& w_gate,
                                                 std::string_view activation,
                                                 bool /*sparse_grad*/) {
  const Activation parsed = check_expert_mlp(x, weights, indices, w_down, w_up, w_gate, activation);
  const c10::DeviceGuard guard(x.device());
  const Experts experts(parsed, indices, weights, w_down, w_up, w_gate);
  Device::check_index_range("expert_mlp", experts.indices, experts.count());

  const Tensor inputs = as_input<Device>(x, experts.type());
  const at::TensorOptions accumulated = experts.weights.options();
  const TokenOutputs tokens = {
      .x = inputs,
      .out = at::empty({x.size(0), w_up.size(1)}, inputs.options()),
      .hidden = at::empty(indices.sizes(), accumulated),
      .gate = w_gate.has_value() ? at::empty(indices.sizes(), accumulated)
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
                                  const Tensor& w_down,
                                  const Tensor& w_up,
                                  const std::optional<Tensor>& w_gate,
                                  const Tensor& hidden,
                                  const Tensor& gate,
                                  std::string_view activation,
                                  bool wants_grad_x) {
  const Activation parsed = check_expert_mlp_backward(op, x, weights, indices, w_down, w_up, w_gate,
                                                      hidden, gate, activation);
  check_expert_mlp_grad_out(op, grad_out, x, w_up);
  const Experts experts(parsed, indices, weights, w_down, w_up, w_gate);
  Device::check_index_range(op, experts.indices, experts.count());

  const at::TensorOptions accumulated = experts.weights.options();
  const auto coefficients = [&] { return at::empty(indices.sizes(), accumulated); };
  const Tensor incoming = as_input<Device>(grad_out, experts.type());
  const at::ScalarType type = accumulation_type(experts.type());
  const TokenGradients gradients = {
      .indices = experts.indices,
      .grad_out = incoming,
      .hidden = contiguous_as(hidden, type),
      .gate = w_gate.has_value() ? contiguous_as(gate, type) : Tensor(),
      .grad_x = wants_grad_x ? at::empty(x.sizes(), incoming.options()) : Tensor(),
      .grad_weights = coefficients(),
      .down_coefficients = coefficients(),
      .up_coefficients = coefficients(),
      .gate_coefficients = w_gate.has_value() ? coefficients() : Tensor(),
  };
  Device::backward(experts, gradients);
  return gradients;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_on(
    const Tensor& grad_out,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation,
    bool sparse_grad,
    std::array<bool, 5> output_mask) {
  const char* op = "expert_mlp_backward";
  const c10::DeviceGuard guard(x.device());
  const TokenGradients tokens =
      token_gradients_on<Device>(op, grad_out, x, weights, indices, w_down, w_up, w_gate, hidden,
                                 gate, activation, output_mask[kGradX]);
  Tensor grad_down, grad_up, grad_gate;
  const bool wants_grad_gate = output_mask[kGradGate] && w_gate.has_value();
  if (output_mask[kGradDown] || output_mask[kGradUp] || wants_grad_gate) {
    check_sortable<Device>(op, w_down, tokens.indices.numel(), w_down.size(0));
    const typename Device::TableGradient gradient(tokens.indices, w_down.size(0), sparse_grad);
    if (output_mask[kGradDown] || wants_grad_gate) {
      const Tensor inputs = as_input<Device>(x, w_down.scalar_type());
      grad_down = output_mask[kGradDown]
                      ? gradient.sum(tokens.down_coefficients, inputs, w_down.options())
                      : Tensor();
      grad_gate = wants_grad_gate
                      ? gradient.sum(tokens.gate_coefficients, inputs, w_gate->options())
                      : Tensor();
    }
    grad_up = output_mask[kGradUp]
                  ? gradient.sum(tokens.up_coefficients, tokens.grad_out, w_up.options())
                  : Tensor();
  }
  return {tokens.grad_x.defined() ? tokens.grad_x.to(x.scalar_type()) : Tensor(),
          output_mask[kGradWeights] ? tokens.grad_weights.to(weights.scalar_type()) : Tensor(),
          grad_down, grad_up, grad_gate};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_coefficients_on(
    const Tensor& grad_out,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation) {
  const c10::DeviceGuard guard(x.device());
  const TokenGradients tokens =
      token_gradients_on<Device>("expert_mlp_backward_coefficients", grad_out, x, weights, indices,
                                 w_down, w_up, w_gate, hidden, gate, activation,
                                 /*wants_grad_x=*/true);
  return {tokens.grad_x.to(x.scalar_type()), tokens.grad_weights.to(weights.scalar_type()),
          tokens.down_coefficients, tokens.up_coefficients,
          w_gate.has_value() ? tokens.gate_coefficients
                             : at::empty({0}, tokens.grad_weights.options())};
}

}  // namespace peer::ops
