// The operators of retrieval: product_key_topk and product_key_topk_backward. Shapes are in
// peer/functional.h.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "ops/operator.h"

namespace peer::ops {

struct ProductKeyTopkArguments {
  static constexpr const char* kName = "peer::product_key_topk";
  const Tensor& query;
  const Tensor& row_keys;
  const Tensor& col_keys;
  int64_t k;
  const std::optional<Tensor>& disabled;
};

// indices is a result of product_key_topk. output_mask and the results are in the order query,
// row_keys, col_keys.
struct ProductKeyTopkBackwardArguments {
  static constexpr const char* kName = "peer::product_key_topk_backward";
  const Tensor& grad_scores;
  const Tensor& query;
  const Tensor& row_keys;
  const Tensor& col_keys;
  const Tensor& indices;
  std::array<bool, 3> output_mask;
};

using ProductKeyTopkOp = Operator<ProductKeyTopkArguments,
                                  std::tuple<Tensor, Tensor>(const Tensor&,
                                                             const Tensor&,
                                                             const Tensor&,
                                                             int64_t,
                                                             const std::optional<Tensor>&)>;
using ProductKeyTopkBackwardOp = Operator<ProductKeyTopkBackwardArguments,
                                          std::tuple<Tensor, Tensor, Tensor>(const Tensor&,
                                                                             const Tensor&,
                                                                             const Tensor&,
                                                                             const Tensor&,
                                                                             const Tensor&,
                                                                             std::array<bool, 3>)>;

// The checks are those that every device needs. They read no data.
void check_product_key_topk(const ProductKeyTopkArguments& args);
void check_product_key_topk_backward(const ProductKeyTopkBackwardArguments& args);

// Only for kernels that compute: while compiled autograd records a graph, the incoming gradient is
// a placeholder whose shape may differ.
void check_product_key_topk_grad_scores(const Tensor& grad_scores, const Tensor& indices);

}  // namespace peer::ops
