#include <limits>
#include <map>
#include <set>

#include "kernels/cpu/product_key_topk.h"
#include "oracles/product_key_topk.h"
#include "problems/product_key_topk.h"
#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

namespace {

template <class Real>
struct Problem {
  int64_t tokens, heads, half_width, rows, columns, k;
  bool shared;
  std::vector<Real> query, row_keys, col_keys;
  std::vector<Real> scores = std::vector<Real>(tokens * heads * k, Real(-1));
  std::vector<int64_t> indices = std::vector<int64_t>(tokens * heads * k, -1);
  int64_t tokens_per_block = kMaxTokensPerBlock;
  Mask mask = {};

  void solve(Capability capability, int threads = 1) {
    const auto& kernel = kernels<ProductKeyTopkKernels>(capability).of<Real>();
    const auto pack = [&](const std::vector<Real>& keys, int64_t count, std::vector<Real>& packed,
                          const std::vector<char>& unused) {
      const int64_t panels = (count + kernel.keys_per_panel - 1) / kernel.keys_per_panel;
      const int64_t key_heads = shared ? 1 : heads;
      packed.assign(key_heads * panels * kernel.keys_per_panel * half_width, Real(NAN));
      const PackKeys<Real> pass = {
          .count = count, .half_width = half_width, .keys = keys.data(), .packed = packed.data()};
      on_threads(threads)(key_heads * panels, 1, [&](int64_t first, int64_t last) {
        kernel.pack_keys(pass, first, last);
      });
      return Keys<Real>{
          .data = packed.data(),
          .count = count,
          .head_stride = shared ? 0 : panels * kernel.keys_per_panel * half_width,
          .unused = Mask::data(unused),
      };
    };
    std::vector<Real> packed_rows, packed_columns;
    const ProductKeyTopk<Real> pass = {
        .tokens = tokens,
        .heads = heads,
        .half_width = half_width,
        .k = k,
        .query = query.data(),
        .rows = pack(row_keys, rows, packed_rows, mask.unused_rows),
        .columns = pack(col_keys, columns, packed_columns, mask.unused_columns),
        .scores = scores.data(),
        .indices = indices.data(),
        .disabled = Mask::data(mask.disabled),
    };
    const int64_t items = (tokens + tokens_per_block - 1) / tokens_per_block * heads;
    on_threads(threads)(items, 1, [&](int64_t first, int64_t last) {
      kernel.retrieve(pass)(pass, tokens_per_block, first, last);
    });
  }

  std::vector<Real> scores_of(int64_t token,
                              int64_t head,
                              const std::vector<Real>& keys,
                              int64_t count,
                              int64_t half) const {
    return sub_scores<Real>(&query[((token * heads + head) * 2 + half) * half_width],
                            &keys[(shared ? 0 : head * count) * half_width], count, half_width);
  }
};

template <class Real>
void check_against_brute_force(Problem<Real> problem, const std::string& what) {
  for (const Capability capability : capabilities()) {
    problem.solve(capability);
    int64_t wrong = 0;
    for (int64_t t = 0; t < problem.tokens; ++t) {
      for (int64_t h = 0; h < problem.heads; ++h) {
        const int64_t first = (t * problem.heads + h) * problem.k;
        wrong +=
            count_wrong(problem.scores_of(t, h, problem.row_keys, problem.rows, 0),
                        problem.scores_of(t, h, problem.col_keys, problem.columns, 1), problem.k,
                        &problem.scores[first], &problem.indices[first], problem.mask.disabled);
      }
    }
    INFO(name_of(capability) << ": " << what);
    CHECK(wrong == 0);
  }
}

template <class Real>
std::vector<Real> small_integers(Random& random, int64_t count, int64_t range) {
  std::vector<Real> values;
  for (const int64_t value : random.integers(count, 2 * range + 1)) {
    values.push_back(Real(value - range));
  }
  return values;
}

// With integers in [-range, range]. A small range makes many ties.
template <class Real>
Problem<Real> random_problem(Random& random, const Sizes& sizes, int64_t range) {
  return draw_problem<Problem<Real>>(
      sizes, [&](int64_t count) { return small_integers<Real>(random, count, range); });
}

}  // namespace

