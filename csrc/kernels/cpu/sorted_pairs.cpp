#include "kernels/cpu/sorted_pairs.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace peer::cpu {

namespace {

constexpr int kMaxDigitBits =
    11;  // 2048 counters: a block's histogram stays in the first-level cache
constexpr int64_t kPairsPerBlock =
    1 << 15;  // fixed, so that the result's construction does not depend on the threads

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

}  // namespace

std::unique_ptr<Pair[]> sort_pairs(const int64_t* owners,
                                   int64_t count,
                                   int64_t owner_count,
                                   const ParallelFor& parallel_for) {
  std::unique_ptr<Pair[]> pairs(new Pair[count]);  // uninitialised, unlike make_unique
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
  std::unique_ptr<Pair[]> other(new Pair[count]);
  for (int pass = 0; pass < passes; ++pass) {
    sort_by_digit(pairs.get(), other.get(), count, pass * digit_bits, digit_bits, parallel_for);
    std::swap(pairs, other);
  }
  return pairs;
}

ExpertPassPlan plan_expert_pass(const Pair* pairs, int64_t count, OutputRows rows) {
  ExpertPassPlan plan;
  int64_t distinct = 0;
  for (int64_t first = 0; first < count;) {
    const int64_t owner = pairs[first].owner;
    int64_t last = first + 1;
    while (last < count && pairs[last].owner == owner) {
      ++last;
    }
    const int64_t row = rows == OutputRows::compact ? distinct : owner;
    if (last - first <= kPairsPerChunk) {
      plan.chunks.push_back({first, last, row, false});
    } else {
      const int64_t first_partial = plan.partial_rows;
      for (int64_t begin = first; begin < last; begin += kPairsPerChunk) {
        plan.chunks.push_back(
            {begin, std::min(begin + kPairsPerChunk, last), plan.partial_rows++, true});
      }
      plan.split_runs.push_back({first_partial, plan.partial_rows, row});
    }
    if (rows == OutputRows::compact) {
      plan.owners.push_back(owner);
    }
    ++distinct;
    first = last;
  }
  return plan;
}

}  // namespace peer::cpu
