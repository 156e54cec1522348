#include <valarray>

#include "cuda_support.h"
#include "kernels/cuda/table_grad.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

// The inputs of one table's gradient, and its sums in double, one pair at a time.
template <class Element, class Source>
struct Problem {
  using Real = accumulation_t<Element>;

  Problem(std::vector<int64_t> given_owners,
          int64_t pairs_per_row,
          int64_t owner_count,
          int64_t width,
          uint64_t seed = 1)
      : pairs_per_row(pairs_per_row),
        owner_count(owner_count),
        width(width),
        owners(std::move(given_owners)) {
    owners.resize((owners.size() + pairs_per_row - 1) / pairs_per_row * pairs_per_row,
                  owner_count - 1);
    Random random(seed);
    coefficients = random.normal<Real>(owners.size());
    source = random.normal<Source>(owners.size() / pairs_per_row * width);
  }

  int64_t source_rows() const { return owners.size() / pairs_per_row; }

  struct Gradient {
    std::vector<Element> values;  // (rows, width)
    std::vector<int64_t> owners;  // of each row
    bool is_untouched_elsewhere;
  };

  // Rows without pairs, and frozen rows, keep their value, -1.
  Gradient solve(OutputRows rows, Layout layout = {}) const {
    const Element untouched = from_double<Element>(-1);
    Segments& segments = sorted[int(rows)];
    if (segments.count == 0) {
      segments = make_segments(owners.data(), owners.size(), owner_count,
                               frozen.size() > 0 ? &frozen[0] : nullptr, rows, kContext);
    }
    Gradient gradient;
    gradient.owners.resize(
        rows == OutputRows::compact ? DistinctOwnerCount(segments, kContext).wait() : owner_count);
    for (size_t row = 0; row < gradient.owners.size(); ++row) {
      gradient.owners[row] =
          rows == OutputRows::compact ? segments.distinct_owners.get()[row] : row;
    }
    RowMemory<Source> source_memory(source_rows(), width, layout, from_double<Source>(NAN));
    source_memory.set(source);
    RowMemory<Element> out(gradient.owners.size(), width, layout, untouched);
    const TableGrad<Element, Source> pass = {
        .width = width,
        .pairs_per_row = pairs_per_row,
        .coefficients = coefficients.data(),
        .source = std::as_const(source_memory).rows(),
        .out = out.rows(),
    };
    sum_segments(pass, segments, kContext);
    gradient.values = out.values(gradient.owners.size());
    gradient.is_untouched_elsewhere = out.holds_elsewhere(gradient.owners.size(), untouched);
    return gradient;
  }

  // The largest distance from the sums in double, in units of the rounding tolerance.
  double distance(const Gradient& gradient) const {
    std::vector<double> sums(owner_count * width), magnitudes(owner_count * width);
    std::vector<bool> has_pairs(owner_count);
    for (size_t i = 0; i < owners.size(); ++i) {
      if (frozen.size() > 0 && frozen[owners[i]]) {
        continue;
      }
      has_pairs[owners[i]] = true;
      for (int64_t column = 0; column < width; ++column) {
        const double term =
            double(coefficients[i]) * to_double(source[i / pairs_per_row * width + column]);
        sums[owners[i] * width + column] += term;
        magnitudes[owners[i] * width + column] += std::abs(term);
      }
    }
    double worst = gradient.is_untouched_elsewhere ? 0 : INFINITY;
    for (size_t row = 0; row < gradient.owners.size(); ++row) {
      const int64_t owner = gradient.owners[row];
      for (int64_t column = 0; column < width; ++column) {
        const double sum = sums[owner * width + column];
        const double bound = kEpsilon<Element> * std::abs(sum) +
                             64 * kEpsilon<Real> * magnitudes[owner * width + column] + 1e-7;
        const double difference =
            to_double(gradient.values[row * width + column]) - (has_pairs[owner] ? sum : -1);
        worst = std::isnan(difference) ? INFINITY : std::max(worst, std::abs(difference) / bound);
      }
    }
    return worst;
  }

