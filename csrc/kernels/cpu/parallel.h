// The parallel loop that the caller passes to functions of several passes: at::parallel_for with
// Torch, threads of their own in tests. A body is called with disjoint ranges that cover [begin,
// end), in any order. No result may depend on how the range is cut.
#pragma once

#include <cstdint>
#include <functional>

namespace peer {

using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor =
    std::function<void(int64_t begin, int64_t end, int64_t grain, const RangeBody& body)>;

}  // namespace peer
