#include "ops/expert_mlp.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd/saved.h"
#include "ops/checks.h"

namespace peer::ops::autograd {

namespace {

// ---- Double backward -------------------------------------------------------------------------------------------------------------------
//
// The backward operator gives the gradient of L = <grad_out, out>. Pulling cotangents (x', w', down', up', gate') of that gradient back
// is differentiating the derivative of L in the direction (x', w', down', up', gate'). Per pair of a token and an expert, with
//
//   z = <x, down>,   q = <x, gate> or 1,   s = <grad_out, up>                    (the values)
//   ż = <x', down> + <x, down'>,   q̇ likewise,   ṡ = <grad_out, up'>,   ẇ = w'  (their derivatives in the direction)
//
// that derivative is  Σ ẇ·a(z)·q·s + w·a'(z)·ż·q·s + w·a(z)·q̇·s + w·a(z)·q·ṡ,  and its partial derivatives with respect to w, s, ṡ, z, ż,
// q, q̇ are the coefficients below. Written in differentiable ATen operators, so that derivatives of any order follow. It gathers the
// retrieved rows, (T, P, D): the one place that does.
//
// An undefined tensor stands for zero.

Tensor plus(const Tensor& a, const Tensor& b) {
  if (!a.defined()) {
    return b;
  }
  return b.defined() ? a + b : a;
}

Tensor times(const Tensor& a, const Tensor& b) {
  return a.defined() && b.defined() ? a * b : Tensor();
}

struct ActivationValues {
  Tensor value, first, second;  // a(z), a'(z), a''(z)
};

ActivationValues differentiate(Activation activation, const Tensor& z) {
  switch (activation) {
    case Activation::gelu: {
      const Tensor cdf = 0.5 * (1 + at::erf(z * 0.70710678118654752440));
      const Tensor pdf = 0.39894228040143267794 * at::exp(-0.5 * z * z);
      return {z * cdf, cdf + z * pdf, pdf * (2 - z * z)};
    }
    case Activation::gelu_tanh: {
      const double root = 0.79788456080286535588;
      const Tensor t = at::tanh(root * (z + 0.044715 * z * z * z));
      const Tensor inner_first = root * (1 + 0.134145 * z * z);
      const Tensor inner_second = root * 0.26829 * z;
      const Tensor t_first = (1 - t * t) * inner_first;
      const Tensor t_second = (1 - t * t) * (inner_second - 2 * t * inner_first * inner_first);
      return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * t_first, t_first + 0.5 * z * t_second};
    }
    case Activation::relu: {
      const Tensor is_positive = (z > 0).to(z.scalar_type());
      return {at::relu(z), is_positive, Tensor()};
    }
    case Activation::silu: {
      const Tensor s = at::sigmoid(z);
      const Tensor s_first = s * (1 - s);
      return {z * s, s + z * s_first, s_first * (2 + z * (1 - 2 * s))};
    }
    case Activation::identity:
      return {z, at::ones_like(z), Tensor()};
    case Activation::relu2: {
      const Tensor positive = at::relu(z);
      return {positive * positive, 2 * positive, 2 * (z > 0).to(z.scalar_type())};
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The pairs of tokens and experts, and the three ways in which vectors and table rows meet in them.
class Pairs {
 public:
  Pairs(const Tensor& indices, at::ScalarType type)
      : tokens_(indices.sym_size(0)), experts_(indices.sym_size(1)), flat_(indices.reshape(-1)), type_(type) {}

  Tensor rows(const Tensor& table) const {
    if (!table.defined()) {
      return Tensor();
    }
    return table.index_select(0, flat_).reshape_symint({tokens_, experts_, table.sym_size(1)}).to(type_);
  }

  // (T, D) with (T, P, D) -> (T, P)
  Tensor dot(const Tensor& vectors, const Tensor& rows) const {
    return vectors.defined() && rows.defined() ? (rows * vectors.to(type_).unsqueeze(1)).sum(-1) : Tensor();
  }

  // (T, P) with (T, P, D) -> (T, D)
  Tensor combine(const Tensor& coefficients, const Tensor& rows) const {
    return coefficients.defined() && rows.defined() ? (coefficients.unsqueeze(-1) * rows).sum(1) : Tensor();
  }

  // (T, P) with (T, D) -> (N, D)
  Tensor scatter(const Tensor& coefficients, const Tensor& vectors, const Tensor& table) const {
    if (!coefficients.defined() || !vectors.defined()) {
      return Tensor();
    }
    const Tensor outer = (coefficients.unsqueeze(-1) * vectors.to(type_).unsqueeze(1)).reshape_symint({-1, vectors.sym_size(1)});
    return at::zeros_symint(table.sym_sizes(), table.options().dtype(type_)).index_add(0, flat_, outer);
  }

 private:
  c10::SymInt tokens_, experts_;
  Tensor flat_;
  at::ScalarType type_;
};

struct ExpertMlpDoubleBackward : SavingNode {
  SavedVariable grad_out_, x_, weights_, indices_, w_down_, w_up_, w_gate_;
  std::string activation_;
  bool sparse_tables_ = false;

  std::string name() const override { return "PeerExpertMlpDoubleBackward"; }
  std::vector<SavedVariable*> saved() override { return {&grad_out_, &x_, &weights_, &indices_, &w_down_, &w_up_, &w_gate_}; }
  void collect_arguments(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(sparse_tables_);
  }

  variable_list apply(variable_list&& directions) override {
    const auto [x_dot, w_dot, down_dot, up_dot, gate_dot] =
        std::tie(directions[kGradX], directions[kGradWeights], directions[kGradDown], directions[kGradUp], directions[kGradGate]);
    TORCH_CHECK_NOT_IMPLEMENTED(!sparse_tables_, "peer::expert_mlp: double backward is not implemented for sparse table gradients; use "
                                                 "sparse_grad=False");
    variable_list grads(6);
    if (!x_dot.defined() && !w_dot.defined() && !down_dot.defined() && !up_dot.defined() && !gate_dot.defined()) {
      return grads;
    }
    const Tensor grad_out = grad_out_.unpack(), x = x_.unpack(), weights = weights_.unpack(), indices = indices_.unpack(),
                 w_down = w_down_.unpack(), w_up = w_up_.unpack(), w_gate = w_gate_.unpack();
    const at::ScalarType type = accumulation_type(w_down.scalar_type());
    const Tensor w = weights.to(type);
    const Tensor w_direction = w_dot.defined() ? w_dot.to(type) : Tensor();
    const Pairs pairs(indices, type);
    const Tensor down = pairs.rows(w_down), up = pairs.rows(w_up), gate = pairs.rows(w_gate);
    const Tensor down_direction = pairs.rows(down_dot), up_direction = pairs.rows(up_dot), gate_direction = pairs.rows(gate_dot);

    const Tensor z = pairs.dot(x, down);
    const Tensor q = w_gate.defined() ? pairs.dot(x, gate) : at::ones_like(z);
    const Tensor s = pairs.dot(grad_out, up);
    const Tensor z_dot = plus(pairs.dot(x_dot, down), pairs.dot(x, down_direction));
    const Tensor q_dot = plus(pairs.dot(x_dot, gate), pairs.dot(x, gate_direction));
    const Tensor s_dot = pairs.dot(grad_out, up_direction);
    const auto [a, a1, a2] = differentiate(check_expert_mlp(x, weights, indices, w_down, w_up,
                                                            w_gate.defined() ? std::optional<Tensor>(w_gate) : std::nullopt, activation_),
                                           z);

    const Tensor of_weights = plus(plus(times(a1 * q * s, z_dot), times(a * s, q_dot)), times(a * q, s_dot));
    const Tensor of_s = plus(plus(times(a * q, w_direction), times(w * a1 * q, z_dot)), times(w * a, q_dot));
    const Tensor of_s_dot = w * a * q;
    const Tensor of_z = plus(plus(times(a1 * q * s, w_direction), times(times(w * q * s, a2), z_dot)),
                             plus(times(w * a1 * s, q_dot), times(w * a1 * q, s_dot)));
    const Tensor of_z_dot = w * a1 * q * s;
    const Tensor of_q = plus(plus(times(a * s, w_direction), times(w * a1 * s, z_dot)), times(w * a, s_dot));
    const Tensor of_q_dot = w * a * s;

    const auto as_input = [](const Tensor& grad, const Tensor& input) { return grad.defined() ? grad.to(input.scalar_type()) : grad; };
    if (task_should_compute_output(0)) {
      grads[0] = as_input(plus(pairs.combine(of_s, up), pairs.combine(of_s_dot, up_direction)), grad_out);
    }
    if (task_should_compute_output(1)) {
      grads[1] = as_input(plus(plus(pairs.combine(of_z, down), pairs.combine(of_z_dot, down_direction)),
                               plus(pairs.combine(of_q, gate), pairs.combine(of_q_dot, gate_direction))),
                          x);
    }
    if (task_should_compute_output(2)) {
      grads[2] = as_input(of_weights, weights);
    }
    if (task_should_compute_output(3)) {
      grads[3] = as_input(plus(pairs.scatter(of_z, x, w_down), pairs.scatter(of_z_dot, x_dot, w_down)), w_down);
    }
    if (task_should_compute_output(4)) {
      grads[4] = as_input(pairs.scatter(of_s, grad_out, w_up), w_up);
    }
    if (w_gate.defined() && task_should_compute_output(5)) {
      grads[5] = as_input(plus(pairs.scatter(of_q, x, w_gate), pairs.scatter(of_q_dot, x_dot, w_gate)), w_gate);
    }
    return grads;
  }
};

// ---- Backward --------------------------------------------------------------------------------------------------------------------------

struct ExpertMlpBackwardNode : SavingNode {
  SavedVariable x_, weights_, indices_, w_down_, w_up_, w_gate_, hidden_, gate_;
  std::string activation_;
  bool sparse_grad_ = false;

  std::string name() const override { return "PeerExpertMlpBackward"; }
  std::vector<SavedVariable*> saved() override { return {&x_, &weights_, &indices_, &w_down_, &w_up_, &w_gate_, &hidden_, &gate_}; }
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
        grads[0], x_.unpack(), weights_.unpack(), indices_.unpack(), w_down_.unpack(), w_up_.unpack(),
        w_gate.defined() ? std::optional<Tensor>(w_gate) : std::nullopt, hidden_.unpack(), gate_.unpack(), activation_, sparse_grad_,
        wanted_outputs<5>());
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
    return redispatch_expert_mlp(keys & c10::after_autograd_keyset, x, weights, indices, w_down, w_up, w_gate, activation, sparse_grad);
  }();
  if (node) {
    torch::autograd::set_history(out, node);
    node->hidden_ = SavedVariable(hidden, false);
    node->gate_ = SavedVariable(gate, false);
  }
  return {out, hidden, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_autograd(c10::DispatchKeySet keys,
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
    node->set_next_edges(torch::autograd::collect_next_edges(grad_out, x, weights, w_down, w_up, w_gate));
    node->grad_out_ = SavedVariable(grad_out, false);
    node->x_ = SavedVariable(x, false);
    node->weights_ = SavedVariable(weights, false);
    node->indices_ = SavedVariable(indices, false);
    node->w_down_ = SavedVariable(w_down, false);
    node->w_up_ = SavedVariable(w_up, false);
    node->w_gate_ = SavedVariable(w_gate, false);
    node->activation_ = activation;
    node->sparse_tables_ = sparse_grad && (output_mask[kGradDown] || output_mask[kGradUp] || output_mask[kGradGate]);
  }
  auto [grad_x, grad_weights, grad_down, grad_up, grad_gate] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_expert_mlp_backward(keys & c10::after_autograd_keyset, grad_out, x, weights, indices, w_down, w_up, w_gate, hidden, gate,
                                          activation, sparse_grad, output_mask);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_x, grad_weights, grad_down, grad_up, grad_gate}, node);
  }
  return {grad_x, grad_weights, grad_down, grad_up, grad_gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("expert_mlp", expert_mlp_autograd);
  m.impl("expert_mlp_backward", expert_mlp_backward_autograd);
}

}  // namespace peer::ops::autograd
