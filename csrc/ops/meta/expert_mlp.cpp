#include "ops/expert_mlp.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/meta/common.h"

namespace peer::ops {

namespace {

at::TensorOptions accumulation_options(const Tensor& x, const Tensor& table) {
  return x.options().dtype(accumulation_type(table.scalar_type()));
}

ThreeTensors expert_mlp_meta(const ExpertMlpArguments& args) {
  check_expert_mlp(args);
  const at::TensorOptions options = accumulation_options(args.x, args.table);
  return {at::empty_symint(args.x.sym_sizes(), args.x.options()),
          at::empty_symint(args.indices.sym_sizes(), options),
          has_gate(args.table) ? at::empty_symint(args.indices.sym_sizes(), options)
                               : at::empty({0}, options)};
}

ThreeTensors expert_mlp_backward_meta(const ExpertMlpBackwardArguments& args) {
  check_expert_mlp_backward(args, args.hidden, args.gate);
  // Not a NotImplementedError: FakeTensor would replace that, and its message, by one of its own.
  TORCH_CHECK(!(args.sparse_grad && args.output_mask[kGradTable]),
              "peer::expert_mlp: sparse_grad=True works in eager mode only, because the number of "
              "retrieved experts is not known when a graph is traced; use sparse_grad=False with "
              "torch.compile");
  return {empty_if(args.output_mask[kGradX], args.x),
          empty_if(args.output_mask[kGradWeights], args.weights),
          empty_if(args.output_mask[kGradTable], args.table, grad_table_type(args))};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, Meta, m) {
  m.impl("expert_mlp", ExpertMlpOp::kernel<expert_mlp_meta>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::kernel<expert_mlp_backward_meta>);
}

}  // namespace peer::ops
