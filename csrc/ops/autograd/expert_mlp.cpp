#include "ops/expert_mlp.h"

#include <torch/library.h>

#include "ops/autograd/expert_mlp_double_backward.h"
#include "ops/autograd/saved.h"

namespace peer::ops::autograd {

namespace {

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

std::tuple<Tensor, Tensor, Tensor> expert_mlp_autograd(c10::DispatchKeySet keys,
                                                       const Tensor& x,
                                                       const Tensor& weights,
                                                       const Tensor& indices,
                                                       const Tensor& w_down,
                                                       const Tensor& w_up,
                                                       const std::optional<Tensor>& w_gate,
                                                       std::string_view activation,
                                                       bool sparse_grad) {
  refuse_forward_mode("expert_mlp", x, weights, w_down, w_up, w_gate);
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
  refuse_forward_mode("expert_mlp_backward", grad_out, x, weights, w_down, w_up, w_gate);
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
    node->sparse_tables_ =
        sparse_grad && (output_mask[kGradDown] || output_mask[kGradUp] || output_mask[kGradGate]);
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
  return {grad_x, grad_weights, grad_down, grad_up, grad_gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("expert_mlp", expert_mlp_autograd);
  m.impl("expert_mlp_backward", expert_mlp_backward_autograd);
}

}  // namespace peer::ops::autograd