TEMPLATE_TEST_CASE("retrieval equals brute force over all experts, ties included",
                   "[product_key_topk]",
                   float,
                   double) {
  Random random(6);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 16}, {40, 7}, {3, 300}, {1, 50}, {33, 1}, {300, 20}}) {
    for (const int64_t k : {1, 2, 8, 16, 32, 50}) {
      for (const bool shared : {true, false}) {
        if (k > rows * columns) {
          continue;
        }
        // A whole block of tokens and a piece of one. Few distinct values: most rows have ties at
        // the boundary.
        check_against_brute_force(
            random_problem<TestType>(random, {19, 2, 5, rows, columns, k, shared}, 2),
            describe_grid(rows, columns, k));
      }
    }
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force where the group filter works",
                   "[product_key_topk]",
                   float,
                   double) {
  Random random(7);
  for (const int64_t range : {1, 100}) {  // many ties, few ties
    check_against_brute_force<TestType>(
        {4, 1, 3, 1000, 513, 16, true, small_integers<TestType>(random, 4 * 6, 50),
         small_integers<TestType>(random, 3000, range),
         small_integers<TestType>(random, 513 * 3, range)},
        "range " + std::to_string(range));
  }
}

TEMPLATE_TEST_CASE("retrieval equals brute force at every key width and number around the panels",
                   "[product_key_topk]",
                   float,
                   double) {
  Random random(9);
  for (const int64_t half_width : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33}) {
    for (const int64_t rows : {11, 12, 13, 23, 24, 25, 47, 48, 49, 63, 64, 65, 97}) {
      check_against_brute_force(
          random_problem<TestType>(random, {6, 2, half_width, rows, 20, 9, false}, 20),
          "half width " + std::to_string(half_width) + " rows " + std::to_string(rows));
    }
  }
}

TEMPLATE_TEST_CASE("a block may hold any number of tokens", "[product_key_topk]", float, double) {
  Random random(10);
  const auto query = small_integers<TestType>(random, 21 * 3 * 14, 20);
  const auto row_keys = small_integers<TestType>(random, 90 * 7, 20);
  const auto col_keys = small_integers<TestType>(random, 30 * 7, 20);
  for (const int64_t block : {1, 2, 3, 4, 5, 7, 12, 16, 64}) {
    Problem<TestType> problem{21, 3, 7, 90, 30, 6, true, query, row_keys, col_keys};
    problem.tokens_per_block = block;
    check_against_brute_force<TestType>(problem, "block of " + std::to_string(block));
  }
}

TEMPLATE_TEST_CASE("k may be all experts", "[product_key_topk]", float, double) {
  Random random(8);
  check_against_brute_force(random_problem<TestType>(random, {5, 1, 2, 9, 11, 99}, 3), "k = N");
}

TEMPLATE_TEST_CASE(
    "NaN, infinities of either sign and minus zero are ordered as brute force orders them",
    "[product_key_topk]",
    float,
    double) {
  using limits = std::numeric_limits<TestType>;
  const std::vector<TestType> special = {0,
                                         TestType(-0.0),
                                         1,
                                         -1,
                                         limits::infinity(),
                                         -limits::infinity(),
                                         limits::quiet_NaN(),
                                         limits::max(),
                                         limits::lowest(),
                                         limits::denorm_min()};
  Random random(9);
  // With a query of ones and one key element per half, the keys are the sub-scores.
  for (int repeat = 0; repeat < 200; ++repeat) {
    const auto [k, rows, columns] = draw_special_scores(random, special);
    check_against_brute_force<TestType>(
        {1, 1, 1, int64_t(rows.size()), int64_t(columns.size()), k, true, {1, 1}, rows, columns},
        "repeat " + std::to_string(repeat));
  }
}

namespace {

// The result of one query whose sub-scores are these.
template <class Real>
std::pair<std::vector<Real>, std::vector<int64_t>> retrieve(Capability capability,
                                                            const std::vector<Real>& rows,
                                                            const std::vector<Real>& columns,
                                                            int64_t k) {
  const int64_t row_count = rows.size(), column_count = columns.size();
  Problem<Real> problem{1, 1, 1, row_count, column_count, k, true, {1, 1}, rows, columns};
  problem.solve(capability);
  return {problem.scores, problem.indices};
}

}  // namespace

