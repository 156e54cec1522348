// The operators that compute the backward pass of expert_mlp and update its table by the gradient,
// which is not stored: expert_mlp_backward_rowwise_adagrad_, expert_mlp_backward_sgd_ and
// expert_mlp_backward_rowwise_adam_.
#pragma once

#include <tuple>

#include "ops/expert_mlp.h"
#include "ops/table_update.h"

namespace peer::ops {

using TwoTensors = std::tuple<Tensor, Tensor>;

template <class Rule>
constexpr const char* kFusedName = nullptr;
template <>
inline constexpr const char* kFusedName<RowwiseAdagrad> =
    "peer::expert_mlp_backward_rowwise_adagrad_";
template <>
inline constexpr const char* kFusedName<Sgd> = "peer::expert_mlp_backward_sgd_";
template <>
inline constexpr const char* kFusedName<RowwiseAdam> = "peer::expert_mlp_backward_rowwise_adam_";

// frozen: (N,) bool. Frozen rows are not updated.
template <class Rule>
struct FusedUpdateArguments : ExpertMlpBackwardInputs {
  static constexpr const char* kName = kFusedName<Rule>;
  typename Rule::State state;
  typename Rule::Options options;
  Rounding rounding;
  const std::optional<Tensor>& frozen;
};

// Results: the gradients of x and of the weights.
using FusedRowwiseAdagradOp = Operator<FusedUpdateArguments<RowwiseAdagrad>,
                                       TwoTensors(const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  const Tensor&,
                                                  std::string_view,
                                                  const Tensor&,
                                                  double,
                                                  double,
                                                  double,
                                                  std::optional<int64_t>,
                                                  int64_t,
                                                  int64_t,
                                                  const std::optional<Tensor>&)>;
using FusedSgdOp = Operator<FusedUpdateArguments<Sgd>,
                            TwoTensors(const Tensor&,
                                       const Tensor&,
                                       const Tensor&,
                                       const Tensor&,
                                       const Tensor&,
                                       const Tensor&,
                                       const Tensor&,
                                       std::string_view,
                                       const std::optional<Tensor>&,
                                       double,
                                       double,
                                       bool,
                                       double,
                                       std::optional<int64_t>,
                                       int64_t,
                                       int64_t,
                                       const std::optional<Tensor>&)>;
using FusedRowwiseAdamOp = Operator<FusedUpdateArguments<RowwiseAdam>,
                                    TwoTensors(const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               std::string_view,
                                               const Tensor&,
                                               const Tensor&,
                                               const Tensor&,
                                               double,
                                               double,
                                               double,
                                               double,
                                               double,
                                               std::optional<int64_t>,
                                               int64_t,
                                               int64_t,
                                               const std::optional<Tensor>&)>;

// The checks that every device needs. They read no data.
template <class Rule>
Activation check_fused_update(const FusedUpdateArguments<Rule>& args) {
  const Activation activation = check_expert_mlp_backward(args, args.hidden, args.gate);
  check_rows(args.kName, "table", args.table);
  check_state(args.kName, args.table, args.state, args.options);
  return activation;
}

}  // namespace peer::ops
