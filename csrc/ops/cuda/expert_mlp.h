#pragma once

#include "ops/device/expert_mlp.h"

namespace peer::ops::cuda {

// The backward pass over the tokens, on the current stream.
void run_backward(const Experts& experts, const TokenGradients& tokens);

}  // namespace peer::ops::cuda