TEMPLATE_TEST_CASE("an infinite sub-score counts as the largest finite number of its sign",
                   "[product_key_topk]",
                   float,
                   double) {
  const TestType inf = std::numeric_limits<TestType>::infinity();
  const TestType max = std::numeric_limits<TestType>::max();
  using Scores = std::vector<TestType>;
  using Ids = std::vector<int64_t>;
  for (const Capability capability : capabilities()) {
    INFO(name_of(capability));
    const auto opposite = retrieve<TestType>(capability, {inf, 5}, {-inf, 0}, 4);
    CHECK(opposite.first == Scores{max, 5, 0, -max});
    CHECK(opposite.second == Ids{1, 3, 0, 2});
    const auto equal = retrieve<TestType>(capability, {1, max, inf, -inf, -max}, {0}, 5);
    CHECK(equal.first == Scores{max, max, 1, -max, -max});
    CHECK(equal.second == Ids{1, 2, 0, 3, 4});
    // A sum of finite sub-scores may overflow.
    const auto overflow = retrieve<TestType>(capability, {-inf, inf}, {inf, -inf}, 4);
    CHECK(overflow.first == Scores{inf, 0, 0, -inf});
    CHECK(overflow.second == Ids{2, 3, 0, 1});
  }
}

TEMPLATE_TEST_CASE("infinities among many keys are ordered as brute force orders them",
                   "[product_key_topk]",
                   float,
                   double) {
  const TestType inf = std::numeric_limits<TestType>::infinity();
  std::vector<TestType> col_keys(300);
  for (int i = 0; i < 300; ++i) {
    col_keys[i] = TestType(i);
  }
  col_keys[123] = -inf;
  check_against_brute_force<TestType>({1, 1, 1, 3, 300, 4, true, {1, 1}, {1, inf, 2}, col_keys},
                                      "+inf row, -inf column");
  check_against_brute_force<TestType>({1, 1, 1, 300, 3, 4, true, {1, 1}, col_keys, {1, inf, 2}},
                                      "-inf row, +inf column");
}

TEMPLATE_TEST_CASE("k NaNs fill the result, whatever infinities there are",
                   "[product_key_topk]",
                   float,
                   double) {
  const TestType inf = std::numeric_limits<TestType>::infinity();
  const TestType nan = std::numeric_limits<TestType>::quiet_NaN();
  const std::vector<TestType> hidden = {1, inf, nan, nan, 2, nan, nan, nan, -inf};
  for (const int64_t k : {1, 3, 4, 5, 6, 7}) {
    for (const std::vector<TestType>& other :
         {std::vector<TestType>{1, -inf, 2}, {-inf, inf}, {nan, -inf, nan, inf, nan, nan, nan}}) {
      const int64_t count = other.size();
      check_against_brute_force<TestType>({1, 1, 1, 9, count, k, true, {1, 1}, hidden, other},
                                          "hidden row, k " + std::to_string(k));
      check_against_brute_force<TestType>({1, 1, 1, count, 9, k, true, {1, 1}, other, hidden},
                                          "hidden column, k " + std::to_string(k));
    }
  }
}

TEST_CASE("ids are distinct and in range for rows that defeat a filter on floats",
          "[product_key_topk]") {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  for (const Capability capability : capabilities()) {
    for (const float value : {0.0f, nan, inf, -inf, 1e38f}) {
      Problem<float> problem{3,
                             2,
                             4,
                             512,
                             512,
                             32,
                             true,
                             std::vector<float>(48, value),
                             std::vector<float>(2048, 1),
                             std::vector<float>(2048, 1)};
      problem.solve(capability);
      for (int64_t list = 0; list < 6; ++list) {
        const std::set<int64_t> ids(problem.indices.begin() + list * 32,
                                    problem.indices.begin() + (list + 1) * 32);
        INFO(name_of(capability) << " value " << value);
        CHECK(ids.size() == 32);
        CHECK(*ids.begin() >= 0);
        CHECK(*ids.rbegin() < 512 * 512);
      }
    }
  }
}

