// A number that only the device knows, on its way to the host while later work runs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/cuda/launch.h"

namespace peer::cuda {

// The construction queues the copy on the context's stream. wait() waits for what was queued
// before, not for what was queued since.
//
// The value is copied to pinned memory: a copy to other memory would wait. Pinned memory and events
// take long to make, so they are kept and used again, by device.
template <class Value>
class ReadBack {
 public:
  ReadBack(const Value* source, const Context& context) : slot_(take_slot()) {
    check(
        cudaMemcpyAsync(slot_.value, source, sizeof(Value), cudaMemcpyDeviceToHost, context.stream),
        "a number was not copied");
    check(cudaEventRecord(slot_.arrived, context.stream), "an event was not recorded");
  }

  ReadBack(const ReadBack&) = delete;

  ~ReadBack() {
    // The copy must not arrive in a slot that another number uses. After an error, the slot is
    // lost.
    if (cudaEventSynchronize(slot_.arrived) == cudaSuccess) {
      const std::lock_guard lock(slots().mutex);
      slots().unused.push_back(slot_);
    }
  }

  Value wait() const {
    check(cudaEventSynchronize(slot_.arrived), "the work before a number failed");
    return *slot_.value;
  }

 private:
  struct Slot {
    int device;
    Value* value;
    cudaEvent_t arrived;
  };
  struct Slots {
    std::mutex mutex;
    std::vector<Slot> unused;
  };

  // Never destroyed, because CUDA may end before static objects do.
  static Slots& slots() {
    static Slots* const all = new Slots;
    return *all;
  }

  static Slot take_slot() {
    int device = 0;
    check(cudaGetDevice(&device), "no device");
    {
      const std::lock_guard lock(slots().mutex);
      std::vector<Slot>& unused = slots().unused;
      for (Slot& slot : unused) {
        if (slot.device == device) {
          std::swap(slot, unused.back());
          const Slot taken = unused.back();
          unused.pop_back();
          return taken;
        }
      }
    }
    Slot slot = {.device = device, .value = nullptr, .arrived = nullptr};
    check(
        cudaHostAlloc(reinterpret_cast<void**>(&slot.value), sizeof(Value), cudaHostAllocPortable),
        "no pinned memory");
    check(cudaEventCreateWithFlags(&slot.arrived, cudaEventDisableTiming), "no event");
    return slot;
  }

  Slot slot_;
};

}  // namespace peer::cuda
