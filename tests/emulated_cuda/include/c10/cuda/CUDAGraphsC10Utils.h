// Stands in for Torch's header: whether the emulated device captures a graph.
#pragma once

namespace c10::cuda {

enum class CaptureStatus { None, Active };

CaptureStatus currentStreamCaptureStatusMayInitCtx();

}  // namespace c10::cuda
