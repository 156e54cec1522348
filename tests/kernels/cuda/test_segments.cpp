#include <array>
#include <map>

#include "cuda_support.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/segments.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

// What the runs of owners add up to, one run at a time.
struct WorkList {
  std::vector<int32_t> numbers, targets, distinct_owners;
  std::vector<std::array<int32_t, 3>> split_segments;
  int32_t partial_rows = 0;

  WorkList(const std::vector<int64_t>& owners, OutputRows rows) {
    std::map<int64_t, std::vector<int32_t>> runs;
    for (size_t i = 0; i < owners.size(); ++i) {
      runs[owners[i]].push_back(int32_t(i));
    }
    for (const auto& [owner, pairs] : runs) {
      const int32_t row = rows == OutputRows::compact ? distinct_owners.size() : owner;
      distinct_owners.push_back(owner);
      numbers.insert(numbers.end(), pairs.begin(), pairs.end());
      const bool is_split = pairs.size() > kPairsPerChunk;
      const int32_t first = partial_rows;
      for (size_t i = 1; i <= pairs.size(); ++i) {
        const bool ends = i == pairs.size() || i % kPairsPerChunk == 0;
        targets.push_back(!ends      ? kContinueSegment
                          : is_split ? to_partial_row(partial_rows++)
                                     : row);
      }
      if (is_split) {
        split_segments.push_back({first, partial_rows - first, row});
      }
    }
  }
};

bool agrees(const Segments& pairs, const WorkList& expected, OutputRows rows) {
  const auto equal = [](const auto* actual, const auto& list) {
    return std::equal(list.begin(), list.end(), actual);
  };
  const SegmentCounts counts = *pairs.counts;
  bool right = pairs.count == int64_t(expected.numbers.size()) &&
               counts.owners == int32_t(expected.distinct_owners.size()) &&
               counts.split_segments == int32_t(expected.split_segments.size()) &&
               counts.partial_rows == expected.partial_rows &&
               counts.split_segments <= pairs.max_split_segments &&
               counts.partial_rows <= pairs.max_partial_rows;
  right = right && equal(pairs.numbers.get(), expected.numbers) &&
          equal(pairs.targets.get(), expected.targets);
  if (rows == OutputRows::compact) {
    right = right && equal(pairs.distinct_owners.get(), expected.distinct_owners);
  }
  for (int32_t r = 0; right && r < counts.split_segments; ++r) {
    const SplitSegment& run = pairs.split_segments.get()[r];
    right = expected.split_segments[r] == std::array<int32_t, 3>{run.first, run.count, run.row};
  }
  return right;
}

void check_sorting(const std::vector<int64_t>& owners, int64_t owner_count, OutputRows rows) {
  const Segments pairs = make_segments(owners.data(), owners.size(), owner_count, rows, kContext);
  const WorkList expected(owners, rows);
  INFO(owners.size() << " pairs of " << owner_count << " owners, compact "
                     << (rows == OutputRows::compact));
  CHECK(agrees(pairs, expected, rows));
  CHECK(count_distinct_owners(pairs, kContext) == int64_t(expected.distinct_owners.size()));
}

void check_sorting(const std::vector<int64_t>& owners, int64_t owner_count) {
  check_sorting(owners, owner_count, OutputRows::by_owner);
  check_sorting(owners, owner_count, OutputRows::compact);
}

}  // namespace

TEST_CASE("pairs come out by owner, in their own order within an owner, and know their sums",
          "[sorted_pairs]") {
  Random random(1);
  for (const int64_t owner_count : {1, 2, 1025, 1 << 20, INT32_MAX}) {
    for (const int64_t count : {1, 33, 512, 513, 2000}) {
      check_sorting(random.integers(count, owner_count), owner_count);
    }
  }
}

