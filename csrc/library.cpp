// The schemas of all operators.
#include <torch/library.h>

#include "ops/build_info.h"
#include "peer/functional.h"

TORCH_LIBRARY(peer, m) {
  m.def(
      "product_key_topk(Tensor query, Tensor row_keys, Tensor col_keys, int k) -> (Tensor scores, "
      "Tensor indices)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "product_key_topk_backward(Tensor grad_scores, Tensor query, Tensor row_keys, Tensor "
      "col_keys, Tensor indices, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp(Tensor x, Tensor weights, Tensor indices, Tensor table, str activation, bool "
      "sparse_grad=False) -> (Tensor out, Tensor hidden, Tensor gate)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward(Tensor grad_out, Tensor x, Tensor weights, Tensor indices, Tensor "
      "table, Tensor hidden, Tensor gate, str activation, bool sparse_grad, bool[3] output_mask) "
      "-> "
      "(Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward_coefficients(Tensor grad_out, Tensor x, Tensor weights, Tensor indices, "
      "Tensor table, Tensor hidden, Tensor gate, str activation) -> (Tensor grad_x, Tensor "
      "grad_weights, Tensor coefficients)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rowwise_adagrad_(Tensor(a!) table, Tensor(b!) sum_of_squares, Tensor? indices, Tensor "
      "source, Tensor? coefficients, float lr, float eps, float weight_decay, int? seed=None, int "
      "step=0, int stream=0) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sgd_(Tensor(a!) table, Tensor(b!)? momentum_buffer, Tensor? indices, Tensor source, Tensor? "
      "coefficients, float lr, float momentum, bool nesterov, float weight_decay, int? seed=None, "
      "int step=0, int stream=0) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rowwise_adam_(Tensor(a!) table, Tensor(b!) first_moment, Tensor(c!) second_moment, "
      "Tensor(d!) row_steps, Tensor? indices, Tensor source, Tensor? coefficients, float lr, float "
      "beta1, float beta2, float eps, float weight_decay, int? seed=None, int step=0, int "
      "stream=0) "
      "-> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", &peer::empty_huge);
  m.def("zeros_huge(int[] size, ScalarType dtype) -> Tensor", &peer::zeros_huge);
  m.def("build_info() -> str", &peer::build_info);
  m.def("cpu_capability() -> str", &peer::cpu_capability);
}
