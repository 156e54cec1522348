// A row that a single pair retrieved is updated by the pass over the tokens, as soon as that has
// read it. The other rows are updated afterwards.
#include "ops/device/fused_update.h"

#include <torch/library.h>

#include "ops/cpu/expert_mlp.h"
#include "ops/cpu/segment_update.h"

namespace peer::ops::cpu {

namespace {

struct Cpu : Device {
  static void backward(const Experts& experts, const TokenGradients& tokens) {
    run_backward(experts, tokens, nullptr);
  }

  template <class Table, class Source>
  static void backward_and_update(const Experts& experts,
                                  const TokenGradients& tokens,
                                  TableUpdate<Table, Source> update) {
    update.pairs_per_row = experts.per_token();
    const Segments segments = make_segments(experts.indices, experts.count(), update.frozen,
                                            OutputRows::by_owner, SinglePairs::apart);
    const SegmentUpdate segment_update(update, segments);
    run_backward(experts, tokens, [&](int64_t first, int64_t last) {
      segment_update.update_single_pairs(first, last);
    });
    segment_update.update_chunks();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("expert_mlp_backward_rowwise_adagrad_",
         FusedRowwiseAdagradOp::kernel<fused_update_on<Cpu, RowwiseAdagrad>>);
  m.impl("expert_mlp_backward_sgd_", FusedSgdOp::kernel<fused_update_on<Cpu, Sgd>>);
  m.impl("expert_mlp_backward_rowwise_adam_",
         FusedRowwiseAdamOp::kernel<fused_update_on<Cpu, RowwiseAdam>>);
}

}  // namespace peer::ops::cpu
