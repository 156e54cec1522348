#include <map>
#include <numeric>
#include <valarray>

#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

TEST_CASE("pairs come out by owner, and in their own order within an owner", "[segments]") {
  const int64_t owner_count = GENERATE(1, 2, 3, 1000, 2048, 2049, 1 << 20, (int64_t(1) << 33) + 5);
  const int64_t count = GENERATE(0, 1, 2, 1000, 100'000);
  Random random(1);
  const std::vector<int64_t> owners = random.integers(count, owner_count);
  const List<Pair> pairs =
      make_segments(owners.data(), count, owner_count, nullptr, OutputRows::by_owner,
                    SinglePairs::in_chunks, on_threads(2), plain_memory)
          .pairs;

  std::vector<int64_t> expected(count);
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int64_t a, int64_t b) { return owners[a] < owners[b]; });
  bool equal = true;
  for (int64_t i = 0; i < count; ++i) {
    equal = equal && pairs[i].id == expected[i] && pairs[i].owner == owners[expected[i]];
  }
  CHECK(equal);
}

namespace {

// Owners, one of them hot: its segment is longer than a block of pairs.
std::vector<int64_t> owners_with_a_hot_one(int64_t count, int64_t hot) {
  Random random(2);
  std::vector<int64_t> owners = random.integers(count, 300);
  std::fill(owners.begin() + 1000, owners.begin() + 1000 + hot, 17);
  return owners;
}

}  // namespace

TEST_CASE("chunks cover every pair once, and none is longer than allowed", "[segments]") {
  const OutputRows rows = GENERATE(OutputRows::by_owner, OutputRows::compact);
  const int threads = GENERATE(1, 3);
  const std::vector<int64_t> owners = owners_with_a_hot_one(40'000, 20'000);
  const Segments segments =
      make_segments(owners.data(), owners.size(), 300, nullptr, rows, SinglePairs::in_chunks,
                    on_threads(threads), plain_memory);

  std::map<int64_t, int64_t> pairs_of_owner;
  for (const int64_t owner : owners) {
    pairs_of_owner[owner] += 1;
  }
  int64_t position = 0, row = -1, partial_row = 0, split_segment = 0;
  bool right = true;
  for (auto [owner, left] : pairs_of_owner) {
    ++row;
    const int64_t output_row = rows == OutputRows::compact ? row : owner;
    right = right && (rows == OutputRows::by_owner || segments.distinct_owners[row] == owner);
    const bool is_split = left > kPairsPerChunk;
    const int64_t first_partial = partial_row;
    for (; left > 0; left -= kPairsPerChunk, ++position) {
      const Chunk& chunk = segments.chunks[position];
      right = right && chunk.is_partial == is_split &&
              chunk.row == (is_split ? partial_row++ : output_row) &&
              chunk.last - chunk.first == std::min<int64_t>(left, kPairsPerChunk) &&
              chunk.first == (position == 0 ? 0 : segments.chunks[position - 1].last) &&
              segments.pairs[chunk.first].owner == owner &&
              segments.pairs[chunk.last - 1].owner == owner;
    }
    if (is_split) {
      const SplitSegment& split = segments.split_segments[split_segment++];
      right = right && split.first == first_partial && split.last == partial_row &&
              split.row == output_row;
    }
  }
  CHECK(right);
  CHECK(segments.chunks.size() == position);
  CHECK(segments.chunks[position - 1].last == int64_t(owners.size()));
  CHECK(segments.split_segments.size() == split_segment);
  CHECK(segments.partial_rows == partial_row);
  CHECK(segments.distinct_owners.size() == (rows == OutputRows::compact ? row + 1 : 0));
  CHECK(segments.single_rows.size() == 0);
}

