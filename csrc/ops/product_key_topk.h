#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <array>
#include <tuple>

namespace peer::ops {

using ProductKeyTopkSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& query,
                                                                   const at::Tensor& row_keys,
                                                                   const at::Tensor& col_keys,
                                                                   int64_t k);
using ProductKeyTopkBackwardSignature =
    std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor& grad_scores,
                                                   const at::Tensor& query,
                                                   const at::Tensor& row_keys,
                                                   const at::Tensor& col_keys,
                                                   const at::Tensor& indices,
                                                   std::array<bool, 3> output_mask);

// Through the dispatcher, from the top.
ProductKeyTopkSignature product_key_topk;
ProductKeyTopkBackwardSignature product_key_topk_backward;

// Through the dispatcher, from the keys in `below` on.
std::tuple<at::Tensor, at::Tensor> redispatch_product_key_topk(c10::DispatchKeySet below,
                                                               const at::Tensor& query,
                                                               const at::Tensor& row_keys,
                                                               const at::Tensor& col_keys,
                                                               int64_t k);
std::tuple<at::Tensor, at::Tensor, at::Tensor> redispatch_product_key_topk_backward(
    c10::DispatchKeySet below,
    const at::Tensor& grad_scores,
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    const at::Tensor& indices,
    std::array<bool, 3> output_mask);

// What every kernel of the operator requires of its arguments, whatever the device. Reads no data.
void check_product_key_topk(const at::Tensor& query,
                            const at::Tensor& row_keys,
                            const at::Tensor& col_keys,
                            int64_t k);
void check_product_key_topk_backward(const at::Tensor& query,
                                     const at::Tensor& row_keys,
                                     const at::Tensor& col_keys,
                                     const at::Tensor& indices);

// For the kernels that compute only: while compiled autograd records a graph, the incoming gradient
// is a stand-in of another shape.
void check_product_key_topk_grad_scores(const at::Tensor& grad_scores, const at::Tensor& indices);

}  // namespace peer::ops
