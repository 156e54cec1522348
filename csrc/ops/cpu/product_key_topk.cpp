#include "ops/device/product_key_topk.h"

#include <torch/library.h>

#include "kernels/cpu/product_key_topk.h"
#include "ops/cpu/common.h"

namespace peer::ops::cpu {

namespace {

// Keys in the layout of the sub-score product, for one head or for each.
template <class Real>
Tensor pack(const ProductKeyTopkFunctions<Real>& kernel, const Tensor& keys) {
  const int64_t heads = keys.dim() == 3 ? keys.size(0) : 1;
  const int64_t panels = (keys.size(-2) + kernel.keys_per_panel - 1) / kernel.keys_per_panel;
  const Tensor packed =
      at::empty({heads, panels * kernel.keys_per_panel, keys.size(-1)}, keys.options());
  const PackKeys<Real> pass = {
      .count = keys.size(-2),
      .half_width = keys.size(-1),
      .keys = const_data_of<Real>(keys),
      .packed = data_of<Real>(packed),
  };
  at::parallel_for(0, heads * panels, 8,
                   [&](int64_t first, int64_t last) { kernel.pack_keys(pass, first, last); });
  return packed;
}

// The largest block that still gives every thread a block, rounded down to a multiple of the 4
// queries that the product keeps in registers.
int64_t tokens_per_block(int64_t tokens, int64_t heads) {
  const int64_t per_thread = tokens * heads / at::get_num_threads();
  return std::clamp<int64_t>(per_thread / 4 * 4, 4, kMaxTokensPerBlock);
}

struct Cpu : Device {
  static void retrieve(const Tensor& query,
                       const Tensor& row_keys,
                       const Tensor& col_keys,
                       const Tensor& scores,
                       const Tensor& indices) {
    // With shared keys, heads are like tokens, so the heads of one token can share a block.
    const bool keys_are_shared = row_keys.dim() == 2 && col_keys.dim() == 2;
    const int64_t heads = keys_are_shared ? 1 : query.size(1);
    const int64_t tokens = keys_are_shared ? query.size(0) * query.size(1) : query.size(0);
    const int64_t block = tokens_per_block(tokens, heads);
    with_accumulation_type(scores.scalar_type(), [&]<class Real>() {
      const auto& kernel = kernels<ProductKeyTopkKernels>().of<Real>();
      const Tensor rows = pack(kernel, row_keys);
      const Tensor columns = pack(kernel, col_keys);
      const auto packed_keys = [](const Tensor& packed, const Tensor& keys) {
        return Keys<Real>{const_data_of<Real>(packed), keys.size(-2),
                          keys.dim() == 3 ? packed.stride(0) : 0};
      };
      const ProductKeyTopk<Real> retrieval = {
          .tokens = tokens,
          .heads = heads,
          .half_width = query.size(2) / 2,
          .k = scores.size(2),
          .query = const_data_of<Real>(query),
          .rows = packed_keys(rows, row_keys),
          .columns = packed_keys(columns, col_keys),
          .scores = data_of<Real>(scores),
          .indices = data_of<int64_t>(indices),
      };
      at::parallel_for(0, (tokens + block - 1) / block * heads, 1,
                       [&](int64_t first, int64_t last) {
                         kernel.product_key_topk(retrieval, block, first, last);
                       });
    });
  }

  static void find_retrieved_keys(const RetrievedKeys& keys) {
    const int64_t heads = keys.indices.size(1);
    const int64_t k = keys.indices.size(2);
    at::parallel_for(0, keys.indices.size(0) * heads, 256, [&](int64_t first, int64_t last) {
      const int64_t* id = keys.indices.const_data_ptr<int64_t>();
      int64_t* row = keys.rows.mutable_data_ptr<int64_t>();
      int64_t* column = keys.columns.mutable_data_ptr<int64_t>();
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = i % heads;
        for (int64_t p = i * k; p < (i + 1) * k; ++p) {
          row[p] = head * keys.row_head_stride() + id[p] / keys.columns_per_head;
          column[p] = head * keys.column_head_stride() + id[p] % keys.columns_per_head;
        }
      }
    });
  }

  template <class Real>
  static void gather_sum(const GatherSum<Real>& pass) {
    const auto& kernel = kernels<ProductKeyTopkKernels>().of<Real>();
    at::parallel_for(0, pass.items, 64,
                     [&](int64_t first, int64_t last) { kernel.gather_sum(pass, first, last); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("product_key_topk", ProductKeyTopkOp::kernel<product_key_topk_on<Cpu>>);
  m.impl("product_key_topk_backward",
         ProductKeyTopkBackwardOp::kernel<product_key_topk_backward_on<Cpu>>);
}

}  // namespace peer::ops::cpu
