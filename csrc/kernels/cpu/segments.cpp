// Pairs of frozen owners are dropped. The others are sorted by a radix sort, then cut into chunks.
// Pairs that have an owner to themselves are, if wanted, listed by their ids instead.
//
// Work item   a block of kPairsPerBlock pairs, in each of two phases. The first phase counts. A
//             scan gives every block its positions. The second phase writes
// Traffic     per digit of the owners, each pair is read twice and written once; then each pair is
//             read twice. With a mask, each owner is read twice before, with its byte of the mask
// Exactness   the result depends on the owners only, not on the threads
#include "kernels/cpu/segments.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace peer::cpu {

namespace {

constexpr int kMaxDigitBits = 11;  // 2048 counters: a block's histogram stays in the L1 cache
constexpr int64_t kPairsPerBlock = 1 << 13;

int64_t ceil_div(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// One pass of a stable least-significant-digit radix sort. Each block counts its digits, a scan
// over (digit, block) gives every block its targets, then each block moves its pairs there.
void sort_by_digit(const Pair* source,
                   Pair* target,
                   int64_t count,
                   int shift,
                   int digit_bits,
                   const ParallelFor& parallel_for) {
  const int64_t digits = int64_t(1) << digit_bits;
  const int64_t blocks = ceil_div(count, kPairsPerBlock);
  const auto digit_of = [&](const Pair& pair) { return (pair.owner >> shift) & (digits - 1); };
  std::vector<int64_t> positions(blocks * digits);

  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
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
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t* next = positions.data() + block * digits;
      for (int64_t i = block * kPairsPerBlock; i < std::min(count, (block + 1) * kPairsPerBlock);
           ++i) {
        target[next[digit_of(source[i])]++] = source[i];
      }
    }
  });
}

List<Pair> list_pairs(const int64_t* owners,
                      int64_t count,
                      const ParallelFor& parallel_for,
                      const Allocate& allocate) {
  const List<Pair> pairs(allocate, count);
  parallel_for(count, kPairsPerBlock, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      pairs[i] = {.owner = owners[i], .id = i};
    }
  });
  return pairs;
}

// The pairs of the owners that are not frozen, by id.
List<Pair> list_trained_pairs(const int64_t* owners,
                              int64_t count,
                              const bool* frozen,
                              const ParallelFor& parallel_for,
                              const Allocate& allocate) {
  const int64_t blocks = ceil_div(count, kPairsPerBlock);
  std::vector<int64_t> positions(blocks + 1);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      for (int64_t i = block * kPairsPerBlock; i < std::min(count, (block + 1) * kPairsPerBlock);
           ++i) {
        positions[block] += !frozen[owners[i]];
      }
    }
  });
  int64_t total = 0;
  for (int64_t& position : positions) {
    total += std::exchange(position, total);
  }
  const List<Pair> pairs(allocate, total);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      // No branch depends on the mask: the place of a frozen pair is overwritten by the next pair.
      // The loop ends with the block's last place, so that it writes no other block's places.
      int64_t next = positions[block];
      for (int64_t i = block * kPairsPerBlock; next < positions[block + 1]; ++i) {
        pairs[next] = {.owner = owners[i], .id = i};
        next += !frozen[owners[i]];
      }
    }
  });
  return pairs;
}

