#include "ops/expert_mlp.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/cpu/glue.h"

namespace peer::ops::cpu {

namespace {

// A token's pass takes tens of microseconds at the paper's sizes, so a few tokens outweigh waking a
// thread.
constexpr int64_t kTokensPerTask = 4;

// Fewer tokens than this are cut into parts, so that even one gives work to several threads.
constexpr int64_t kFewTokens = 8;

// What the token pass reads in both directions, as the kernels want it.
struct Experts {
  Experts(const char* op,
          const Tensor& given_indices,
          const Tensor& given_weights,
          const Tensor& given_down,
          const Tensor& given_up,
          const std::optional<Tensor>& given_gate)
      : indices(given_indices.contiguous()),
        weights(contiguous_as(given_weights, accumulation_type(given_down.scalar_type()))),
        w_down(with_contiguous_rows(given_down)),
        w_up(with_contiguous_rows(given_up)),
        w_gate(given_gate.has_value() ? with_contiguous_rows(*given_gate) : Tensor()) {
    check_index_range(op, indices, given_down.size(0));
  }

  template <class Table>
  Rows<const Table> gate_rows() const {
    return w_gate.defined() ? rows_of<Table>(w_gate) : Rows<const Table>{};
  }

  Tensor indices, weights, w_down, w_up;
  Tensor w_gate;  // undefined without one
};

std::tuple<Tensor, Tensor, Tensor> expert_mlp_cpu(const Tensor& x,
                                                  const Tensor& weights,
                                                  const Tensor& indices,
                                                  const Tensor& w_down,
                                                  const Tensor& w_up,
                                                  const std::optional<Tensor>& w_gate,
                                                  std::string_view activation,
                                                  bool /*sparse_grad*/) {
  const Activation parsed = check_expert_mlp(x, weights, indices, w_down, w_up, w_gate, activation);
  const at::ScalarType type = accumulation_type(w_down.scalar_type());
  const at::TensorOptions accumulated = x.options().dtype(type);
  const Experts experts("expert_mlp", indices, weights, w_down, w_up, w_gate);
  const int64_t parts = parts_per_token(indices.size(1));
  const bool shares_tokens = x.size(0) < kFewTokens && parts > 1;
  const Tensor inputs = contiguous_as(x, type);

  const Tensor out = at::empty({x.size(0), w_up.size(1)}, accumulated);
  const Tensor parts_out =
      at::empty({shares_tokens ? x.size(0) * parts : 0, w_up.size(1)}, accumulated);
  const Tensor hidden = at::empty(indices.sizes(), accumulated);
  const Tensor gate =
      w_gate.has_value() ? at::empty(indices.sizes(), accumulated) : at::empty({0}, accumulated);
  with_table_type(w_down.scalar_type(), [&]<class Table>() {
    using Real = accumulation_t<Table>;
    const TokenForward<Table> pass = {
        .experts_per_token = indices.size(1),
        .dim = x.size(1),
        .dim_out = w_up.size(1),
        .activation = parsed,
        .x = const_data_of<Real>(inputs),
        .weights = const_data_of<Real>(experts.weights),
        .indices = experts.indices.const_data_ptr<int64_t>(),
        .w_down = rows_of<Table>(experts.w_down),
        .w_up = rows_of<Table>(experts.w_up),
        .w_gate = experts.gate_rows<Table>(),
        .out = data_of<Real>(out),
        .hidden = data_of<Real>(hidden),
        .gate = data_of<Real>(gate),
        .parts_out = data_of<Real>(parts_out),
    };
    const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
    if (shares_tokens) {
      at::parallel_for(0, x.size(0) * parts, 1, [&](int64_t first, int64_t last) {
        kernel.token_parts_forward(pass, first, last);
      });
      kernel.add_token_parts(pass, 0, x.size(0));
    } else {
      at::parallel_for(0, x.size(0), kTokensPerTask, [&](int64_t first, int64_t last) {
        kernel.token_forward(pass, first, last);
      });
    }
  });
  return {out.to(x.scalar_type()), hidden, gate};
}

// The gradients with respect to what belongs to tokens, and the coefficients that the tables'
// gradients are made of, in the accumulation dtype.
struct TokenGradients {
  TokenGradients(const char* op,
                 const Tensor& given_grad_out,
                 const Tensor& x,
                 const Tensor& weights,
                 const Tensor& given_indices,
                 const Tensor& w_down,
                 const Tensor& w_up,
                 const std::optional<Tensor>& w_gate,
                 const Tensor& hidden,
                 const Tensor& gate,
                 std::string_view activation,
                 bool wants_grad_x)
      : type(accumulation_type(w_down.scalar_type())) {
    const Activation parsed = check_expert_mlp_backward(op, x, weights, given_indices, w_down, w_up,
                                                        w_gate, hidden, gate, activation);
    check_expert_mlp_grad_out(op, given_grad_out, x, w_up);
    const at::TensorOptions accumulated = x.options().dtype(type);
    const Experts experts(op, given_indices, weights, w_down, w_up, w_gate);
    indices = experts.indices;
    grad_out = contiguous_as(given_grad_out, type);
    const Tensor hidden_values = contiguous_as(hidden, type);
    const Tensor gate_values = w_gate.has_value() ? contiguous_as(gate, type) : Tensor();

    grad_x = wants_grad_x ? at::empty(x.sizes(), accumulated) : Tensor();
    grad_weights = at::empty(indices.sizes(), accumulated);
    down_coefficients = at::empty(indices.sizes(), accumulated);
    up_coefficients = at::empty(indices.sizes(), accumulated);
    gate_coefficients = w_gate.has_value() ? at::empty(indices.sizes(), accumulated) : Tensor();
    with_table_type(w_down.scalar_type(), [&]<class Table>() {
      using Real = accumulation_t<Table>;
      const TokenBackward<Table> pass = {
          .experts_per_token = indices.size(1),
          .dim = x.size(1),
          .dim_out = w_up.size(1),
          .activation = parsed,
          .grad_out = const_data_of<Real>(grad_out),
          .weights = const_data_of<Real>(experts.weights),
          .indices = experts.indices.const_data_ptr<int64_t>(),
          .w_down = rows_of<Table>(experts.w_down),
          .w_up = rows_of<Table>(experts.w_up),
          .w_gate = experts.gate_rows<Table>(),
          .hidden = const_data_of<Real>(hidden_values),
          .gate = gate_values.defined() ? const_data_of<Real>(gate_values) : nullptr,
          .grad_x = grad_x.defined() ? data_of<Real>(grad_x) : nullptr,
          .grad_weights = data_of<Real>(grad_weights),
          .down_coefficients = data_of<Real>(down_coefficients),
          .gate_coefficients =
              gate_coefficients.defined() ? data_of<Real>(gate_coefficients) : nullptr,
          .up_coefficients = data_of<Real>(up_coefficients),
      };
      const ExpertKernels<Table>& kernel = kernels().template experts<Table>();
      at::parallel_for(0, x.size(0), kTokensPerTask, [&](int64_t first, int64_t last) {
        kernel.token_backward(pass, first, last);
      });
    });
  }

