#include <array>
#include <tuple>
#include <valarray>

#include "kernels/cpu/stochastic_rounding.h"
#include "kernels/cpu/table_update.h"
#include "kernels/random_bits.h"
#include "problems/table_update.h"
#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

namespace {

// Rows are padded: the stride exceeds the width.
constexpr int64_t kPadding = 5;

template <class Table, class Source>
struct Problem : TableUpdateProblem<Table, Source> {
  using Base = TableUpdateProblem<Table, Source>;
  using Base::given, Base::rows, Base::parts, Base::width, Base::stride, Base::pairs_per_row;
  using Base::owners, Base::source, Base::coefficients, Base::start;
  using Real = typename Base::Real;

  Problem(Given given,
          int64_t rows,
          int64_t parts,
          int64_t width,
          const std::vector<int64_t>& segments,
          uint64_t seed)
      : Base(given, rows, parts, width, segments, seed, kPadding) {}

  State<Table> solve(Capability capability,
                     const Hyperparameters& h,
                     int threads,
                     bool stochastic_rounding = false,
                     SinglePairs single_pairs = SinglePairs::in_chunks) const {
    const ParallelFor parallel_for = on_threads(threads);
    State<Table> state = start;
    const TableUpdate<Table, Source> update = {
        .parts = parts,
        .width = width,
        .table = {state.table.data(), stride},
        .rule = rule_of<Table>(h, {state.momentum.data(), stride}, state),
        .stochastic_rounding = stochastic_rounding,
        .key = 17,
        .source = {source.data(), stride},
        .pairs_per_row = pairs_per_row,
        .coefficients = this->given_coefficients(),
        .frozen = this->frozen_rows(),
    };
    const auto& kernel = kernels<TableUpdateKernels>(capability).of<Table, Source>();
    if (!this->has_pairs()) {
      const int64_t* ids = given == Given::dense ? nullptr : owners.data();
      parallel_for(owners.size(), 1, [&](int64_t first, int64_t last) {
        kernel.update_rows(update, ids, first, last);
      });
      return state;
    }
    const Segments segments =
        make_segments(owners.data(), owners.size(), rows, update.frozen, OutputRows::by_owner,
                      single_pairs, parallel_for, plain_memory);
    std::vector<Real> partial_sums(segments.partial_rows * parts * width);
    const SegmentWork<Real> work = segments.work(Rows<Real>{partial_sums.data(), parts * width});
    parallel_for(segments.single_rows.size(), 1, [&](int64_t first, int64_t last) {
      kernel.update_single_pairs(update, work, first, last);
    });
    parallel_for(segments.chunks.size(), 1, [&](int64_t first, int64_t last) {
      kernel.update_chunks(update, work, first, last);
    });
    parallel_for(segments.split_segments.size(), 1, [&](int64_t first, int64_t last) {
      kernel.update_split_segments(update, work, first, last);
    });
    return state;
  }

  double distance(const State<Table>& result, const Hyperparameters& h) const {
    return Base::distance(result, h, 40 * kEpsilon<Real>);
  }

  // The state of a part, without what lies between the rows.
  State<Table> part_of(const State<Table>& state, int64_t part) const {
    State<Table> result;
    result.row_steps = state.row_steps;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row * stride + part * width;
      result.table.insert(result.table.end(), &state.table[first], &state.table[first] + width);
      result.momentum.insert(result.momentum.end(), &state.momentum[first],
                             &state.momentum[first] + width);
      result.second_moments.push_back(state.second_moments[row * parts + part]);
    }
    return result;
  }

  // The update of a part as of a table of its own.
  Problem part(int64_t part) const {
    Problem alone = *this;
    alone.parts = 1;
    alone.stride = width;
    alone.start = part_of(start, part);
    alone.source.clear();
    for (size_t row = 0; row < source.size() / stride; ++row) {
      const Source* first = &source[row * stride + part * width];
      alone.source.insert(alone.source.end(), first, first + width);
    }
    alone.coefficients.assign(&coefficients[part * owners.size()],
                              &coefficients[part * owners.size()] + owners.size());
    return alone;
  }
};

