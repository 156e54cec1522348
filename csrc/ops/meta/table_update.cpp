#include "ops/table_update.h"

#include <torch/library.h>

namespace peer::ops {

// The operators return nothing: a meta kernel only checks.
TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("rowwise_adagrad_", RowwiseAdagradOp::kernel<check_update<RowwiseAdagrad>>);
  m.impl("sgd_", SgdOp::kernel<check_update<Sgd>>);
  m.impl("rowwise_adam_", RowwiseAdamOp::kernel<check_update<RowwiseAdam>>);
}

}  // namespace peer::ops
