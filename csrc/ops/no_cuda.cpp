// In a build without CUDA, CUDA tensors raise a clear error instead of the dispatcher's list of
// keys.
#include <torch/library.h>

namespace {

void raise_without_cuda(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              ": peer was built without CUDA, so it cannot run on CUDA tensors; move the module "
              "and its inputs to the CPU");
}

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  for (const char* name :
       {"product_key_topk", "product_key_topk_backward", "expert_mlp", "expert_mlp_backward",
        "rowwise_adagrad_", "sgd_", "rowwise_adam_", "expert_mlp_backward_rowwise_adagrad_",
        "expert_mlp_backward_sgd_", "expert_mlp_backward_rowwise_adam_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&raise_without_cuda>());
  }
}
