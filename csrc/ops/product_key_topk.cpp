#include "ops/product_key_topk.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/checks.h"
#include "peer/functional.h"

namespace peer {

std::tuple<at::Tensor, at::Tensor> product_key_topk(const at::Tensor& query,
                                                    const at::Tensor& row_keys,
                                                    const at::Tensor& col_keys,
                                                    int64_t k) {
  return ops::product_key_topk(query, row_keys, col_keys, k);
}

at::Tensor router_weights(const at::Tensor& scores, std::string_view function) {
  if (function == "softmax") {
    return scores.softmax(-1);
  }
  if (function == "sigmoid") {
    return scores.sigmoid();
  }
  TORCH_CHECK_VALUE(function == "relu", "router_weights: expected softmax, sigmoid or relu, got '",
                    function, "'");
  return scores.relu();
}

namespace ops {

namespace {

const auto& forward_handle() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("peer::product_key_topk", "")
                                 .typed<ProductKeyTopkSignature>();
  return handle;
}

const auto& backward_handle() {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("peer::product_key_topk_backward", "")
                                 .typed<ProductKeyTopkBackwardSignature>();
  return handle;
}

constexpr const char* kBackward = "product_key_topk_backward";

void check_query_and_keys(const char* op,
                          const at::Tensor& query,
                          const at::Tensor& row_keys,
                          const at::Tensor& col_keys) {
  TORCH_CHECK_VALUE(query.dim() == 3, "peer::", op,
                    ": expected query of shape [tokens, heads, dim_key], got ", query.sym_sizes());
  TORCH_CHECK_VALUE(
      query.sym_size(2) % 2 == 0 && query.sym_size(2) > 0, "peer::", op,
      ": expected query with an even dim_key (its halves score the rows and the columns), got ",
      query.sym_size(2));
  const auto check_keys = [&](const char* name, const at::Tensor& keys, const char* count) {
    check_strided(op, name, keys);
    TORCH_CHECK_VALUE(keys.dim() == 2 || keys.dim() == 3, "peer::", op, ": expected ", name,
                      " of shape [", count, ", dim_key / 2] or [heads, ", count,
                      ", dim_key / 2], got ", keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.sym_size(-1) * 2 == query.sym_size(2), "peer::", op, ": expected ", name,
                      " of width dim_key / 2 = ", query.sym_size(2) / 2, ", got shape ",
                      keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.dim() == 2 || keys.sym_size(0) == query.sym_size(1), "peer::", op,
                      ": expected ", name, " for ", query.sym_size(1),
                      " heads as in query, got shape ", keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.sym_size(-2) > 0, "peer::", op, ": expected at least one key in ", name,
                      ", got shape ", keys.sym_sizes());
    check_same_dtype(op, name, keys, "query", query);
    check_same_device(op, name, keys, "query", query);
  };
  check_strided(op, "query", query);
  check_floating(op, "query", query);
  check_keys("row_keys", row_keys, "rows");
  check_keys("col_keys", col_keys, "columns");
  TORCH_CHECK_VALUE(
      row_keys.dim() == col_keys.dim(), "peer::", op,
      ": expected row_keys and col_keys both shared by the heads or both per head, got shapes ",
      row_keys.sym_sizes(), " and ", col_keys.sym_sizes());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> product_key_topk(const at::Tensor& query,
                                                    const at::Tensor& row_keys,
                                                    const at::Tensor& col_keys,
                                                    int64_t k) {
  return forward_handle().call(query, row_keys, col_keys, k);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> product_key_topk_backward(
    const at::Tensor& grad_scores,
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    const at::Tensor& indices,
    std::array<bool, 3> output_mask) {
  return backward_handle().call(grad_scores, query, row_keys, col_keys, indices, output_mask);
}

std::tuple<at::Tensor, at::Tensor> redispatch_product_key_topk(c10::DispatchKeySet below,
                                                               const at::Tensor& query,
                                                               const at::Tensor& row_keys,
                                                               const at::Tensor& col_keys,
                                                               int64_t k) {
  return forward_handle().redispatch(below, query, row_keys, col_keys, k);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> redispatch_product_key_topk_backward(
    c10::DispatchKeySet below,
    const at::Tensor& grad_scores,
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    const at::Tensor& indices,
    std::array<bool, 3> output_mask) {
  return backward_handle().redispatch(below, grad_scores, query, row_keys, col_keys, indices,
                                      output_mask);
}

void check_product_key_topk(const at::Tensor& query,
                            const at::Tensor& row_keys,
                            const at::Tensor& col_keys,
                            int64_t k) {
  check_query_and_keys("product_key_topk", query, row_keys, col_keys);
  const c10::SymInt experts = row_keys.sym_size(-2) * col_keys.sym_size(-2);
  TORCH_CHECK_VALUE(k >= 1 && experts >= k,
                    "peer::product_key_topk: expected k between 1 and the number of experts ",
                    experts, ", got ", k);
}

void check_product_key_topk_backward(const at::Tensor& query,
                                     const at::Tensor& row_keys,
                                     const at::Tensor& col_keys,
                                     const at::Tensor& indices) {
  check_query_and_keys(kBackward, query, row_keys, col_keys);
  check_index_dtype(kBackward, indices);
  check_same_device(kBackward, "indices", indices, "query", query);
  TORCH_CHECK_VALUE(indices.dim() == 3 && indices.sym_size(0) == query.sym_size(0) &&
                        indices.sym_size(1) == query.sym_size(1),
                    "peer::", kBackward, ": expected indices of shape [", query.sym_size(0), ", ",
                    query.sym_size(1), ", k] to match query, got ", indices.sym_sizes());
}

void check_product_key_topk_grad_scores(const at::Tensor& grad_scores, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(grad_scores.sizes() == indices.sizes(), "peer::", kBackward,
                    ": expected grad_scores of indices' shape ", indices.sizes(), ", got ",
                    grad_scores.sizes());
  check_floating(kBackward, "grad_scores", grad_scores);
  check_strided(kBackward, "grad_scores", grad_scores);
  check_same_device(kBackward, "grad_scores", grad_scores, "indices", indices);
}

}  // namespace ops
}  // namespace peer
