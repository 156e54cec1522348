#include "cuda_support.h"
#include "kernels/cpu/stochastic_rounding.h"
#include "kernels/cpu/table_update.h"
#include "kernels/cuda/stochastic_rounding.h"
#include "kernels/cuda/table_grad.h"
#include "kernels/cuda/table_update.h"
#include "kernels/random_bits.h"
#include "problems/table_update.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

constexpr Given kGiven[] = {Given::dense, Given::pairs, Given::pairs_with_coefficients};

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
    };
    if (!this->has_pairs()) {
      update_rows(update, rows, kContext);
    } else {
      if (sorted.count == 0) {
        sorted = make_segments(owners.data(), owners.size(), rows, OutputRows::by_owner, kContext);
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
    const Segments segments =
        make_segments(fused.owners.data(), fused.owners.size(), 9, OutputRows::compact, kContext);
    const int64_t distinct = count_distinct_owners(segments, kContext);
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

TEMPLATE_TEST_CASE("stochastic rounding has the CPU's bits for every value and every random word",
                   "[table_update]",
                   BFloat16,
                   Half) {
  namespace cpu = peer::cpu::baseline;
  constexpr int lanes = cpu::kLanes<float>;
  Random random(10);
  const std::vector<float> values = values_to_round(40'000);
  for (size_t i = 0; i < values.size(); i += lanes) {
    cpu::Bits32 words;
    for (int l = 0; l < lanes; ++l) {
      words[l] = uint32_t(random.integer(int64_t(1) << 32));
    }
    TestType expected[lanes];
    cpu::store_stochastic(expected, cpu::load(values.data() + i), words);
    for (int l = 0; l < lanes; ++l) {
      INFO(values[i + l] << " by " << words[l]);
      REQUIRE(narrow_stochastically<TestType>(values[i + l], words[l]).bits == expected[l].bits);
    }
  }
}

// With tables of zeros, these hyperparameters make the table and the momentum equal to the
// gradient. So rounding is the only inexact step.
TEMPLATE_TEST_CASE("tables and momentum are rounded to the CPU's bits, row by row",
                   "[table_update]",
                   BFloat16,
                   Half) {
  constexpr int64_t kRows = 40, kWidth = 500;
  const std::vector<float> values = values_to_round(kRows * kWidth);
  std::vector<TestType> table(values.size()), momentum(values.size());
  auto expected_table = table, expected_momentum = momentum;
  const auto rule_with = [](std::vector<TestType>& rows) {
    return UpdateRule<TestType>{
        .rule = Rule::sgd, .lr = -1, .decay_factor = 1, .momentum = {rows.data(), kWidth}};
  };
  TableUpdate<TestType, float> update = {.parts = 2,
                                         .width = kWidth / 2,
                                         .table = {expected_table.data(), kWidth},
                                         .rule = rule_with(expected_momentum),
                                         .stochastic_rounding = true,
                                         .key = 0x123456789abcdef0u,
                                         .source = {values.data(), kWidth}};
  peer::cpu::kernels<peer::cpu::TableUpdateKernels>(peer::cpu::Capability::baseline)
      .of<TestType, float>()
      .update_rows(update, /*ids=*/nullptr, 0, kRows);
  update.table = {table.data(), kWidth};
  update.rule = rule_with(momentum);
  update_rows(update, kRows, kContext);
  CHECK(have_same_bits(table, expected_table));
  CHECK(have_same_bits(momentum, expected_momentum));
  CHECK(!have_same_bits(table, momentum));
}
