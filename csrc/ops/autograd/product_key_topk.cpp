// With q1, q2 the halves of a query, the score of expert (r, c) is <q1, row_keys[r]> + <q2,
// col_keys[c]>: linear in the query and in the keys. So the backward operator is bilinear, and its
// own derivative is made of the same operator and of dot products.
#include "ops/product_key_topk.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd/saved.h"

namespace peer::ops::autograd {

namespace {

// Positions of the keys that a retrieval used, in the table of all heads' keys, (T·H·k).
Tensor key_positions(const Tensor& ids_in_half, const Tensor& keys) {
  if (keys.dim() == 2) {
    return ids_in_half.reshape(-1);
  }
  const Tensor heads = at::arange(keys.size(0), ids_in_half.options()).view({1, -1, 1});
  return (ids_in_half + heads * keys.sym_size(1)).reshape(-1);
}

// <query_half, key> for the retrieved keys: (T, H, half), (…, half) -> (T, H, k).
Tensor score_retrieved(const Tensor& query_half,
                       const Tensor& keys,
                       const Tensor& ids_in_half,
                       at::ScalarType type) {
  const Tensor table = keys.reshape_symint({-1, keys.sym_size(-1)}).to(type);
  const Tensor retrieved = table.index_select(0, key_positions(ids_in_half, keys))
                               .reshape_symint({ids_in_half.sym_size(0), ids_in_half.sym_size(1),
                                                ids_in_half.sym_size(2), keys.sym_size(-1)});
  return (retrieved * query_half.to(type).unsqueeze(2)).sum(-1);
}

// The derivative of the scores in the direction (query', row_keys', col_keys'), where one factor is
// the direction's and one is given.
Tensor score_both_halves(const Tensor& query,
                         const Tensor& row_keys,
                         const Tensor& col_keys,
                         const Tensor& indices,
                         at::ScalarType type) {
  const c10::SymInt half = row_keys.sym_size(-1);
  const Tensor columns_per_row = at::scalar_tensor(col_keys.size(-2), indices.options());
  const Tensor rows = at::div(indices, columns_per_row, "floor");
  const Tensor columns = indices - rows * columns_per_row;
  return score_retrieved(query.narrow_symint(2, 0, half), row_keys, rows, type) +
         score_retrieved(query.narrow_symint(2, half, half), col_keys, columns, type);
}

struct ProductKeyTopkDoubleBackward : SavingNode {
  SavedVariable grad_scores_, query_, row_keys_, col_keys_, indices_;

  std::string name() const override { return "PeerProductKeyTopkDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_scores_, &query_, &row_keys_, &col_keys_, &indices_};
  }

  variable_list apply(variable_list&& directions) override {
    variable_list grads(4);
    if (!directions[0].defined() && !directions[1].defined() && !directions[2].defined()) {
      return grads;
    }
    const Tensor grad_scores = grad_scores_.unpack(), query = query_.unpack(),
                 row_keys = row_keys_.unpack(), col_keys = col_keys_.unpack(),
                 indices = indices_.unpack();
    const auto or_zeros = [](const Tensor& direction, const Tensor& like) {
      return direction.defined() ? direction : at::zeros_like(like);
    };
    const Tensor query_direction = or_zeros(directions[0], query);
    const Tensor row_direction = or_zeros(directions[1], row_keys);
    const Tensor column_direction = or_zeros(directions[2], col_keys);
    if (task_should_compute_output(0)) {
      const at::ScalarType type = grad_scores.scalar_type();
      grads[0] = score_both_halves(query_direction, row_keys, col_keys, indices, type) +
                 score_both_halves(query, row_direction, column_direction, indices, type);
    }
    const std::array<bool, 3> wanted = {task_should_compute_output(1),
                                        task_should_compute_output(2),
                                        task_should_compute_output(3)};
    if (wanted[0] || wanted[1] || wanted[2]) {
      std::tie(grads[1], grads[2], grads[3]) = product_key_topk_backward(
          grad_scores, query_direction, row_direction, column_direction, indices, wanted);
    }
    return grads;
  }
};

struct ProductKeyTopkBackwardNode : SavingNode {
  SavedVariable query_, row_keys_, col_keys_, indices_;

  std::string name() const override { return "PeerProductKeyTopkBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&query_, &row_keys_, &col_keys_, &indices_};
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(3);
    }
    auto [grad_query, grad_row_keys, grad_col_keys] =
        product_key_topk_backward(grads[0], query_.unpack(), row_keys_.unpack(), col_keys_.unpack(),
                                  indices_.unpack(), wanted_outputs<3>());
    return {grad_query, grad_row_keys, grad_col_keys};
  }
};

std::tuple<Tensor, Tensor> product_key_topk_autograd(c10::DispatchKeySet keys,
                                                     const Tensor& query,
                                                     const Tensor& row_keys,
                                                     const Tensor& col_keys,
                                                     int64_t k) {
  refuse_forward_mode("product_key_topk", query, row_keys, col_keys);
  NodePtr<ProductKeyTopkBackwardNode> node;
  if (torch::autograd::compute_requires_grad(query, row_keys, col_keys)) {
    node = make_node<ProductKeyTopkBackwardNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(query, row_keys, col_keys));
    node->query_ = SavedVariable(query, false);
    node->row_keys_ = SavedVariable(row_keys, false);
    node->col_keys_ = SavedVariable(col_keys, false);
  }
  auto [scores, indices] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_product_key_topk(keys & c10::after_autograd_keyset, query, row_keys, col_keys,
                                       k);
  }();
  if (node) {
    torch::autograd::set_history(scores, node);
    node->indices_ = SavedVariable(indices, false);
  }
  return {scores, indices};
}

std::tuple<Tensor, Tensor, Tensor> product_key_topk_backward_autograd(
    c10::DispatchKeySet keys,
    const Tensor& grad_scores,
    const Tensor& query,
    const Tensor& row_keys,
    const Tensor& col_keys,
    const Tensor& indices,
    std::array<bool, 3> output_mask) {
  refuse_forward_mode("product_key_topk_backward", grad_scores, query, row_keys, col_keys);
  NodePtr<ProductKeyTopkDoubleBackward> node;
  if (torch::autograd::compute_requires_grad(grad_scores, query, row_keys, col_keys)) {
    node = make_node<ProductKeyTopkDoubleBackward>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(grad_scores, query, row_keys, col_keys));
    node->grad_scores_ = SavedVariable(grad_scores, false);
    node->query_ = SavedVariable(query, false);
    node->row_keys_ = SavedVariable(row_keys, false);
    node->col_keys_ = SavedVariable(col_keys, false);
    node->indices_ = SavedVariable(indices, false);
  }
  auto [grad_query, grad_row_keys, grad_col_keys] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch_product_key_topk_backward(keys & c10::after_autograd_keyset, grad_scores,
                                                query, row_keys, col_keys, indices, output_mask);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_query, grad_row_keys, grad_col_keys}, node);
  }
  return {grad_query, grad_row_keys, grad_col_keys};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("product_key_topk", product_key_topk_autograd);
  m.impl("product_key_topk_backward", product_key_topk_backward_autograd);
}

}  // namespace peer::ops::autograd
