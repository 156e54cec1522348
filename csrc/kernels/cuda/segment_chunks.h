// The targets of sums over sorted pairs.
//
// The sum over a segment of one chunk is stored in a row of the output. The sums over the chunks of
// a split segment are stored in rows of partial sums (kernels/segments.h).
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/segments.h"

namespace peer::cuda {

// The target of the sum up to a pair:
//
//   kContinueSegment            none, the sum continues with the next pair
//   row >= 0                    this row of the output
//   below kContinueSegment      a row of partial sums, partial_row_of(target)
constexpr int32_t kContinueSegment = -1;

PEER_HOST_DEVICE inline bool is_row_of_output(int32_t target) { return target >= 0; }
PEER_HOST_DEVICE inline int32_t to_partial_row(int32_t row) { return kContinueSegment - 1 - row; }
PEER_HOST_DEVICE inline int32_t partial_row_of(int32_t target) {
  return kContinueSegment - 1 - target;
}

// What ends with the pair at a sorted position.
struct PairEnds {
  bool segment = false;
  bool chunk = false;
  bool is_split = false;  // whether the segment has other chunks than the one that ends
  int32_t chunks = 0;     // of a split segment, up to the one that ends
};

// The first position of the segment of a position.
PEER_HOST_DEVICE inline int32_t segment_begin(const int32_t* sorted_owners, int32_t position) {
  const int32_t owner = sorted_owners[position];
  int32_t low = 0, high = position;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (sorted_owners[middle] < owner) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Searches for the segment's start only if it is at least a chunk away.
PEER_HOST_DEVICE inline PairEnds ends_at(const int32_t* sorted_owners,
                                         int32_t count,
                                         int32_t position) {
  const int32_t owner = sorted_owners[position];
  const bool ends_segment = position + 1 == count || sorted_owners[position + 1] != owner;
  const int32_t chunk_before = position + 1 - kPairsPerChunk;
  if (chunk_before < 0 || sorted_owners[chunk_before] != owner) {
    return {.segment = ends_segment, .chunk = ends_segment};
  }
  const int32_t pairs = position + 1 - segment_begin(sorted_owners, position);
  return {.segment = ends_segment,
          .chunk = ends_segment || pairs % kPairsPerChunk == 0,
          .is_split = pairs > kPairsPerChunk || !ends_segment,
          .chunks = (pairs + kPairsPerChunk - 1) / kPairsPerChunk};
}

// Upper bounds, for any assignment of this many pairs to this many owners. The shortest split
// segment has one pair more than a chunk and takes two partial rows; every further row takes a
// whole chunk of pairs.
inline int64_t max_split_segments(int64_t pairs, int64_t owners) {
  const int64_t by_pairs = pairs / (kPairsPerChunk + 1);
  return by_pairs < owners ? by_pairs : owners;
}

inline int64_t max_partial_rows(int64_t pairs, int64_t owners) {
  const int64_t segments = max_split_segments(pairs, owners);
  return segments == 0 ? 0
                       : 2 * segments + (pairs - segments * (kPairsPerChunk + 1)) / kPairsPerChunk;
}

}  // namespace peer::cuda
