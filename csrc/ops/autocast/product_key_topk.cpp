// Under autocast, the query and the keys are cast: the key matrices are small.
#include "ops/product_key_topk.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace peer::ops {

namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor> product_key_topk_autocast(const ProductKeyTopkArguments& args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return ProductKeyTopkOp::call(at::autocast::cached_cast(dtype, args.query, device),
                                at::autocast::cached_cast(dtype, args.row_keys, device),
                                at::autocast::cached_cast(dtype, args.col_keys, device), args.k,
                                args.disabled);
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, AutocastCPU, m) {
  m.impl("product_key_topk",
         ProductKeyTopkOp::kernel<
             product_key_topk_autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>>);
}

TORCH_LIBRARY_IMPL(peer, AutocastCUDA, m) {
  m.impl("product_key_topk",
         ProductKeyTopkOp::kernel<
             product_key_topk_autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>>);
}

}  // namespace peer::ops
