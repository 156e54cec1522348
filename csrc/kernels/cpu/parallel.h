// How kernels that need several passes ask for threads: the caller hands in a loop. Under Torch
// that is at::parallel_for; a test may pass a serial loop or its own threads. A body is called with
// disjoint ranges that cover [begin, end), in any order; no result may depend on how the range was
// cut.
#pragma once

#include <cstdint>
#include <functional>

namespace peer {

using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor =
    std::function<void(int64_t begin, int64_t end, int64_t grain, const RangeBody& body)>;

}  // namespace peer
