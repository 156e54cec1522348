// Retrieval by the CUDA backend, played on the CPU. The stand-in for a device has 3
// sm_count: up to 3 blocks are large ones.
#include <limits>
#include <set>

#include "cuda_support.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/mma.h"
#include "kernels/product_key_topk.h"
#include "oracles/product_key_topk.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

// To nearest, and infinities and NaN as they are, which from_double does not promise.
template <class Element>
Element element_of(double value) {
  return narrow<Element>(accumulation_t<Element>(value));
}

template <class Element>
struct Problem {
  using Query = Element;
  using Real = accumulation_t<Query>;

  int64_t tokens, heads, half_width, rows, columns, k;
  bool shared;
  std::vector<Query> query, row_keys, col_keys;
  int64_t offset = 0;  // by so many elements the arrays miss their alignment
  std::vector<Real> scores = std::vector<Real>(tokens * heads * k, Real(-1));
  std::vector<int64_t> indices = std::vector<int64_t>(tokens * heads * k, -1);

  void solve() {
    const auto displaced = [&](const std::vector<Query>& values) {
      std::vector<Query> copy(offset);
      copy.insert(copy.end(), values.begin(), values.end());
      return copy;
    };
    const std::vector<Query> queries = displaced(query), row_array = displaced(row_keys),
                             col_array = displaced(col_keys);
    const ProductKeyTopk<Query> retrieval = {
        .tokens = tokens,
        .heads = heads,
        .half_width = half_width,
        .k = k,
        .query = queries.data() + offset,
        .rows = {row_array.data() + offset, rows, shared ? 0 : rows * half_width},
        .columns = {col_array.data() + offset, columns, shared ? 0 : columns * half_width},
        .scores = scores.data(),
        .indices = indices.data(),
    };
    product_key_topk(retrieval, kContext);
  }

  template <class Sum>
  std::vector<Sum> scores_of(int64_t token,
                             int64_t head,
                             const std::vector<Query>& keys,
                             int64_t count,
                             int64_t half) const {
    return sub_scores<Sum>(&query[((token * heads + head) * 2 + half) * half_width],
                           &keys[(shared ? 0 : head * count) * half_width], count, half_width);
  }
};

template <class Query>
void check_against_brute_force(Problem<Query> problem, const std::string& what) {
  using Real = accumulation_t<Query>;
  problem.solve();
  int64_t wrong = 0;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    for (int64_t h = 0; h < problem.heads; ++h) {
      const int64_t first = (t * problem.heads + h) * problem.k;
      wrong +=
          count_wrong(problem.template scores_of<Real>(t, h, problem.row_keys, problem.rows, 0),
                      problem.template scores_of<Real>(t, h, problem.col_keys, problem.columns, 1),
                      problem.k, &problem.scores[first], &problem.indices[first]);
    }
  }
  INFO(what);
  CHECK(wrong == 0);
}

template <class Query>
std::vector<Query> elements(const std::vector<double>& values) {
  std::vector<Query> result;
  for (const double value : values) {
    result.push_back(element_of<Query>(value));
  }
  return result;
}

template <class Query>
std::vector<Query> small_integers(Random& random, int64_t count, int64_t range) {
  std::vector<Query> values;
  for (const int64_t value : random.integers(count, 2 * range + 1)) {
    values.push_back(element_of<Query>(double(value - range)));
  }
  return values;
}

struct Sizes {
  int64_t tokens, heads, half_width, rows, columns, k;
  bool shared = true;
};

// With integers up to `range`: few make ties at most boundaries.
template <class Query>
Problem<Query> random_problem(Random& random, const Sizes& sizes, int64_t range) {
  const int64_t key_heads = sizes.shared ? 1 : sizes.heads;
  return {sizes.tokens,
          sizes.heads,
          sizes.half_width,
          sizes.rows,
          sizes.columns,
          sizes.k,
          sizes.shared,
          small_integers<Query>(random, sizes.tokens * sizes.heads * 2 * sizes.half_width, range),
          small_integers<Query>(random, key_heads * sizes.rows * sizes.half_width, range),
          small_integers<Query>(random, key_heads * sizes.columns * sizes.half_width, range)};
}

