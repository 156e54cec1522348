// Autocast: x is cast, and the output comes in its dtype. The table is left alone: a cast copy of
// a million rows would be made, and kept for the whole region, to read a few thousand of them. The
// routing weights stay as exact as they are.
#include "ops/expert_mlp.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace peer::ops {

namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> expert_mlp_autocast(const Tensor& x,
                                                       const Tensor& weights,
                                                       const Tensor& indices,
                                                       const Tensor& table,
                                                       std::string_view activation,
                                                       bool sparse_grad) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  return expert_mlp(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device),
                    weights, indices, table, activation, sparse_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, AutocastCPU, m) {
  m.impl("expert_mlp", expert_mlp_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(peer, AutocastCUDA, m) {
  m.impl("expert_mlp", expert_mlp_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace peer::ops
