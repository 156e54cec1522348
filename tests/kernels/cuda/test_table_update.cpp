#include <algorithm>
#include <valarray>

#include "cuda_support.h"
#include "kernels/cuda/stochastic_rounding.h"
#include "kernels/cuda/table_grad.h"
#include "kernels/cuda/table_update.h"
#include "kernels/random_bits.h"
#include "problems/table_update.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

constexpr Given kGiven[] = {Given::dense, Given::distinct_rows, Given::pairs,
                            Given::pairs_with_coefficients};

template <class Table, class Source>
struct Problem : TableUpdateProblem<Table, Source> {
  using Base = TableUpdateProblem<Table, Source>;
  using Base::Base, Base::given, Base::rows, Base::parts, Base::width, Base::pairs_per_row;
  using Base::owners, Base::source, Base::start;

  State<Table> solve(const Hyperparameters& h,
                     bool stochastic_rounding = false,
                     Layout layout = {}) const {
    const Table untouched = from_double<Table>(-7);
    RowMemory<Table> table(rows, parts * width, layout, untouched);
    RowMemory<Table> momentum(rows, parts * width, layout, untouched);
    RowMemory<Source> source_memory(owners.size() / pairs_per_row, parts * width, layout,
                                    from_double<Source>(NAN));
    table.set(start.table);
    momentum.set(start.momentum);
    source_memory.set(source);
    State<Table> state = start;
    TableUpdate<Table, Source> update = {
        .parts = parts,
        .width = width,
        .table = table.rows(),
        .rule = rule_of(h, momentum.rows(), state),
        .stochastic_rounding = stochastic_rounding,
        .key = 17,
        .source = std::as_const(source_memory).rows(),
        .pairs_per_row = pairs_per_row,
        .coefficients = this->given_coefficients(),
        .frozen = this->frozen_rows(),
    };
    if (!this->has_pairs()) {
      update_rows(update, given == Given::dense ? nullptr : owners.data(), owners.size(), rows,
                  kContext);
    } else {
      if (sorted.count == 0) {
        sorted = make_segments(owners.data(), owners.size(), rows, update.frozen,
                               OutputRows::by_owner, kContext);
      }
      update_by_segments(update, sorted, kContext);
    }
    state.table = table.values(rows);
    state.momentum = momentum.values(rows);
    REQUIRE(table.holds_elsewhere(rows, untouched));
    REQUIRE(momentum.holds_elsewhere(rows, untouched));
    return state;
  }

  double distance(const State<Table>& result, const Hyperparameters& h) const {
    return Base::distance(result, h, 64 * kEpsilon<typename Base::Real>);
  }

  // Makes pieces of the gradients of rows zero. A row has 2·parts pieces, two per part; bit p of a
  // row's number tells whether piece p is zero. Only for gradients with a source row of their own.
  void clear_pieces() {
    const int64_t piece = (width + 1) / 2;
    for (size_t i = 0; i < owners.size(); ++i) {
      for (int64_t column = 0; column < parts * width; ++column) {
        const int64_t number = 2 * (column / width) + column % width / piece;
        if (owners[i] >> number & 1) {
          source[i * this->stride + column] = from_double<Source>(i % 2 ? -0. : 0.);
        }
      }
    }
  }

  mutable Segments sorted;  // made once for several solutions
};

}  // namespace

TEMPLATE_TEST_CASE("every rule updates the rows that have pairs, and no others",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  for (const int64_t width : {1, 7, 33, 256, 1030}) {
    for (const Given given : kGiven) {
      const int64_t parts = 1 + width % 3;
      const Problem<typename TestType::Table, typename TestType::Source> problem(
          given, 20, parts, width, {1, 2, 0, 7, 0, 3, 5}, 3);
      for (const Hyperparameters& rule : kRules) {
        INFO("parts " << parts << " width " << width << " given " << int(given) << " rule "
                      << int(rule.rule) << " momentum " << rule.has_momentum << " nesterov "
                      << rule.nesterov);
        CHECK(problem.distance(problem.solve(rule), rule) <= 1);
      }
    }
  }
}

