#pragma once

#include <ATen/ops/empty.h>

namespace peer::ops {

// A tensor like this one if it is wanted, else undefined.
inline at::Tensor empty_if(bool is_wanted, const at::Tensor& like, at::ScalarType type) {
  return is_wanted ? at::empty_symint(like.sym_sizes(), like.options().dtype(type)) : at::Tensor();
}

inline at::Tensor empty_if(bool is_wanted, const at::Tensor& like) {
  return empty_if(is_wanted, like, like.scalar_type());
}

}  // namespace peer::ops
