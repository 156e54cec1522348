// The schemas of all operators.
#include <torch/library.h>

#include "ops/build_info.h"
#include "peer.h"

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
      "expert_mlp(Tensor x, Tensor weights, Tensor indices, Tensor w_down, Tensor w_up, Tensor? "
      "w_gate, str activation, "
      "bool sparse_grad=False) -> (Tensor out, Tensor hidden, Tensor gate)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "expert_mlp_backward(Tensor grad_out, Tensor x, Tensor weights, Tensor indices, Tensor "
      "w_down, Tensor w_up, Tensor? w_gate, "
      "Tensor hidden, Tensor gate, str activation, bool sparse_grad, bool[5] output_mask) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", &peer::empty_huge);
  m.def("build_info() -> str", &peer::build_info);
  m.def("cpu_capability() -> str", &peer::cpu_capability);
}
