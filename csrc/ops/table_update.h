// The operators that update the rows of a table in place: rowwise_adagrad_, sgd_ and rowwise_adam_.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peer::ops {

using at::Tensor;

// The gradient that a table (N, parts, width) is updated by. Part j of its row r is the sum of
// coefficients[j, pair]·source[pair / pairs_per_row, j] over the pairs with indices[pair] == r,
// where pairs_per_row is indices.numel() / source.size(0). Without coefficients they are one;
// without indices, row r is source[r]. A table (N, width) has one part, which is no dimension of
// the source and the coefficients either.
struct RowGradient {
  const std::optional<Tensor>& indices;
  const Tensor& source;
  const std::optional<Tensor>& coefficients;
};

// How 16-bit tables are rounded: to nearest without a seed, else stochastically, with random bits
// from the seed, the number of the step and a number for the table.
struct Rounding {
  std::optional<int64_t> seed;
  int64_t step;
  int64_t stream;
};

// What every kernel of the operators requires of its arguments, whatever the device. Reads no data.
void check_rowwise_adagrad(const Tensor& table,
                           const Tensor& sum_of_squares,
                           const RowGradient& gradient);
void check_sgd(const Tensor& table,
               const std::optional<Tensor>& momentum_buffer,
               const RowGradient& gradient,
               double momentum);
void check_rowwise_adam(const Tensor& table,
                        const Tensor& first_moment,
                        const Tensor& second_moment,
                        const Tensor& row_steps,
                        const RowGradient& gradient);

}  // namespace peer::ops
