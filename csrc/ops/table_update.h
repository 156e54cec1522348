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

// What the rules keep for a table, and their numbers.

struct RowwiseAdagrad {
  static constexpr const char* kName = "peer::rowwise_adagrad_";
  struct State {
    const Tensor& sum_of_squares;
  };
  struct Options {
    double lr, eps, weight_decay;
  };
};

struct Sgd {
  static constexpr const char* kName = "peer::sgd_";
  struct State {
    const std::optional<Tensor>& momentum_buffer;
  };
  struct Options {
    double lr, momentum;
    bool nesterov;
    double weight_decay;
  };
};

struct RowwiseAdam {
  static constexpr const char* kName = "peer::rowwise_adam_";
  struct State {
    const Tensor& first_moment;
    const Tensor& second_moment;
    const Tensor& row_steps;
  };
  struct Options {
    double lr, beta1, beta2, eps, weight_decay;
  };
};

// frozen: (N,) bool. Frozen rows are not updated, whatever their gradient.
template <class Rule>
struct UpdateArguments {
  static constexpr const char* kName = Rule::kName;
  const Tensor& table;
  typename Rule::State state;
  RowGradient gradient;
  typename Rule::Options options;
  Rounding rounding;
  const std::optional<Tensor>& frozen;
};

using RowwiseAdagradOp = Operator<UpdateArguments<RowwiseAdagrad>,
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
using SgdOp = Operator<UpdateArguments<Sgd>,
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
using RowwiseAdamOp = Operator<UpdateArguments<RowwiseAdam>,
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

void check_state(const char* op,
                 const Tensor& table,
                 const RowwiseAdagrad::State& state,
                 const RowwiseAdagrad::Options& options);
void check_state(const char* op,
                 const Tensor& table,
                 const Sgd::State& state,
                 const Sgd::Options& options);
void check_state(const char* op,
                 const Tensor& table,
                 const RowwiseAdam::State& state,
                 const RowwiseAdam::Options& options);

// A table that is written in place: its rows are contiguous and do not overlap.
void check_rows(const char* op, const char* name, const Tensor& tensor);

void check_gradient(const char* op,
                    const Tensor& table,
                    const RowGradient& gradient,
                    const std::optional<Tensor>& frozen);

template <class Rule>
void check_update(const UpdateArguments<Rule>& args) {
  check_gradient(args.kName, args.table, args.gradient, args.frozen);
  check_state(args.kName, args.table, args.state, args.options);
}

}  // namespace peer::ops
