// The vocabulary of sums over retrievals, which both devices share.
//
// Pair           one retrieval: the p-th expert of token t has the pair id t·P + p
// Owner          the row of the table that a pair contributes to
// Segment        the pairs of one owner, in the order of their ids
// Single pair    a pair that is its whole segment
// Chunk          a piece of a segment, of at most kPairsPerChunk pairs, counted from its start
// Split segment  a segment of several chunks. Each chunk is summed into a row of partial sums; the
//                partial sums are then added
//
// So no thread or warp sums many more pairs than another, and the order of a sum depends only on
// the number of pairs that the owner has.
#pragma once

#include <cstdint>

namespace peer {

// At 128 pairs a chunk, there is at most one row of partial sums for every 64 pairs, and the pairs
// of a hot expert are shared among many threads or warps.
constexpr int32_t kPairsPerChunk = 128;

// The row of the output that a segment is summed into.
enum class OutputRows {
  by_owner,  // the owner: a dense gradient
  compact,   // the number of smaller owners that occur: the values of a sparse gradient
};

}  // namespace peer
