// product_key_topk on the emulated device, which has 3 SMs. With more SMs, few queries divide the
// keys into ranges.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "cuda_support.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/product_key_topk.h"
#include "oracles/product_key_topk.h"
#include "problems/product_key_topk.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

// Rounds to nearest. Unlike from_double, keeps infinities and NaN.
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
  int64_t offset = 0;  // of the arrays from an aligned address, in elements
  Mask mask = {};
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
        .rows = {row_array.data() + offset, rows, shared ? 0 : rows * half_width,
                 Mask::data(mask.unused_rows)},
        .columns = {col_array.data() + offset, columns, shared ? 0 : columns * half_width,
                    Mask::data(mask.unused_columns)},
        .scores = scores.data(),
        .indices = indices.data(),
        .disabled = Mask::data(mask.disabled),
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
      wrong += count_wrong(
          problem.template scores_of<Real>(t, h, problem.row_keys, problem.rows, 0),
          problem.template scores_of<Real>(t, h, problem.col_keys, problem.columns, 1), problem.k,
          &problem.scores[first], &problem.indices[first], problem.mask.disabled);
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

// With integers in [-range, range]. A small range makes many ties.
template <class Query>
Problem<Query> random_problem(Random& random, const Sizes& sizes, int64_t range) {
  return draw_problem<Problem<Query>>(
      sizes, [&](int64_t count) { return small_integers<Query>(random, count, range); });
}

template <class Query>
Problem<Query> normal_problem(Random& random, const Sizes& sizes) {
  return draw_problem<Problem<Query>>(sizes,
                                      [&](int64_t count) { return random.normal<Query>(count); });
}

// One query. The sub-scores are the keys.
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

// Limits the shared memory of the emulated device for the lifetime of the object.
struct ScopedSharedMemory {
  explicit ScopedSharedMemory(size_t bytes) { limit_shared_bytes(bytes); }
  ~ScopedSharedMemory() { limit_shared_bytes(kSharedBytes); }
};

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

#define PEER_QUERY_TYPES float, double, BFloat16, Half

TEMPLATE_TEST_CASE("retrieval equals brute force over all experts, ties included",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(6);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 16}, {40, 7}, {3, 300}, {1, 50}, {33, 1}, {300, 20}}) {
    for (const int64_t k : {1, 8, 17, 32, 64}) {
      if (k <= rows * columns) {
        const Sizes sizes = {2, 2, 5, rows, columns, k, k % 2 == 0};
        check_against_brute_force(random_problem<TestType>(random, sizes, 2),
                                  describe_grid(rows, columns, k));
      }
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force if keys take several batches",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(7);
  for (const int64_t k : {16, 64}) {
    for (const int64_t range : {1, 15}) {  // many ties, few ties
      check_against_brute_force(random_problem<TestType>(random, {2, 1, 3, 1100, 513, k}, range),
                                "k " + std::to_string(k) + " range " + std::to_string(range));
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force for sorted scores in several batches",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // Every type represents the steps exactly. In ascending scores, every batch exceeds all previous
  // ones.
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
                   "[product_key_topk]",
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

TEMPLATE_TEST_CASE("every batch of keys is multiplied with all columns of wide queries",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(27);
  check_against_brute_force(random_problem<TestType>(random, {2, 1, 250, 9, 1500, 12}, 2),
                            "two stages of columns, several batches");
}

TEMPLATE_TEST_CASE("retrieval equals brute force for any number of tokens",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(10);
  for (const int64_t tokens : {1, 16, 17, 32, 33}) {
    check_against_brute_force(random_problem<TestType>(random, {tokens, 1, 3, 12, 9, 4}, 4),
                              std::to_string(tokens) + " tokens");
  }
  for (const bool shared : {true, false}) {  // more blocks than SMs
    check_against_brute_force(random_problem<TestType>(random, {35, 3, 3, 12, 9, 4, shared}, 4),
                              "35 tokens of 3 heads");
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force if many queries share a block",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(23);
  check_against_brute_force(random_problem<TestType>(random, {65, 1, 3, 530, 9, 16}, 15), "k 16");
  check_against_brute_force(random_problem<TestType>(random, {33, 1, 3, 70, 70, 33, false}, 2),
                            "k 33");
  const ScopedSharedMemory device(99 << 10);  // no room for many queries
  check_against_brute_force(random_problem<TestType>(random, {33, 1, 3, 300, 9, 64}, 15),
                            "a small device");
}

TEMPLATE_TEST_CASE("the result does not depend on the division of the keys",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(24);
  for (const auto& [tokens, k] : {std::pair<int64_t, int64_t>{1, 16}, {3, 64}, {40, 1}, {40, 16}}) {
    const int64_t half_width = 5;
    const Sizes sizes = {tokens, 1, half_width, 1100, 200, k};
    Problem<TestType> problem = k == 16 ? normal_problem<TestType>(random, sizes)
                                        : random_problem<TestType>(random, sizes, 1);
    problem.row_keys[77 * half_width] = element_of<TestType>(kNan);
    problem.row_keys[1030 * half_width] = element_of<TestType>(kNan);
    problem.col_keys[130 * half_width] = element_of<TestType>(-kInf);
    Problem<TestType> whole = problem;
    {
      const ScopedSmCount sms(1);
      whole.solve();
    }
    for (const int sm_count : {9, 132}) {
      Problem<TestType> divided = problem;
      const ScopedSmCount sms(sm_count);
      divided.solve();
      INFO(tokens << " tokens, k " << k << ", " << sm_count << " SMs");
      CHECK(have_same_bits(divided.scores, whole.scores));
      CHECK(divided.indices == whole.indices);
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force if the keys are divided",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const ScopedSmCount sms(132);
  Random random(25);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{1100, 65}, {64, 129}, {1, 700}, {63, 2}}) {
    for (const int64_t k : {1, 16, 63}) {
      for (const int64_t range : {1, 15}) {
        check_against_brute_force(
            random_problem<TestType>(random, {1, 2, 3, rows, columns, k, false}, range),
            describe_grid(rows, columns, k));
      }
    }
  }
}

TEMPLATE_TEST_CASE("no tokens give no results", "[product_key_topk]", PEER_QUERY_TYPES) {
  Random random(10);
  for (const bool shared : {true, false}) {
    random_problem<TestType>(random, {0, 2, 3, 12, 9, 4, shared}, 4).solve();
  }
}

TEMPLATE_TEST_CASE("k may be all experts", "[product_key_topk]", PEER_QUERY_TYPES) {
  Random random(8);
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 9, 7, 63}, 3), "9x7");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 1, 64, 64}, 3), "1x64");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 64, 1, 64}, 3), "64x1");
  check_against_brute_force(random_problem<TestType>(random, {3, 1, 2, 1, 1, 1}, 3), "1x1");
}