TEMPLATE_TEST_CASE(
    "rows with more columns than a block takes at once are updated by the mean of the whole row",
    "[table_update]",
    PEER_TABLE_AND_SOURCE_TYPES) {
  const int64_t width = 16 * 1024 / sizeof(typename TestType::Source) + 333;
  for (const Given given : {Given::dense, Given::pairs_with_coefficients}) {
    const Problem<typename TestType::Table, typename TestType::Source> problem(given, 5, 2, width,
                                                                               {1, 3, 0, 129}, 4);
    for (const Hyperparameters& rule : {kRules[2], kRules[4]}) {
      INFO("given " << int(given) << " rule " << int(rule.rule));
      CHECK(problem.distance(problem.solve(rule), rule) <= 1);
    }
  }
}

TEMPLATE_TEST_CASE("rows with many pairs are updated once, and the same on a device of any size",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  const Problem<Table, typename TestType::Source> problem(
      Given::pairs_with_coefficients, 12, 2, 72, {1, 128, 129, 700, 2, 256, 257, 0, 1, 1}, 5);
  for (const Hyperparameters& rule : {kRules[0], kRules[3], kRules[4]}) {
    const State<Table> state = problem.solve(rule);
    INFO("rule " << int(rule.rule) << " momentum " << rule.has_momentum);
    CHECK(problem.distance(state, rule) <= 1);
    const ScopedSmCount device(132);
    CHECK(problem.solve(rule) == state);
    CHECK((problem.solve(rule, true) == state) == std::is_same_v<Table, accumulation_t<Table>>);
  }
}

TEMPLATE_TEST_CASE("alignment and strides change no bit of an update",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  for (const int64_t width : {7, 536}) {
    const Problem<Table, typename TestType::Source> problem(Given::pairs_with_coefficients, 8, 2,
                                                            width, {1, 2, 3, 140, 0, 1, 4}, 6);
    for (const Hyperparameters& rule : {kRules[0], kRules[4]}) {
      const State<Table> aligned = problem.solve(rule, true);
      for (const Layout layout : {Layout{1, 0}, Layout{0, 1}, Layout{8, 8}, Layout{4, 4}}) {
        INFO("width " << width << " rule " << int(rule.rule) << " offset " << layout.offset
                      << " padding " << layout.padding);
        CHECK(problem.solve(rule, true, layout) == aligned);
      }
    }
  }
}

// A fused optimizer relies on this.
TEMPLATE_TEST_CASE("an update by pairs has the bits of a gradient followed by an update",
                   "[table_update]",
                   float,
                   double) {
  for (const int64_t width : {40, 700}) {
    const Problem<TestType, TestType> fused(Given::pairs_with_coefficients, 9, 1, width,
                                            {1, 2, 30, 129, 0, 300, 1, 1}, 7);
    const Segments segments = make_segments(fused.owners.data(), fused.owners.size(), 9, nullptr,
                                            OutputRows::compact, kContext);
    const int64_t distinct = DistinctOwnerCount(segments, kContext).wait();
    // The same table, with one pair for each row of the gradient.
    Problem<TestType, TestType> step(Given::pairs, 9, 1, width, {}, 7);
    step.start = fused.start;
    step.owners.assign(segments.distinct_owners.get(), segments.distinct_owners.get() + distinct);
    step.source.resize(distinct * width);
    const TableGrad<TestType, TestType> gradient = {
        .width = width,
        .pairs_per_row = fused.pairs_per_row,
        .coefficients = fused.coefficients.data(),
        .source = {fused.source.data(), width},
        .out = {step.source.data(), width},
    };
    sum_segments(gradient, segments, kContext);
    for (const Hyperparameters& rule : kRules) {
      INFO("width " << width << " rule " << int(rule.rule));
      CHECK(step.solve(rule) == fused.solve(rule));
    }
  }
}

TEMPLATE_TEST_CASE("distinct rows are updated to the bits that they get as pairs",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  for (const int64_t width : {40, 700}) {
    const Problem<Table, typename TestType::Source> distinct(Given::distinct_rows, 200, 2, width,
                                                             {}, 15);
    auto sorted = distinct;
    sorted.given = Given::pairs;
    for (const Hyperparameters& rule : kRules) {
      INFO("width " << width << " rule " << int(rule.rule));
      CHECK(distinct.solve(rule, true) == sorted.solve(rule, true));
    }
  }
}

