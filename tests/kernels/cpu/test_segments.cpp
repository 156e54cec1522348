#include <map>
#include <numeric>

#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

TEST_CASE("pairs come out by owner, and in their own order within an owner", "[sort]") {
  const int64_t owner_count = GENERATE(1, 2, 3, 1000, 2048, 2049, 1 << 20, (int64_t(1) << 33) + 5);
  const int64_t count = GENERATE(0, 1, 2, 1000, 100'000);
  Random random(1);
  const std::vector<int64_t> owners = random.integers(count, owner_count);
  const auto pairs = make_segments(owners.data(), count, owner_count, on_threads(2), plain_memory);

  std::vector<int64_t> expected(count);
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int64_t a, int64_t b) { return owners[a] < owners[b]; });
  bool equal = true;
  for (int64_t i = 0; i < count; ++i) {
    equal = equal && pairs[i].number == expected[i] && pairs[i].owner == owners[expected[i]];
  }
  CHECK(equal);
}

namespace {

// Owners of which one is hot, in pieces: its run is longer than a block of pairs.
std::vector<int64_t> owners_with_a_hot_one(int64_t count, int64_t hot) {
  Random random(2);
  std::vector<int64_t> owners = random.integers(count, 300);
  std::fill(owners.begin() + 1000, owners.begin() + 1000 + hot, 17);
  return owners;
}

}  // namespace

TEST_CASE("the chunks of a plan cover every pair once, and none is longer than allowed", "[sort]") {
  const OutputRows rows = GENERATE(OutputRows::by_owner, OutputRows::compact);
  const int threads = GENERATE(1, 3);
  const std::vector<int64_t> owners = owners_with_a_hot_one(40'000, 20'000);
  const auto pairs = make_segments(owners.data(), owners.size(), 300, on_threads(1), plain_memory);
  const SegmentPlan plan = plan_expert_pass(pairs, rows, on_threads(threads), plain_memory);

  std::map<int64_t, int64_t> chunks_of_owner;
  for (const int64_t owner : owners) {
    chunks_of_owner[owner] += 1;
  }
  int64_t position = 0, row = -1, partial_row = 0, split_segment = 0;
  bool right = true;
  for (auto [owner, left] : chunks_of_owner) {
    ++row;
    const int64_t output_row = rows == OutputRows::compact ? row : owner;
    right = right && (rows == OutputRows::by_owner || plan.owners[row] == owner);
    const bool is_split = left > kPairsPerChunk;
    const int64_t first_partial = partial_row;
    for (; left > 0; left -= kPairsPerChunk, ++position) {
      const Chunk& chunk = plan.chunks[position];
      right = right && chunk.is_partial == is_split &&
              chunk.row == (is_split ? partial_row++ : output_row) &&
              chunk.last - chunk.first == std::min(left, kPairsPerChunk) &&
              chunk.first == (position == 0 ? 0 : plan.chunks[position - 1].last) &&
              pairs[chunk.first].owner == owner && pairs[chunk.last - 1].owner == owner;
    }
    if (is_split) {
      const SplitSegment& run = plan.split_segments[split_segment++];
      right =
          right && run.first == first_partial && run.last == partial_row && run.row == output_row;
    }
  }
  CHECK(right);
  CHECK(plan.chunks.size() == position);
  CHECK(plan.chunks[position - 1].last == int64_t(owners.size()));
  CHECK(plan.split_segments.size() == split_segment);
  CHECK(plan.partial_rows == partial_row);
  CHECK(plan.owners.size() == (rows == OutputRows::compact ? row + 1 : 0));
}

TEST_CASE("a plan of no pairs is empty", "[sort]") {
  const auto pairs = make_segments(nullptr, 0, 300, on_threads(2), plain_memory);
  const SegmentPlan plan =
      plan_expert_pass(pairs, OutputRows::compact, on_threads(2), plain_memory);
  CHECK(plan.chunks.size() == 0);
  CHECK(plan.split_segments.size() == 0);
  CHECK(plan.owners.size() == 0);
}
