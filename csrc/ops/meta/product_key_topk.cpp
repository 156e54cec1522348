#include "ops/product_key_topk.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace peer::ops {

namespace {

std::tuple<at::Tensor, at::Tensor> product_key_topk_meta(const at::Tensor& query,
                                                         const at::Tensor& row_keys,
                                                         const at::Tensor& col_keys,
                                                         int64_t k) {
  check_product_key_topk(query, row_keys, col_keys, k);
  const std::vector<c10::SymInt> shape = {query.sym_size(0), query.sym_size(1), k};
  return {at::empty_symint(shape, query.options().dtype(accumulation_type(query.scalar_type()))),
          at::empty_symint(shape, query.options().dtype(at::kLong))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> product_key_topk_backward_meta(
    const at::Tensor& /*grad_scores*/,
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    const at::Tensor& indices,
    std::array<bool, 3> output_mask) {
  check_product_key_topk_backward(query, row_keys, col_keys, indices);
  const auto like = [](bool is_wanted, const at::Tensor& tensor) {
    return is_wanted ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : at::Tensor();
  };
  return {like(output_mask[0], query), like(output_mask[1], row_keys),
          like(output_mask[2], col_keys)};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("product_key_topk", product_key_topk_meta);
  m.impl("product_key_topk_backward", product_key_topk_backward_meta);
}

}  // namespace peer::ops
