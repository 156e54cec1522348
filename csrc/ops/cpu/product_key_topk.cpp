#include "ops/product_key_topk.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/cpu/glue.h"

namespace peer::ops::cpu {

namespace {

// Keys in the layout of the sub-score product, for one head or for each.
template <class Real>
at::Tensor pack(const RetrievalKernels<Real>& kernel, const at::Tensor& keys) {
  const int64_t heads = keys.dim() == 3 ? keys.size(0) : 1;
  const int64_t panels = (keys.size(-2) + kernel.keys_per_panel - 1) / kernel.keys_per_panel;
  const at::Tensor packed =
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

// As many queries to a block as leave every thread one, in steps of what the product has in
// registers.
int64_t tokens_per_block(int64_t tokens, int64_t heads) {
  const int64_t per_thread = tokens * heads / at::get_num_threads();
  return std::clamp<int64_t>(per_thread / 4 * 4, 4, kMostTokensPerBlock);
}

std::tuple<at::Tensor, at::Tensor> product_key_topk_cpu(const at::Tensor& query,
                                                        const at::Tensor& row_keys,
                                                        const at::Tensor& col_keys,
                                                        int64_t k) {
  check_product_key_topk(query, row_keys, col_keys, k);
  const int64_t half_width = query.size(2) / 2;
  const at::ScalarType type = accumulation_type(query.scalar_type());
  const at::Tensor scores =
      at::empty({query.size(0), query.size(1), k}, query.options().dtype(type));
  const at::Tensor indices = at::empty_like(scores, scores.options().dtype(at::kLong));

  // To shared keys all queries are alike, so that one token's heads make a block too.
  const bool keys_are_shared = row_keys.dim() == 2 && col_keys.dim() == 2;
  const int64_t heads = keys_are_shared ? 1 : query.size(1);
  const int64_t tokens = keys_are_shared ? query.size(0) * query.size(1) : query.size(0);
  const int64_t block = tokens_per_block(tokens, heads);

  const at::Tensor dense_query = contiguous_as(query, type);
  const auto run = [&]<class Real>() {
    const RetrievalKernels<Real>& kernel = kernels().template retrieval<Real>();
    const at::Tensor rows = pack(kernel, contiguous_as(row_keys, type));
    const at::Tensor columns = pack(kernel, contiguous_as(col_keys, type));
    const auto packed_keys = [](const at::Tensor& packed, const at::Tensor& keys) {
      return PackedKeys<Real>{const_data_of<Real>(packed), keys.size(-2),
                              keys.dim() == 3 ? packed.stride(0) : 0};
    };
    const Retrieval<Real> retrieval = {
        .tokens = tokens,
        .heads = heads,
        .half_width = half_width,
        .k = k,
        .tokens_per_block = block,
        .query = const_data_of<Real>(dense_query),
        .rows = packed_keys(rows, row_keys),
        .columns = packed_keys(columns, col_keys),
        .scores = data_of<Real>(scores),
        .indices = data_of<int64_t>(indices),
    };
    at::parallel_for(0, (tokens + block - 1) / block * heads, 1,
                     [&](int64_t first, int64_t last) { kernel.retrieve(retrieval, first, last); });
  };
  type == at::kDouble ? run.template operator()<double>() : run.template operator()<float>();
  return {scores, indices};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> product_key_topk_backward_cpu(
    const at::Tensor& grad_scores,
    const at::Tensor& query,
    const at::Tensor& row_keys,
    const at::Tensor& col_keys,
    const at::Tensor& indices,
    std::array<bool, 3> output_mask) {
  check_product_key_topk_backward(query, row_keys, col_keys, indices);
  check_product_key_topk_grad_scores(grad_scores, indices);
  const int64_t tokens = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t half_width = query.size(2) / 2;
  const int64_t k = indices.size(2);
  const int64_t columns = col_keys.size(-2);
  const at::ScalarType type = accumulation_type(query.scalar_type());
  const at::Tensor ids = indices.contiguous();
  check_index_range("product_key_topk_backward", ids, row_keys.size(-2) * columns);
  const at::Tensor grad = contiguous_as(grad_scores, type);

  // The keys of all heads are one table; a retrieval owns row r (or c) of it, in its head's part
  // where the heads have their own keys.
  const at::Tensor row_owners = at::empty_like(ids);
  const at::Tensor column_owners = at::empty_like(ids);
  const int64_t row_head_stride = row_keys.dim() == 3 ? row_keys.size(1) : 0;
  const int64_t column_head_stride = col_keys.dim() == 3 ? col_keys.size(1) : 0;
  at::parallel_for(0, tokens * heads, 256, [&](int64_t first, int64_t last) {
    const int64_t* id = ids.const_data_ptr<int64_t>();
    int64_t* row = row_owners.mutable_data_ptr<int64_t>();
    int64_t* column = column_owners.mutable_data_ptr<int64_t>();
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i % heads;
      for (int64_t p = i * k; p < (i + 1) * k; ++p) {
        row[p] = head * row_head_stride + id[p] / columns;
        column[p] = head * column_head_stride + id[p] % columns;
      }
    }
  });

  at::Tensor grad_query;
  if (output_mask[0]) {
    const at::Tensor sums =
        at::empty({tokens * heads, 2 * half_width}, query.options().dtype(type));
    const auto add_half = [&]<class Real>(const at::Tensor& keys, const at::Tensor& owners,
                                          int64_t column) {
      const at::Tensor table = contiguous_as(keys, type).reshape({-1, half_width});
      const GatherSum<Real> pass = {
          .terms = k,
          .width = half_width,
          .coefficients = const_data_of<Real>(grad),
          .indices = owners.const_data_ptr<int64_t>(),
          .table = rows_of<Real>(table),
          .out = {data_of<Real>(sums) + column, 2 * half_width},
      };
      const auto& kernel = kernels().template retrieval<Real>();
      at::parallel_for(0, tokens * heads, 64,
                       [&](int64_t first, int64_t last) { kernel.gather_sum(pass, first, last); });
    };
    const auto run = [&]<class Real>() {
      add_half.template operator()<Real>(row_keys, row_owners, 0);
      add_half.template operator()<Real>(col_keys, column_owners, half_width);
    };
    type == at::kDouble ? run.template operator()<double>() : run.template operator()<float>();
    grad_query = sums.view({tokens, heads, 2 * half_width}).to(query.scalar_type());
  }

  const at::Tensor queries = output_mask[1] || output_mask[2]
                                 ? contiguous_as(query, type).view({tokens * heads, 2 * half_width})
                                 : at::Tensor();
  const auto grad_keys = [&](const at::Tensor& keys, const at::Tensor& owners, int64_t column) {
    const TableGradient gradient(owners, keys.numel() / half_width, /*sparse=*/false);
    return gradient.sum(grad, queries.narrow(1, column, half_width), keys.options())
        .view(keys.sizes());
  };
  return {grad_query, output_mask[1] ? grad_keys(row_keys, row_owners, 0) : at::Tensor(),
          output_mask[2] ? grad_keys(col_keys, column_owners, half_width) : at::Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("product_key_topk", product_key_topk_cpu);
  m.impl("product_key_topk_backward", product_key_topk_backward_cpu);
}

}  // namespace peer::ops::cpu
