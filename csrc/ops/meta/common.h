#pragma once

#include <ATen/ops/empty.h>

namespace peer::ops {

// A tensor like this one if it is wanted, else undefined.
inline at::Tensor empty_if(bool is_wanted, const at::Tensor& like) {
  return is_wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::Tensor();
}

}  // namespace peer::ops
