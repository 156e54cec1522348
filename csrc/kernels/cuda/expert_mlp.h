// expert_mlp and its backward. Table is the element type of the table. Input is that of x, out and
// their gradients: Table, or the accumulation type of Table.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/expert_mlp.h"

namespace peer::cuda {

// An index outside [0, experts) ends the kernel with a message and a trap.
template <class Table, class Input>
void expert_mlp_forward(const ExpertMlpForward<Table, Input>& pass, const Context& context);
template <class Table, class Input>
void expert_mlp_backward(const ExpertMlpBackward<Table, Input>& pass, const Context& context);

}  // namespace peer::cuda
