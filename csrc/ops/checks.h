// Argument checks that the operators share. A message names the operator (`op`, with its
// namespace), the argument, what was expected and what was got.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>

namespace peer::ops {

// float for the types up to 32 bits, double for double.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op,
      ": expected ", name, " of dtype float32, float64, bfloat16 or float16, got ", type);
}

inline void check_same_dtype(const char* op,
                             const char* name,
                             const at::Tensor& tensor,
                             const char* other_name,
                             const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, ": expected ", name, " of ",
                   other_name, "'s dtype ", other.scalar_type(), ", got ", tensor.scalar_type());
}

inline void check_same_device(const char* op,
                              const char* name,
                              const at::Tensor& tensor,
                              const char* other_name,
                              const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": expected ", name, " on ", other_name,
              "'s device ", other.device(), ", got ", tensor.device());
}

inline void check_index_dtype(const char* op, const at::Tensor& indices) {
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, op,
                   ": expected indices of dtype int64, got ", indices.scalar_type());
}

// Whether all dimensions but the first are contiguous.
inline bool has_contiguous_rows(const at::Tensor& tensor) {
  c10::SymInt expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    if (tensor.sym_size(dim) != 1 && tensor.sym_stride(dim) != expected) {
      return tensor.sym_numel() == 0;
    }
    expected = expected * tensor.sym_size(dim);
  }
  return true;
}

// Whether an optional argument was given. Boxed calls may pass an undefined tensor for None.
inline bool is_given(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

inline void check_strided(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": expected ", name,
                    " to be dense, got layout ", tensor.layout());
}

// Which rows of the table are frozen, if any.
inline void check_frozen(const char* op,
                         const std::optional<at::Tensor>& frozen,
                         const at::Tensor& table) {
  if (!is_given(frozen)) {
    return;
  }
  TORCH_CHECK_VALUE(frozen->dim() == 1 && frozen->sym_size(0) == table.sym_size(0), op,
                    ": expected frozen of shape [", table.sym_size(0), "] to match table, got ",
                    frozen->sym_sizes());
  TORCH_CHECK_TYPE(frozen->scalar_type() == at::kBool, op, ": expected frozen of dtype bool, got ",
                   frozen->scalar_type());
  check_same_device(op, "frozen", *frozen, "table", table);
}

}  // namespace peer::ops
