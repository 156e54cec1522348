// The emulated device of libpeer.so: CPU memory that is marked as device memory. An operator with
// an argument in such memory runs the kernel registered for CUDA; all other calls run the kernel
// for the CPU. emulated_cuda.py presents it to Python as a CUDA device.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

namespace {

bool is_capturing = false;
bool is_everything_on_device = false;

// The deleter marks device memory. Its context is the DataPtr that held the memory before.
void free_device_memory(void* before) { delete static_cast<c10::DataPtr*>(before); }

bool is_marked(const at::Tensor& tensor) {
  if (tensor.layout() == at::kSparse) {
    return is_marked(tensor._values());
  }
  return tensor.has_storage() && tensor.storage().data_ptr().get_deleter() == &free_device_memory;
}

bool is_on_device(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().is_cpu() &&
         (is_everything_on_device || is_marked(tensor));
}

void put_on_device(const at::Tensor& tensor) {
  if (tensor.layout() == at::kSparse) {
    put_on_device(tensor._indices());
    put_on_device(tensor._values());
    return;
  }
  if (!tensor.device().is_cpu() || !tensor.has_storage() || is_marked(tensor)) {
    return;
  }
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  auto before = std::make_unique<c10::DataPtr>(storage->set_data_ptr(c10::DataPtr()));
  void* data = before->mutable_get();
  storage->set_data_ptr({data, before.release(), &free_device_memory, at::kCPU});
}

// Runs below Autograd and above the kernels of all devices.
void choose_device(const c10::OperatorHandle& op,
                   c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const bool on_device =
      std::any_of(arguments.begin(), arguments.end(), [](const c10::IValue& argument) {
        return argument.isTensor() && is_on_device(argument.toTensor());
      });
  op.redispatchBoxed(on_device ? c10::DispatchKeySet(c10::DispatchKey::CUDA)
                               : keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER,
                                                            c10::DispatchKey::BackendSelect),
                     stack);
}

// Counts memory. Like the memory of a device's allocator, new memory holds what was there before;
// here that is NaN. The size is stored in front of each block.
class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, at::kCPU};
    }
    auto* const block = static_cast<unsigned char*>(parent()->raw_allocate(kBefore + bytes));
    std::memcpy(block, &bytes, sizeof(bytes));
    std::memset(block + kBefore, 0xff, bytes);
    const int64_t now = in_use += int64_t(bytes);
    peak = std::max<int64_t>(peak, now);
    return {block + kBefore, block + kBefore, &free_memory, at::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }

  static inline std::atomic<int64_t> in_use = 0;
  static inline std::atomic<int64_t> peak = 0;

 private:
  static constexpr size_t kBefore = 64;  // Torch's alignment of memory

  static c10::Allocator* parent() {
    static c10::Allocator* const allocator = c10::GetDefaultCPUAllocator();
    return allocator;
  }

  static void free_memory(void* data) {
    if (data == nullptr) {
      return;
    }
    unsigned char* const block = static_cast<unsigned char*>(data) - kBefore;
    size_t bytes;
    std::memcpy(&bytes, block, sizeof(bytes));
    in_use -= int64_t(bytes);
    parent()->raw_deallocate(block);
  }
};

// Registers choose_device for every operator of peer that has a CUDA kernel. The dispatcher lists
// them, so that none can be forgotten and silently run the CPU's kernel.
void choose_device_of_all_operators() {
  static torch::Library library(torch::Library::IMPL, "peer", c10::DispatchKey::BackendSelect,
                                __FILE__, __LINE__);
  for (const c10::OperatorName& op :
       c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CUDA)) {
    if (op.getNamespace() == "peer") {
      library.impl(op.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&choose_device>());
    }
  }
}

// Must be called once.
void install() {
  static CountingAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
  choose_device_of_all_operators();
}

TORCH_LIBRARY_FRAGMENT(peer_emulated, m) {
  m.def("install", install);
  m.def("put_on_device", put_on_device);
  m.def("is_on_device", is_on_device);
  m.def("set_everything_on_device", [](bool value) { is_everything_on_device = value; });
  m.def("set_capturing", [](bool value) { is_capturing = value; });
  m.def("memory_in_use", [] { return CountingAllocator::in_use.load(); });
  m.def("peak_memory", [] { return CountingAllocator::peak.load(); });
  m.def("reset_peak_memory", [] { CountingAllocator::peak = CountingAllocator::in_use.load(); });
}

}  // namespace

c10::cuda::CaptureStatus c10::cuda::currentStreamCaptureStatusMayInitCtx() {
  return is_capturing ? CaptureStatus::Active : CaptureStatus::None;
}
