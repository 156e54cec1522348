#include "ops/device/expert_mlp.h"

#include <torch/library.h>

#include "ops/cuda/glue.h"

namespace peer::ops::cuda {

namespace {

struct Cuda : Device {
  static void forward(const Experts& experts, const TokenOutputs& tokens) {
    with_table_and_input_type(experts.type(), tokens.x.scalar_type(),
                              [&]<class Table, class Input>() {
                                using Real = accumulation_t<Table>;
                                const TokenForward<Table, Input> pass = {
                                    .tokens = tokens.x.size(0),
                                    .experts = experts.count(),
                                    .experts_per_token = experts.per_token(),
                                    .dim = tokens.x.size(1),
                                    .dim_out = tokens.out.size(1),
                                    .activation = experts.activation,
                                    .x = const_data_of<Input>(tokens.x),
                                    .weights = const_data_of<Real>(experts.weights),
                                    .indices = experts.indices.const_data_ptr<int64_t>(),
                                    .w_down = rows_of<Table>(experts.w_down),
                                    .w_up = rows_of<Table>(experts.w_up),
                                    .w_gate = experts.gate_rows<Table>(),
                                    .out = data_of<Input>(tokens.out),
                                    .hidden = data_of<Real>(tokens.hidden),
                                    .gate = data_of<Real>(tokens.gate),
                                };
                                token_forward(pass, current_context());
                              });
  }

  static void backward(const Experts& experts, const TokenGradients& tokens) {
    with_table_and_input_type(
        experts.type(), tokens.grad_out.scalar_type(), [&]<class Table, class Input>() {
          using Real = accumulation_t<Table>;
          const TokenBackward<Table, Input> pass = {
              .tokens = tokens.grad_out.size(0),
              .experts = experts.count(),
              .experts_per_token = experts.per_token(),
              .dim = experts.w_down.size(1),
              .dim_out = experts.w_up.size(1),
              .activation = experts.activation,
              .grad_out = const_data_of<Input>(tokens.grad_out),
              .weights = const_data_of<Real>(experts.weights),
              .indices = experts.indices.const_data_ptr<int64_t>(),
              .w_down = rows_of<Table>(experts.w_down),
              .w_up = rows_of<Table>(experts.w_up),
              .w_gate = experts.gate_rows<Table>(),
              .hidden = const_data_of<Real>(tokens.hidden),
              .gate = const_data_or_null<Real>(tokens.gate),
              .grad_x = data_or_null<Input>(tokens.grad_x),
              .grad_weights = data_of<Real>(tokens.grad_weights),
              .down_coefficients = data_of<Real>(tokens.down_coefficients),
              .gate_coefficients = data_or_null<Real>(tokens.gate_coefficients),
              .up_coefficients = data_of<Real>(tokens.up_coefficients),
          };
          token_backward(pass, current_context());
        });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("expert_mlp", expert_mlp_on<Cuda>);
  m.impl("expert_mlp_backward", expert_mlp_backward_on<Cuda>);
  m.impl("expert_mlp_backward_coefficients", expert_mlp_backward_coefficients_on<Cuda>);
}

}  // namespace peer::ops::cuda
