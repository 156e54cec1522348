// From the options `device` and `dtype` to what tensors are made with.
#pragma once

#include <torch/types.h>

namespace peer::nn {

template <typename Options>
torch::TensorOptions factory(const Options& options) {
  return torch::TensorOptions().device(options.device()).dtype(options.dtype());
}

}  // namespace peer::nn