TEST_CASE("single pairs that are apart have their rows, and the other segments their chunks",
          "[segments]") {
  const OutputRows rows = GENERATE(OutputRows::by_owner, OutputRows::compact);
  const int threads = GENERATE(1, 3);
  const bool has_frozen = GENERATE(false, true);
  // As many pairs as owners: a third of the owners have one. One is hot, unless there are few.
  const int64_t count = GENERATE(1, 40'000);
  std::vector<int64_t> owners = Random(4).integers(count, count);
  std::fill(owners.begin(), owners.begin() + count / 8, count / 2);
  std::valarray<bool> frozen(count);
  for (int64_t owner = 0; owner < count; ++owner) {
    frozen[owner] = has_frozen && owner % 5 == 3;
  }
  const auto solve = [&](SinglePairs single_pairs, int threads) {
    return make_segments(owners.data(), count, count, has_frozen ? &frozen[0] : nullptr, rows,
                         single_pairs, on_threads(threads), plain_memory);
  };
  const Segments segments = solve(SinglePairs::apart, threads);
  const Segments expected = solve(SinglePairs::in_chunks, 1);

  std::vector<int64_t> single_rows(count, -1);
  std::vector<Chunk> chunks;
  for (const Chunk& chunk : expected.chunks) {
    if (chunk.last - chunk.first == 1 && !chunk.is_partial) {
      single_rows[expected.pairs[chunk.first].id] = chunk.row;
    } else {
      chunks.push_back(chunk);
    }
  }
  CHECK(segments.single_count == expected.chunks.size() - int64_t(chunks.size()));
  REQUIRE(segments.single_count > 0);
  CHECK(std::equal(segments.single_rows.begin(), segments.single_rows.end(), single_rows.begin(),
                   single_rows.end()));
  CHECK(std::equal(segments.chunks.begin(), segments.chunks.end(), chunks.begin(), chunks.end(),
                   [](const Chunk& a, const Chunk& b) {
                     return a.first == b.first && a.last == b.last && a.row == b.row &&
                            a.is_partial == b.is_partial;
                   }));
  CHECK(std::equal(segments.distinct_owners.begin(), segments.distinct_owners.end(),
                   expected.distinct_owners.begin(), expected.distinct_owners.end()));
  CHECK(segments.partial_rows == expected.partial_rows);
  CHECK(segments.split_segments.size() == expected.split_segments.size());
}

TEST_CASE("without single pairs, there is no list of their rows", "[segments]") {
  const std::vector<int64_t> owners = {2, 1, 1, 2};
  const Segments segments = make_segments(owners.data(), 4, 3, nullptr, OutputRows::by_owner,
                                          SinglePairs::apart, on_threads(2), plain_memory);
  CHECK(segments.work(Rows<float>{}).single_rows == nullptr);
  CHECK(segments.chunks.size() == 2);
}

TEST_CASE("segments with frozen owners are those of the other pairs", "[segments]") {
  const OutputRows rows = GENERATE(OutputRows::by_owner, OutputRows::compact);
  const int threads = GENERATE(1, 3);
  const int64_t hot = GENERATE(0, 20'000);
  // Of ten owners, how many are frozen.
  const int64_t share = GENERATE(0, 1, 5, 9, 10);
  const std::vector<int64_t> owners = owners_with_a_hot_one(40'000, hot);
  std::valarray<bool> frozen(300);
  for (int64_t owner = 0; owner < 300; ++owner) {
    frozen[owner] = (owner + 3) % 10 < share;
  }
  std::vector<int64_t> ids, trained;
  for (size_t i = 0; i < owners.size(); ++i) {
    if (!frozen[owners[i]]) {
      ids.push_back(i);
      trained.push_back(owners[i]);
    }
  }
  const Segments segments =
      make_segments(owners.data(), owners.size(), 300, &frozen[0], rows, SinglePairs::in_chunks,
                    on_threads(threads), plain_memory);
  const Segments expected = make_segments(trained.data(), trained.size(), 300, nullptr, rows,
                                          SinglePairs::in_chunks, on_threads(1), plain_memory);

  CHECK(segments.pair_count == int64_t(owners.size()));
  REQUIRE(segments.pairs.size() == expected.pairs.size());
  CHECK(std::equal(
      segments.pairs.begin(), segments.pairs.end(), expected.pairs.begin(),
      [&](const Pair& a, const Pair& b) { return a.owner == b.owner && a.id == ids[b.id]; }));
  const auto have_same_bytes = [](const auto& a, const auto& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  CHECK(std::equal(segments.chunks.begin(), segments.chunks.end(), expected.chunks.begin(),
                   expected.chunks.end(), [](const Chunk& a, const Chunk& b) {
                     return a.first == b.first && a.last == b.last && a.row == b.row &&
                            a.is_partial == b.is_partial;
                   }));
  CHECK(have_same_bytes(segments.split_segments, expected.split_segments));
  CHECK(have_same_bytes(segments.distinct_owners, expected.distinct_owners));
  CHECK(segments.partial_rows == expected.partial_rows);
}

TEST_CASE("no pairs are no segments", "[segments]") {
  const Segments segments = make_segments(nullptr, 0, 300, nullptr, OutputRows::compact,
                                          SinglePairs::apart, on_threads(2), plain_memory);
  CHECK(segments.chunks.size() == 0);
  CHECK(segments.split_segments.size() == 0);
  CHECK(segments.distinct_owners.size() == 0);
}
