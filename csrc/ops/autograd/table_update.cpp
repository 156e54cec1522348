// The operators that update tables, fused with a backward pass or not, have no derivative. They
// write in place, so they increment the versions of the tensors that they write: autograd then
// notices that a tensor saved for a backward pass has changed.
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "ops/autograd/tangents.h"

namespace peer::ops::autograd {

namespace {

// Calls the operator with what lies below `keys` while the guard holds.
template <class Guard>
void redispatch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const Guard guard;
  op.redispatchBoxed(keys, stack);
}

void refuse_gradients(const c10::OperatorHandle& op,
                      c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!values[i].isTensor()) {
      continue;
    }
    const at::Tensor& tensor = values[i].toTensor();
    TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), op.schema().name(),
                ": has no derivative, but ", arguments[i].name(),
                " requires grad; call it under torch.no_grad()");
    TORCH_CHECK_NOT_IMPLEMENTED(!any_has_tangent(tensor), op.schema().name(),
                                ": has no derivative, but ", arguments[i].name(),
                                " has a tangent; pass ", arguments[i].name(), ".detach()");
  }
  redispatch<at::AutoDispatchBelowAutograd>(op, keys & c10::after_autograd_keyset, stack);
}

void bump_versions(const c10::OperatorHandle& op,
                   c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (const auto* alias = arguments[i].alias_info();
        alias != nullptr && alias->isWrite() && values[i].isTensor()) {
      written.push_back(values[i].toTensor());
    }
  }
  redispatch<at::AutoDispatchBelowADInplaceOrView>(op, keys & c10::after_ADInplaceOrView_keyset,
                                                   stack);
  for (const at::Tensor& tensor : written) {
    if (!tensor.is_inference()) {
      torch::autograd::increment_version(tensor);
    }
  }
}

constexpr const char* kOperators[] = {"rowwise_adagrad_",
                                      "sgd_",
                                      "rowwise_adam_",
                                      "expert_mlp_backward_rowwise_adagrad_",
                                      "expert_mlp_backward_sgd_",
                                      "expert_mlp_backward_rowwise_adam_"};

}  // namespace

TORCH_LIBRARY_IMPL(peer, Autograd, m) {
  for (const char* name : kOperators) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
  }
}

TORCH_LIBRARY_IMPL(peer, ADInplaceOrView, m) {
  for (const char* name : kOperators) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&bump_versions>());
  }
}

}  // namespace peer::ops::autograd
