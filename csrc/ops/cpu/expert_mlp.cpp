#include "ops/cpu/expert_mlp.h"

#include <torch/library.h>

#include "kernels/cpu/expert_mlp.h"
#include "ops/cpu/common.h"

namespace peer::ops::cpu {

namespace {

// A token's pass takes tens of microseconds at the paper's sizes, so a few tokens are worth the
// cost of waking a thread.
constexpr int64_t kTokensPerTask = 4;

// With fewer tokens than this, several threads share the splits of a token.
constexpr int64_t kFewTokens = 8;

struct Cpu : Device {
  static void forward(const Experts& experts, const TokenOutputs& tokens) {
    with_table_type(experts.type(), [&]<class Table>() {
      using Real = accumulation_t<Table>;
      const auto pass = forward_arguments<Table, Real>(experts, tokens);
      const auto& kernel = kernels<ExpertMlpKernels>().of<Table>();
      const int64_t splits = splits_per_token(pass.experts_per_token);
      if (pass.tokens < kFewTokens && splits > 1) {
        const Tensor partial_sums =
            at::empty({pass.tokens * splits, pass.dim}, tokens.out.options());
        Real* const sums = data_of<Real>(partial_sums);
        parallel_for(pass.tokens * splits, 1, [&](int64_t first, int64_t last) {
          kernel.forward_splits(pass, sums, first, last);
        });
        kernel.add_splits(pass, sums, 0, pass.tokens);
      } else {
        parallel_for(pass.tokens, kTokensPerTask,
                     [&](int64_t first, int64_t last) { kernel.forward(pass, first, last); });
      }
    });
  }

  static void backward(const Experts& experts, const TokenGradients& tokens) {
    run_backward(experts, tokens, nullptr);
  }

  static Tensor backward_and_sum(const Experts& experts,
                                 const TokenGradients& tokens,
                                 const TableGradient& gradient,
                                 at::TensorList sources,
                                 const at::TensorOptions& like) {
    const auto pass = [&](const RangeBody& after_pairs) {
      run_backward(experts, tokens, after_pairs);
    };
    return gradient.sum_during(pass, tokens.coefficients, sources, like);
  }
};

}  // namespace

void run_backward(const Experts& experts,
                  const TokenGradients& tokens,
                  const RangeBody& after_pairs) {
  AfterPairs after;
  if (after_pairs != nullptr) {
    after.context = &after_pairs;
    after.call = [](const void* body, int64_t first, int64_t last) {
      (*static_cast<const RangeBody*>(body))(first, last);
    };
  }
  with_table_type(experts.type(), [&]<class Table>() {
    const auto pass = backward_arguments<Table, accumulation_t<Table>>(experts, tokens);
    const auto& kernel = kernels<ExpertMlpKernels>().of<Table>();
    parallel_for(pass.tokens, kTokensPerTask,
                 [&](int64_t first, int64_t last) { kernel.backward(pass, after, first, last); });
  });
}

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("expert_mlp", ExpertMlpOp::kernel<expert_mlp_on<Cpu>>);
  m.impl("expert_mlp_backward", ExpertMlpBackwardOp::kernel<expert_mlp_backward_on<Cpu>>);
}

}  // namespace peer::ops::cpu