  int64_t pairs_per_row, owner_count, width;
  std::vector<int64_t> owners;
  std::valarray<bool> frozen;  // by owner, or empty
  std::vector<Real> coefficients;
  std::vector<Source> source;
  mutable Segments sorted[2];  // by OutputRows, made once for several solutions
};

}  // namespace

TEMPLATE_TEST_CASE("a table's gradient is the sum over the pairs of each row",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  using Source = typename TestType::Source;
  for (const int64_t width : {1, 3, 8, 31, 128, 129, 257, 512, 513, 999, 2100}) {
    Random random(3);
    const Problem<Table, Source> problem(random.integers(180, 60), 6, 70, width);
    INFO("width " << width);
    CHECK(problem.distance(problem.solve(OutputRows::by_owner)) <= 1);
  }
}

TEMPLATE_TEST_CASE("rows with more columns than a block takes at once are summed right",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  const int64_t width = 16 * 1024 / sizeof(typename TestType::Source) + 808;
  const Problem<typename TestType::Table, typename TestType::Source> problem(
      owners_of_segments({1, 3, 0, 129}), 2, 5, width);
  CHECK(problem.distance(problem.solve(OutputRows::by_owner)) <= 1);
}

TEMPLATE_TEST_CASE("segments of every length around chunks and tiles are summed right",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  for (const std::vector<int64_t>& segments :
       std::vector<std::vector<int64_t>>{{1},
                                         {2},
                                         {3},
                                         {4},
                                         {5},
                                         {8},
                                         {9},
                                         {63, 1, 64, 65, 66},
                                         {127, 128, 129, 0, 255, 256, 257},
                                         {7, 190, 191, 192, 1, 1, 1, 1, 1, 500},
                                         {1, 0, 1100}}) {
    const Problem<typename TestType::Table, typename TestType::Source> problem(
        owners_of_segments(segments), 1, segments.size(), 40);
    INFO(segments.size() << " segments, the first of " << segments[0]);
    CHECK(problem.distance(problem.solve(OutputRows::compact)) <= 1);
  }
}

TEMPLATE_TEST_CASE("a hot expert is summed right, and the same on a device of any size",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  const Problem<typename TestType::Table, typename TestType::Source> problem(
      owners_of_segments({3, 1, 3000, 2, 0, 700, 1, 1, 1, 130}), 8, 12, 72);
  const auto gradient = problem.solve(OutputRows::by_owner);
  CHECK(problem.distance(gradient) <= 1);
  for (const int sm_count : {1, 20, 132}) {
    const ScopedSmCount device(sm_count);
    CHECK(have_same_bits(problem.solve(OutputRows::by_owner).values, gradient.values));
  }
}

TEMPLATE_TEST_CASE("compact rows are the rows of the owners that occur",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  Random random(5);
  std::vector<int64_t> owners = random.integers(300, 1000);
  std::fill(owners.begin(), owners.begin() + 150, 500);
  const Problem<typename TestType::Table, typename TestType::Source> problem(owners, 3, 1000, 24);
  const auto dense = problem.solve(OutputRows::by_owner);
  const auto compact = problem.solve(OutputRows::compact);
  for (size_t row = 0; row < compact.owners.size(); ++row) {
    REQUIRE(std::memcmp(compact.values.data() + row * 24,
                        dense.values.data() + compact.owners[row] * 24,
                        24 * sizeof(compact.values[0])) == 0);
  }
}

