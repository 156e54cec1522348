#include "ops/device/product_key_topk.h"

#include <ATen/ops/ones.h>
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
  parallel_for(heads * panels, 8,
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
  static RetrievalMask make_mask(const Tensor& disabled, int64_t rows, int64_t columns, int64_t k) {
    const RetrievalMask mask = {.disabled = disabled,
                                .unused_rows = at::empty({rows}, disabled.options()),
                                .unused_columns = at::ones({columns}, disabled.options())};
    const bool* row = const_data_of<bool>(disabled);
    bool* const unused_rows = data_of<bool>(mask.unused_rows);
    bool* const unused_columns = data_of<bool>(mask.unused_columns);
    int64_t enabled = 0;
    for (int64_t r = 0; r < rows; ++r, row += columns) {
      int32_t disabled_in_row = 0;
      for (int64_t c = 0; c < columns; ++c) {
        disabled_in_row += row[c];
        unused_columns[c] &= row[c];
      }
      unused_rows[r] = disabled_in_row == columns;
      enabled += columns - disabled_in_row;
    }
    TORCH_CHECK_VALUE(enabled >= k, ProductKeyTopkArguments::kName, ": expected at least k = ", k,
                      " enabled experts, got ", enabled);
    return mask;
  }

  static void retrieve(const Tensor& query,
                       const Tensor& row_keys,
                       const Tensor& col_keys,
                       const RetrievalMask& mask,
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
      const auto packed_keys = [](const Tensor& packed, const Tensor& keys, const Tensor& unused) {
        return Keys<Real>{.data = const_data_of<Real>(packed),
                          .count = keys.size(-2),
                          .head_stride = keys.dim() == 3 ? packed.stride(0) : 0,
                          .unused = const_data_or_null<bool>(unused)};
      };
      const ProductKeyTopk<Real> retrieval = {
          .tokens = tokens,
          .heads = heads,
          .half_width = query.size(2) / 2,
          .k = scores.size(2),
          .query = const_data_of<Real>(query),
          .rows = packed_keys(rows, row_keys, mask.unused_rows),
          .columns = packed_keys(columns, col_keys, mask.unused_columns),
          .scores = data_of<Real>(scores),
          .indices = data_of<int64_t>(indices),
          .disabled = const_data_or_null<bool>(mask.disabled),
      };
      const auto retrieve = kernel.retrieve(retrieval);
      parallel_for((tokens + block - 1) / block * heads, 1,
                   [&](int64_t first, int64_t last) { retrieve(retrieval, block, first, last); });
    });
  }

  static void find_retrieved_keys(const RetrievedKeys& keys) {
    const int64_t heads = keys.indices.size(1);
    const int64_t k = keys.indices.size(2);
    parallel_for(keys.indices.size(0) * heads, 256, [&](int64_t first, int64_t last) {
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
    parallel_for(pass.items, 64,
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