// One query, to whom the keys are the sub-scores.
template <class Query>
Problem<Query> given_scores(const std::vector<double>& rows,
                            const std::vector<double>& columns,
                            int64_t k) {
  return {1,
          1,
          1,
          int64_t(rows.size()),
          int64_t(columns.size()),
          k,
          true,
          elements<Query>({1, 1}),
          elements<Query>(rows),
          elements<Query>(columns)};
}

// A device with less shared memory, for as long as it lives.
struct SmallDevice {
  explicit SmallDevice(size_t shared_bytes) { limit_shared_bytes(shared_bytes); }
  ~SmallDevice() { limit_shared_bytes(kSharedBytes); }
};

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

#define PEER_QUERY_TYPES float, double, BFloat16, Half

TEMPLATE_TEST_CASE("retrieval equals brute force over all experts, ties included",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  Random random(6);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 16}, {40, 7}, {3, 300}, {1, 50}, {33, 1}, {300, 20}}) {
    for (const int64_t k : {1, 8, 17, 32, 64}) {
      if (k <= rows * columns) {
        const Sizes sizes = {2, 2, 5, rows, columns, k, k % 2 == 0};
        check_against_brute_force(random_problem<TestType>(random, sizes, 2),
                                  "grid " + std::to_string(rows) + "x" + std::to_string(columns) +
                                      " k " + std::to_string(k));
      }
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force where keys come in several chunks",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  Random random(7);
  for (const int64_t k : {16, 64}) {
    for (const int64_t range : {1, 15}) {  // many ties, few ties
      check_against_brute_force(random_problem<TestType>(random, {2, 1, 3, 1100, 513, k}, range),
                                "k " + std::to_string(k) + " range " + std::to_string(range));
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force for sorted scores in several chunks",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  // In steps that every type tells apart; ascending, each chunk's scores are all above those
  // before.
  std::vector<double> ascending(700), descending(530);
  for (int i = 0; i < 700; ++i) {
    ascending[i] = i / 4;
  }
  for (int i = 0; i < 530; ++i) {
    descending[i] = 100 - i / 3;
  }
  for (const int64_t k : {1, 20, 64}) {
    check_against_brute_force(given_scores<TestType>(ascending, descending, k),
                              "k " + std::to_string(k));
    check_against_brute_force(given_scores<TestType>(descending, ascending, k),
                              "swapped, k " + std::to_string(k));
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force at every key width, aligned or not",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  Random random(9);
  for (const int64_t half_width : {1, 4, 7, 8, 32, 40, 127, 128, 129, 300}) {
    for (const int64_t offset : {0, 1}) {
      Problem<TestType> problem =
          random_problem<TestType>(random, {1, 2, half_width, 35, 10, 9, false}, 2);
      problem.offset = offset;
      check_against_brute_force(problem, "half width " + std::to_string(half_width) + " offset " +
                                             std::to_string(offset));
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force for any number of tokens",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  Random random(10);
  for (const int64_t tokens : {1, 16, 17, 32, 33}) {
    check_against_brute_force(random_problem<TestType>(random, {tokens, 1, 3, 12, 9, 4}, 4),
                              std::to_string(tokens) + " tokens");
  }
  for (const bool shared : {true, false}) {  // more blocks than there are sm_count
    check_against_brute_force(random_problem<TestType>(random, {35, 3, 3, 12, 9, 4, shared}, 4),
                              "35 tokens of 3 heads");
  }
}

TEMPLATE_TEST_CASE("no tokens give no results", "[retrieval]", PEER_QUERY_TYPES) {
  Random random(10);
  for (const bool shared : {true, false}) {
    random_problem<TestType>(random, {0, 2, 3, 12, 9, 4, shared}, 4).solve();
  }
}

TEMPLATE_TEST_CASE("k may be all experts", "[retrieval]", PEER_QUERY_TYPES) {
  Random random(8);
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 9, 7, 63}, 3), "9x7");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 1, 64, 64}, 3), "1x64");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 64, 1, 64}, 3), "64x1");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 1, 1, 1}, 3), "1x1");
}

