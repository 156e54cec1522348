#include "nn/masks.h"

#include <torch/types.h>

#include <algorithm>
#include <array>

namespace peer::nn {

using torch::Tensor;

namespace {

Tensor empty_if_unmarked(const Tensor& mask) {
  return mask.any().item<bool>() ? mask : torch::empty({0}, mask.options());
}

}  // namespace

void set_buffer(torch::nn::Module& module, const char* name, Tensor& member, const Tensor& value) {
  if (member.defined()) {
    if (!value.is_same(member)) {
      member.set_data(value);
    }
  } else if (is_set(value)) {
    member = module.register_buffer(name, value);
  }
}

void register_again(torch::nn::Module& module, const char* name, Tensor& member) {
  if (member.defined()) {
    member = module.register_buffer(name, torch::empty_like(member));
  }
}

bool is_mask_name(std::string_view name) {
  constexpr std::array<std::string_view, 6> kNames = {
      "frozen", "disabled", "frozen_rows", "frozen_columns", "kept_row_keys", "kept_col_keys"};
  const std::string_view last = name.substr(name.rfind('.') + 1);  // npos + 1 is 0
  return std::find(kNames.begin(), kNames.end(), last) != kNames.end();
}

Tensor as_mask(const Tensor& experts, int64_t size, torch::Device device) {
  const auto options = torch::dtype(torch::kBool).device(device);
  if (!experts.defined()) {
    return torch::ones({size}, options);
  }
  if (experts.scalar_type() == torch::kBool) {
    TORCH_CHECK_VALUE(experts.sizes() == torch::IntArrayRef{size}, "expected a mask of shape [",
                      size, "], got ", experts.sizes());
    return experts.to(device, torch::kBool, /*non_blocking=*/false, /*copy=*/true);
  }
  TORCH_CHECK_TYPE(torch::isIntegralType(experts.scalar_type(), /*includeBool=*/false),
                   "expected integer ids or a bool mask, got ", experts.scalar_type());
  Tensor mask = torch::zeros({size}, options);
  if (experts.numel() > 0) {
    const Tensor ids = experts.to(device, torch::kLong).flatten();
    const int64_t smallest = ids.min().item<int64_t>(), largest = ids.max().item<int64_t>();
    TORCH_CHECK_INDEX(smallest >= 0 && largest < size, "expected ids in [0, ", size, "), got ",
                      smallest < 0 ? smallest : largest);
    mask.index_fill_(0, ids, true);
  }
  return mask;
}

Tensor union_of(const Tensor& mask, const Tensor& more) {
  return empty_if_unmarked(is_set(mask) ? mask.logical_or(more) : more.clone());
}

Tensor without(const Tensor& mask, const Tensor& fewer) {
  return is_set(mask) ? empty_if_unmarked(mask.logical_and(fewer.logical_not())) : mask;
}

Tensor with_more(const Tensor& mask, int64_t count) {
  return is_set(mask) ? torch::cat({mask, torch::zeros({count}, mask.options())}) : mask;
}

void clear_gradient(const Tensor& parameter, const Tensor& mask, int64_t dim) {
  Tensor gradient = parameter.grad();
  if (!gradient.defined()) {
    return;
  }
  const torch::NoGradGuard no_grad;
  if (gradient.is_sparse()) {
    gradient = gradient.coalesce();
    const Tensor kept = mask.index_select(0, gradient.indices()[0]).logical_not().nonzero();
    parameter.mutable_grad() = torch::sparse_coo_tensor(
        gradient.indices().index_select(1, kept.flatten()),
        gradient.values().index_select(0, kept.flatten()), gradient.sizes(), gradient.options(),
        /*is_coalesced=*/true);
  } else {
    gradient.index_fill_(dim, mask.nonzero().flatten(), 0);
  }
}

}  // namespace peer::nn
