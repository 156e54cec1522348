#include "ops/cuda/expert_mlp.h"

#include <torch/library.h>

#include "kernels/cuda/expert_mlp.h"
#include "ops/cuda/common.h"

namespace peer::ops::cuda {

namespace {

struct Cuda : Device {
  static void forward(const Experts& experts, const TokenOutputs& tokens) {
    with_table_and_input_type(
        experts.type(), tokens.x.scalar_type(), [&]<class Table, class Input>() {
          expert_mlp_forward(forward_arguments<Table, Input>(experts, tokens), current_context());
        });
  }

  static void backward(const Experts& experts, const TokenGradients& tokens) {
    run_backward(experts, tokens);
  }

  static Tensor backward_and_sum(const Experts& experts,
                                 const TokenGradients& tokens,
                                 const TableGradient& gradient,
                                 at::TensorList sources,
                                 const at::TensorOptions& like) {
    run_backward(experts, tokens);
    return gradient.sum(tokens.coefficients, sources, like);
  }
};

}  // namespace

void run_backward(const Experts& experts, const TokenGradients& tokens) {
  with_table_and_input_type(
      experts.type(), tokens.grad_out.scalar_type(), [&]<class Table, class Input>() {
        expert_mlp_backward(backward_arguments<Table, Input>(experts, tokens), current_context());
      });
}

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("expert_mlp", ExpertMlpOp::kernel<expert_mlp_on<Cuda>>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::kernel<expert_mlp_backward_on<Cuda>>);
}

}  // namespace peer::ops::cuda
