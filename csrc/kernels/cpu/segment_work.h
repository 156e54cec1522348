// The work list over segments (kernels/segments.h), as the kernels read it.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer::cpu {

struct Pair {
  int64_t owner;
  int64_t id;
};

// A piece of a segment, of at most kPairsPerChunk pairs. The only chunk of a segment is summed into
// a row of the output, the chunks of a split segment are summed into rows of partial sums.
struct Chunk {
  int64_t first, last;  // range of sorted pairs
  int64_t row;          // of the output, or of the partial sums
  bool is_partial;
};

// The partial sums [first, last) of one row of the output.
struct SplitSegment {
  int64_t first, last;
  int64_t row;
};

template <class Real>
struct SegmentWork {
  int64_t pair_count;  // with the pairs of frozen owners
  const Pair* pairs;   // the others, sorted by owner, stable
  const Chunk* chunks;
  // By pair id: the row of the output that only this pair is summed into, or -1. Null if no pair is
  // apart from the chunks.
  const int64_t* single_rows = nullptr;
  const SplitSegment* split_segments;
  Rows<Real> partial_sums;  // of all columns of an output row
};

}  // namespace peer::cpu
