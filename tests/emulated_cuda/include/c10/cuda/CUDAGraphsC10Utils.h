// Stands in for Torch's header: whether the stream is being captured in a graph, as the emulated
// device says.
#pragma once

namespace c10::cuda {

enum class CaptureStatus { None, Active };

CaptureStatus currentStreamCaptureStatusMayInitCtx();

}  // namespace c10::cuda
