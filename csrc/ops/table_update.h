// The operators that update the rows of a table in place: rowwise_adagrad_, sgd_ and rowwise_adam_.
// kernels/table_update.h has their mathematics. A row whose gradient is zero in all parts is not
// updated, in either form of gradient: neither the row nor its state is written.
#pragma once

#include <optional>

#include "ops/operator.h"

namespace peer::ops {

// The gradient of a table (N, parts, width). Part j of its row r is the sum of
// coefficients[j, pair]·source[pair / pairs_per_row, j] over the pairs with indices[pair] == r,
// where pairs_per_row is indices.numel() / source.size(0). Without coefficients, each is one.
// Without indices, row r is source[r]. A table (N, width) has one part; then neither source nor
// coefficients have a dimension for parts.
struct RowGradient {
  const std::optional<Tensor>& indices;
  const Tensor& source;
  const std::optional<Tensor>& coefficients;
};

// How 16-bit tables are rounded: to nearest without a seed, else stochastically. The random bits
// depend on the seed, the step and the stream, a number for the table.
struct Rounding {
  std::optional<int64_t> seed;
  int64_t step;
  int64_t stream;
};

// frozen: (N,) bool. Frozen rows are not updated, whatever their gradient.
struct RowwiseAdagradArguments {
  static constexpr const char* kName = "peer::rowwise_adagrad_";
  const Tensor& table;
  const Tensor& sum_of_squares;
  RowGradient gradient;
  double lr, eps, weight_decay;
  Rounding rounding;
  const std::optional<Tensor>& frozen;
};

struct SgdArguments {
  static constexpr const char* kName = "peer::sgd_";
  const Tensor& table;
  const std::optional<Tensor>& momentum_buffer;
  RowGradient gradient;
  double lr, momentum;
  bool nesterov;
  double weight_decay;
  Rounding rounding;
  const std::optional<Tensor>& frozen;
};

struct RowwiseAdamArguments {
  static constexpr const char* kName = "peer::rowwise_adam_";
  const Tensor& table;
  const Tensor& first_moment;
  const Tensor& second_moment;
  const Tensor& row_steps;
  RowGradient gradient;
  double lr, beta1, beta2, eps, weight_decay;
  Rounding rounding;
  const std::optional<Tensor>& frozen;
};

using RowwiseAdagradOp = Operator<RowwiseAdagradArguments,
                                  void(const Tensor&,
                                       const Tensor&,
                                       const std::optional<Tensor>&,
                                       const Tensor&,
                                       const std::optional<Tensor>&,
                                       double,
                                       double,
                                       double,
                                       std::optional<int64_t>,
                                       int64_t,
                                       int64_t,
                                       const std::optional<Tensor>&)>;
using SgdOp = Operator<SgdArguments,
                       void(const Tensor&,
                            const std::optional<Tensor>&,
                            const std::optional<Tensor>&,
                            const Tensor&,
                            const std::optional<Tensor>&,
                            double,
                            double,
                            bool,
                            double,
                            std::optional<int64_t>,
                            int64_t,
                            int64_t,
                            const std::optional<Tensor>&)>;
using RowwiseAdamOp = Operator<RowwiseAdamArguments,
                               void(const Tensor&,
                                    const Tensor&,
                                    const Tensor&,
                                    const Tensor&,
                                    const std::optional<Tensor>&,
                                    const Tensor&,
                                    const std::optional<Tensor>&,
                                    double,
                                    double,
                                    double,
                                    double,
                                    double,
                                    std::optional<int64_t>,
                                    int64_t,
                                    int64_t,
                                    const std::optional<Tensor>&)>;

// The checks are those that every device needs. They read no data.
void check_rowwise_adagrad(const RowwiseAdagradArguments& args);
void check_sgd(const SgdArguments& args);
void check_rowwise_adam(const RowwiseAdamArguments& args);

}  // namespace peer::ops
