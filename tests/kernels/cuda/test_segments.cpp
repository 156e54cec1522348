#include <array>
#include <map>
#include <memory>
#include <valarray>

#include "cuda_support.h"
#include "kernels/cuda/segment_chunks.h"
#include "kernels/cuda/segments.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

// By owner; empty if no owner is frozen.
using Mask = std::valarray<bool>;

// Of ten owners, so many are frozen.
Mask frozen_owners(int64_t owner_count, int64_t of_ten) {
  Mask frozen(owner_count);
  for (int64_t owner = 0; owner < owner_count; ++owner) {
    frozen[owner] = (owner * 7 + 3) % 10 < of_ten;
  }
  return frozen;
}

// The expected segments, made one at a time. Pairs of frozen owners have none.
struct ExpectedSegments {
  std::vector<int32_t> pair_ids, targets, distinct_owners;
  std::vector<std::array<int32_t, 3>> split_segments;
  int32_t partial_rows = 0;

  ExpectedSegments(const std::vector<int64_t>& owners, const Mask& frozen, OutputRows rows) {
    std::map<int64_t, std::vector<int32_t>> segments;
    for (size_t i = 0; i < owners.size(); ++i) {
      if (frozen.size() == 0 || !frozen[owners[i]]) {
        segments[owners[i]].push_back(int32_t(i));
      }
    }
    for (const auto& [owner, pairs] : segments) {
      const int32_t row = rows == OutputRows::compact ? distinct_owners.size() : owner;
      distinct_owners.push_back(owner);
      pair_ids.insert(pair_ids.end(), pairs.begin(), pairs.end());
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

bool agree(const Segments& actual, const ExpectedSegments& expected, OutputRows rows) {
  const auto equal = [](const auto* values, const auto& list) {
    return std::equal(list.begin(), list.end(), values);
  };
  const SegmentCounts counts = *actual.counts;
  const int64_t trained = actual.trained_count ? *actual.trained_count : actual.count;
  bool right = trained == int64_t(expected.pair_ids.size()) &&
               counts.owners == int32_t(expected.distinct_owners.size()) &&
               counts.split_segments == int32_t(expected.split_segments.size()) &&
               counts.partial_rows == expected.partial_rows &&
               counts.split_segments <= actual.max_split_segments &&
               counts.partial_rows <= actual.max_partial_rows;
  right = right && equal(actual.pair_ids.get(), expected.pair_ids) &&
          equal(actual.targets.get(), expected.targets);
  if (rows == OutputRows::compact) {
    right = right && equal(actual.distinct_owners.get(), expected.distinct_owners);
  }
  for (int32_t i = 0; right && i < counts.split_segments; ++i) {
    const SplitSegment& segment = actual.split_segments.get()[i];
    right = expected.split_segments[i] ==
            std::array<int32_t, 3>{segment.first, segment.count, segment.row};
  }
  return right;
}

void check_segments(const std::vector<int64_t>& owners,
                    int64_t owner_count,
                    OutputRows rows,
                    const Mask& frozen = {}) {
  const Segments segments = make_segments(owners.data(), owners.size(), owner_count,
                                          frozen.size() > 0 ? &frozen[0] : nullptr, rows, kContext);
  const ExpectedSegments expected(owners, frozen, rows);
  INFO(owners.size() << " pairs of " << owner_count << " owners, compact "
                     << (rows == OutputRows::compact));
  CHECK(segments.count == int64_t(owners.size()));
  CHECK(agree(segments, expected, rows));
  CHECK(DistinctOwnerCount(segments, kContext).wait() == int64_t(expected.distinct_owners.size()));
}

void check_segments(const std::vector<int64_t>& owners,
                    int64_t owner_count,
                    const Mask& frozen = {}) {
  check_segments(owners, owner_count, OutputRows::by_owner, frozen);
  check_segments(owners, owner_count, OutputRows::compact, frozen);
}

}  // namespace

TEST_CASE("pairs are sorted by owner, stably, and every sum has its target", "[segments]") {
  Random random(1);
  for (const int64_t owner_count : {1, 2, 1025, 1 << 20, INT32_MAX}) {
    for (const int64_t count : {1, 33, 512, 513, 2000}) {
      check_segments(random.integers(count, owner_count), owner_count);
    }
  }
}

TEST_CASE("segments are cut into chunks from their own start, wherever that lies", "[segments]") {
  check_segments(
      owners_of_segments({128, 127, 129, 1, 0, 255, 256, 257, 0, 0, 3, 512, 640, 2, 513}), 20);
  check_segments(owners_of_segments({1, 5000, 1}), 3);
  check_segments(owners_of_segments({5000}), 1);
  check_segments(owners_of_segments({200, 200, 200}), 1000);
}

TEST_CASE("pairs of frozen owners lie behind all others and belong to no segment", "[segments]") {
  Random random(4);
  for (const int64_t of_ten : {0, 1, 5, 9, 10}) {
    INFO("frozen, of ten " << of_ten);
    for (const int64_t owner_count : {1, 2, 1023, 1024, 1025, 1 << 20}) {
      for (const int64_t count : {1, 33, 512, 513, 2000}) {
        check_segments(random.integers(count, owner_count), owner_count,
                       frozen_owners(owner_count, of_ten));
      }
    }
  }
}

TEST_CASE("a hot owner that is frozen is not split", "[segments]") {
  const std::vector<int64_t> owners = owners_of_segments({300, 129, 5000, 2, 257, 1, 1024});
  for (const Mask& frozen : {Mask{false, false, true, false, false, false, false},
                             Mask{true, false, true, false, true, false, true},
                             Mask{true, true, true, true, true, true, true}}) {
    check_segments(owners, 7, frozen);
  }
}

TEST_CASE("a few small segments are right for every order of threads", "[segments][races]") {
  check_segments(owners_of_segments({130, 2, 300, 1, 129}), 6);
  check_segments(owners_of_segments({130, 2, 300, 1, 129}), 6,
                 {false, true, true, false, false, true});
}

TEST_CASE("there may be more tiles than the block that scans them has threads", "[segments]") {
  Random random(2);
  std::vector<int64_t> owners = random.integers(132'000, 100'000);
  std::fill(owners.begin() + 1000, owners.begin() + 21'000, 77'777);
  check_segments(owners, 100'000, OutputRows::compact);
  check_segments(owners, 100'000, OutputRows::compact, frozen_owners(100'000, 5));
}

TEST_CASE("the number of distinct owners arrives when it is waited for, in any order",
          "[segments]") {
  const auto sort = [](const std::vector<int64_t>& owners) {
    return make_segments(owners.data(), owners.size(), 9, nullptr, OutputRows::compact, kContext);
  };
  const Segments three = sort({5, 1, 1, 8}), one = sort({7, 7}), two = sort({0, 8, 0});
  for (int repetition = 0; repetition < 3; ++repetition) {  // with memory that was used before
    const DistinctOwnerCount count_of_three(three, kContext);
    auto count_of_one = std::make_unique<DistinctOwnerCount>(one, kContext);
    const DistinctOwnerCount count_of_two(two, kContext);
    CHECK(count_of_two.wait() == 2);
    count_of_one.reset();  // nobody waited for it
    CHECK(DistinctOwnerCount(one, kContext).wait() == 1);
    CHECK(count_of_three.wait() == 3);
    CHECK(count_of_two.wait() == 2);
  }
  // The host is not faster than the device.
  int on_device = 1, on_host = 0;
  cudaMemcpyAsync(&on_host, &on_device, sizeof(int), cudaMemcpyDeviceToHost, nullptr);
  CHECK(on_host == 0);
  cudaStreamSynchronize(nullptr);
  CHECK(on_host == 1);
}

TEST_CASE("no pairs make no segments", "[segments]") {
  const Segments segments = make_segments(nullptr, 0, 100, nullptr, OutputRows::compact, kContext);
  CHECK(segments.count == 0);
  CHECK(segments.max_partial_rows == 0);
  CHECK(DistinctOwnerCount(segments, kContext).wait() == 0);
}

TEST_CASE("an owner out of range ends the kernel", "[segments]") {
  for (const int64_t bad : {int64_t(-1), int64_t(10), int64_t(1) << 32, INT64_MIN}) {
    std::vector<int64_t> owners(600, 3);
    owners[555] = bad;
    const Mask frozen = frozen_owners(10, 5);
    for (const bool* mask : {static_cast<const bool*>(nullptr), &frozen[0]}) {
      CHECK_THROWS_AS(
          make_segments(owners.data(), owners.size(), 10, mask, OutputRows::by_owner, kContext),
          std::runtime_error);
    }
  }
  const int64_t zero = 0;
  CHECK_THROWS_AS(make_segments(&zero, 1, 0, nullptr, OutputRows::by_owner, kContext),
                  std::runtime_error);
}

TEST_CASE("what ends at a position is found from its neighbours", "[segments]") {
  Random random(3);
  for (int repetition = 0; repetition < 20; ++repetition) {
    std::vector<int32_t> owners;
    for (int32_t segment = 0; segment < 30; ++segment) {
      const int64_t max_pairs = random.integer(3) == 0 ? 600 : 4;
      owners.insert(owners.end(), random.integer(max_pairs), 5 * segment);
    }
    int32_t start = 0;
    bool right = true;
    for (int32_t i = 0; i < int32_t(owners.size()); ++i) {
      start = i > 0 && owners[i - 1] == owners[i] ? start : i;
      const auto length = std::count(owners.begin(), owners.end(), owners[i]);
      const PairEnds ends = ends_at(owners.data(), owners.size(), i);
      right = right && segment_begin(owners.data(), i) == start;
      right = right && ends.segment == (i + 1 == start + length);
      right = right && ends.chunk == (ends.segment || (i + 1 - start) % kPairsPerChunk == 0);
      if (ends.chunk) {
        right = right && ends.is_split == (length > kPairsPerChunk);
        right = right && (!ends.is_split || ends.chunks == (i - start) / kPairsPerChunk + 1);
      }
    }
    CHECK(right);
  }
}

TEST_CASE("the bounds on split segments and partial rows are tight", "[segments]") {
  constexpr int64_t kChunk = kPairsPerChunk;
  for (int64_t owners = 1; owners <= 5; ++owners) {
    for (int64_t pairs = 0; pairs <= 8 * kChunk; ++pairs) {
      // The most rows for every number s of split segments: the shortest ones, one of them
      // lengthened by all further pairs.
      int64_t segments = 0, rows = 0;
      for (int64_t s = 1; s <= owners && s * (kChunk + 1) <= pairs; ++s) {
        segments = s;
        const int64_t longest = pairs - (s - 1) * (kChunk + 1);
        rows = std::max(rows, 2 * (s - 1) + (longest + kChunk - 1) / kChunk);
      }
      REQUIRE(max_split_segments(pairs, owners) == segments);
      REQUIRE(max_partial_rows(pairs, owners) == rows);
    }
  }
}