constexpr Given kGiven[] = {Given::dense, Given::distinct_rows, Given::pairs,
                            Given::pairs_with_coefficients};

}  // namespace

TEMPLATE_TEST_CASE("every rule updates the rows that have pairs, and no others",
                   "[table_update]",
                   (std::tuple<float, float>),
                   (std::tuple<double, double>),
                   (std::tuple<BFloat16, BFloat16>),
                   (std::tuple<BFloat16, float>),
                   (std::tuple<Half, Half>),
                   (std::tuple<Half, float>)) {
  using Table = std::tuple_element_t<0, TestType>;
  using Source = std::tuple_element_t<1, TestType>;
  for (const Capability capability : capabilities()) {
    for (const int64_t width : {1, 3, 7, 8, 9, 31, 33, 100}) {
      for (const Given given : kGiven) {
        const int64_t parts = 1 + width % 3;
        const Problem<Table, Source> problem(given, 20, parts, width, {1, 2, 7, 0, 3, 5}, 3);
        for (const Hyperparameters& rule : kRules) {
          INFO(name_of(capability)
               << " parts " << parts << " width " << width << " given " << int(given) << " rule "
               << int(rule.rule) << " nesterov " << rule.nesterov);
          CHECK(problem.distance(problem.solve(capability, rule, 1), rule) <= 1);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("rows with many pairs are updated once, and the same for any number of threads",
                   "[table_update]",
                   float,
                   BFloat16) {
  for (const Capability capability : capabilities()) {
    for (const Given given : kGiven) {
      const Problem<TestType, float> problem(given, 40, 2, 37, {1, 128, 129, 1000, 2, 256, 257}, 4);
      for (const Hyperparameters& rule : kRules) {
        const State<TestType> one = problem.solve(capability, rule, 1);
        const State<TestType> stochastic = problem.solve(capability, rule, 1, true);
        INFO(name_of(capability) << " given " << int(given) << " rule " << int(rule.rule));
        CHECK(problem.distance(one, rule) <= 1);
        CHECK((stochastic == one) == std::is_same_v<TestType, float>);
        for (const int threads : {2, 3, 8}) {
          INFO("threads " << threads);
          CHECK(problem.solve(capability, rule, threads) == one);
          CHECK(problem.solve(capability, rule, threads, true) == stochastic);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE(
    "frozen rows, and rows whose gradient is zero, keep their bits and their state, and no other "
    "row is updated differently",
    "[table_update]",
    (std::tuple<float, float>),
    (std::tuple<double, double>),
    (std::tuple<BFloat16, BFloat16>),
    (std::tuple<Half, float>)) {
  using Table = std::tuple_element_t<0, TestType>;
  using Source = std::tuple_element_t<1, TestType>;
  const bool is_stochastic = GENERATE(false, true);
  const int64_t width = GENERATE(1, 9, 64, 100);
  for (const Capability capability : capabilities()) {
    for (const Given given : kGiven) {
      const Problem<Table, Source> problem(given, 40, 2, width, {1, 128, 129, 1000, 2, 0, 257}, 8);
      const std::valarray<bool> rows = problem.some_rows(), all(true, 40);
      Problem<Table, Source> with_frozen = problem, with_zeros = problem, with_all = problem;
      with_frozen.frozen = rows;
      with_all.frozen = all;
      with_zeros.clear_gradients(rows);
      for (const Hyperparameters& rule : kRules) {
        INFO(name_of(capability) << " given " << int(given) << " rule " << int(rule.rule));
        const State<Table> expected =
            problem.with_start_in(rows, problem.solve(capability, rule, 1, is_stochastic));
        for (const int threads : {1, 3}) {
          CHECK(with_frozen.solve(capability, rule, threads, is_stochastic) == expected);
          CHECK(with_zeros.solve(capability, rule, threads, is_stochastic) == expected);
          CHECK(with_all.solve(capability, rule, threads, is_stochastic) == problem.start);
        }
        if (!is_stochastic) {
          CHECK(with_frozen.distance(expected, rule) <= 1);
          CHECK(with_zeros.distance(expected, rule) <= 1);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("rows of single pairs are updated the same if they are apart",
                   "[table_update]",
                   (std::tuple<float, float>),
                   (std::tuple<double, double>),
                   (std::tuple<BFloat16, BFloat16>),
                   (std::tuple<Half, float>)) {
  using Table = std::tuple_element_t<0, TestType>;
  using Source = std::tuple_element_t<1, TestType>;
  const bool is_stochastic = GENERATE(false, true);
  const int64_t width = GENERATE(1, 9, 64, 100);
  std::vector<int64_t> segments(30, 1);
  segments.insert(segments.end(), {2, 129, 0, 300, 1, 1});
  for (const Capability capability : capabilities()) {
    for (const Given given : {Given::pairs, Given::pairs_with_coefficients}) {
      Problem<Table, Source> problem(given, 40, 2, width, segments, 9);
      problem.frozen = problem.some_rows();
      problem.clear_gradients(problem.some_rows().shift(1));
      for (const Hyperparameters& rule : kRules) {
        INFO(name_of(capability) << " given " << int(given) << " rule " << int(rule.rule));
        const State<Table> expected = problem.solve(capability, rule, 1, is_stochastic);
        for (const int threads : {1, 3, 8}) {
          CHECK(problem.solve(capability, rule, threads, is_stochastic, SinglePairs::apart) ==
                expected);
        }
      }
    }
  }
}

// Not with stochastic rounding: its random bits depend on the column in the whole row.
TEMPLATE_TEST_CASE("parts are updated as tables of their own", "[table_update]", float, double) {
  for (const Capability capability : capabilities()) {
    for (const Given given : kGiven) {
      for (const int64_t width : {7, 32}) {
        const Problem<TestType, TestType> whole(given, 20, 3, width, {1, 2, 130, 0, 3, 300}, 5);
        for (const Hyperparameters& rule : kRules) {
          const State<TestType> result = whole.solve(capability, rule, 1);
          for (int64_t part = 0; part < whole.parts; ++part) {
            const Problem<TestType, TestType> alone = whole.part(part);
            const State<TestType> expected = alone.solve(capability, rule, 1);
            INFO(name_of(capability)
                 << " given " << int(given) << " rule " << int(rule.rule) << " part " << part);
            CHECK(whole.part_of(result, part) == alone.part_of(expected, 0));
          }
        }
      }
    }
  }
}

namespace {

// Rounds values with the kernels: subtracts their negatives from rows of zeros.
template <class Table>
std::vector<Table> round_with_kernels(Capability capability,
                                      const std::vector<float>& values,
                                      int64_t rows,
                                      uint64_t key,
                                      int64_t parts = 1) {
  const int64_t columns = values.size() / rows;
  std::vector<Table> table(values.size(), Table{});
  const TableUpdate<Table, float> update = {
      .parts = parts,
      .width = columns / parts,
      .table = {table.data(), columns},
      .rule = {.rule = Rule::sgd, .lr = -1, .decay_factor = 1},
      .stochastic_rounding = true,
      .key = key,
      .source = {values.data(), columns},
  };
  kernels<TableUpdateKernels>(capability).of<Table, float>().update_rows(update, nullptr, 0, rows);
  return table;
}

// The two neighbouring values of the type around a positive value, by bisection of bit patterns.
template <class Table>
std::pair<double, double> neighbours(double value) {
  uint16_t low = 0, high = std::is_same_v<Table, Half> ? 0x7c00 : 0x7f80;
  while (high - low > 1) {
    const uint16_t middle = low + (high - low) / 2;
    (to_double(Table{middle}) <= value ? low : high) = middle;
  }
  return {to_double(Table{low}), to_double(Table{high})};
}

}  // namespace

TEMPLATE_TEST_CASE("a column is rounded by 16 bits of a word that it shares with its neighbour",
                   "[table_update]",
                   BFloat16,
                   Half) {
  constexpr int64_t kRows = 5, kKey = 11;
  for (const int64_t parts : {1, 2, 3}) {
    for (const int64_t width : {1, 2, 7, 16, 31, 33, 64, 100}) {
      const int64_t columns = parts * width;
      std::vector<float> values = Random(7).normal<float>(kRows * columns);
      for (size_t i = 0; i < values.size(); i += 3) {
        values[i] *= 0x1p-17f;  // a subnormal half
      }
      for (const Capability capability : capabilities()) {
        const auto rounded = round_with_kernels<TestType>(capability, values, kRows, kKey, parts);
        INFO(name_of(capability) << " parts " << parts << " width " << width);
        for (int64_t i = 0; i < kRows * columns; ++i) {
          const int64_t row = i / columns, column = i % columns;
          const uint32_t random =
              random_bits_of(derive_key(kKey, 2 * row), column / width, width, column % width);
          REQUIRE(rounded[i].bits == round_by_bits<TestType>(values[i], random).bits);
        }
      }
    }
  }
}

// 6 standard deviations: a correct kernel fails one comparison in 5·10^8.
TEMPLATE_TEST_CASE("stochastic rounding is unbiased", "[table_update]", BFloat16, Half) {
  constexpr int64_t kRows = 400, kWidth = 250;
  const bool is_half = std::is_same_v<TestType, Half>;
  std::vector<float> values = {1.001f, 1.0001f, 3.14159f, 1023.9f, 0.1f, 6.1e-5f};
  if (is_half) {
    // Subnormals of half, the border to them, and less than the smallest.
    values.insert(values.end(), {0x1p-14f * 0.99999f, 0x1p-15f * 1.23456f, 0x1p-20f * 1.3f,
                                 0x1p-24f * 1.5f, 0x1p-24f * 0.25f, 0x1p-30f, 65000.f, 65530.f});
  } else {
    values.insert(values.end(), {1e-30f, 3e38f, 3.4e38f, 0x1p-127f, 0x1p-133f * 0.3f, 0x1p-140f});
  }
  for (const Capability capability : capabilities()) {
    for (const float value : values) {
      const auto [below, above] = neighbours<TestType>(value);
      // Infinity stands where the next value would be.
      const double next = std::isinf(above) ? std::ldexp(1, is_half ? 16 : 128) : above;
      const double up = (value - below) / (next - below);
      int64_t ups = 0;
      const auto rounded = round_with_kernels<TestType>(
          capability, std::vector<float>(kRows * kWidth, value), kRows, 5);
      for (const TestType& each : rounded) {
        REQUIRE((to_double(each) == below || to_double(each) == above));
        ups += to_double(each) == above;
      }
      const double count = kRows * kWidth;
      INFO(name_of(capability) << " value " << value << " expected " << up * count << " got "
                               << ups);
      CHECK(std::abs(ups - up * count) <= 6 * std::sqrt(count * up * (1 - up)) + 1);
      const auto negative = round_with_kernels<TestType>(
          capability, std::vector<float>(kRows * kWidth, -value), kRows, 5);
      for (size_t i = 0; i < rounded.size(); ++i) {
        REQUIRE(to_double(negative[i]) == -to_double(rounded[i]));
      }
    }
  }
}

TEMPLATE_TEST_CASE("what a 16-bit type holds is rounded to itself",
                   "[table_update]",
                   BFloat16,
                   Half) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x10000; ++bits) {
    values.push_back(float(to_double(TestType{uint16_t(bits)})));
  }
  for (const Capability capability : capabilities()) {
    for (const uint64_t key : {1, 2, 3}) {
      const auto rounded = round_with_kernels<TestType>(capability, values, 256, key);
      int64_t changed = 0;
      for (int bits = 0; bits < 0x10000; ++bits) {
        const double expected = to_double(TestType{uint16_t(bits)});
        const double actual = to_double(rounded[bits]);
        changed += std::isnan(expected) ? !std::isnan(actual) : actual != expected;
      }
      INFO(name_of(capability));
      CHECK(changed == 0);
    }
  }
}

TEMPLATE_TEST_CASE("stochastic rounding has the same bits on every capability, in [below, above]",
                   "[table_update]",
                   BFloat16,
                   Half) {
  Random random(6);
  std::vector<float> values = special_values_to_round();
  for (const int64_t bits : random.integers(7000 - values.size(), int64_t(1) << 32)) {
    values.push_back(std::bit_cast<float>(uint32_t(bits)));
  }
  const auto expected = round_with_kernels<TestType>(Capability::baseline, values, 70, 9);
  for (size_t i = 0; i < values.size(); ++i) {
    const double value = values[i], rounded = to_double(expected[i]);
    INFO(value << " to " << rounded);
    if (std::isnan(value) || std::isinf(value)) {
      REQUIRE((std::isnan(value) ? std::isnan(rounded) : rounded == value));
    } else {
      const auto [below, above] = neighbours<TestType>(std::abs(value));
      REQUIRE((std::abs(rounded) == below || std::abs(rounded) == above));
      REQUIRE((rounded == 0 || std::signbit(rounded) == std::signbit(value)));
    }
  }
  for (const Capability capability : capabilities()) {
    const auto result = round_with_kernels<TestType>(capability, values, 70, 9);
    INFO(name_of(capability));
    CHECK(std::memcmp(result.data(), expected.data(), result.size() * sizeof(TestType)) == 0);
  }
}

TEMPLATE_TEST_CASE("neither the smallest nor the largest random bits move what a 16-bit type holds",
                   "[table_update]",
                   BFloat16,
                   Half) {
  using namespace baseline;
  constexpr int lanes = kLanes<float>;
  for (const uint32_t random : {0u, 0xffffu}) {
    for (int bits = 0; bits < 0x10000; bits += lanes) {
      TestType given[lanes];
      for (int i = 0; i < lanes; ++i) {
        given[i].bits = bits + i;
      }
      const Bits32 rounded =
          baseline::round_stochastically<TestType>(load(given), Bits32{} + random);
      for (int i = 0; i < lanes; ++i) {
        const double expected = to_double(given[i]),
                     actual = to_double(TestType{uint16_t(rounded[i])});
        REQUIRE((std::isnan(expected)
                     ? std::isnan(actual)
                     : actual == expected && std::signbit(actual) == std::signbit(expected)));
      }
    }
  }
}

// Each bit is set half of the time, independently of its neighbours, within 6 standard deviations.
TEST_CASE("random words are balanced, and differ by row, number and key", "[table_update]") {
  constexpr int64_t kRows = 300, kColumns = 300;
  const double count = kRows * kColumns, allowed = 6 * std::sqrt(count) / 2;
  std::array<int64_t, 32> ones = {}, same_in_next_row = {}, same_in_next_column = {},
                          same_with_next_key = {};
  const auto word = [](uint64_t key, int64_t row, uint32_t column) {
    return random_word(derive_key(key, row), column);
  };
  for (int64_t row = 0; row < kRows; ++row) {
    for (uint32_t column = 0; column < kColumns; ++column) {
      const uint32_t here = word(1, row, column);
      for (int bit = 0; bit < 32; ++bit) {
        ones[bit] += here >> bit & 1;
        same_in_next_row[bit] += ~(here ^ word(1, row + 1, column)) >> bit & 1;
        same_in_next_column[bit] += ~(here ^ word(1, row, column + 1)) >> bit & 1;
        same_with_next_key[bit] += ~(here ^ word(2, row, column)) >> bit & 1;
      }
    }
  }
  for (const auto& counts : {ones, same_in_next_row, same_in_next_column, same_with_next_key}) {
    for (const int64_t each : counts) {
      CHECK(std::abs(each - count / 2) <= allowed);
    }
  }
  int64_t equal = 0;
  for (uint32_t column = 0; column < kColumns; ++column) {
    equal +=
        random_word(uint64_t(7), column) == random_word(uint64_t(7) | uint64_t(1) << 32, column);
  }
  CHECK(equal == 0);
}
