#include "ops/table_update.h"

#include <torch/library.h>

namespace peer::ops {

// The operators return nothing: a meta kernel only checks.
TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("rowwise_adagrad_", RowwiseAdagrad::kernel<check_rowwise_adagrad>);
  m.impl("sgd_", Sgd::kernel<check_sgd>);
  m.impl("rowwise_adam_", RowwiseAdam::kernel<check_rowwise_adam>);
}

}  // namespace peer::ops
