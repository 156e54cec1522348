// Under autocast, x is cast, and the output has its dtype. The table is not cast: that would copy a
// million rows, and keep the copy for the whole region, to read a few thousand of them. The routing
// weights are not cast either, so that they stay as exact as they are.
#include "ops/expert_mlp.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace peer::ops {

namespace {

template <c10::DispatchKey key, c10::DeviceType device>
ThreeTensors expert_mlp_autocast(const ExpertMlpArguments& args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ExpertMlpOp::call(at::autocast::cached_cast(dtype, args.x, device), args.weights,
                           args.indices, args.table, args.activation, args.sparse_grad,
                           args.frozen);
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, AutocastCPU, m) {
  m.impl("expert_mlp",
         ExpertMlpOp::kernel<
             expert_mlp_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(peer, AutocastCUDA, m) {
  m.impl("expert_mlp",
         ExpertMlpOp::kernel<
             expert_mlp_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
}

}  // namespace peer::ops
