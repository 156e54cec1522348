#pragma once

#include "kernels/cpu/parallel.h"
#include "ops/device/expert_mlp.h"

namespace peer::ops::cpu {

// The backward pass over the tokens. It calls after_pairs(first, last) once for each pair, from any
// thread: after it has written the coefficients of the pairs and has read the rows of their experts
// for the last time. A row that no other pair has may then be written. Null: calls nothing.
void run_backward(const Experts& experts,
                  const TokenGradients& tokens,
                  const RangeBody& after_pairs);

}  // namespace peer::ops::cpu