TEMPLATE_TEST_CASE("a device with little shared memory is enough for every k",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  const SmallDevice device(99 << 10);
  Random random(11);
  for (const int64_t k : {1, 64}) {  // a second chunk from 256 keys on
    check_against_brute_force(random_problem<TestType>(random, {3, 1, 3, 300, 100, k}, 3),
                              "k " + std::to_string(k));
  }
}

TEMPLATE_TEST_CASE(
    "NaN, infinities of either sign and minus zero are ordered as brute force orders them",
    "[retrieval]",
    PEER_QUERY_TYPES) {
  // What all types hold. The largest ones overflow when added.
  const double largest = to_double(std::is_same_v<TestType, Half> ? element_of<TestType>(65504)
                                                                  : element_of<TestType>(3e38));
  const std::vector<double> special = {0,     -0.0, 1,       -1,       kInf,
                                       -kInf, kNan, largest, -largest, 0x1p-14};
  Random random(9);
  for (int repeat = 0; repeat < 60; ++repeat) {
    const int64_t rows = 1 + random.integer(12), columns = 1 + random.integer(12);
    const int64_t k = 1 + random.integer(std::min<int64_t>(rows * columns, 20));
    const int64_t kinds =
        1 + random.integer(special.size());  // few kinds make constant rows and long ties
    const auto draw = [&](int64_t count) {
      std::vector<double> values;
      const int64_t first = random.integer(special.size());
      for (const int64_t kind : random.integers(count, kinds)) {
        values.push_back(special[(first + kind) % special.size()]);
      }
      return values;
    };
    const std::vector<double> row_scores = draw(rows), column_scores = draw(columns);
    check_against_brute_force(given_scores<TestType>(row_scores, column_scores, k),
                              "repeat " + std::to_string(repeat));
  }
}

TEMPLATE_TEST_CASE(
    "opposite infinities win over finite scores even where one of them is last in its half",
    "[retrieval]",
    PEER_QUERY_TYPES) {
  std::vector<double> long_half(600);
  for (int i = 0; i < 600; ++i) {
    long_half[i] = i / 4;
  }
  long_half[123] = long_half[124] = long_half[599] = -kInf;
  for (const int64_t k : {1, 4, 40}) {
    const std::vector<double> short_half = {1, kInf, 2, kInf};
    check_against_brute_force(given_scores<TestType>(short_half, long_half, k),
                              "+inf row, -inf column, k " + std::to_string(k));
    check_against_brute_force(given_scores<TestType>(long_half, short_half, k),
                              "-inf row, +inf column, k " + std::to_string(k));
  }
  std::vector<double> both(70, -kInf);  // more of each than k
  both.resize(140, kInf);
  check_against_brute_force(given_scores<TestType>(both, both, 64), "both in both");
  both[3] = kNan;
  check_against_brute_force(given_scores<TestType>(both, {-kInf, 1, kInf, kNan}, 64), "NaN, too");
}

TEMPLATE_TEST_CASE(
    "NaNs that hide an infinity from the list of the best fill the result themselves",
    "[retrieval]",
    PEER_QUERY_TYPES) {
  const std::vector<double> hidden = {1, kInf, kNan, kNan, 2, kNan, kNan, kNan, -kInf};
  for (const int64_t k : {1, 3, 4, 5, 6, 7}) {
    for (const std::vector<double>& other : {std::vector<double>{1, -kInf, 2, 3, 4, 5, 6},
                                             {-kInf, kInf, 0, 0},
                                             {kNan, -kInf, kNan, kInf}}) {
      check_against_brute_force(given_scores<TestType>(hidden, other, k),
                                "hidden row, k " + std::to_string(k));
      check_against_brute_force(given_scores<TestType>(other, hidden, k),
                                "hidden column, k " + std::to_string(k));
    }
  }
}