TEMPLATE_TEST_CASE("a device with little shared memory is enough for every k",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const ScopedSharedMemory device(99 << 10);
  Random random(11);
  for (const int64_t k : {1, 64}) {  // a batch has fewer keys than there are rows
    check_against_brute_force(random_problem<TestType>(random, {3, 1, 3, 600, 100, k}, 3),
                              "k " + std::to_string(k));
  }
}

TEMPLATE_TEST_CASE(
    "NaN, infinities of either sign and minus zero are ordered as brute force orders them",
    "[product_key_topk]",
    PEER_QUERY_TYPES) {
  // Every type represents these. The largest ones overflow when added.
  const double largest = to_double(std::is_same_v<TestType, Half> ? element_of<TestType>(65504)
                                                                  : element_of<TestType>(3e38));
  const std::vector<double> special = {0,     -0.0, 1,       -1,       kInf,
                                       -kInf, kNan, largest, -largest, 0x1p-14};
  Random random(9);
  for (int repeat = 0; repeat < 60; ++repeat) {
    const auto [k, rows, columns] = draw_special_scores(random, special);
    check_against_brute_force(given_scores<TestType>(rows, columns, k),
                              "repeat " + std::to_string(repeat));
  }
}

TEMPLATE_TEST_CASE("an infinite sub-score counts as the largest finite number of its sign",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  using Real = accumulation_t<TestType>;
  constexpr double largest = std::numeric_limits<Real>::max();
  const auto scores_of = [](const std::vector<double>& rows, const std::vector<double>& columns) {
    Problem<TestType> problem = given_scores<TestType>(rows, columns, 4);
    problem.solve();
    return std::vector<double>(problem.scores.begin(), problem.scores.end());
  };
  CHECK(scores_of({kInf, 1}, {-kInf, 2}) == std::vector<double>{largest, 3, 0, -largest});
  CHECK(scores_of({-kInf, 1}, {kInf, 2}) == std::vector<double>{largest, 3, 0, -largest});
  CHECK(scores_of({kInf, -kInf}, {kInf, -kInf}) == std::vector<double>{kInf, 0, 0, -kInf});
}

