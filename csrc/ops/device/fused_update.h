// The backward pass of expert_mlp with an update of its table, on a device. Besides what common.h
// lists, a device has
//
//   backward_and_update(const Experts&, const TokenGradients&, TableUpdate)
//
// which computes the coefficients of the table's gradient and updates the rows by it. The update
// has all but pairs_per_row, which is the number of experts per token.
#pragma once

#include <ATen/ops/stack.h>

#include "ops/device/expert_mlp.h"
#include "ops/device/table_update.h"
#include "ops/fused_update.h"

namespace peer::ops {

template <class Device, class Rule>
TwoTensors fused_update_on(const FusedUpdateArguments<Rule>& args) {
  check_fused_update(args);
  const c10::DeviceGuard guard(args.x.device());
  const Tensor& table = args.table;
  const Experts experts = check_experts_on<Device>(args);
  check_sortable<Device>(args.kName, table, experts.indices.numel(), table.size(0));
  const TokenGradients tokens =
      allocate_token_gradients<Device>(args, experts, /*wants_grad_x=*/true);
  if (experts.indices.numel() == 0) {
    Device::backward(experts, tokens);
  } else {
    // The gradients of the down and gate vectors are multiples of x, those of the up vectors
    // multiples of grad_out.
    std::vector<Tensor> sources(table.size(1), as_input<Device>(args.x, table.scalar_type()));
    sources.back() = tokens.grad_out;
    const Tensor source = at::stack(sources, 1);
    const Tensor frozen = contiguous_mask(args.frozen);
    with_table_and_input_type(
        table.scalar_type(), source.scalar_type(), [&]<class Table, class Source>() {
          Device::backward_and_update(
              experts, tokens,
              make_update<Table, Source>(args, source, tokens.coefficients, frozen));
        });
  }
  return {tokens.grad_x.to(args.x.scalar_type()),
          tokens.grad_weights.to(args.weights.scalar_type())};
}

}  // namespace peer::ops
