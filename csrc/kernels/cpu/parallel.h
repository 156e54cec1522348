// The parallel loop that the caller passes to functions of several passes: that of ops/cpu/common.h
// with Torch, threads of their own in tests. A body is called with disjoint ranges that cover [0,
// count), in any order. No result may depend on how the range is cut.
#pragma once

#include <cstdint>
#include <functional>

namespace peer {

using RangeBody = std::function<void(int64_t first, int64_t last)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const RangeBody& body)>;

}  // namespace peer