TEST_CASE("runs are cut into chunks from their own start, wherever that lies", "[sorted_pairs]") {
  check_sorting(owners_of_segments({128, 127, 129, 1, 0, 255, 256, 257, 0, 0, 3, 512, 640, 2, 513}),
                20);
  check_sorting(owners_of_segments({1, 5000, 1}), 3);
  check_sorting(owners_of_segments({5000}), 1);
  check_sorting(owners_of_segments({200, 200, 200}), 1000);
}

TEST_CASE("a small work list is right, whoever comes first", "[sorted_pairs][races]") {
  check_sorting(owners_of_segments({130, 2, 300, 1, 129}), 6);
}

TEST_CASE("there may be more tiles than the block that adds them up has threads",
          "[sorted_pairs]") {
  Random random(2);
  std::vector<int64_t> owners = random.integers(132'000, 100'000);
  std::fill(owners.begin() + 1000, owners.begin() + 21'000, 77'777);
  check_sorting(owners, 100'000, OutputRows::compact);
}

TEST_CASE("no pairs are no work", "[sorted_pairs]") {
  const Segments pairs = make_segments(nullptr, 0, 100, OutputRows::compact, kContext);
  CHECK(pairs.count == 0);
  CHECK(pairs.max_partial_rows == 0);
  CHECK(count_distinct_owners(pairs, kContext) == 0);
}

TEST_CASE("an owner out of range ends the kernel", "[sorted_pairs]") {
  for (const int64_t bad : {int64_t(-1), int64_t(10), int64_t(1) << 32, INT64_MIN}) {
    std::vector<int64_t> owners(600, 3);
    owners[555] = bad;
    CHECK_THROWS_AS(make_segments(owners.data(), owners.size(), 10, OutputRows::by_owner, kContext),
                    std::runtime_error);
  }
  const int64_t zero = 0;
  CHECK_THROWS_AS(make_segments(&zero, 1, 0, OutputRows::by_owner, kContext), std::runtime_error);
}

TEST_CASE("what ends at a position is found from its neighbours", "[sorted_pairs]") {
  Random random(3);
  for (int repetition = 0; repetition < 20; ++repetition) {
    std::vector<int32_t> owners;
    for (int32_t run = 0; run < 30; ++run) {
      const int64_t most = random.integer(3) == 0 ? 600 : 4;
      owners.insert(owners.end(), random.integer(most), 5 * run);
    }
    int32_t start = 0;
    bool right = true;
    for (int32_t i = 0; i < int32_t(owners.size()); ++i) {
      start = i > 0 && owners[i - 1] == owners[i] ? start : i;
      const auto length = std::count(owners.begin(), owners.end(), owners[i]);
      const PairEnds ends = ends_at(owners.data(), owners.size(), i);
      right = right && start_of_run(owners.data(), i) == start;
      right = right && ends.run == (i + 1 == start + length);
      right = right && ends.chunk == (ends.run || (i + 1 - start) % kPairsPerChunk == 0);
      if (ends.chunk) {
        right = right && ends.is_split == (length > kPairsPerChunk);
        right = right && (!ends.is_split || ends.chunks == (i - start) / kPairsPerChunk + 1);
      }
    }
    CHECK(right);
  }
}

TEST_CASE("the bounds on split segments and partial rows are reached, and never passed",
          "[sorted_pairs]") {
  constexpr int64_t kChunk = kPairsPerChunk;
  for (int64_t owners = 1; owners <= 5; ++owners) {
    for (int64_t pairs = 0; pairs <= 8 * kChunk; ++pairs) {
      // The best that s split segments can do, for every s: the shortest ones, one of them
      // prolonged.
      int64_t runs = 0, rows = 0;
      for (int64_t s = 1; s <= owners && s * (kChunk + 1) <= pairs; ++s) {
        runs = s;
        const int64_t longest = pairs - (s - 1) * (kChunk + 1);
        rows = std::max(rows, 2 * (s - 1) + (longest + kChunk - 1) / kChunk);
      }
      REQUIRE(max_split_segments(pairs, owners) == runs);
      REQUIRE(max_partial_rows(pairs, owners) == rows);
    }
  }
}
