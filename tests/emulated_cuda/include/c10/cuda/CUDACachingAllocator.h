// Stands in for Torch's header: memory of the emulated device is Torch's CPU memory.
#pragma once

#include <c10/core/CPUAllocator.h>

namespace c10::cuda::CUDACachingAllocator {

inline c10::Allocator* get() { return c10::GetCPUAllocator(); }

}  // namespace c10::cuda::CUDACachingAllocator
