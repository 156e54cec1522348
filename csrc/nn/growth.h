// Parameters that get more rows and keep their identity, so that optimizers, hooks and modules that
// share them go on holding them.
#pragma once

#include <ATen/core/Tensor.h>

namespace peer::nn {

// Throws c10::Error if the parameter has a gradient, or if a graph of autograd holds it at its
// present shape.
void require_growable(const char* name, const at::Tensor& parameter);

// Appends rows, in dimension `dim`, to a parameter that can grow. A table on huge pages is not
// copied. A graph that saved the parameter notices the change.
void append_rows(at::Tensor& parameter, int64_t dim, const at::Tensor& rows);

}  // namespace peer::nn