TEMPLATE_TEST_CASE("pairs of frozen rows are not read, and the other rows keep their bits",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  using Table = typename TestType::Table;
  using Source = typename TestType::Source;
  const std::vector<int64_t> owners = owners_of_segments({3, 200, 1, 129, 70, 0, 400, 2, 1});
  for (const int64_t width : {7, 520}) {
    const Problem<Table, Source> unfrozen(owners, 2, 9, width);
    const auto gradient = unfrozen.solve(OutputRows::by_owner);
    for (const std::valarray<bool>& frozen :
         {std::valarray<bool>(9),
          std::valarray<bool>{true, true, false, false, true, false, false, false, true},
          std::valarray<bool>{false, false, true, true, false, true, true, true, false},
          std::valarray<bool>(true, 9)}) {
      Problem<Table, Source> problem(owners, 2, 9, width);
      problem.frozen = frozen;
      for (size_t i = 0; i < owners.size(); ++i) {
        if (frozen[owners[i]]) {
          problem.coefficients[i] = NAN;
        }
      }
      for (const OutputRows rows : {OutputRows::by_owner, OutputRows::compact}) {
        const auto with_frozen = problem.solve(rows);
        INFO("width " << width << " compact " << (rows == OutputRows::compact));
        CHECK(problem.distance(with_frozen) <= 1);
        for (size_t row = 0; row < with_frozen.owners.size(); ++row) {
          const int64_t owner = with_frozen.owners[row];
          REQUIRE((rows == OutputRows::by_owner || !frozen[owner]));
          REQUIRE((frozen[owner] || std::memcmp(with_frozen.values.data() + row * width,
                                                gradient.values.data() + owner * width,
                                                width * sizeof(Table)) == 0));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("alignment and strides change no bit, and nothing is written between rows",
                   "[table_grad]",
                   PEER_TABLE_AND_SOURCE_TYPES) {
  for (const int64_t width : {5, 64, 600}) {
    const Problem<typename TestType::Table, typename TestType::Source> problem(
        owners_of_segments({1, 2, 3, 140, 0, 1, 4}), 3, 8, width);
    const auto aligned = problem.solve(OutputRows::by_owner);
    for (const Layout layout : {Layout{1, 0}, Layout{0, 1}, Layout{3, 5}, Layout{8, 8},
                                Layout{0, 8}, Layout{4, 4}, Layout{2, 0}}) {
      INFO("width " << width << " offset " << layout.offset << " padding " << layout.padding);
      const auto gradient = problem.solve(OutputRows::by_owner, layout);
      CHECK(gradient.is_untouched_elsewhere);
      CHECK(have_same_bits(gradient.values, aligned.values));
    }
  }
}

TEMPLATE_TEST_CASE("NaN and infinity reach only the rows of their pairs",
                   "[table_grad]",
                   float,
                   BFloat16) {
  Problem<TestType, TestType> problem(owners_of_segments({2, 1, 3, 150, 1, 5}), 1, 6, 100);
  problem.source[40 * 100 + 7] = from_double<TestType>(INFINITY);
  problem.source[41 * 100 + 99] = from_double<TestType>(NAN);
  problem.source[42 * 100 + 50] = from_double<TestType>(INFINITY);
  problem.coefficients[42] = 0;
  const auto gradient = problem.solve(OutputRows::by_owner);
  for (int64_t row = 0; row < 6; ++row) {
    for (int64_t column = 0; column < 100; ++column) {
      const bool is_finite = !((row == problem.owners[40] && column == 7) ||
                               (row == problem.owners[41] && column == 99) ||
                               (row == problem.owners[42] && column == 50));
      REQUIRE(std::isfinite(to_double(gradient.values[row * 100 + column])) == is_finite);
    }
  }
}

TEST_CASE("no pairs and no columns leave everything as it is", "[table_grad]") {
  const Problem<float, float> no_pairs({}, 1, 3, 16);
  CHECK(no_pairs.distance(no_pairs.solve(OutputRows::by_owner)) == 0);
  CHECK(no_pairs.solve(OutputRows::compact).values.empty());
  const Problem<float, float> no_columns(owners_of_segments({3, 200}), 1, 2, 0);
  CHECK(no_columns.distance(no_columns.solve(OutputRows::by_owner)) == 0);
}

TEMPLATE_TEST_CASE("a small gradient is right for every order of threads",
                   "[table_grad][races]",
                   (Types<float, float>),
                   (Types<BFloat16, BFloat16>)) {
  const Problem<typename TestType::Table, typename TestType::Source> problem(
      owners_of_segments({2, 130, 1}), 2, 3, 520);
  CHECK(problem.distance(problem.solve(OutputRows::by_owner)) <= 1);
}
