#include "ops/fused_update.h"

#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def(
      "expert_mlp_backward_rowwise_adagrad_(Tensor grad_out, Tensor x, Tensor weights, Tensor "
      "indices, Tensor(a!) table, Tensor hidden, Tensor gate, str activation, Tensor(b!) "
      "sum_of_squares, float lr, float eps, float weight_decay, int? seed=None, int step=0, int "
      "stream=0, Tensor? frozen=None) -> (Tensor grad_x, Tensor grad_weights)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward_sgd_(Tensor grad_out, Tensor x, Tensor weights, Tensor indices, "
      "Tensor(a!) table, Tensor hidden, Tensor gate, str activation, Tensor(b!)? momentum_buffer, "
      "float lr, float momentum, bool nesterov, float weight_decay, int? seed=None, int step=0, "
      "int stream=0, Tensor? frozen=None) -> (Tensor grad_x, Tensor grad_weights)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward_rowwise_adam_(Tensor grad_out, Tensor x, Tensor weights, Tensor "
      "indices, Tensor(a!) table, Tensor hidden, Tensor gate, str activation, Tensor(b!) "
      "first_moment, Tensor(c!) second_moment, Tensor(d!) row_steps, float lr, float beta1, float "
      "beta2, float eps, float weight_decay, int? seed=None, int step=0, int stream=0, Tensor? "
      "frozen=None) -> (Tensor grad_x, Tensor grad_weights)",
      {at::Tag::pt2_compliant_tag});
}
