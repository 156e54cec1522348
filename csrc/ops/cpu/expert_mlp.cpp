#include "ops/device/expert_mlp.h"

#include <torch/library.h>

#include "ops/cpu/common.h"

namespace peer::ops::cpu {

namespace {

// A token's pass takes tens of microseconds at the paper's sizes, so a few tokens outweigh waking a
// thread.
constexpr int64_t kTokensPerTask = 4;

// Fewer tokens than this are cut into parts, so that even one gives work to several threads.
constexpr int64_t kFewTokens = 8;

struct Cpu : Device {
  static void forward(const Experts& experts, const TokenOutputs& tokens) {
    with_table_type(experts.type(), [&]<class Table>() {
      using Real = accumulation_t<Table>;
      const auto pass = forward_pass<Table, Real>(experts, tokens);
      const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
      const int64_t parts = parts_per_token(pass.experts_per_token);
      if (pass.tokens < kFewTokens && parts > 1) {
        const Tensor parts_out = at::empty({pass.tokens * parts, pass.dim}, tokens.out.options());
        Real* const sums = data_of<Real>(parts_out);
        at::parallel_for(0, pass.tokens * parts, 1, [&](int64_t first, int64_t last) {
          kernel.token_parts_forward(pass, sums, first, last);
        });
        kernel.add_token_parts(pass, sums, 0, pass.tokens);
      } else {
        at::parallel_for(0, pass.tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
          kernel.token_forward(pass, first, last);
        });
      }
    });
  }

  static void backward(const Experts& experts, const TokenGradients& tokens) {
    with_table_type(experts.type(), [&]<class Table>() {
      const auto pass = backward_pass<Table, accumulation_t<Table>>(experts, tokens);
      const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
      at::parallel_for(0, pass.tokens, kTokensPerTask, [&](int64_t first, int64_t last) {
        kernel.token_backward(pass, first, last);
      });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("expert_mlp", ExpertMlpOp::kernel<expert_mlp_on<Cpu>>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::kernel<expert_mlp_backward_on<Cpu>>);
  m.impl("expert_mlp_backward_coefficients",
         ExpertMlpBackwardCoefficientsOp::kernel<expert_mlp_backward_coefficients_on<Cpu>>);
}

}  // namespace peer::ops::cpu