TEST_CASE("rows that are not distinct, ascending and in range end the kernel before any is written",
          "[table_update]") {
  for (const std::vector<int64_t>& owners :
       std::vector<std::vector<int64_t>>{{0, 2, 2}, {0, 3, 1}, {-1, 0, 1}, {0, 1, 6}}) {
    Problem<float, float> problem(Given::distinct_rows, 6, 1, 16, {}, 16);
    problem.owners = owners;
    problem.source.resize(3 * 16, 1.f);
    State<float> state = problem.start;
    const TableUpdate<float, float> update = {
        .width = 16,
        .table = {state.table.data(), 16},
        .rule = rule_of(kRules[0], {}, state),
        .source = {problem.source.data(), 16},
    };
    CHECK_THROWS_AS(update_rows(update, problem.owners.data(), 3, 6, kContext), std::runtime_error);
    CHECK(state == problem.start);
  }
}

TEMPLATE_TEST_CASE(
    "frozen rows, and rows whose gradient is zero, keep their bits and their state, and no other "
    "row is updated differently",
    "[table_update]",
    PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  using Source = typename TestType::Source;
  for (const int64_t width : {9, 536}) {
    for (const Given given : kGiven) {
      const int64_t parts = width == 9 ? 1 : 2;
      // Row 0, which is frozen, has several chunks. So has row 2, which is not.
      const Problem<Table, Source> problem(given, 70, parts, width, {129, 128, 130, 2, 0, 1}, 10);
      const std::valarray<bool> rows = problem.some_rows();
      Problem<Table, Source> with_frozen = problem, with_all = problem, with_zeros = problem;
      with_frozen.frozen = rows;
      with_all.frozen = std::valarray<bool>(true, 70);
      with_zeros.clear_gradients(rows);
      for (const Hyperparameters& rule : kRules) {
        const bool is_stochastic = rule.has_momentum != rule.nesterov;
        INFO("parts " << parts << " width " << width << " given " << int(given) << " rule "
                      << int(rule.rule) << " stochastic " << is_stochastic);
        const State<Table> expected =
            problem.with_start_in(rows, problem.solve(rule, is_stochastic));
        CHECK(with_frozen.solve(rule, is_stochastic) == expected);
        CHECK(with_zeros.solve(rule, is_stochastic) == expected);
        CHECK(with_all.solve(rule, is_stochastic) == problem.start);
      }
    }
  }
}

TEST_CASE("frozen rows, and rows whose gradient is zero, keep their bits in the largest tiles",
          "[table_update]") {
  const ScopedSmCount device(1);
  for (const Given given : {Given::dense, Given::pairs}) {
    constexpr int64_t kRows = 8300;
    const Problem<float, float> problem(given, kRows, 2, 4, std::vector<int64_t>(kRows, 1), 14);
    const std::valarray<bool> rows = problem.some_rows();
    Problem<float, float> with_frozen = problem, with_zeros = problem;
    with_frozen.frozen = rows;
    with_zeros.clear_gradients(rows);
    const Hyperparameters& rule = kRules[given == Given::dense ? 4 : 2];
    const State<float> expected = problem.with_start_in(rows, problem.solve(rule));
    CHECK(with_frozen.solve(rule) == expected);
    CHECK(with_zeros.solve(rule) == expected);
  }
}

TEMPLATE_TEST_CASE("a row is updated whole if any piece of its gradient is nonzero",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  using Source = typename TestType::Source;
  // One warp, three warps, several rounds. A piece has more columns than a warp takes at once.
  const int64_t wide = 2048 / sizeof(Source) + 6;
  for (const int64_t width : {int64_t(6), wide, 8 * wide + 285}) {
    for (const Given given : {Given::dense, Given::pairs}) {
      const int64_t parts = width == 6 ? 3 : 2;
      const bool has_rounds = width > wide;
      std::vector<int64_t> segments(1 << 2 * parts, 1);
      segments[1] = 129;
      if (!has_rounds) {
        segments[15] = 130;  // no gradient in the first two parts
      }
      if (width == 6) {
        segments[4] = 130, segments[6] = 100;
      }
      Problem<Table, Source> problem(given, segments.size(), parts, width, segments, 11);
      problem.clear_pieces();
      for (const Hyperparameters& rule : has_rounds ? std::vector{kRules[3], kRules[4]} : kRules) {
        INFO("width " << width << " given " << int(given) << " rule " << int(rule.rule)
                      << " momentum " << rule.has_momentum << " nesterov " << rule.nesterov);
        const State<Table> state = problem.solve(rule);
        CHECK(problem.distance(state, rule) <= 1);
        const ScopedSmCount device(132);
        CHECK((has_rounds || problem.solve(rule) == state));
      }
    }
  }
}

