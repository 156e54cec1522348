#include "nn/growth.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/types.h>

#include "peer/functional.h"

namespace peer::nn {

using torch::Tensor;

void require_growable(const char* name, const Tensor& parameter) {
  TORCH_CHECK(!parameter.grad().defined(), "cannot grow ", name,
              ": its gradient has the old shape; call zero_grad() first");
  TORCH_CHECK(!torch::autograd::impl::try_get_grad_accumulator(parameter), "cannot grow ", name,
              ": a graph of autograd holds it at the old shape; delete old losses and outputs");
}

void append_rows(Tensor& parameter, int64_t dim, const Tensor& rows) {
  const torch::NoGradGuard no_grad;
  const Tensor old = parameter.variable_data();
  const Tensor larger = dim == 0 ? append_zero_rows(old, rows.size(0))
                                 : torch::cat({old, torch::empty_like(rows, old.options())}, dim);
  larger.narrow(dim, old.size(dim), rows.size(dim)).copy_(rows);
  parameter.set_data(larger);
  torch::autograd::impl::bump_version(parameter);
}

}  // namespace peer::nn
