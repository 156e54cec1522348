#include "ops/device/fused_update.h"

#include <torch/library.h>

#include "kernels/cuda/table_update.h"
#include "ops/cuda/common.h"
#include "ops/cuda/expert_mlp.h"

namespace peer::ops::cuda {

namespace {

struct Cuda : Device {
  static void backward(const Experts& experts, const TokenGradients& tokens) {
    run_backward(experts, tokens);
  }

  template <class Table, class Source>
  static void backward_and_update(const Experts& experts,
                                  const TokenGradients& tokens,
                                  TableUpdate<Table, Source> update) {
    run_backward(experts, tokens);
    update.pairs_per_row = experts.per_token();
    const Context context = current_context();
    update_by_segments(
        update,
        make_segments(experts.indices.const_data_ptr<int64_t>(), experts.indices.numel(),
                      experts.count(), update.frozen, OutputRows::by_owner, context),
        context);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("expert_mlp_backward_rowwise_adagrad_",
         FusedRowwiseAdagradOp::kernel<fused_update_on<Cuda, RowwiseAdagrad>>);
  m.impl("expert_mlp_backward_sgd_", FusedSgdOp::kernel<fused_update_on<Cuda, Sgd>>);
  m.impl("expert_mlp_backward_rowwise_adam_",
         FusedRowwiseAdamOp::kernel<fused_update_on<Cuda, RowwiseAdam>>);
}

}  // namespace peer::ops::cuda