TEMPLATE_TEST_CASE("retrieval equals brute force for infinities among many keys",
                   "[product_key_topk]",
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

TEMPLATE_TEST_CASE("many keys of infinite scores tie with those of the largest finite number",
                   "[product_key_topk]",
                   float,
                   double) {
  // Every group of keys has both numbers, so its maximum is the greater one. The bound must be one
  // that the smaller one reaches.
  const double largest = std::numeric_limits<TestType>::max();
  for (const auto& [even, odd] : {std::pair{-kInf, -largest}, {largest, kInf}}) {
    std::vector<double> long_half;
    for (int i = 0; i < 1100; ++i) {
      long_half.push_back(i % 2 == 0 ? even : odd);
    }
    for (const int64_t k : {1, 4}) {
      INFO(even << " and " << odd);
      check_against_brute_force(given_scores<TestType>(long_half, {0}, k),
                                "rows, k " + std::to_string(k));
      check_against_brute_force(given_scores<TestType>({0}, long_half, k),
                                "columns, k " + std::to_string(k));
    }
  }
}

namespace {

template <class Query>
std::vector<double> special_scores() {
  const double largest = to_double(element_of<Query>(std::is_same_v<Query, Half> ? 65504 : 3e38));
  return {0, -0.0, 1, kInf, -kInf, kNan, largest, -largest};
}

}  // namespace

TEMPLATE_TEST_CASE("retrieval equals brute force for special values among many keys",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const std::vector<double> special = special_scores<TestType>();
  Random random(26);
  const auto draw = [&](int64_t count, int64_t percent) {
    const double usual = special[random.integer(special.size())];
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_special = random.integer(100) < percent;
      values.push_back(is_special ? special[random.integer(special.size())]
                       : std::isfinite(usual) && percent < 50 ? double(random.integer(50)) - 25
                                                              : usual);
    }
    return values;
  };
  for (const int sm_count : {1, 132}) {
    const ScopedSmCount sms(sm_count);
    for (const int64_t percent : {1, 10, 60}) {
      for (const int64_t k : {1, 16, 64}) {
        check_against_brute_force(given_scores<TestType>(draw(1100, percent), draw(70, percent), k),
                                  "k " + std::to_string(k) + " percent " + std::to_string(percent));
      }
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force for NaNs and infinities in one half",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const std::vector<double> special = {1, kInf, kNan, kNan, 2, kNan, kNan, kNan, -kInf};
  for (const int64_t k : {1, 3, 4, 5, 6, 7}) {
    for (const std::vector<double>& other : {std::vector<double>{1, -kInf, 2, 3, 4, 5, 6},
                                             {-kInf, kInf, 0, 0},
                                             {kNan, -kInf, kNan, kInf}}) {
      check_against_brute_force(given_scores<TestType>(special, other, k),
                                "special rows, k " + std::to_string(k));
      check_against_brute_force(given_scores<TestType>(other, special, k),
                                "special columns, k " + std::to_string(k));
    }
  }
}

TEMPLATE_TEST_CASE("a sum that is infinite only between stages of columns is not clamped",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // A sub-score is NaN: infinite in the first stage, of 128 columns, and opposite in the second.
  const int64_t half_width = 130, rows = 3, columns = 3;
  std::vector<double> row_keys(rows * half_width, 0), col_keys(columns * half_width, 0);
  row_keys[half_width] = kInf;
  row_keys[2 * half_width - 1] = -kInf;
  row_keys[2 * half_width] = kInf;
  check_against_brute_force(
      Problem<TestType>{1, 1, half_width, rows, columns, 9, true,
                        elements<TestType>(std::vector<double>(2 * half_width, 1)),
                        elements<TestType>(row_keys), elements<TestType>(col_keys)},
      "NaN, infinity and zero");
}

TEMPLATE_TEST_CASE("ids are distinct and in range for rows that defeat a filter on floats",
                   "[product_key_topk]",
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
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(12);
  const int64_t tokens = 3, half_width = 70, rows = 600, columns = 130, k = 24;
  Problem<TestType> problem =
      normal_problem<TestType>(random, {tokens, 1, half_width, rows, columns, k});
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
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  using Real = accumulation_t<TestType>;
  Random random(13);
  const int64_t half_width = 150, keys = 600, k = 12;  // a second stage, a second batch
  const auto row_keys = random.normal<TestType>(keys * half_width);
  const auto col_keys = random.normal<TestType>(keys * half_width);
  const auto query = random.normal<TestType>(5 * 2 * half_width);
  Problem<TestType> together{5, 1, half_width, keys, keys, k, true, query, row_keys, col_keys};
  together.solve();
  const ScopedSharedMemory device(99 << 10);
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

TEMPLATE_TEST_CASE("a masked retrieval equals brute force without the disabled experts",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(16);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 16}, {40, 7}, {3, 150}, {1, 90}, {90, 1}, {7, 600}}) {
    for (const auto& [k, percent] : {std::pair<int64_t, int64_t>{1, 50},
                                     {1, 99},
                                     {12, 1},
                                     {12, 10},
                                     {12, 50},
                                     {12, 90},
                                     {12, 100},
                                     {64, 10}}) {
      const int64_t range = percent == 50 ? 15 : 2;  // few ties, many ties
      Problem<TestType> problem =
          random_problem<TestType>(random, {1, 2, 3, rows, columns, k, percent > 10}, range);
      problem.mask = draw_mask(random, rows, columns, k, percent);
      check_against_brute_force(
          problem, describe_grid(rows, columns, k) + " percent " + std::to_string(percent));
    }
  }
}

