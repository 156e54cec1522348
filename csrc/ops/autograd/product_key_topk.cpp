// With q1 and q2 the halves of a query, expert (r, c) scores <q1, row_keys[r]> + <q2, col_keys[c]>.
// The score is linear in the query and in the keys, so the backward operator is bilinear, and its
// derivative is made of the same operator and of dot products. The scores of the retrieved experts
// are differentiated; the choice of these experts is not.
#include "ops/product_key_topk.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/autograd/saved.h"
#include "ops/autograd/tangents.h"
#include "ops/autograd/undefined_as_zero.h"

namespace peer::ops::autograd {

namespace {

// The positions of the retrieved keys in the table of all heads' keys: (T·H·k).
Tensor key_positions(const Tensor& ids_in_half, const Tensor& keys) {
  if (keys.dim() == 2) {
    return ids_in_half.reshape(-1);
  }
  const Tensor heads = at::arange(keys.sym_size(0), ids_in_half.options()).view({1, -1, 1});
  return (ids_in_half + heads * keys.sym_size(1)).reshape(-1);
}

// <query_half, key> for the retrieved keys: (T, H, half), (…, half) -> (T, H, k). Undefined if the
// keys are.
Tensor score_retrieved(const Tensor& query_half,
                       const Tensor& keys,
                       const Tensor& ids_in_half,
                       at::ScalarType type) {
  if (!keys.defined()) {
    return Tensor();
  }
  const Tensor table = keys.reshape_symint({-1, keys.sym_size(-1)}).to(type);
  const Tensor retrieved = table.index_select(0, key_positions(ids_in_half, keys))
                               .reshape_symint({ids_in_half.sym_size(0), ids_in_half.sym_size(1),
                                                ids_in_half.sym_size(2), keys.sym_size(-1)});
  return (retrieved * query_half.to(type).unsqueeze(2)).sum(-1);
}

// A point, or a direction in which an undefined tensor is zero.
struct QueryAndKeys {
  Tensor query, row_keys, col_keys;
};

// The derivative of the retrieved scores in the direction.
Tensor differentiate_scores(const QueryAndKeys& point,
                            const QueryAndKeys& direction,
                            const Tensor& indices,
                            at::ScalarType type) {
  const c10::SymInt half = point.row_keys.sym_size(-1);
  const Tensor columns_per_row = at::scalar_tensor(point.col_keys.sym_size(-2), indices.options());
  const Tensor rows = at::div(indices, columns_per_row, "floor");
  const Tensor columns = indices - rows * columns_per_row;
  const auto score = [&](const Tensor& query, const Tensor& row_keys, const Tensor& col_keys) {
    if (!query.defined()) {
      return Tensor();
    }
    return sum(score_retrieved(query.narrow_symint(2, 0, half), row_keys, rows, type),
               score_retrieved(query.narrow_symint(2, half, half), col_keys, columns, type));
  };
  return sum(score(direction.query, point.row_keys, point.col_keys),
             score(point.query, direction.row_keys, direction.col_keys));
}

// The backward operator at grad_scores and the derivative of all else in the direction. The
// gradient of the query depends on the keys alone, and theirs on the query.
std::tuple<Tensor, Tensor, Tensor> differentiate_gradients(const Tensor& grad_scores,
                                                           const QueryAndKeys& point,
                                                           const QueryAndKeys& direction,
                                                           const Tensor& indices,
                                                           std::array<bool, 3> wanted) {
  const auto [query, row_keys, col_keys] = direction;
  wanted[0] = wanted[0] && (row_keys.defined() || col_keys.defined());
  wanted[1] = wanted[1] && query.defined();
  wanted[2] = wanted[2] && query.defined();
  if (!grad_scores.defined() || wanted == std::array<bool, 3>{}) {
    return {};
  }
  const auto or_zeros = [](const Tensor& tensor, const Tensor& like) {
    return tensor.defined() ? tensor : at::zeros_like(like);
  };
  return ProductKeyTopkBackwardOp::call(grad_scores, or_zeros(query, point.query),
                                        or_zeros(row_keys, point.row_keys),
                                        or_zeros(col_keys, point.col_keys), indices, wanted);
}

struct ProductKeyTopkDoubleBackward : SavingNode {
  SavedVariable grad_scores_, query_, row_keys_, col_keys_, indices_;

  std::string name() const override { return "PeerProductKeyTopkDoubleBackward"; }
  std::vector<SavedVariable*> saved() override {
    return {&grad_scores_, &query_, &row_keys_, &col_keys_, &indices_};
  }

