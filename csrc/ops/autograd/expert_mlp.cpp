#include "ops/expert_mlp.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/expert_mlp_derivative.h"
#include "ops/autograd/saved.h"
#include "ops/autograd/tangents.h"

namespace peer::ops::autograd {

namespace {

struct ExpertMlpDoubleBackward : SavingNode {
  SavedVariable grad_out_, x_, weights_, indices_, table_;
  std::string activation_;
  bool is_table_sparse_ = false;

  std::string name() const override { return "PeerExpertMlpDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_out_, &x_, &weights_, &indices_, &table_};
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
    const auto derivative = differentiate_expert_mlp(point, direction, indices_.unpack(),
                                                     activation_, wanted_outputs<4>());
    return {derivative.begin(), derivative.end()};
  }
};

struct ExpertMlpBackwardNode : SavingNode {
  SavedVariable x_, weights_, indices_, table_, hidden_, gate_;
  std::string activation_;
  bool sparse_grad_ = false;

  std::string name() const override { return "PeerExpertMlpBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&x_, &weights_, &indices_, &table_, &hidden_, &gate_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_grad_);
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(3);
    }
    auto [grad_x, grad_weights, grad_table] = expert_mlp_backward(
        grads[0], x_.unpack(), weights_.unpack(), indices_.unpack(), table_.unpack(),
        hidden_.unpack(), gate_.unpack(), activation_, sparse_grad_, wanted_outputs<3>());
    return {grad_x, grad_weights, grad_table};
  }
};

// The pre-activations, hidden and gate, have neither a history nor a tangent: they are what the
// backward operator needs beside the inputs, and all derivatives are taken by the inputs.
std::tuple<Tensor, Tensor, Tensor> expert_mlp_autograd(c10::DispatchKeySet keys,
                                                       const Tensor& x,
                                                       const Tensor& weights,
                                                       const Tensor& indices,
                                                       const Tensor& table,
                                                       std::string_view activation,
                                                       bool sparse_grad) {
  NodePtr<ExpertMlpBackwardNode> node;
  if (torch::autograd::compute_requires_grad(x, weights, table)) {
    node = make_node<ExpertMlpBackwardNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, weights, table));
    node->x_ = SavedVariable(x, false);
    node->weights_ = SavedVariable(weights, false);
    node->indices_ = SavedVariable(indices, false);
    node->table_ = SavedVariable(table, false);
    node->activation_ = activation;
    node->sparse_grad_ = sparse_grad;
  }
  auto [out, hidden, gate] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_expert_mlp(keys & c10::after_autograd_keyset, x, weights, indices, table,
                                 activation, sparse_grad);
  }();
  if (node) {
    torch::autograd::set_history(out, node);
    node->hidden_ = SavedVariable(hidden, false);
    node->gate_ = SavedVariable(gate, false);
  }
  if (any_has_tangent(x, weights, table)) {
    const auto derivative = differentiate_expert_mlp(
        primals_of<ExpertMlpVariables>(Tensor(), x, weights, table),
        tangents_of<ExpertMlpVariables>(Tensor(), x, weights, table), indices, activation, {true});
    set_tangent(out, derivative[kOut]);
  }
  return {out, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_autograd(c10::DispatchKeySet keys,
                                                                const Tensor& grad_out,
                                                                const Tensor& x,
                                                                const Tensor& weights,
                                                                const Tensor& indices,
                                                                const Tensor& table,
                                                                const Tensor& hidden,
                                                                const Tensor& gate,
                                                                std::string_view activation,
                                                                bool sparse_grad,
                                                                std::array<bool, 3> output_mask) {
  const bool is_dual = any_has_tangent(grad_out, x, weights, table);
  const bool is_table_sparse = sparse_grad && output_mask[kGradTable];
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_dual || !is_table_sparse,
      "peer::expert_mlp: forward-mode AD of the backward pass is not implemented for sparse table "
      "gradients; use sparse_grad=False");
  NodePtr<ExpertMlpDoubleBackward> node;
  if (torch::autograd::compute_requires_grad(grad_out, x, weights, table)) {
    node = make_node<ExpertMlpDoubleBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad_out, x, weights, table));
    node->grad_out_ = SavedVariable(grad_out, false);
    node->x_ = SavedVariable(x, false);
    node->weights_ = SavedVariable(weights, false);
    node->indices_ = SavedVariable(indices, false);
    node->table_ = SavedVariable(table, false);
    node->activation_ = activation;
    node->is_table_sparse_ = is_table_sparse;
  }
  auto [grad_x, grad_weights, grad_table] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_expert_mlp_backward(keys & c10::after_autograd_keyset, grad_out, x, weights,
                                          indices, table, hidden, gate, activation, sparse_grad,
                                          output_mask);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_x, grad_weights, grad_table}, node);
  }
  if (is_dual) {
    const auto derivative = differentiate_expert_mlp(
        primals_of<ExpertMlpVariables>(grad_out, x, weights, table),
        tangents_of<ExpertMlpVariables>(grad_out, x, weights, table), indices, activation,
        {false, output_mask[kGradX], output_mask[kGradWeights], output_mask[kGradTable]});
    set_tangent(grad_x, derivative[kOfX]);
    set_tangent(grad_weights, derivative[kOfWeights]);
    set_tangent(grad_table, derivative[kOfTable]);
  }
  return {grad_x, grad_weights, grad_table};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("expert_mlp", expert_mlp_autograd);
  m.impl("expert_mlp_backward", expert_mlp_backward_autograd);
}

}  // namespace peer::ops::autograd