TEMPLATE_TEST_CASE("a masked retrieval equals brute force without the disabled experts",
                   "[product_key_topk]",
                   float,
                   double) {
  Random random(11);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{16, 16}, {40, 7}, {3, 150}, {1, 90}, {90, 1}, {120, 30}}) {
    for (const int64_t k : {1, 8, 16, 64, 80}) {
      for (const int64_t percent : {1, 10, 50, 90, 99, 100}) {
        const bool shared = (k + percent) % 2 == 0;
        const int64_t range = percent == 50 ? 100 : 2;  // few ties, many ties
        Problem<TestType> problem =
            random_problem<TestType>(random, {3, 2, 3, rows, columns, k, shared}, range);
        problem.mask = draw_mask(random, rows, columns, k, percent);
        check_against_brute_force(
            problem, describe_grid(rows, columns, k) + " percent " + std::to_string(percent));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a masked retrieval finds enabled experts behind any number of disabled ones",
                   "[product_key_topk]",
                   float,
                   double) {
  const int64_t rows = 170, columns = 190;
  std::vector<TestType> row_keys, col_keys;
  for (int64_t i = 0; i < columns; ++i) {
    row_keys.push_back(TestType(2 * (columns - i)));
    col_keys.push_back(TestType(3 * (columns - i)));
  }
  row_keys.resize(rows);
  for (const int64_t k : {1, 4, 90}) {
    for (const int64_t depth : {int64_t(1), k, 2 * k, 8 * k, int64_t(165)}) {
      if (depth > 165) {
        continue;
      }
      for (const auto& [name, mask] : hostile_masks(rows, columns, k, depth)) {
        Problem<TestType> problem{1, 1, 1, rows, columns, k, true, {1, 1}, row_keys, col_keys};
        problem.mask = mask;
        check_against_brute_force(problem, std::string(name) + ", k " + std::to_string(k) +
                                               " depth " + std::to_string(depth));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a masked retrieval orders special values as brute force orders them",
                   "[product_key_topk]",
                   float,
                   double) {
  using limits = std::numeric_limits<TestType>;
  const std::vector<TestType> special = {0,
                                         TestType(-0.0),
                                         1,
                                         limits::infinity(),
                                         -limits::infinity(),
                                         limits::quiet_NaN(),
                                         limits::max(),
                                         limits::lowest()};
  Random random(12);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const auto [k, rows, columns] = draw_special_scores(random, special);
    const int64_t row_count = rows.size(), column_count = columns.size();
    Problem<TestType> problem{1, 1, 1, row_count, column_count, k, true, {1, 1}, rows, columns};
    problem.mask = draw_mask(random, row_count, column_count, k, random.integer(101));
    check_against_brute_force(problem, "repeat " + std::to_string(repeat));
  }
}

TEMPLATE_TEST_CASE("a mask that disables nothing changes no bit",
                   "[product_key_topk]",
                   float,
                   double) {
  Random random(13);
  const int64_t rows = 90, columns = 130;
  Problem<TestType> problem = draw_problem<Problem<TestType>>(
      {21, 3, 7, rows, columns, 12, false},
      [&](int64_t count) { return random.normal<TestType>(count); });
  for (const Capability capability : capabilities()) {
    Problem<TestType> masked = problem;
    masked.mask = make_mask(std::vector<char>(rows * columns), rows, columns);
    masked.solve(capability);
    problem.solve(capability);
    INFO(name_of(capability));
    CHECK(have_same_bits(masked.scores, problem.scores));
    CHECK(masked.indices == problem.indices);
  }
}

TEST_CASE("results do not depend on the number of threads", "[product_key_topk]") {
  Random random(10);
  const std::vector<float> query = random.normal<float>(100 * 3 * 16),
                           row_keys = random.normal<float>(200 * 8),
                           col_keys = random.normal<float>(300 * 8);
  for (const Capability capability : capabilities()) {
    Problem<float> one{100, 3, 8, 200, 300, 8, true, query, row_keys, col_keys};
    one.solve(capability);
    for (const int threads : {2, 3, 8}) {
      Problem<float> many{100, 3, 8, 200, 300, 8, true, query, row_keys, col_keys};
      many.solve(capability, threads);
      INFO(name_of(capability) << " threads " << threads);
      CHECK(std::memcmp(one.scores.data(), many.scores.data(), one.scores.size() * sizeof(float)) ==
            0);
      CHECK(one.indices == many.indices);
    }
  }
}

TEMPLATE_TEST_CASE("a weighted sum of rows lands in its strip of the output and nowhere else",
                   "[product_key_topk]",
                   float,
                   double) {
  for (const Capability capability : capabilities()) {
    const TestType table[] = {1, 2, 3, 10, 20, 30};
    const TestType coefficients[] = {2, 1, -1, 3};
    const int64_t indices[] = {0, 1, 1, 1};
    std::vector<TestType> out(12, -7);
    const GatherSum<TestType> pass = {.items = 2,
                                      .terms = 2,
                                      .width = 3,
                                      .coefficients = coefficients,
                                      .indices = indices,
                                      .table = {table, 3},
                                      .out = {out.data() + 2, 6}};
    kernels<ProductKeyTopkKernels>(capability).of<TestType>().gather_sum(pass, 0, 2);
    CHECK(out == std::vector<TestType>{-7, -7, 12, 24, 36, -7, -7, -7, 20, 40, 60, -7});
  }
}