  at::ScalarType type;
  Tensor indices, grad_out;  // as the kernels want them
  Tensor grad_x;             // undefined where not wanted
  Tensor grad_weights, down_coefficients, up_coefficients;
  Tensor gate_coefficients;  // undefined without gate
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_cpu(
    const Tensor& grad_out,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation,
    bool sparse_grad,
    std::array<bool, 5> output_mask) {
  const TokenGradients tokens("expert_mlp_backward", grad_out, x, weights, indices, w_down, w_up,
                              w_gate, hidden, gate, activation, output_mask[kGradX]);
  Tensor grad_down, grad_up, grad_gate;
  const bool wants_grad_gate = output_mask[kGradGate] && w_gate.has_value();
  if (output_mask[kGradDown] || output_mask[kGradUp] || wants_grad_gate) {
    const TableGradient gradient(tokens.indices, w_down.size(0), sparse_grad);
    if (output_mask[kGradDown] || wants_grad_gate) {
      const Tensor inputs = contiguous_as(x, tokens.type);
      grad_down = output_mask[kGradDown]
                      ? gradient.sum(tokens.down_coefficients, inputs, w_down.options())
                      : Tensor();
      grad_gate = wants_grad_gate
                      ? gradient.sum(tokens.gate_coefficients, inputs, w_gate->options())
                      : Tensor();
    }
    grad_up = output_mask[kGradUp]
                  ? gradient.sum(tokens.up_coefficients, tokens.grad_out, w_up.options())
                  : Tensor();
  }
  return {tokens.grad_x.defined() ? tokens.grad_x.to(x.scalar_type()) : Tensor(),
          output_mask[kGradWeights] ? tokens.grad_weights.to(weights.scalar_type()) : Tensor(),
          grad_down, grad_up, grad_gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_coefficients_cpu(
    const Tensor& grad_out,
    const Tensor& x,
    const Tensor& weights,
    const Tensor& indices,
    const Tensor& w_down,
    const Tensor& w_up,
    const std::optional<Tensor>& w_gate,
    const Tensor& hidden,
    const Tensor& gate,
    std::string_view activation) {
  const TokenGradients tokens("expert_mlp_backward_coefficients", grad_out, x, weights, indices,
                              w_down, w_up, w_gate, hidden, gate, activation,
                              /*wants_grad_x=*/true);
  return {tokens.grad_x.to(x.scalar_type()), tokens.grad_weights.to(weights.scalar_type()),
          tokens.down_coefficients, tokens.up_coefficients,
          w_gate.has_value() ? tokens.gate_coefficients
                             : at::empty({0}, x.options().dtype(tokens.type))};
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("expert_mlp", expert_mlp_cpu);
  m.impl("expert_mlp_backward", expert_mlp_backward_cpu);
  m.impl("expert_mlp_backward_coefficients", expert_mlp_backward_coefficients_cpu);
}

}  // namespace peer::ops::cpu
