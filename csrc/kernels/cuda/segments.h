// The arithmetic of the expert pass's work list: where, among sorted pairs, sums end.
//
// A run, the pairs of one owner, is cut into chunks of kPairsPerChunk pairs, counted from the run's
// start; the last one may be shorter. A run of one chunk is summed into its owner's row of the
// output. A longer one is split: its chunks are summed into rows of partial sums, which are added
// up afterwards. So no warp sums many more pairs than another, and what is added to what depends on
// nothing but how many pairs the owner has.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/segments.h"

namespace peer::cuda {

// What becomes of the sum after a pair: it goes on with the next pair, or goes to a row of the
// output, the target itself, or to a row of partial sums, a number below kContinueSegment.
constexpr int32_t kContinueSegment = -1;

PEER_HOST_DEVICE inline bool is_row_of_output(int32_t target) { return target >= 0; }
PEER_HOST_DEVICE inline int32_t to_partial_row(int32_t row) { return kContinueSegment - 1 - row; }
PEER_HOST_DEVICE inline int32_t partial_row_of(int32_t target) {
  return kContinueSegment - 1 - target;
}

// What ends with the pair at a sorted position.
struct PairEnds {
  bool run = false;
  bool chunk = false;
  bool is_split = false;  // whether the run has more chunks than the one that ends
  int32_t chunks = 0;     // of the run, up to this one; where the chunk is one of several
};

// The first position of owners[position]'s run.
PEER_HOST_DEVICE inline int32_t start_of_run(const int32_t* sorted_owners, int32_t position) {
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

// Looks for the run's start only where it is so far away that it matters.
PEER_HOST_DEVICE inline PairEnds ends_at(const int32_t* sorted_owners,
                                         int32_t count,
                                         int32_t position) {
  const int32_t owner = sorted_owners[position];
  const bool ends_run = position + 1 == count || sorted_owners[position + 1] != owner;
  const int32_t chunk_before = position + 1 - kPairsPerChunk;
  if (chunk_before < 0 || sorted_owners[chunk_before] != owner) {
    return {ends_run, ends_run, false, 0};
  }
  const int32_t pairs = position + 1 - start_of_run(sorted_owners, position);
  const bool ends_chunk = ends_run || pairs % kPairsPerChunk == 0;
  const bool is_split = pairs > kPairsPerChunk || !ends_run;
  return {ends_run, ends_chunk, is_split, (pairs + kPairsPerChunk - 1) / kPairsPerChunk};
}

// The most runs of more than a chunk that so many pairs of so many owners can have, and the most
// chunks that these are cut into. The shortest run that is split has one pair more than a chunk and
// takes two rows; after that, a row takes a whole chunk.
inline int64_t max_split_segments(int64_t pairs, int64_t owners) {
  const int64_t by_pairs = pairs / (kPairsPerChunk + 1);
  return by_pairs < owners ? by_pairs : owners;
}

inline int64_t max_partial_rows(int64_t pairs, int64_t owners) {
  const int64_t runs = max_split_segments(pairs, owners);
  return runs == 0 ? 0 : 2 * runs + (pairs - runs * (kPairsPerChunk + 1)) / kPairsPerChunk;
}

}  // namespace peer::cuda
