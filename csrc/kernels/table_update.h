// How the optimizers change a row of a table, part by part, whatever runs it.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

// How the gradient g of a row's part changes the part w and its state. Before anything else, w is
// multiplied by `decay_factor`, 1 - (learning rate)·(weight decay). With s and v the part's own
// numbers, m its momentum, and t the row's number:
//
//   rowwise_adagrad   s += mean(g²)
//                     w -= lr·g / (sqrt(s) + eps)
//   sgd               m = beta1·m + g, where momentum is given; else m stands for g
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

}  // namespace peer
