#include "ops/device/expert_mlp.h"

#include <torch/library.h>

#include "ops/cpu/glue.h"

namespace peer::ops::cpu {

namespace {

// A token's pass takes tens of microseconds at the paper's sizes, so a few tokens outweigh waking a
// thread.
constexpr int64_t kTokensPerTask = 4;

// Fewer tokens than this are cut into parts, so that even one gives work to several threads.
constexpr int64_t kFewTokens = 8;

struct Cpu : Device {
  static void forward(const Experts& experts, const TokenOutputs& tokens) {
    const int64_t count = tokens.x.size(0);
    const int64_t parts = parts_per_token(experts.per_token());
    const bool shares_tokens = count < kFewTokens && parts > 1;
    const Tensor parts_out =
        at::empty({shares_tokens ? count * parts : 0, tokens.out.size(1)}, tokens.out.options());
    with_table_type(experts.type(), [&]<class Table>() {
      using Real = accumulation_t<Table>;
      const TokenForward<Table> pass = {
          .experts_per_token = experts.per_token(),
          .dim = tokens.x.size(1),
          .dim_out = tokens.out.size(1),
          .activation = experts.activation,
          .x = const_data_of<Real>(tokens.x),
          .weights = const_data_of<Real>(experts.weights),
          .indices = experts.indices.const_data_ptr<int64_t>(),
          .w_down = rows_of<Table>(experts.w_down),
          .w_up = rows_of<Table>(experts.w_up),
          .w_gate = experts.gate_rows<Table>(),
          .out = data_of<Real>(tokens.out),
          .hidden = data_of<Real>(tokens.hidden),
          .gate = data_of<Real>(tokens.gate),
          .parts_out = data_of<Real>(parts_out),
      };
      const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
      if (shares_tokens) {
        at::parallel_for(0, count * parts, 1, [&](int64_t first, int64_t last) {
          kernel.token_parts_forward(pass, first, last);
        });
        kernel.add_token_parts(pass, 0, count);
      } else {
        at::parallel_for(0, count, kTokensPerTask, [&](int64_t first, int64_t last) {
          kernel.token_forward(pass, first, last);
        });
      }
    });
  }

  static void backward(const Experts& experts, const TokenGradients& tokens) {
    with_table_type(experts.type(), [&]<class Table>() {
      using Real = accumulation_t<Table>;
      const TokenBackward<Table> pass = {
          .experts_per_token = experts.per_token(),
          .dim = experts.w_down.size(1),
          .dim_out = experts.w_up.size(1),
          .activation = experts.activation,
          .grad_out = const_data_of<Real>(tokens.grad_out),
          .weights = const_data_of<Real>(experts.weights),
          .indices = experts.indices.const_data_ptr<int64_t>(),
          .w_down = rows_of<Table>(experts.w_down),
          .w_up = rows_of<Table>(experts.w_up),
          .w_gate = experts.gate_rows<Table>(),
          .hidden = const_data_of<Real>(tokens.hidden),
          .gate = const_data_or_null<Real>(tokens.gate),
          .grad_x = data_or_null<Real>(tokens.grad_x),
          .grad_weights = data_of<Real>(tokens.grad_weights),
          .down_coefficients = data_of<Real>(tokens.down_coefficients),
          .gate_coefficients = data_or_null<Real>(tokens.gate_coefficients),
          .up_coefficients = data_of<Real>(tokens.up_coefficients),
      };
      const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
      at::parallel_for(
          0, tokens.grad_out.size(0), kTokensPerTask,
          [&](int64_t first, int64_t last) { kernel.token_backward(pass, first, last); });
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("expert_mlp", expert_mlp_on<Cpu>);
  m.impl("expert_mlp_backward", expert_mlp_backward_on<Cpu>);
  m.impl("expert_mlp_backward_coefficients", expert_mlp_backward_coefficients_on<Cpu>);
}

}  // namespace peer::ops::cpu
