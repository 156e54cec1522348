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
  const auto pairs = sort_pairs(owners.data(), count, owner_count, on_threads(2));

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

TEST_CASE("the chunks of a plan cover every pair once, and none is longer than allowed", "[sort]") {
  const OutputRows rows = GENERATE(OutputRows::by_owner, OutputRows::compact);
  Random random(2);
  std::vector<int64_t> owners = random.integers(5000, 300);
  std::fill(owners.begin() + 1000, owners.begin() + 3000, 17);  // a hot owner, in pieces
  const auto pairs = sort_pairs(owners.data(), owners.size(), 300, on_threads(1));
  const ExpertPassPlan plan = plan_expert_pass(pairs.get(), owners.size(), rows);

  int64_t position = 0;
  int64_t partial_rows = 0;
  for (const Chunk& chunk : plan.chunks) {
    CHECK(chunk.first == position);
    CHECK(chunk.last - chunk.first <= kPairsPerChunk);
    CHECK(pairs[chunk.first].owner == pairs[chunk.last - 1].owner);
    partial_rows += chunk.is_partial;
    position = chunk.last;
  }
  CHECK(position == int64_t(owners.size()));
  CHECK(partial_rows == plan.partial_rows);
  CHECK(plan.split_runs.size() == 1);
}
