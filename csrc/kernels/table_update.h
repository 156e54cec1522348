// The update of a table's rows by an optimizer as the kernels of every device take it.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

// How the gradient g of a part of a row changes the part w and its state. First, w is multiplied by
// decay_factor, 1 - (learning rate)·(weight decay). s and v are the part's own numbers, m is its
// momentum, and t is the row's number of steps:
//
//   rowwise_adagrad   s += mean(g²)
//                     w -= lr·g / (sqrt(s) + eps)
//   sgd               m = beta1·m + g with momentum, m = g without
//                     w -= lr·m, with nesterov lr·(g + beta1·m)
//   rowwise_adam      t += 1, once for all parts
//                     m = beta1·m + (1 - beta1)·g
//                     v = beta2·v + (1 - beta2)·mean(g²)
//                     w -= lr·m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
enum class Rule : int32_t { rowwise_adagrad, sgd, rowwise_adam };

template <class Table>
struct UpdateRule {
  using Real = accumulation_t<Table>;
  Rule rule;
  double lr, decay_factor;
  double eps = 0, beta1 = 0, beta2 = 0;
  bool nesterov = false;
  Rows<Table> momentum = {};       // (N, parts·width), or none
  Real* second_moments = nullptr;  // (N, parts): s or v
  int32_t* row_steps = nullptr;    // (N): t
};

// Updates rows of a table by gradients that are not stored. A row of the table, of its momentum and
// of the source has `parts` parts of the same width, side by side. The gradient of a part is a sum
// over a segment of sorted pairs:
//
//   g[row, part] = Σ over the segment's pairs of
//                  coefficients[part, pair]·source[pair / pairs_per_row, part]
//
// or, without pairs, a row of the source itself.
//
// A row is not updated, and counts no step, if it is frozen or if its gradient is zero in all
// parts: then neither the row nor its state is written. Negative zero is zero, NaN is not. So a row
// of zeros in a gradient equals a row that is missing.
//
// A 16-bit table and its momentum are rounded to nearest, or stochastically with random bits from
// the key, the row and the column in the row.
template <class Table, class Source>
struct TableUpdate {
  using Real = accumulation_t<Table>;
  int64_t parts = 1;
  int64_t width;  // of a part
  Rows<Table> table;
  UpdateRule<Table> rule;
  bool stochastic_rounding = false;
  uint64_t key = 0;
  Rows<const Source> source;
  int64_t pairs_per_row = 1;
  const Real* coefficients = nullptr;  // by part and pair id, or null: all one
  const bool* frozen = nullptr;        // by row of the table, or null: none is
};

}  // namespace peer
