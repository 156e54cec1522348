// What the operators have in common on every device.
//
// In this folder an operator is a template over its device. It reads in the order in which things
// happen: check, allocate, launch, return. A device is a struct of static functions, completed by
// each operator's file in the device's folder. From its common.h, every device has:
//
//   input_type(given, table)           the dtype in which the kernels take an input of the given
//                                      dtype beside a table
//   kMaxSortable                       how many retrievals or table rows the device can sort
//   check_index_range(op, ids, count)  raises IndexError for an id outside [0, count), unless only
//                                      the kernels can tell
//   TableGradient                      the gradient of a table from sorted retrievals; frozen rows
//                                      have none
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <optional>

#include "kernels/common.h"
#include "ops/checks.h"

namespace peer::ops {

using at::Tensor;

// The kernels' own 16-bit types have the layout of Torch's.
static_assert(sizeof(BFloat16) == sizeof(c10::BFloat16) && sizeof(Half) == sizeof(c10::Half));

// Calls body.template operator()<Table>() for the kernels' element type of a table's dtype, which
// was checked before.
template <class Body>
auto with_table_type(at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat:
      return body.template operator()<float>();
    case at::kDouble:
      return body.template operator()<double>();
    case at::kBFloat16:
      return body.template operator()<BFloat16>();
    default:
      return body.template operator()<Half>();
  }
}

// Calls body.template operator()<Table, Input>(). The input has the table's dtype or its
// accumulation dtype.
template <class Body>
auto with_table_and_input_type(at::ScalarType table, at::ScalarType input, Body&& body) {
  return with_table_type(table, [&]<class Table>() {
    return input == table ? body.template operator()<Table, Table>()
                          : body.template operator()<Table, accumulation_t<Table>>();
  });
}

// Calls body.template operator()<Real>() for an accumulation dtype.
template <class Body>
auto with_accumulation_type(at::ScalarType type, Body&& body) {
  return type == at::kDouble ? body.template operator()<double>()
                             : body.template operator()<float>();
}

template <class Element>
Element* data_of(const Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

template <class Element>
const Element* const_data_of(const Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

// Null if the tensor is undefined.
template <class Element>
Element* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? data_of<Element>(tensor) : nullptr;
}

template <class Element>
const Element* const_data_or_null(const Tensor& tensor) {
  return tensor.defined() ? const_data_of<Element>(tensor) : nullptr;
}

// The tensor, contiguous and in this dtype; itself if it already is.
inline Tensor contiguous_as(const Tensor& tensor, at::ScalarType type) {
  return tensor.to(type).contiguous();
}

// The tensor as the device's kernels take it beside tables of the dtype.
template <class Device>
Tensor as_input(const Tensor& tensor, at::ScalarType table) {
  return contiguous_as(tensor, Device::input_type(tensor.scalar_type(), table));
}

// A tensor whose last dimension is contiguous, whatever its other strides.
inline Tensor with_contiguous_columns(const Tensor& table) {
  return table.stride(-1) == 1 || table.size(-1) <= 1 ? table : table.contiguous();
}

template <class Element>
Rows<const Element> rows_of(const Tensor& table) {
  return {const_data_of<Element>(table), table.stride(0)};
}

template <class Element>
Rows<Element> mutable_rows_of(const Tensor& table) {
  return {data_of<Element>(table), table.stride(0)};
}

// A mask as the kernels take it: contiguous, or undefined if there is none.
inline Tensor contiguous_mask(const std::optional<Tensor>& mask) {
  return is_given(mask) ? mask->contiguous() : Tensor();
}

// Checks that the device's kernels can sort this many indices of this many rows.
template <class Device>
void check_sortable(const char* op, const Tensor& table, int64_t indices, int64_t rows) {
  TORCH_CHECK_VALUE(indices <= Device::kMaxSortable && rows <= Device::kMaxSortable, op,
                    ": expected at most ", Device::kMaxSortable, " indices and table rows on ",
                    table.device(), ", got ", indices, " indices of ", rows, " rows");
}

// A coalesced sparse gradient of a table with this many rows: ids (1, distinct) ascending, values
// (distinct, parts, width).
inline Tensor sparse_gradient(int64_t rows, const Tensor& ids, const Tensor& values) {
  return at::_sparse_coo_tensor_with_dims_and_tensors(
      /*sparse_dim=*/1, /*dense_dim=*/2, {rows, values.size(1), values.size(2)}, ids, values,
      values.options().layout(at::kSparse), /*is_coalesced=*/true);
}

}  // namespace peer::ops
