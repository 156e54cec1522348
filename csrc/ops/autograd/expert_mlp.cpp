#include "ops/expert_mlp.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/expert_mlp_derivative.h"
#include "ops/autograd/saved.h"
#include "ops/autograd/tangents.h"

namespace peer::ops::autograd {

namespace {

bool has_sparse_tables(bool sparse_grad, const std::array<bool, 5>& output_mask) {
  return sparse_grad && (output_mask[kGradDown] || output_mask[kGradUp] || output_mask[kGradGate]);
}

struct ExpertMlpDoubleBackward : SavingNode {
  SavedVariable grad_out_, x_, weights_, indices_, w_down_, w_up_, w_gate_;
  std::string activation_;
  bool sparse_tables_ = false;

  std::string name() const override { return "PeerExpertMlpDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_out_, &x_, &weights_, &indices_, &w_down_, &w_up_, &w_gate_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_tables_);
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !sparse_tables_,
        "peer::expert_mlp: double backward is not implemented for sparse table gradients; use "
        "sparse_grad=False");
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(6);
    }
    const ExpertMlpVariables point = {
        .grad_out = grad_out_.unpack(),
        .x = x_.unpack(),
        .weights = weights_.unpack(),
        .w_down = w_down_.unpack(),
        .w_up = w_up_.unpack(),
        .w_gate = w_gate_.unpack(),
    };
    const ExpertMlpVariables direction = {
        .grad_out = Tensor(),
        .x = grads[kGradX],
        .weights = grads[kGradWeights],
        .w_down = grads[kGradDown],
        .w_up = grads[kGradUp],
        .w_gate = grads[kGradGate],
    };
    const auto derivative = differentiate_expert_mlp(point, direction, indices_.unpack(),
                                                     activation_, wanted_outputs<6>());
    return {derivative.begin(), derivative.end()};
  }
};

struct ExpertMlpBackwardNode : SavingNode {
  SavedVariable x_, weights_, indices_, w_down_, w_up_, w_gate_, hidden_, gate_;
  std::string activation_;
  bool sparse_grad_ = false;

  std::string name() const override { return "PeerExpertMlpBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&x_, &weights_, &indices_, &w_down_, &w_up_, &w_gate_, &hidden_, &gate_};
  }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_grad_);
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(5);
    }
    const Tensor w_gate = w_gate_.unpack();
    auto [grad_x, grad_weights, grad_down, grad_up, grad_gate] = expert_mlp_backward(
        grads[0], x_.unpack(), weights_.unpack(), indices_.unpack(), w_down_.unpack(),
        w_up_.unpack(), w_gate.defined() ? std::optional<Tensor>(w_gate) : std::nullopt,
        hidden_.unpack(), gate_.unpack(), activation_, sparse_grad_, wanted_outputs<5>());
    return {grad_x, grad_weights, grad_down, grad_up, grad_gate};
  }
};

// The pre-activations, hidden and gate, have neither a history nor a tangent: they are what the
// backward operator needs beside the inputs, and all derivatives are taken by the inputs.
std::tuple<Tensor, Tensor, Tensor> expert_mlp_autograd(c10::DispatchKeySet keys,
                                                       const Tensor& x,
                                                       const Tensor& weights,
                                                       const Tensor& indices,
                                                       const Tensor& w_down,
                                                       const Tensor& w_up,
                                                       const std::optional<Tensor>& w_gate,
                                                       std::string_view activation,
                                                       bool sparse_grad) {
  NodePtr<ExpertMlpBackwardNode> node;
  if (torch::autograd::compute_requires_grad(x, weights, w_down, w_up, w_gate)) {
    node = make_node<ExpertMlpBackwardNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, weights, w_down, w_up, w_gate));
    node->x_ = SavedVariable(x, false);
    node->weights_ = SavedVariable(weights, false);
    node->indices_ = SavedVariable(indices, false);
    node->w_down_ = SavedVariable(w_down, false);
    node->w_up_ = SavedVariable(w_up, false);
    node->w_gate_ = SavedVariable(w_gate, false);
    node->activation_ = activation;
    node->sparse_grad_ = sparse_grad;
  }
  auto [out, hidden, gate] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_expert_mlp(keys & c10::after_autograd_keyset, x, weights, indices, w_down,
                                 w_up, w_gate, activation, sparse_grad);
  }();
  if (node) {
    torch::autograd::set_history(out, node);
    node->hidden_ = SavedVariable(hidden, false);
    node->gate_ = SavedVariable(gate, false);
  }
  if (any_has_tangent(x, weights, w_down, w_up, w_gate)) {
    const auto derivative = differentiate_expert_mlp(
        primals_of<ExpertMlpVariables>(Tensor(), x, weights, w_down, w_up, w_gate),
        tangents_of<ExpertMlpVariables>(Tensor(), x, weights, w_down, w_up, w_gate), indices,
        activation, {true});
    set_tangent(out, derivative[kOut]);
  }
  return {out, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_autograd(
    c10::DispatchKeySet keys,
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
  const bool is_dual = any_has_tangent(grad_out, x, weights, w_down, w_up, w_gate);
  const bool sparse_tables = has_sparse_tables(sparse_grad, output_mask);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !is_dual || !sparse_tables,
      "peer::expert_mlp: forward-mode AD of the backward pass is not implemented for sparse table "
      "gradients; use sparse_grad=False");
  NodePtr<ExpertMlpDoubleBackward> node;
  if (torch::autograd::compute_requires_grad(grad_out, x, weights, w_down, w_up, w_gate)) {
    node = make_node<ExpertMlpDoubleBackward>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(grad_out, x, weights, w_down, w_up, w_gate));
    node->grad_out_ = SavedVariable(grad_out, false);
    node->x_ = SavedVariable(x, false);
    node->weights_ = SavedVariable(weights, false);
    node->indices_ = SavedVariable(indices, false);
    node->w_down_ = SavedVariable(w_down, false);
    node->w_up_ = SavedVariable(w_up, false);
    node->w_gate_ = SavedVariable(w_gate, false);
    node->activation_ = activation;
    node->sparse_tables_ = sparse_tables;
  }
  auto [grad_x, grad_weights, grad_down, grad_up, grad_gate] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_expert_mlp_backward(keys & c10::after_autograd_keyset, grad_out, x, weights,
                                          indices, w_down, w_up, w_gate, hidden, gate, activation,
                                          sparse_grad, output_mask);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_x, grad_weights, grad_down, grad_up, grad_gate},
                                 node);
  }
  if (is_dual) {
    const auto derivative = differentiate_expert_mlp(
        primals_of<ExpertMlpVariables>(grad_out, x, weights, w_down, w_up, w_gate),
        tangents_of<ExpertMlpVariables>(grad_out, x, weights, w_down, w_up, w_gate), indices,
        activation,
        {false, output_mask[kGradX], output_mask[kGradWeights], output_mask[kGradDown],
         output_mask[kGradUp], output_mask[kGradGate]});
    set_tangent(grad_x, derivative[kOfX]);
    set_tangent(grad_weights, derivative[kOfWeights]);
    set_tangent(grad_down, derivative[kOfDown]);
    set_tangent(grad_up, derivative[kOfUp]);
    set_tangent(grad_gate, derivative[kOfGate]);
  }
  return {grad_x, grad_weights, grad_down, grad_up, grad_gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("expert_mlp", expert_mlp_autograd);
  m.impl("expert_mlp_backward", expert_mlp_backward_autograd);
}

}  // namespace peer::ops::autograd
