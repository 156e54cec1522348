#include "ops/product_key_topk.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "peer/functional.h"

namespace peer {

std::tuple<at::Tensor, at::Tensor> product_key_topk(const at::Tensor& query,
                                                    const at::Tensor& row_keys,
                                                    const at::Tensor& col_keys,
                                                    int64_t k,
                                                    const std::optional<at::Tensor>& disabled) {
  return ops::ProductKeyTopkOp::call(query, row_keys, col_keys, k, disabled);
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

void check_query_and_keys(const char* op,
                          const Tensor& query,
                          const Tensor& row_keys,
                          const Tensor& col_keys) {
  TORCH_CHECK_VALUE(query.dim() == 3, op,
                    ": expected query of shape [tokens, heads, dim_key], got ", query.sym_sizes());
  TORCH_CHECK_VALUE(
      query.sym_size(2) % 2 == 0 && query.sym_size(2) > 0, op,
      ": expected query with an even dim_key (its halves score the rows and the columns), got ",
      query.sym_size(2));
  const auto check_keys = [&](const char* name, const Tensor& keys, const char* count) {
    check_strided(op, name, keys);
    TORCH_CHECK_VALUE(keys.dim() == 2 || keys.dim() == 3, op, ": expected ", name, " of shape [",
                      count, ", dim_key / 2] or [heads, ", count, ", dim_key / 2], got ",
                      keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.sym_size(-1) * 2 == query.sym_size(2), op, ": expected ", name,
                      " of width dim_key / 2 = ", query.sym_size(2) / 2, ", got shape ",
                      keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.dim() == 2 || keys.sym_size(0) == query.sym_size(1), op, ": expected ",
                      name, " for ", query.sym_size(1), " heads as in query, got shape ",
                      keys.sym_sizes());
    TORCH_CHECK_VALUE(keys.sym_size(-2) > 0, op, ": expected at least one key in ", name,
                      ", got shape ", keys.sym_sizes());
    check_same_dtype(op, name, keys, "query", query);
    check_same_device(op, name, keys, "query", query);
  };
  check_strided(op, "query", query);
  check_floating(op, "query", query);
  check_keys("row_keys", row_keys, "rows");
  check_keys("col_keys", col_keys, "columns");
  TORCH_CHECK_VALUE(
      row_keys.dim() == col_keys.dim(), op,
      ": expected row_keys and col_keys both shared by the heads or both per head, got shapes ",
      row_keys.sym_sizes(), " and ", col_keys.sym_sizes());
}

}  // namespace

void check_product_key_topk(const ProductKeyTopkArguments& args) {
  const auto& [query, row_keys, col_keys, k, disabled] = args;
  check_query_and_keys(args.kName, query, row_keys, col_keys);
  const c10::SymInt experts = row_keys.sym_size(-2) * col_keys.sym_size(-2);
  TORCH_CHECK_VALUE(k >= 1 && experts >= k, args.kName,
                    ": expected k between 1 and the number of experts ", experts, ", got ", k);
  if (disabled && disabled->defined()) {
    check_strided(args.kName, "disabled", *disabled);
    TORCH_CHECK_TYPE(disabled->scalar_type() == at::kBool, args.kName,
                     ": expected disabled of dtype bool, True for experts that are never "
                     "retrieved, got ",
                     disabled->scalar_type());
    TORCH_CHECK_VALUE(disabled->dim() == 1 && disabled->sym_size(0) == experts, args.kName,
                      ": expected disabled of shape [", experts, "], one for each expert, got ",
                      disabled->sym_sizes());
    check_same_device(args.kName, "disabled", *disabled, "query", query);
  }
}

void check_product_key_topk_backward(const ProductKeyTopkBackwardArguments& args) {
  const char* op = args.kName;
  const Tensor& query = args.query;
  const Tensor& indices = args.indices;
  check_query_and_keys(op, query, args.row_keys, args.col_keys);
  check_index_dtype(op, indices);
  check_same_device(op, "indices", indices, "query", query);
  TORCH_CHECK_VALUE(indices.dim() == 3 && indices.sym_size(0) == query.sym_size(0) &&
                        indices.sym_size(1) == query.sym_size(1),
                    op, ": expected indices of shape [", query.sym_size(0), ", ", query.sym_size(1),
                    ", k] to match query, got ", indices.sym_sizes());
}

void check_product_key_topk_grad_scores(const Tensor& grad_scores, const Tensor& indices) {
  const char* op = ProductKeyTopkBackwardArguments::kName;
  TORCH_CHECK_VALUE(grad_scores.sizes() == indices.sizes(), op,
                    ": expected grad_scores of indices' shape ", indices.sizes(), ", got ",
                    grad_scores.sizes());
  check_floating(op, "grad_scores", grad_scores);
  check_strided(op, "grad_scores", grad_scores);
  check_same_device(op, "grad_scores", grad_scores, "indices", indices);
}

}  // namespace ops
}  // namespace peer

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def(
      "product_key_topk(Tensor query, Tensor row_keys, Tensor col_keys, int k, Tensor? "
      "disabled=None) -> (Tensor scores, Tensor indices)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "product_key_topk_backward(Tensor grad_scores, Tensor query, Tensor row_keys, Tensor "
      "col_keys, Tensor indices, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