TEMPLATE_TEST_CASE("a masked retrieval finds enabled experts behind any number of disabled ones",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const int64_t rows = 100, columns = 110;
  std::vector<double> row_scores, column_scores;
  for (int64_t i = 0; i < columns; ++i) {  // BFloat16 represents them exactly
    row_scores.push_back(double(columns - i));
    column_scores.push_back(double(2 * (columns - i)));
  }
  row_scores.resize(rows);
  for (const int64_t k : {1, 5}) {
    for (const int64_t depth : {8, 64, 70}) {
      for (const auto& [name, mask] : hostile_masks(rows, columns, k, depth)) {
        Problem<TestType> problem = given_scores<TestType>(row_scores, column_scores, k);
        problem.mask = mask;
        check_against_brute_force(problem, std::string(name) + ", k " + std::to_string(k) +
                                               " depth " + std::to_string(depth));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a masked retrieval orders special values as brute force orders them",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  const std::vector<double> special = special_scores<TestType>();
  Random random(17);
  for (int repeat = 0; repeat < 60; ++repeat) {
    const auto [k, rows, columns] = draw_special_scores(random, special);
    Problem<TestType> problem = given_scores<TestType>(rows, columns, k);
    problem.mask = draw_mask(random, rows.size(), columns.size(), k, random.integer(101));
    check_against_brute_force(problem, "repeat " + std::to_string(repeat));
  }
}

TEMPLATE_TEST_CASE("an unused key ranks behind keys of infinitely low score",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // 8 rows have the score -infinity. All others are unused, but have better scores or NaN.
  const int64_t rows = 700, columns = 3;
  std::vector<double> row_scores(rows, 5);
  std::vector<char> disabled(rows * columns, 1);
  for (const int64_t row : {7, 70, 71, 300, 301, 302, 600, 699}) {
    row_scores[row] = -kInf;
    std::fill_n(&disabled[row * columns], columns, 0);
  }
  row_scores[0] = row_scores[640] = kNan;
  for (const int sm_count : {1, 132}) {
    const ScopedSmCount sms(sm_count);
    for (const int64_t k : {1, 8, 24}) {
      Problem<TestType> problem = given_scores<TestType>(row_scores, {1, kInf, -kInf}, k);
      problem.mask = make_mask(disabled, rows, columns);
      check_against_brute_force(problem, "rows, k " + std::to_string(k));
    }
  }
}

TEMPLATE_TEST_CASE("a scan finds pairs with NaN, also those of key 0",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // All pairs that the filter sees are NaN, and disabled but for the last ones.
  const int64_t rows = 30, columns = 40, k = 20;
  std::vector<double> row_scores(rows, 1), column_scores(columns, kNan);
  std::fill_n(column_scores.begin() + 20, 20, 2);
  std::vector<char> disabled(rows * columns, 0);
  for (int64_t id = 0; id < 20 * columns; ++id) {
    disabled[id] = id % columns != 0 && id % columns < 30;
  }
  for (int64_t id = 0; id < 5 * columns; ++id) {
    disabled[id] = 1;
  }
  Problem<TestType> problem = given_scores<TestType>(row_scores, column_scores, k);
  problem.mask = make_mask(disabled, rows, columns);
  check_against_brute_force(problem, "NaN");
}

TEMPLATE_TEST_CASE("a scan finds what the filter does not, for some or all queries of a block",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // The filter finds k enabled experts for the queries that prefer the last rows. The first rows
  // have one each.
  Random random(18);
  const int64_t rows = 40, columns = 5, k = 20;
  std::vector<char> disabled(rows * columns, 0);
  for (int64_t id = 0; id < 100; ++id) {
    disabled[id] = id % columns != 3;
  }
  const ScopedSmCount one_sm(1);  // so that a block works on several blocks of queries
  for (const int64_t tokens : {1, 40}) {
    for (const bool shared : {true, false}) {
      Problem<TestType> problem =
          random_problem<TestType>(random, {tokens, 2, 1, rows, columns, k, shared}, 3);
      problem.mask = make_mask(disabled, rows, columns);
      for (int64_t i = 0; i < int64_t(problem.row_keys.size()); ++i) {
        problem.row_keys[i] = element_of<TestType>(double(i % rows));
      }
      check_against_brute_force(problem, std::to_string(tokens) + " tokens");
    }
  }
}

TEMPLATE_TEST_CASE("a scan has the sub-scores of the retrieval without a mask, bit by bit",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  // A pair that both find has the same score.
  Random random(19);
  const int64_t keys = 12, k = 60;
  Problem<TestType> all = normal_problem<TestType>(random, {3, 1, 150, keys, keys, 64});
  Problem<TestType> masked = all;
  masked.k = k;
  masked.mask = draw_mask(random, keys, keys, k, 30);
  all.solve();
  masked.solve();
  int64_t common = 0;
  for (int64_t query = 0; query < 3; ++query) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < 64; ++j) {
        if (masked.indices[query * k + i] == all.indices[query * 64 + j]) {
          ++common;
          CHECK(masked.scores[query * k + i] == all.scores[query * 64 + j]);
        }
      }
    }
  }
  CHECK(common > 100);
}

