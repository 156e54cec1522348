// Pairs sorted by owner, and the rows that the sums over their segments are stored in. The terms
// are defined in kernels/segments.h.
//
// Pairs of frozen owners lie behind all others. They belong to no segment: nothing sums them, and
// their owners have no rows.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/read_back.h"
#include "kernels/segments.h"

namespace peer::cuda {

// The partial sums [first, first + count) add up to one row of the output.
struct SplitSegment {
  int32_t first, count;
  int32_t row;
};

struct SegmentCounts {
  int32_t owners, split_segments, partial_rows;
};

// All arrays are in device memory, and the host knows nothing of their contents. segment_chunks.h
// defines targets.
struct Segments {
  int64_t count = 0;                         // of pairs, with those of frozen owners
  std::shared_ptr<int32_t> trained_count;    // (1), of pairs in segments; null: all, none is frozen
  std::shared_ptr<int32_t> pair_ids;         // (count), by ascending owner, then by id
  std::shared_ptr<int32_t> targets;          // (count), of the sum up to each pair of a segment
  std::shared_ptr<int32_t> distinct_owners;  // (count), counts->owners of them; compact rows only
  std::shared_ptr<SplitSegment> split_segments;  // (max_split_segments)
  std::shared_ptr<SegmentCounts> counts;         // (1)
  // Bounds that the host knows, for the sizes of grids and of memory.
  int64_t max_split_segments = 0;
  int64_t max_partial_rows = 0;
};

// frozen: (owner_count), or null if no owner is frozen. count and owner_count must be below 2^31.
// An owner outside [0, owner_count) ends the kernel with a message and a trap.
Segments make_segments(const int64_t* owners,
                       int64_t count,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       const Context& context);

// The number of distinct owners that are not frozen, which the size of a sparse gradient needs. The
// host waits for it, but not for work that is queued between the construction and wait().
class DistinctOwnerCount {
 public:
  DistinctOwnerCount(const Segments& segments, const Context& context);
  int64_t wait() const;

 private:
  std::unique_ptr<ReadBack<SegmentCounts>> counts_;  // null without pairs
};

}  // namespace peer::cuda