TEMPLATE_TEST_CASE("ids are distinct and in range for rows that defeat a filter on floats",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  for (const double value : {0.0, kNan, kInf, -kInf, 3e38}) {
    Problem<TestType> problem{2,
                              1,
                              4,
                              600,
                              560,
                              50,
                              true,
                              elements<TestType>(std::vector<double>(16, value)),
                              elements<TestType>(std::vector<double>(2400, 1)),
                              elements<TestType>(std::vector<double>(2240, 1))};
    problem.solve();
    for (int64_t list = 0; list < 2; ++list) {
      const std::set<int64_t> ids(problem.indices.begin() + list * 50,
                                  problem.indices.begin() + (list + 1) * 50);
      INFO("value " << value);
      CHECK(ids.size() == 50);
      CHECK(*ids.begin() >= 0);
      CHECK(*ids.rbegin() < 600 * 560);
    }
  }
}

TEMPLATE_TEST_CASE("random scores are right within rounding, and the best are found",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  Random random(12);
  const int64_t tokens = 3, half_width = 70, rows = 600, columns = 130, k = 24;
  Problem<TestType> problem{tokens,
                            1,
                            half_width,
                            rows,
                            columns,
                            k,
                            true,
                            random.normal<TestType>(tokens * 2 * half_width),
                            random.normal<TestType>(rows * half_width),
                            random.normal<TestType>(columns * half_width)};
  problem.solve();
  const double tolerance = 200 * kEpsilon<accumulation_t<TestType>>;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto row_scores = problem.template scores_of<double>(t, 0, problem.row_keys, rows, 0);
    const auto column_scores =
        problem.template scores_of<double>(t, 0, problem.col_keys, columns, 1);
    const auto expected = brute_force(row_scores, column_scores, k);
    const std::set<int64_t> ids(&problem.indices[t * k], &problem.indices[t * k] + k);
    CHECK(ids.size() == k);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = problem.indices[t * k + i];
      REQUIRE((id >= 0 && id < rows * columns));
      const double score = problem.scores[t * k + i];
      CHECK(std::abs(score - (row_scores[id / columns] + column_scores[id % columns])) < tolerance);
      CHECK(std::abs(score - expected[i].first) < tolerance);
    }
  }
}

TEMPLATE_TEST_CASE("a query's result does not depend on its neighbours or on the device",
                   "[retrieval]",
                   PEER_QUERY_TYPES) {
  using Real = accumulation_t<TestType>;
  Random random(13);
  const int64_t half_width = 150, keys = 300, k = 12;  // a second stage, a second chunk
  const auto row_keys = random.normal<TestType>(keys * half_width);
  const auto col_keys = random.normal<TestType>(keys * half_width);
  const auto query = random.normal<TestType>(5 * 2 * half_width);
  Problem<TestType> together{5, 1, half_width, keys, keys, k, true, query, row_keys, col_keys};
  together.solve();
  const SmallDevice device(99 << 10);
  const int64_t last = 4;
  Problem<TestType> alone{
      1,        1,       half_width, keys,
      keys,     k,       true,       {query.begin() + last * 2 * half_width, query.end()},
      row_keys, col_keys};
  alone.offset = 1;
  alone.solve();
  CHECK(std::memcmp(alone.scores.data(), &together.scores[last * k], k * sizeof(Real)) == 0);
  CHECK(std::equal(alone.indices.begin(), alone.indices.end(), &together.indices[last * k]));
}

TEMPLATE_TEST_CASE("no access races with another", "[retrieval][races]", float, BFloat16) {
  const SmallDevice device(99 << 10);
  Random random(14);
  check_against_brute_force(random_problem<TestType>(random, {2, 1, 3, 270, 9, 3}, 3),
                            "two chunks");
  check_against_brute_force(random_problem<TestType>(random, {1, 1, 130, 9, 9, 3}, 1),
                            "two stages");
  check_against_brute_force(given_scores<TestType>({kInf, 1}, {2, -kInf, 3}, 2), "infinities");
}

TEST_CASE("the pairs that are listed are those that can be chosen", "[retrieval]") {
  for (int k = 1; k <= kMaxRetrieved; ++k) {
    for (const auto& [rows, columns] : {std::pair{1, 64}, {64, 1}, {5, 9}, {100, 100}}) {
      int chosen = 0;
      for (int i = 0; i < rows; ++i) {
        CHECK(count_candidate_pairs(i, columns, k) == chosen);
        int beside = 0;
        for (int j = 0; j < columns; ++j) {
          beside += is_candidate(i, j, k);
        }
        CHECK(count_candidate_columns(i, columns, k) == beside);
        chosen += beside;
      }
      CHECK(count_candidate_pairs(rows, columns, k) == chosen);
    }
  }
}

