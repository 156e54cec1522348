// product_key_topk on a device. Besides what common.h lists, a device has
//
//   make_mask(disabled, rows, columns, k)   finds the unused keys; raises ValueError for fewer
//                                           than k enabled experts, unless only the kernels can
//                                           tell
//   retrieve(query, row_keys, col_keys, mask, scores, indices)
//   find_retrieved_keys(const RetrievedKeys&)
//   gather_sum(const GatherSum<Real>&)
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "kernels/product_key_topk.h"
#include "ops/device/common.h"
#include "ops/product_key_topk.h"

namespace peer::ops {

// The row key and the column key of every retrieval, as positions in the table of all heads' keys.
// If heads have their own keys, each head has its own part of that table.
struct RetrievedKeys {
  RetrievedKeys(const Tensor& given_indices, const Tensor& row_keys, const Tensor& col_keys)
      : rows_per_head(row_keys.size(-2)),
        columns_per_head(col_keys.size(-2)),
        heads_share_rows(row_keys.dim() == 2),
        heads_share_columns(col_keys.dim() == 2),
        indices(given_indices.contiguous()),
        rows(at::empty_like(indices)),
        columns(at::empty_like(indices)) {}

  int64_t experts() const { return rows_per_head * columns_per_head; }
  int64_t row_head_stride() const { return heads_share_rows ? 0 : rows_per_head; }
  int64_t column_head_stride() const { return heads_share_columns ? 0 : columns_per_head; }

  int64_t rows_per_head, columns_per_head;
  bool heads_share_rows, heads_share_columns;
  Tensor indices;        // (T, H, k)
  Tensor rows, columns;  // (T, H, k), written by the device
};

// What is struck out of a retrieval, bool. Undefined without a mask.
struct RetrievalMask {
  Tensor disabled;                     // (R·C)
  Tensor unused_rows, unused_columns;  // (R) and (C), the keys whose experts are all disabled
};

template <class Device>
std::tuple<Tensor, Tensor> product_key_topk_on(const ProductKeyTopkArguments& args) {
  check_product_key_topk(args);
  const auto& [query, row_keys, col_keys, k, disabled] = args;
  const c10::DeviceGuard guard(query.device());
  const at::ScalarType type = query.scalar_type();
  const Tensor scores =
      at::empty({query.size(0), query.size(1), k}, query.options().dtype(accumulation_type(type)));
  const Tensor indices = at::empty_like(scores, scores.options().dtype(at::kLong));
  RetrievalMask mask;
  if (disabled && disabled->defined()) {
    mask = Device::make_mask(disabled->contiguous(), row_keys.size(-2), col_keys.size(-2), k);
  }
  Device::retrieve(as_input<Device>(query, type), as_input<Device>(row_keys, type),
                   as_input<Device>(col_keys, type), mask, scores, indices);
  return {scores, indices};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> product_key_topk_backward_on(
    const ProductKeyTopkBackwardArguments& args) {
  check_product_key_topk_backward(args);
  check_product_key_topk_grad_scores(args.grad_scores, args.indices);
  const Tensor &query = args.query, &row_keys = args.row_keys, &col_keys = args.col_keys;
  const auto& output_mask = args.output_mask;
  const c10::DeviceGuard guard(query.device());
  const at::ScalarType type = query.scalar_type();
  const int64_t query_count = query.size(0) * query.size(1);
  const int64_t half_width = query.size(2) / 2;
  const Tensor grad = contiguous_as(args.grad_scores, accumulation_type(type));
  const RetrievedKeys keys(args.indices, row_keys, col_keys);
  Device::check_index_range(args.kName, keys.indices, keys.experts());
  Device::find_retrieved_keys(keys);

  Tensor grad_query;
  if (output_mask[0]) {
    const Tensor sums = at::empty({query_count, 2 * half_width}, grad.options());
    const auto sum_half = [&](const Tensor& given, const Tensor& retrieved, int64_t column) {
      const Tensor table = contiguous_as(given, sums.scalar_type()).reshape({-1, half_width});
      with_accumulation_type(sums.scalar_type(), [&]<class Real>() {
        const GatherSum<Real> pass = {
            .items = query_count,
            .terms = retrieved.size(2),
            .width = half_width,
            .coefficients = const_data_of<Real>(grad),
            .indices = retrieved.const_data_ptr<int64_t>(),
            .table = rows_of<Real>(table),
            .out = mutable_rows_of<Real>(sums.narrow(1, column, half_width)),
        };
        Device::gather_sum(pass);
      });
    };
    sum_half(row_keys, keys.rows, 0);
    sum_half(col_keys, keys.columns, half_width);
    grad_query = sums.view(query.sizes()).to(type);
  }

  const Tensor queries = output_mask[1] || output_mask[2]
                             ? as_input<Device>(query, type).view({query_count, 2 * half_width})
                             : Tensor();
  const auto grad_keys = [&](const Tensor& table, const Tensor& retrieved, int64_t column) {
    const int64_t count = table.numel() / half_width;
    check_sortable<Device>(args.kName, table, retrieved.numel(), count);
    const typename Device::TableGradient gradient(retrieved, count, /*sparse=*/false);
    return gradient.sum(grad, {queries.narrow(1, column, half_width)}, table.options())
        .view(table.sizes());
  };
  return {grad_query, output_mask[1] ? grad_keys(row_keys, keys.rows, 0) : Tensor(),
          output_mask[2] ? grad_keys(col_keys, keys.columns, half_width) : Tensor()};
}

}  // namespace peer::ops
