#include "ops/expert_mlp.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/expert_mlp_derivative.h"
#include "ops/autograd/saved.h"
#include "ops/autograd/tangents.h"
#include "ops/autograd/undefined_as_zero.h"
#include "ops/checks.h"

namespace peer::ops::autograd {

namespace {

struct ExpertMlpDoubleBackward : SavingNode {
  SavedVariable grad_out_, x_, weights_, indices_, table_, frozen_;
  std::string activation_;
  bool is_table_sparse_ = false;

  std::string name() const override { return "PeerExpertMlpDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_out_, &x_, &weights_, &indices_, &table_, &frozen_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(is_table_sparse_);
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !is_table_sparse_,
        "peer::expert_mlp: double backward is not implemented for sparse table gradients; use "
        "sparse_grad=False");
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(4);
    }
    const ExpertMlpVariables point = {
        .grad_out = grad_out_.unpack(),
        .x = x_.unpack(),
        .weights = weights_.unpack(),
        .table = table_.unpack(),
    };
    const ExpertMlpVariables direction = {
        .grad_out = Tensor(),
        .x = grads[kGradX],
        .weights = grads[kGradWeights],
        .table = grads[kGradTable],
    };
    const auto derivative = differentiate_expert_mlp(
        point, direction, indices_.unpack(), activation_, frozen_.unpack(), wanted_outputs<4>());
    return {derivative.begin(), derivative.end()};
  }
};

// Torch adds sparse gradients of every dtype but float16, and its error does not name the way out.
// A warning does, because only torch knows whether it will add the gradient or return it.
void warn_of_float16_sum(const Tensor& table) {
  if (table.scalar_type() == at::kHalf && table.is_leaf() && table.grad().defined() &&
      table.grad().is_sparse()) {
    TORCH_WARN(
        "peer::expert_mlp: the table already has a sparse float16 gradient, and torch cannot add "
        "another one (\"cadd_sparse\" not implemented for 'Half'); set "
        "table.grad_dtype = torch.float32 for gradients that can be added");
  }
}

struct ExpertMlpBackwardNode : SavingNode {
  SavedVariable x_, weights_, indices_, table_, frozen_, hidden_, gate_;
  std::string activation_;
  bool sparse_grad_ = false;
  std::optional<at::ScalarType> grad_table_dtype_;

  std::string name() const override { return "PeerExpertMlpBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&x_, &weights_, &indices_, &table_, &frozen_, &hidden_, &gate_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_grad_);
    args.collect(grad_table_dtype_);
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(3);
    }
    const Tensor table = table_.unpack();
    if (sparse_grad_ && wanted_outputs<3>()[kGradTable] && !grad_table_dtype_.has_value()) {
      warn_of_float16_sum(table);
    }
    auto [grad_x, grad_weights, grad_table] = ExpertMlpBackwardOp::call(
        grads[0], x_.unpack(), weights_.unpack(), indices_.unpack(), table, hidden_.unpack(),
        gate_.unpack(), activation_, sparse_grad_, wanted_outputs<3>(), frozen_.unpack(),
        grad_table_dtype_);
    return {grad_x, grad_weights, grad_table};
  }
};

// An undefined tensor if there is no mask.
Tensor mask_of(const std::optional<Tensor>& frozen) {
  return is_given(frozen) ? *frozen : Tensor();
}

// The node keeps a copy of the mask, because masks are buffers, which may be written in place
// before the backward pass: data parallelism writes them before every forward pass.
//
// hidden and gate, the pre-activations, have neither a history nor a tangent. The backward operator
// needs them beside the inputs, and all derivatives are taken with respect to the inputs.
ThreeTensors expert_mlp_autograd(c10::DispatchKeySet keys, const ExpertMlpArguments& args) {
  const auto& [x, weights, indices, table, activation, sparse_grad, frozen] = args;
  const auto node = make_node_if_required<ExpertMlpBackwardNode>(x, weights, table);
  if (node) {
    node->x_ = save(x);
    node->weights_ = save(weights);
    node->indices_ = save(indices);
    node->table_ = save(table);
    node->activation_ = activation;
    node->sparse_grad_ = sparse_grad;
    node->grad_table_dtype_ = requested_grad_dtype(table);
    if (is_given(frozen)) {
      node->frozen_ = save(frozen->clone());
    }
  }
  auto [out, hidden, gate] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ExpertMlpOp::redispatch(keys & c10::after_autograd_keyset, args.x, args.weights,
                                   args.indices, args.table, args.activation, args.sparse_grad,
                                   args.frozen);
  }();
  if (node) {
    torch::autograd::set_history(out, node);
    node->hidden_ = save(hidden);
    node->gate_ = save(gate);
  }
  if (any_has_tangent(x, weights, table)) {
    const auto derivative =
        differentiate_expert_mlp(primals_of<ExpertMlpVariables>(Tensor(), x, weights, table),
                                 tangents_of<ExpertMlpVariables>(Tensor(), x, weights, table),
                                 indices, activation, mask_of(frozen), {true});
    set_tangent(out, derivative[kOut]);
  }
  return {out, hidden, gate};
}

ThreeTensors expert_mlp_backward_autograd(c10::DispatchKeySet keys,
                                          const ExpertMlpBackwardArguments& args) {
  const Tensor &grad_out = args.grad_out, &x = args.x, &weights = args.weights, &table = args.table;
  const auto& output_mask = args.output_mask;
  const bool is_dual = any_has_tangent(grad_out, x, weights, table);
  const bool is_table_sparse = args.sparse_grad && output_mask[kGradTable];
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_dual || !is_table_sparse,
      "peer::expert_mlp: forward-mode AD of the backward pass is not implemented for sparse table "
      "gradients; use sparse_grad=False");
  const auto node = make_node_if_required<ExpertMlpDoubleBackward>(grad_out, x, weights, table);
  if (node) {
    node->grad_out_ = save(grad_out);
    node->x_ = save(x);
    node->weights_ = save(weights);
    node->indices_ = save(args.indices);
    node->table_ = save(table);
    node->frozen_ = save(mask_of(args.frozen));
    node->activation_ = args.activation;
    node->is_table_sparse_ = is_table_sparse;
  }
  auto [grad_x, grad_weights, grad_table] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ExpertMlpBackwardOp::redispatch(keys & c10::after_autograd_keyset, grad_out, x, weights,
                                           args.indices, table, args.hidden, args.gate,
                                           args.activation, args.sparse_grad, output_mask,
                                           args.frozen, args.grad_table_dtype);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_x, grad_weights, grad_table}, node);
  }
  if (is_dual) {
    const auto derivative = differentiate_expert_mlp(
        primals_of<ExpertMlpVariables>(grad_out, x, weights, table),
        tangents_of<ExpertMlpVariables>(grad_out, x, weights, table), args.indices, args.activation,
        mask_of(args.frozen),
        {false, output_mask[kGradX], output_mask[kGradWeights], output_mask[kGradTable]});
    set_tangent(grad_x, derivative[kOfX]);
    set_tangent(grad_weights, derivative[kOfWeights]);
    set_tangent(grad_table, to_type(derivative[kOfTable], grad_table_type(args)));
  }
  return {grad_x, grad_weights, grad_table};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("expert_mlp", ExpertMlpOp::wrapper<expert_mlp_autograd>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::wrapper<expert_mlp_backward_autograd>);
}

}  // namespace peer::ops::autograd