// The layout that NVIDIA's documents give, element by element: where row i and column j of each
// matrix are, as a lane and a place there.
TEMPLATE_TEST_CASE("the stand-in for the tensor cores multiplies matrices in their layout",
                   "[retrieval]",
                   BFloat16,
                   Half) {
  Random random(15);
  const auto a = random.normal<TestType>(16 * 16), b = random.normal<TestType>(16 * 8);
  const auto c = random.normal<float>(16 * 8);
  struct Fragments {
    TestType a[8], b[4];
    float sums[4];
  };
  std::vector<Fragments> lanes(32);
  const auto a_at = [&](int i, int j) -> TestType& {
    return lanes[i % 8 * 4 + j % 8 / 2].a[j % 2 + i / 8 * 2 + j / 8 * 4];
  };
  const auto b_at = [&](int i, int j) -> TestType& {
    return lanes[j * 4 + i % 8 / 2].b[i % 2 + i / 8 * 2];
  };
  const auto sum_at = [&](int i, int j) -> float& {
    return lanes[i % 8 * 4 + j / 2].sums[j % 2 + i / 8 * 2];
  };
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      a_at(i, j) = a[i * 16 + j];
    }
    for (int j = 0; j < 8; ++j) {
      b_at(i, j) = b[i * 8 + j];
      sum_at(i, j) = c[i * 8 + j];
    }
  }
  play_grid({1, 32, 0}, [&] {
    Fragments& own = lanes[threadIdx.x];
    uint32_t own_a[4], own_b[2];
    std::memcpy(own_a, own.a, sizeof(own_a));
    std::memcpy(own_b, own.b, sizeof(own_b));
    for (int repeat = 0; repeat < 2; ++repeat) {  // right after each other, as in a loop
      multiply_add<TestType>(own.sums, own_a, own_b);
    }
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double product = 0;
      for (int k = 0; k < 16; ++k) {
        product += to_double(a[i * 16 + k]) * to_double(b[k * 8 + j]);
      }
      CHECK(sum_at(i, j) == Approx(c[i * 8 + j] + 2 * product).margin(1e-4));
    }
  }
}

TEST_CASE("key owners are the rows and columns of a head's part of the keys", "[retrieval]") {
  const int64_t rows = 7, columns = 11, heads = 3, k = 5, tokens = 40;
  Random random(16);
  const std::vector<int64_t> indices = random.integers(tokens * heads * k, rows * columns);
  for (const bool shared : {true, false}) {
    std::vector<int64_t> row_owners(indices.size(), -1), column_owners(indices.size(), -1);
    find_key_owners({tokens * heads, heads, k, columns, rows * columns, shared ? 0 : rows,
                     shared ? 0 : columns, indices.data(), row_owners.data(), column_owners.data()},
                    kContext);
    for (size_t i = 0; i < indices.size(); ++i) {
      const int64_t head = shared ? 0 : int64_t(i) / k % heads;
      REQUIRE(row_owners[i] == head * rows + indices[i] / columns);
      REQUIRE(column_owners[i] == head * columns + indices[i] % columns);
    }
  }
}

TEST_CASE("an index that is out of range for the experts traps", "[retrieval]") {
  for (const int64_t bad : {int64_t(-1), int64_t(77), int64_t(1) << 40}) {
    std::vector<int64_t> indices(10, 3), row_owners(10), column_owners(10);
    indices[9] = bad;
    CHECK_THROWS_AS(find_key_owners({5, 1, 2, 11, 77, 0, 0, indices.data(), row_owners.data(),
                                     column_owners.data()},
                                    kContext),
                    std::runtime_error);
  }
  find_key_owners({0, 1, 2, 11, 77, 0, 0, nullptr, nullptr, nullptr}, kContext);
}