List<Pair> sort_pairs(List<Pair> pairs,
                      int64_t owner_count,
                      const ParallelFor& parallel_for,
                      const Allocate& allocate) {
  const int64_t count = pairs.size();
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

// The number of work items that some segments need; after the scan, the number before a block.
struct Counts {
  int64_t segments = 0;
  int64_t single_pairs = 0;
  int64_t chunks = 0;
  int64_t split_segments = 0;
  int64_t partial_rows = 0;
};

// visit(first, last) for every segment that begins in [begin, end).
template <class Visit>
void for_each_segment(const List<Pair>& pairs, int64_t begin, int64_t end, const Visit& visit) {
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

Segments make_segments(const int64_t* owners,
                       int64_t count,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       SinglePairs single_pairs,
                       const ParallelFor& parallel_for,
                       const Allocate& allocate) {
  const auto is_apart = [&](int64_t first, int64_t last) {
    return single_pairs == SinglePairs::apart && last - first == 1;
  };
  const List<Pair> pairs = sort_pairs(
      frozen == nullptr ? list_pairs(owners, count, parallel_for, allocate)
                        : list_trained_pairs(owners, count, frozen, parallel_for, allocate),
      owner_count, parallel_for, allocate);
  const int64_t blocks = ceil_div(pairs.size(), kPairsPerBlock);
  std::vector<Counts> places(blocks);
  const auto for_each_segment_of_block = [&](int64_t block, const auto& visit) {
    for_each_segment(pairs, block * kPairsPerBlock,
                     std::min(pairs.size(), (block + 1) * kPairsPerBlock), visit);
  };

  parallel_for(blocks, 1, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      Counts counts;
      for_each_segment_of_block(block, [&](int64_t first, int64_t last) {
        ++counts.segments;
        if (is_apart(first, last)) {
          ++counts.single_pairs;
          return;
        }
        const int64_t chunks = ceil_div(last - first, kPairsPerChunk);
        counts.chunks += chunks;
        counts.split_segments += chunks > 1;
        counts.partial_rows += chunks > 1 ? chunks : 0;
      });
      places[block] = counts;
    }
  });
  Counts total;
  for (Counts& place : places) {
    total.segments += std::exchange(place.segments, total.segments);
    total.single_pairs += std::exchange(place.single_pairs, total.single_pairs);
    total.chunks += std::exchange(place.chunks, total.chunks);
    total.split_segments += std::exchange(place.split_segments, total.split_segments);
    total.partial_rows += std::exchange(place.partial_rows, total.partial_rows);
  }

  const bool is_compact = rows == OutputRows::compact;
  const Segments segments = {
      .pair_count = count,
      .pairs = pairs,
      .chunks = List<Chunk>(allocate, total.chunks),
      .single_rows = total.single_pairs > 0 ? List<int64_t>(allocate, count) : List<int64_t>(),
      .single_count = total.single_pairs,
      .split_segments = List<SplitSegment>(allocate, total.split_segments),
      .distinct_owners = List<int64_t>(allocate, is_compact ? total.segments : 0),
      .partial_rows = total.partial_rows,
  };
  parallel_for(segments.single_rows.size(), kPairsPerBlock, [&](int64_t first, int64_t last) {
    std::fill(segments.single_rows.data() + first, segments.single_rows.data() + last, -1);
  });
  parallel_for(blocks, 1, [&](int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      Counts next = places[block];
      for_each_segment_of_block(block, [&](int64_t first, int64_t last) {
        const int64_t owner = pairs[first].owner;
        const int64_t row = is_compact ? next.segments : owner;
        if (is_compact) {
          segments.distinct_owners[next.segments] = owner;
        }
        ++next.segments;
        if (is_apart(first, last)) {
          segments.single_rows[pairs[first].id] = row;
          return;
        }
        if (last - first <= kPairsPerChunk) {
          segments.chunks[next.chunks++] = {
              .first = first, .last = last, .row = row, .is_partial = false};
          return;
        }
        const int64_t first_partial = next.partial_rows;
        for (int64_t begin = first; begin < last; begin += kPairsPerChunk) {
          segments.chunks[next.chunks++] = {.first = begin,
                                            .last = std::min(begin + kPairsPerChunk, last),
                                            .row = next.partial_rows++,
                                            .is_partial = true};
        }
        segments.split_segments[next.split_segments++] = {
            .first = first_partial, .last = next.partial_rows, .row = row};
      });
    }
  });
  return segments;
}

}  // namespace peer::cpu
