#include "ops/device/product_key_topk.h"

#include <ATen/ops/all.h>
#include <torch/library.h>

#include "kernels/cuda/product_key_topk.h"
#include "ops/cuda/common.h"

namespace peer::ops::cuda {

namespace {

// Keys (count, half_width) that the heads share, or (H, count, half_width).
template <class Query>
Keys<Query> keys_of(const Tensor& keys, const Tensor& unused) {
  return {.data = const_data_of<Query>(keys),
          .count = keys.size(-2),
          .head_stride = keys.dim() == 3 ? keys.stride(0) : 0,
          .unused = const_data_or_null<bool>(unused)};
}

struct Cuda : Device {
  // Does not count the enabled experts, because the host would have to wait for the number. Kernels
  // trap if there are fewer than k.
  static RetrievalMask make_mask(const Tensor& disabled,
                                 int64_t rows,
                                 int64_t columns,
                                 int64_t /*k*/) {
    TORCH_CHECK_VALUE(rows <= kMaxMaskedKeys && columns <= kMaxMaskedKeys,
                      ProductKeyTopkArguments::kName, ": expected at most ", kMaxMaskedKeys,
                      " rows and columns with disabled experts on ", disabled.device(), ", got ",
                      rows, " and ", columns);
    const Tensor grid = disabled.view({rows, columns});
    return {.disabled = disabled,
            .unused_rows = at::all(grid, /*dim=*/1),
            .unused_columns = at::all(grid, /*dim=*/0)};
  }

  static void retrieve(const Tensor& query,
                       const Tensor& row_keys,
                       const Tensor& col_keys,
                       const RetrievalMask& mask,
                       const Tensor& scores,
                       const Tensor& indices) {
    TORCH_CHECK_VALUE(scores.size(2) <= kMaxRetrieved,
                      "peer::product_key_topk: expected k of at most ", kMaxRetrieved, " on ",
                      query.device(), ", got ", scores.size(2));
    with_table_type(query.scalar_type(), [&]<class Query>() {
      using Real = accumulation_t<Query>;
      const ProductKeyTopk<Query> retrieval = {
          .tokens = query.size(0),
          .heads = query.size(1),
          .half_width = query.size(2) / 2,
          .k = scores.size(2),
          .query = const_data_of<Query>(query),
          .rows = keys_of<Query>(row_keys, mask.unused_rows),
          .columns = keys_of<Query>(col_keys, mask.unused_columns),
          .scores = data_of<Real>(scores),
          .indices = data_of<int64_t>(indices),
          .disabled = const_data_or_null<bool>(mask.disabled),
      };
      peer::cuda::product_key_topk(retrieval, current_context());
    });
  }

  static void find_retrieved_keys(const RetrievedKeys& keys) {
    const KeyOwners pass = {
        .queries = keys.indices.size(0) * keys.indices.size(1),
        .heads = keys.indices.size(1),
        .k = keys.indices.size(2),
        .columns = keys.columns_per_head,
        .experts = keys.experts(),
        .row_head_stride = keys.row_head_stride(),
        .column_head_stride = keys.column_head_stride(),
        .indices = keys.indices.const_data_ptr<int64_t>(),
        .row_owners = data_of<int64_t>(keys.rows),
        .column_owners = data_of<int64_t>(keys.columns),
    };
    find_key_owners(pass, current_context());
  }

  template <class Real>
  static void gather_sum(const GatherSum<Real>& pass) {
    peer::cuda::gather_sum(pass, current_context());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("product_key_topk", ProductKeyTopkOp::kernel<product_key_topk_on<Cuda>>);
  m.impl("product_key_topk_backward",
         ProductKeyTopkBackwardOp::kernel<product_key_topk_backward_on<Cuda>>);
}

}  // namespace peer::ops::cuda
