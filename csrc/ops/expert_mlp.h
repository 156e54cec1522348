// The operators of the experts: expert_mlp and expert_mlp_backward. Shapes are in
// peer/functional.h.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "kernels/activation.h"
#include "ops/operator.h"

namespace peer::ops {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// frozen: (N,) bool. Frozen rows have no gradient: derivatives treat them as constants.
struct ExpertMlpArguments {
  static constexpr const char* kName = "peer::expert_mlp";
  const Tensor& x;
  const Tensor& weights;
  const Tensor& indices;
  const Tensor& table;
  std::string_view activation;
  bool sparse_grad;
  const std::optional<Tensor>& frozen;
};

// What every backward pass takes. hidden and gate are results of expert_mlp.
struct ExpertMlpBackwardInputs {
  const Tensor& grad_out;
  const Tensor& x;
  const Tensor& weights;
  const Tensor& indices;
  const Tensor& table;
  const Tensor& hidden;
  const Tensor& gate;
  std::string_view activation;
};

struct ExpertMlpBackwardArguments : ExpertMlpBackwardInputs {
  static constexpr const char* kName = "peer::expert_mlp_backward";
  bool sparse_grad;
  std::array<bool, 3> output_mask;
  const std::optional<Tensor>& frozen;
  // The table's dtype, which is the default, or its accumulation dtype. See grad_table_type.
  std::optional<at::ScalarType> grad_table_dtype;
};

// Positions in the results of expert_mlp_backward and in its output_mask.
enum ExpertMlpGradient { kGradX, kGradWeights, kGradTable };

using ExpertMlpOp = Operator<ExpertMlpArguments,
                             ThreeTensors(const Tensor&,
                                          const Tensor&,
                                          const Tensor&,
                                          const Tensor&,
                                          std::string_view,
                                          bool,
                                          const std::optional<Tensor>&)>;
using ExpertMlpBackwardOp = Operator<ExpertMlpBackwardArguments,
                                     ThreeTensors(const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  std::string_view,
                                                  bool,
                                                  std::array<bool, 3>,
                                                  const std::optional<Tensor>&,
                                                  std::optional<at::ScalarType>)>;

// Nothing if no activation has the name.
std::optional<Activation> activation_named(std::string_view name);

// The parts of experts (..., parts, D) as views (..., D): down, gate and up, or down and up.
struct ExpertParts {
  ExpertParts() = default;
  explicit ExpertParts(const Tensor& experts);

  Tensor down, up;
  Tensor gate;  // undefined without one
};

inline bool has_gate(const Tensor& experts) { return experts.sym_size(-2) == 3; }

// The inputs of expert_mlp, which its backward operators take too.
struct ExpertMlpInputs {
  template <class Arguments>
  ExpertMlpInputs(const Arguments& args)
      : op(Arguments::kName),
        x(args.x),
        weights(args.weights),
        indices(args.indices),
        table(args.table),
        activation(args.activation),
        frozen(args.frozen) {}

  const char* op;  // for messages
  const Tensor& x;
  const Tensor& weights;
  const Tensor& indices;
  const Tensor& table;
  std::string_view activation;
  const std::optional<Tensor>& frozen;
};

// The checks are those that every device needs. They read no data. All return the parsed
// activation.
Activation check_expert_mlp(const ExpertMlpInputs& inputs);
Activation check_expert_mlp_backward(const ExpertMlpInputs& inputs,
                                     const Tensor& hidden,
                                     const Tensor& gate);

// The dtype of the table's gradient. In the accumulation dtype, the sum over retrievals is not
// rounded to 16 bits.
at::ScalarType grad_table_type(const ExpertMlpBackwardArguments& args);

// Torch's Tensor.grad_dtype of a 16-bit table, if it asks for the accumulation dtype. Torch
// converts gradients to any other dtype that it asks for.
std::optional<at::ScalarType> requested_grad_dtype(const Tensor& table);

// Only for kernels that compute: while compiled autograd records a graph, the incoming gradient is
// a placeholder whose shape may differ.
void check_expert_mlp_grad_out(const char* op, const Tensor& grad_out, const Tensor& x);

}  // namespace peer::ops
