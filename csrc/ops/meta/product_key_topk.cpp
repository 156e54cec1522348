#include "ops/product_key_topk.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/meta/common.h"

namespace peer::ops {

namespace {

std::tuple<Tensor, Tensor> product_key_topk_meta(const ProductKeyTopkArguments& args) {
  check_product_key_topk(args);
  const Tensor& query = args.query;
  const std::vector<c10::SymInt> shape = {query.sym_size(0), query.sym_size(1), args.k};
  return {at::empty_symint(shape, query.options().dtype(accumulation_type(query.scalar_type()))),
          at::empty_symint(shape, query.options().dtype(at::kLong))};
}

std::tuple<Tensor, Tensor, Tensor> product_key_topk_backward_meta(
    const ProductKeyTopkBackwardArguments& args) {
  check_product_key_topk_backward(args);
  return {empty_if(args.output_mask[0], args.query), empty_if(args.output_mask[1], args.row_keys),
          empty_if(args.output_mask[2], args.col_keys)};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("product_key_topk", ProductKeyTopkOp::kernel<product_key_topk_meta>);
  m.impl("product_key_topk_backward",
         ProductKeyTopkBackwardOp::kernel<product_key_topk_backward_meta>);
}

}  // namespace peer::ops
