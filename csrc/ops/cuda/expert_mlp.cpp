#include "ops/device/expert_mlp.h"

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
    with_table_and_input_type(
        experts.type(), tokens.grad_out.scalar_type(), [&]<class Table, class Input>() {
          expert_mlp_backward(backward_arguments<Table, Input>(experts, tokens), current_context());
        });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("expert_mlp", ExpertMlpOp::kernel<expert_mlp_on<Cuda>>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::kernel<expert_mlp_backward_on<Cuda>>);
  m.impl("expert_mlp_backward_coefficients",
         ExpertMlpBackwardCoefficientsOp::kernel<expert_mlp_backward_coefficients_on<Cuda>>);
}

}  // namespace peer::ops::cuda
