#include "kernels/cpu/segments.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace peer::cpu {

namespace {

constexpr int kMaxDigitBits =
    11;  // 2048 counters: a block's histogram stays in the first-level cache
constexpr int64_t kPairsPerBlock =
    1 << 13;  // fixed, so that the result's construction does not depend on the threads

// One pass of a stable least-significant-digit radix sort: blocks count their digits, a scan over
// (digit, block) gives every block its own targets, blocks move their pairs there.
void sort_by_digit(const Pair* source,
                   Pair* target,
                   int64_t count,
                   int shift,
                   int digit_bits,
                   const ParallelFor& parallel_for) {
  const int64_t digits = int64_t(1) << digit_bits;
  const int64_t blocks = (count + kPairsPerBlock - 1) / kPairsPerBlock;
  const auto digit_of = [&](const Pair& pair) { return (pair.owner >> shift) & (digits - 1); };
  std::vector<int64_t> positions(blocks * digits);

  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t* counts = positions.data() + block * digits;
      for (int64_t i = block * kPairsPerBlock; i < std::min(count, (block + 1) * kPairsPerBlock);
           ++i) {
        ++counts[digit_of(source[i])];
      }
    }
  });
  int64_t position = 0;
  for (int64_t digit = 0; digit < digits; ++digit) {
    for (int64_t block = 0; block < blocks; ++block) {
      position += std::exchange(positions[block * digits + digit], position);
    }
  }
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t* next = positions.data() + block * digits;
      for (int64_t i = block * kPairsPerBlock; i < std::min(count, (block + 1) * kPairsPerBlock);
           ++i) {
        target[next[digit_of(source[i])]++] = source[i];
      }
    }
  });
}

// What the runs of some sorted pairs add to the work list.
struct Counts {
  int64_t runs = 0;
  int64_t chunks = 0;
  int64_t split_segments = 0;
  int64_t partial_rows = 0;
};

// visit(first, last) for every run of equal owners that begins in [begin, end).
template <class Visit>
void for_each_run(const List<Pair>& pairs, int64_t begin, int64_t end, const Visit& visit) {
  int64_t first = begin;
  while (first > 0 && first < end && pairs[first].owner == pairs[first - 1].owner) {
    ++first;
  }
  while (first < end) {
    int64_t last = first + 1;
    while (last < pairs.size() && pairs[last].owner == pairs[first].owner) {
      ++last;
    }
    visit(first, last);
    first = last;
  }
}

}  // namespace

List<Pair> make_segments(const int64_t* owners,
                         int64_t count,
                         int64_t owner_count,
                         const ParallelFor& parallel_for,
                         const Allocate& allocate) {
  List<Pair> pairs(allocate, count);
  parallel_for(0, count, kPairsPerBlock, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      pairs[i] = {owners[i], i};
    }
  });
  const int bits = std::bit_width(uint64_t(std::max<int64_t>(owner_count - 1, 0)));
  const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  if (count == 0 || passes == 0) {
    return pairs;
  }
  const int digit_bits = (bits + passes - 1) / passes;
  List<Pair> other(allocate, count);
  for (int pass = 0; pass < passes; ++pass) {
    sort_by_digit(pairs.data(), other.data(), count, pass * digit_bits, digit_bits, parallel_for);
    std::swap(pairs, other);
  }
  return pairs;
}

// Blocks of pairs count what their runs need, a scan gives every block its places, blocks write.
SegmentPlan plan_expert_pass(const List<Pair>& pairs,
                             OutputRows rows,
                             const ParallelFor& parallel_for,
                             const Allocate& allocate) {
  const int64_t blocks = (pairs.size() + kPairsPerBlock - 1) / kPairsPerBlock;
  std::vector<Counts> places(blocks);
  const auto for_each_run_of_block = [&](int64_t block, const auto& visit) {
    for_each_run(pairs, block * kPairsPerBlock,
                 std::min(pairs.size(), (block + 1) * kPairsPerBlock), visit);
  };
  const auto chunks_of = [](int64_t pairs_in_run) {
    return (pairs_in_run + kPairsPerChunk - 1) / kPairsPerChunk;
  };

  parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      Counts counts;
      for_each_run_of_block(block, [&](int64_t first, int64_t last) {
        const int64_t chunks = chunks_of(last - first);
        ++counts.runs;
        counts.chunks += chunks;
        counts.split_segments += chunks > 1;
        counts.partial_rows += chunks > 1 ? chunks : 0;
      });
      places[block] = counts;
    }
  });
  Counts total;
  for (Counts& place : places) {
    total.runs += std::exchange(place.runs, total.runs);
    total.chunks += std::exchange(place.chunks, total.chunks);
    total.split_segments += std::exchange(place.split_segments, total.split_segments);
    total.partial_rows += std::exchange(place.partial_rows, total.partial_rows);
  }

  const bool is_compact = rows == OutputRows::compact;
  const SegmentPlan plan = {
      .chunks = List<Chunk>(allocate, total.chunks),
      .split_segments = List<SplitSegment>(allocate, total.split_segments),
      .owners = List<int64_t>(allocate, is_compact ? total.runs : 0),
      .partial_rows = total.partial_rows,
  };
  parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      Counts next = places[block];
      for_each_run_of_block(block, [&](int64_t first, int64_t last) {
        const int64_t owner = pairs[first].owner;
        const int64_t row = is_compact ? next.runs : owner;
        if (is_compact) {
          plan.owners[next.runs] = owner;
        }
        ++next.runs;
        if (chunks_of(last - first) == 1) {
          plan.chunks[next.chunks++] = {first, last, row, false};
          return;
        }
        const int64_t first_partial = next.partial_rows;
        for (int64_t begin = first; begin < last; begin += kPairsPerChunk) {
          plan.chunks[next.chunks++] = {begin, std::min(begin + kPairsPerChunk, last),
                                        next.partial_rows++, true};
        }
        plan.split_segments[next.split_segments++] = {first_partial, next.partial_rows, row};
      });
    }
  });
  return plan;
}

}  // namespace peer::cpu
