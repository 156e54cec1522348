// Autocast: the query and the small key matrices are cast.
#include "ops/product_key_topk.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace peer::ops {

namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor> product_key_topk_autocast(const at::Tensor& query,
                                                             const at::Tensor& row_keys,
                                                             const at::Tensor& col_keys,
                                                             int64_t k) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return product_key_topk(at::autocast::cached_cast(dtype, query, device),
                          at::autocast::cached_cast(dtype, row_keys, device),
                          at::autocast::cached_cast(dtype, col_keys, device), k);
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, AutocastCPU, m) {
  m.impl("product_key_topk",
         product_key_topk_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(peer, AutocastCUDA, m) {
  m.impl("product_key_topk",
         product_key_topk_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace peer::ops
