// expert_mlp on a device. Besides what common.h lists, a device has
//
//   forward(const Experts&, const TokenOutputs&)
//   backward(const Experts&, const TokenGradients&)
//   backward_and_sum(const Experts&, const TokenGradients&, gradient, sources, like)
//
// The last is `backward` and then gradient.sum of its coefficients. A device may do both at once.
// They convert their arguments with forward_arguments and backward_arguments and call the kernels.
// The table's gradient is a sum over retrievals for each part of a row; one sort serves all parts.
#pragma once

#include <ATen/ops/empty.h>

#include "kernels/expert_mlp.h"
#include "ops/device/common.h"
#include "ops/expert_mlp.h"

namespace peer::ops {

// What the kernels read forward and backward, in the dtypes and layouts that they take.
struct Experts {
  Experts(Activation activation, const ExpertMlpInputs& inputs)
      : activation(activation),
        indices(inputs.indices.contiguous()),
        weights(contiguous_as(inputs.weights, accumulation_type(inputs.table.scalar_type()))),
        table(with_contiguous_columns(inputs.table)),
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

// Forward: x and out in the input dtype, the others in the accumulation dtype.
struct TokenOutputs {
  Tensor x;
  Tensor out, hidden;
  Tensor gate;  // empty without gates
};

// Backward: the gradients of x and weights, and the coefficients of the table's gradient, (parts,
// T, P) in the order of the table's parts. grad_out and grad_x are in the input dtype, the others
// in the accumulation dtype.
struct TokenGradients {
  Tensor indices, grad_out, hidden;
  Tensor gate;    // undefined without gates
  Tensor grad_x;  // undefined if not wanted
  Tensor grad_weights, coefficients;

  template <class Real>
  Real* coefficients_of_part(int64_t part) const {
    return data_of<Real>(coefficients) + part * indices.numel();
  }
};

template <class Table, class Input>
ExpertMlpForward<Table, Input> forward_arguments(const Experts& experts,
                                                 const TokenOutputs& tokens) {
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
ExpertMlpBackward<Table, Input> backward_arguments(const Experts& experts,
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
ThreeTensors expert_mlp_on(const ExpertMlpArguments& args) {
  const Activation activation = check_expert_mlp(args);
  const c10::DeviceGuard guard(args.x.device());
  const Experts experts(activation, args);
  Device::check_index_range(args.kName, experts.indices, experts.count());

  const Tensor inputs = as_input<Device>(args.x, experts.type());
  const at::TensorOptions accumulated = experts.weights.options();
  const TokenOutputs tokens = {
      .x = inputs,
      .out = at::empty(args.x.sizes(), inputs.options()),
      .hidden = at::empty(args.indices.sizes(), accumulated),
      .gate = experts.have_gates() ? at::empty(args.indices.sizes(), accumulated)
                                   : at::empty({0}, accumulated),
  };
  Device::forward(experts, tokens);
  return {tokens.out.to(args.x.scalar_type()), tokens.hidden, tokens.gate};
}

// The arguments of both functions: of expert_mlp_backward, or of a fused update.

template <class Device, class Arguments>
Experts check_experts_on(const Arguments& args) {
  const Activation activation = check_expert_mlp_backward(args, args.hidden, args.gate);
  check_expert_mlp_grad_out(args.kName, args.grad_out, args.x);
  const Experts experts(activation, args);
  Device::check_index_range(args.kName, experts.indices, experts.count());
  return experts;
}

template <class Device, class Arguments>
TokenGradients allocate_token_gradients(const Arguments& args,
                                        const Experts& experts,
                                        bool wants_grad_x) {
  const Tensor& indices = experts.indices;
  const at::TensorOptions accumulated = experts.weights.options();
  const Tensor incoming = as_input<Device>(args.grad_out, experts.type());
  const at::ScalarType type = accumulation_type(experts.type());
  return {
      .indices = indices,
      .grad_out = incoming,
      .hidden = contiguous_as(args.hidden, type),
      .gate = experts.have_gates() ? contiguous_as(args.gate, type) : Tensor(),
      .grad_x = wants_grad_x ? at::empty(args.x.sizes(), incoming.options()) : Tensor(),
      .grad_weights = at::empty(indices.sizes(), accumulated),
      .coefficients =
          at::empty({args.table.size(1), indices.size(0), indices.size(1)}, accumulated),
  };
}

template <class Device>
ThreeTensors expert_mlp_backward_on(const ExpertMlpBackwardArguments& args) {
  const c10::DeviceGuard guard(args.x.device());
  const Tensor& table = args.table;
  const Experts experts = check_experts_on<Device>(args);
  const at::ScalarType grad_type = grad_table_type(args);
  // The retrievals are sorted first. A device that knows the size of a sparse gradient before the
  // host does then tells it while it works on the tokens.
  std::optional<typename Device::TableGradient> gradient;
  if (args.output_mask[kGradTable]) {
    check_sortable<Device>(args.kName, table, experts.indices.numel(), table.size(0));
    gradient.emplace(experts.indices, table.size(0), args.sparse_grad,
                     contiguous_mask(args.frozen));
  }
  const TokenGradients tokens =
      allocate_token_gradients<Device>(args, experts, args.output_mask[kGradX]);
  Tensor grad_table;
  if (gradient.has_value()) {
    std::vector<Tensor> sources(table.size(1), as_input<Device>(args.x, grad_type));
    sources.back() = as_input<Device>(tokens.grad_out, grad_type);
    grad_table = Device::backward_and_sum(experts, tokens, *gradient, sources,
                                          table.options().dtype(grad_type));
  } else {
    Device::backward(experts, tokens);
  }
  return {tokens.grad_x.defined() ? tokens.grad_x.to(args.x.scalar_type()) : Tensor(),
          args.output_mask[kGradWeights] ? tokens.grad_weights.to(args.weights.scalar_type())
                                         : Tensor(),
          grad_table};
}

}  // namespace peer::ops