TEMPLATE_TEST_CASE("a row is not updated if the gradients of its pairs cancel",
                   "[table_update]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  // Both pairs of a row of the source have the same owner, and opposite coefficients whose products
  // are exact.
  Problem<Table, typename TestType::Source> problem(Given::pairs_with_coefficients, 4, 2, 300, {},
                                                    12);
  problem.owners = {1, 1, 3, 3, 1, 1};
  problem.owners.insert(problem.owners.end(), 400, 2);
  for (const bool all_cancel : {false, true}) {
    Random random(12);
    problem.source = random.normal<typename TestType::Source>(problem.owners.size() / 2 * 600);
    problem.coefficients.resize(2 * problem.owners.size());
    for (size_t i = 0; i < problem.coefficients.size(); ++i) {
      problem.coefficients[i] = i % 2 ? 2 : -2;
    }
    if (!all_cancel) {
      problem.coefficients[0] = 1;                              // row 1, first part
      problem.coefficients[2 * problem.owners.size() - 1] = 1;  // row 2, second part
    }
    for (const Hyperparameters& rule : kRules) {
      const State<Table> state = problem.solve(rule);
      CHECK(problem.distance(state, rule) <= 1);
      CHECK((state == problem.start) == all_cancel);
    }
  }
}

TEMPLATE_TEST_CASE("NaN, and values whose squares are zero, are not zero",
                   "[table_update]",
                   (Types<float, float>),
                   (Types<double, double>),
                   (Types<BFloat16, BFloat16>)) {
  using Table = typename TestType::Table;
  const double tiny = std::is_same_v<Table, double> ? 1e-200 : 1e-30;
  for (const double value : {tiny, -tiny, double(NAN), double(INFINITY)}) {
    for (const int64_t column : {0, 599, 600, 1199}) {  // in two parts
      Problem<Table, typename TestType::Source> problem(Given::dense, 3, 2, 600, {}, 13);
      problem.clear_gradients({true, true, true});
      problem.source[1200 + column] = from_double<Table>(value);
      for (const Hyperparameters& rule : kRules) {
        INFO("value " << value << " column " << column << " rule " << int(rule.rule));
        const State<Table> state = problem.solve(rule);
        if (std::isfinite(value)) {
          CHECK(problem.distance(state, rule) <= 1);
        }
        CHECK(!(state == problem.start));
        CHECK(problem.with_start_in({false, true, false}, state) == problem.start);
        CHECK(state.row_steps[1] ==
              problem.start.row_steps[1] + int(rule.rule == Rule::rowwise_adam));
        CHECK(std::isfinite(to_double(state.table[1200 + column])) == std::isfinite(value));
      }
    }
  }
}

TEST_CASE("without gradients nothing changes", "[table_update]") {
  for (const Given given : kGiven) {
    const Problem<float, float> no_rows(given, 0, 2, 16, {}, 8);
    CHECK(no_rows.solve(kRules[0]) == no_rows.start);
    const Problem<float, float> no_columns(given, 5, 2, 0, {}, 8);
    CHECK(no_columns.solve(kRules[0]) == no_columns.start);
  }
  const Problem<float, float> no_pairs(Given::pairs, 5, 2, 16, {}, 8);
  CHECK(no_pairs.solve(kRules[4]) == no_pairs.start);
}

TEST_CASE("a small update is right for every order of threads", "[table_update][races]") {
  const Problem<float, float> by_pairs(Given::pairs_with_coefficients, 3, 2, 520, {2, 130, 1}, 9);
  CHECK(by_pairs.distance(by_pairs.solve(kRules[4]), kRules[4]) <= 1);
  const Problem<float, float> wide_rows(Given::dense, 3, 2, 4400, {}, 9);
  CHECK(wide_rows.distance(wide_rows.solve(kRules[0]), kRules[0]) <= 1);
  Problem<float, float> with_zeros(Given::pairs, 16, 2, 520, {1, 1, 1, 130, 1, 1, 130, 1, 1}, 9);
  with_zeros.clear_pieces();
  for (const Hyperparameters& rule : {kRules[2], kRules[4]}) {
    CHECK(with_zeros.distance(with_zeros.solve(rule), rule) <= 1);
  }
  Problem<float, float> wide_with_zeros(Given::dense, 4, 1, 4400, {}, 9);
  wide_with_zeros.clear_pieces();
  CHECK(wide_with_zeros.distance(wide_with_zeros.solve(kRules[2]), kRules[2]) <= 1);
}