  variable_list apply(variable_list&& grads) override {
    const Tensor grad_scores = grad_scores_.unpack(), indices = indices_.unpack();
    const QueryAndKeys point = {query_.unpack(), row_keys_.unpack(), col_keys_.unpack()};
    const QueryAndKeys direction = {grads[0], grads[1], grads[2]};
    const Tensor of_grad_scores =
        task_should_compute_output(0)
            ? differentiate_scores(point, direction, indices, grad_scores.scalar_type())
            : Tensor();
    const auto [of_query, of_row_keys, of_col_keys] =
        differentiate_gradients(grad_scores, point, direction, indices,
                                {task_should_compute_output(1), task_should_compute_output(2),
                                 task_should_compute_output(3)});
    return {of_grad_scores, of_query, of_row_keys, of_col_keys};
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
        ProductKeyTopkBackwardOp::call(grads[0], query_.unpack(), row_keys_.unpack(),
                                       col_keys_.unpack(), indices_.unpack(), wanted_outputs<3>());
    return {grad_query, grad_row_keys, grad_col_keys};
  }
};

std::tuple<Tensor, Tensor> product_key_topk_autograd(c10::DispatchKeySet keys,
                                                     const ProductKeyTopkArguments& args) {
  const Tensor &query = args.query, &row_keys = args.row_keys, &col_keys = args.col_keys;
  const auto node = make_node_if_required<ProductKeyTopkBackwardNode>(query, row_keys, col_keys);
  if (node) {
    node->query_ = save(query);
    node->row_keys_ = save(row_keys);
    node->col_keys_ = save(col_keys);
  }
  auto [scores, indices] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ProductKeyTopkOp::redispatch(keys & c10::after_autograd_keyset, query, row_keys,
                                        col_keys, args.k, args.disabled);
  }();
  if (node) {
    torch::autograd::set_history(scores, node);
    node->indices_ = save(indices);
  }
  if (any_has_tangent(query, row_keys, col_keys)) {
    set_tangent(scores, differentiate_scores(primals_of<QueryAndKeys>(query, row_keys, col_keys),
                                             tangents_of<QueryAndKeys>(query, row_keys, col_keys),
                                             indices, scores.scalar_type()));
  }
  return {scores, indices};
}

std::tuple<Tensor, Tensor, Tensor> product_key_topk_backward_autograd(
    c10::DispatchKeySet keys,
    const ProductKeyTopkBackwardArguments& args) {
  const Tensor &grad_scores = args.grad_scores, &query = args.query, &row_keys = args.row_keys,
               &col_keys = args.col_keys, &indices = args.indices;
  const auto node =
      make_node_if_required<ProductKeyTopkDoubleBackward>(grad_scores, query, row_keys, col_keys);
  if (node) {
    node->grad_scores_ = save(grad_scores);
    node->query_ = save(query);
    node->row_keys_ = save(row_keys);
    node->col_keys_ = save(col_keys);
    node->indices_ = save(indices);
  }
  auto [grad_query, grad_row_keys, grad_col_keys] = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ProductKeyTopkBackwardOp::redispatch(keys & c10::after_autograd_keyset, grad_scores,
                                                query, row_keys, col_keys, indices,
                                                args.output_mask);
  }();
  if (node) {
    torch::autograd::set_history(variable_list{grad_query, grad_row_keys, grad_col_keys}, node);
  }
  if (any_has_tangent(grad_scores, query, row_keys, col_keys)) {
    const auto point = primals_of<QueryAndKeys>(query, row_keys, col_keys);
    const auto [query_t, row_t, col_t] = differentiate_gradients(
        primal_of(grad_scores), point, tangents_of<QueryAndKeys>(query, row_keys, col_keys),
        indices, args.output_mask);
    std::tuple<Tensor, Tensor, Tensor> linear;
    if (const Tensor tangent = tangent_of(grad_scores); tangent.defined()) {
      linear = ProductKeyTopkBackwardOp::call(tangent, point.query, point.row_keys, point.col_keys,
                                              indices, args.output_mask);
    }
    set_tangent(grad_query, sum(query_t, std::get<0>(linear)));
    set_tangent(grad_row_keys, sum(row_t, std::get<1>(linear)));
    set_tangent(grad_col_keys, sum(col_t, std::get<2>(linear)));
  }
  return {grad_query, grad_row_keys, grad_col_keys};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  m.impl("product_key_topk", ProductKeyTopkOp::wrapper<product_key_topk_autograd>);
  m.impl("product_key_topk_backward",
         ProductKeyTopkBackwardOp::wrapper<product_key_topk_backward_autograd>);
}

}  // namespace peer::ops::autograd
