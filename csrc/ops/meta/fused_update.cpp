#include "ops/fused_update.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/meta/common.h"

namespace peer::ops {

namespace {

template <class Rule>
TwoTensors fused_update_meta(const FusedUpdateArguments<Rule>& args) {
  check_fused_update(args);
  return {empty_if(true, args.x), empty_if(true, args.weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("expert_mlp_backward_rowwise_adagrad_",
         FusedRowwiseAdagradOp::kernel<fused_update_meta<RowwiseAdagrad>>);
  m.impl("expert_mlp_backward_sgd_", FusedSgdOp::kernel<fused_update_meta<Sgd>>);
  m.impl("expert_mlp_backward_rowwise_adam_",
         FusedRowwiseAdamOp::kernel<fused_update_meta<RowwiseAdam>>);
}

}  // namespace peer::ops