TEMPLATE_TEST_CASE("a mask that disables nothing changes no bit",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(20);
  const int64_t rows = 70, columns = 300;
  Problem<TestType> problem =
      normal_problem<TestType>(random, {3, 2, 40, rows, columns, 12, false});
  Problem<TestType> masked = problem;
  masked.mask = make_mask(std::vector<char>(rows * columns), rows, columns);
  problem.solve();
  masked.solve();
  CHECK(have_same_bits(masked.scores, problem.scores));
  CHECK(masked.indices == problem.indices);
}

TEMPLATE_TEST_CASE("fewer than k enabled experts end the kernel with a trap",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(21);
  Problem<TestType> problem = random_problem<TestType>(random, {2, 1, 3, 12, 9, 4}, 2);
  problem.mask = draw_mask(random, 12, 9, 3, 100);
  CHECK_THROWS_WITH(problem.solve(), "CUDA: a kernel trapped");
}

TEMPLATE_TEST_CASE("a masked retrieval without tokens gives no results",
                   "[product_key_topk]",
                   PEER_QUERY_TYPES) {
  Random random(22);
  Problem<TestType> problem = random_problem<TestType>(random, {0, 2, 3, 12, 9, 4}, 2);
  problem.mask = draw_mask(random, 12, 9, 4, 50);
  problem.solve();
}

TEMPLATE_TEST_CASE("no access races with another", "[product_key_topk][races]", float, BFloat16) {
  Random random(14);
  check_against_brute_force(random_problem<TestType>(random, {2, 1, 3, 1030, 9, 3}, 3),
                            "several batches");
  check_against_brute_force(random_problem<TestType>(random, {40, 1, 3, 70, 9, 3}, 3),
                            "many queries");
  {
    const ScopedSmCount sms(12);
    check_against_brute_force(random_problem<TestType>(random, {2, 1, 3, 150, 70, 16}, 3),
                              "ranges of keys");
  }
  const ScopedSharedMemory device(99 << 10);
  check_against_brute_force(random_problem<TestType>(random, {1, 1, 130, 9, 9, 3}, 1),
                            "two stages");
  check_against_brute_force(given_scores<TestType>({kInf, 1}, {2, -kInf, 3}, 2), "infinities");
  for (const int64_t percent : {50, 100}) {  // the filter is enough, a scan is needed
    Problem<TestType> problem = random_problem<TestType>(random, {2, 1, 3, 9, 20, 5}, 3);
    problem.mask = draw_mask(random, 9, 20, 5, percent);
    check_against_brute_force(problem, "mask");
  }
}

TEST_CASE("candidate pairs are counted right", "[product_key_topk]") {
  for (int k = 1; k <= kMaxRetrieved; ++k) {
    for (const auto& [rows, columns] : {std::pair{1, 64}, {64, 1}, {5, 9}, {100, 100}}) {
      int pairs = 0;
      for (int i = 0; i < rows; ++i) {
        CHECK(count_candidate_pairs(i, columns, k) == pairs);
        int candidates = 0;
        for (int j = 0; j < columns; ++j) {
          candidates += (i + 1) * (j + 1) <= k;
        }
        CHECK(count_candidate_columns(i, columns, k) == candidates);
        pairs += candidates;
      }
      CHECK(count_candidate_pairs(rows, columns, k) == pairs);
    }
  }
}