namespace {

// Special values, values around the range of half, and random bits.
std::vector<float> values_to_round(int64_t count) {
  Random random(6);
  std::vector<float> values = special_values_to_round();
  while (int64_t(values.size()) < count / 2) {  // the range of half
    values.push_back(std::ldexp(float(random.normal<double>(1)[0]), int(random.integer(48)) - 32));
  }
  while (int64_t(values.size()) < count) {
    values.push_back(std::bit_cast<float>(uint32_t(random.integer(int64_t(1) << 32))));
  }
  return values;
}

}  // namespace

TEMPLATE_TEST_CASE("a value is rounded stochastically by its 16 random bits",
                   "[table_update]",
                   BFloat16,
                   Half) {
  Random random(10);
  for (const float value : values_to_round(40'000)) {
    for (const uint32_t bits : {0u, 0xffffu, uint32_t(random.integer(0x10000))}) {
      INFO(value << " by " << bits);
      REQUIRE(narrow_stochastically<TestType>(value, bits).bits ==
              round_by_bits<TestType>(value, bits).bits);
    }
  }
}

// With tables of zeros, these hyperparameters make the momentum equal to the gradient, and the
// table to 1.5 times the gradient. So rounding is the only inexact step.
TEMPLATE_TEST_CASE("two columns of a row's part share a random word, and no two parts do",
                   "[table_update]",
                   (Types<BFloat16, float>),
                   (Types<BFloat16, BFloat16>),
                   (Types<Half, float>),
                   (Types<Half, Half>)) {
  using Table = typename TestType::Table;
  using Source = typename TestType::Source;
  constexpr uint64_t kKey = 0x123456789abcdef0u;
  constexpr int64_t kRows = 40;
  for (const int64_t width : {1, 7, 250, 1040}) {
    for (const int64_t parts : {1, 2, 3}) {
      const int64_t columns = parts * width;
      std::vector<Source> source;
      for (const float value : values_to_round(kRows * columns)) {
        source.push_back(from_double<Source>(value));
      }
      std::vector<Table> table(kRows * columns), momentum(kRows * columns);
      const TableUpdate<Table, Source> update = {.parts = parts,
                                                 .width = width,
                                                 .table = {table.data(), columns},
                                                 .rule = {.rule = Rule::sgd,
                                                          .lr = -1.5,
                                                          .decay_factor = 1,
                                                          .momentum = {momentum.data(), columns}},
                                                 .stochastic_rounding = true,
                                                 .key = kKey,
                                                 .source = {source.data(), columns}};
      update_rows(update, nullptr, kRows, kRows, kContext);
      INFO("width " << width << " parts " << parts);
      for (int64_t row = 0; row < kRows; ++row) {
        const Source* first = source.data() + row * columns;
        const bool is_updated = std::any_of(
            first, first + columns, [](const Source& value) { return !(to_double(value) == 0); });
        for (int64_t column = 0; is_updated && column < columns; ++column) {
          const float gradient = float(to_double(first[column]));
          const auto rounded = [&](float value, uint64_t number) {
            return round_by_bits<Table>(
                value,
                random_bits_of(derive_key(kKey, number), column / width, width, column % width));
          };
          INFO("row " << row << " column " << column << " value " << gradient);
          const int64_t place = row * columns + column;
          if (std::isnan(gradient)) {
            REQUIRE(std::isnan(to_double(table[place])));
            REQUIRE(std::isnan(to_double(momentum[place])));
          } else {  // adding to zeros makes -0 positive
            REQUIRE(table[place].bits == rounded(0 + 1.5f * gradient, 2 * row).bits);
            REQUIRE(momentum[place].bits == rounded(0 + gradient, 2 * row + 1).bits);
          }
        }
      }
    }
  }
}
