#include <limits>

#include "kernels/cpu/table_grad.h"
#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

namespace {

// The inputs of one table's gradient, and its sums in double, one pair at a time. Each part of a
// row has its own coefficients and its own source.
template <class Element>
struct Problem {
  using Real = accumulation_t<Element>;

  Problem(int64_t rows,
          int64_t pairs_per_row,
          int64_t owner_count,
          int64_t width,
          int64_t hot_pairs,
          uint64_t seed,
          int64_t parts = 1)
      : pairs_per_row(pairs_per_row), owner_count(owner_count), parts(parts), width(width) {
    Random random(seed);
    owners = random.integers(rows * pairs_per_row, owner_count);
    std::fill(owners.begin(), owners.begin() + std::min<int64_t>(hot_pairs, owners.size()),
              owner_count / 2);
    coefficients = random.normal<Real>(parts * owners.size());
    source = random.normal<Real>(parts * rows * width);
  }

  // `offset`: elements before the rows. The rows start at an aligned address only if it is 0.
  std::vector<Element> solve(Capability capability,
                             int threads,
                             bool nontemporal = false,
                             int64_t offset = 0,
                             SinglePairs single_pairs = SinglePairs::in_chunks) const {
    const ParallelFor parallel_for = on_threads(threads);
    const Segments segments =
        make_segments(owners.data(), owners.size(), owner_count, nullptr, OutputRows::by_owner,
                      single_pairs, parallel_for, plain_memory);
    const int64_t columns = parts * width;
    std::vector<Element> memory(owner_count * columns + offset + 64, Element{});
    const int64_t misaligned = reinterpret_cast<uintptr_t>(memory.data()) % 64 / sizeof(Element);
    Element* out =
        memory.data() + (misaligned == 0 ? 0 : 64 / sizeof(Element) - misaligned) + offset;
    std::vector<Real> partial_sums(segments.partial_rows * columns);
    std::vector<TableGrad<Element>> passes;
    for (int64_t part = 0; part < parts; ++part) {
      passes.push_back({.width = width,
                        .pairs_per_row = pairs_per_row,
                        .coefficients = coefficients.data() + part * owners.size(),
                        .source = {source.data() + part * source.size() / parts, width},
                        .out = {out + part * width, columns}});
    }
    const SegmentWork<Real> work = segments.work(Rows<Real>{partial_sums.data(), columns});
    const auto& kernel = kernels<TableGradKernels>(capability).of<Element>();
    parallel_for(segments.single_rows.size(), 1, [&](int64_t first, int64_t last) {
      kernel.sum_single_pairs(passes, work, nontemporal, first, last);
    });
    parallel_for(segments.chunks.size(), 1, [&](int64_t first, int64_t last) {
      kernel.sum_chunks(passes, work, nontemporal, first, last);
    });
    parallel_for(segments.split_segments.size(), 1, [&](int64_t first, int64_t last) {
      kernel.sum_split_segments(passes, work, first, last);
    });
    return {out, out + owner_count * columns};
  }

  // The sums, and the sums of absolute values, which bound the rounding.
  std::pair<std::vector<double>, std::vector<double>> oracle() const {
    const int64_t columns = parts * width;
    std::vector<double> sums(owner_count * columns), magnitudes(owner_count * columns);
    for (size_t i = 0; i < owners.size(); ++i) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t part = column / width;
        const Real* row = &source[part * source.size() / parts + i / pairs_per_row * width];
        const double term =
            double(coefficients[part * owners.size() + i]) * double(row[column % width]);
        sums[owners[i] * columns + column] += term;
        magnitudes[owners[i] * columns + column] += std::abs(term);
      }
    }
    return {sums, magnitudes};
  }

  int64_t pairs_per_row, owner_count, parts, width;
  std::vector<int64_t> owners;
  std::vector<Real> coefficients, source;
};

}  // namespace

TEMPLATE_TEST_CASE("a table's gradient is the sum over the pairs of each row",
                   "[table_grad]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const Capability capability : capabilities()) {
    for (const int64_t width : {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129}) {
      const Problem<TestType> problem(60, 6, 29, width, 0, 3, 1 + width % 3);
      const std::vector<TestType> result = problem.solve(capability, 1);
      const auto [sums, magnitudes] = problem.oracle();
      double worst = 0;
      for (size_t i = 0; i < sums.size(); ++i) {
        const double bound = kEpsilon<TestType> * std::abs(sums[i]) +
                             64 * kEpsilon<accumulation_t<TestType>> * magnitudes[i] + 1e-7;
        worst = std::max(worst, std::abs(to_double(result[i]) - sums[i]) / bound);
      }
      INFO(name_of(capability) << " width " << width);
      CHECK(worst <= 1);
    }
  }
}

TEMPLATE_TEST_CASE("one hot expert is summed right, and the same for any number of threads",
                   "[table_grad]",
                   float,
                   BFloat16) {
  for (const Capability capability : capabilities()) {
    const Problem<TestType> problem(300, 10, 50, 37, 2500, 4, 2);
    const std::vector<TestType> one = problem.solve(capability, 1);
    const auto [sums, magnitudes] = problem.oracle();
    for (size_t i = 0; i < sums.size(); ++i) {
      const double bound =
          kEpsilon<TestType> * std::abs(sums[i]) + 256 * kEpsilon<float> * magnitudes[i] + 1e-7;
      REQUIRE(std::abs(to_double(one[i]) - sums[i]) <= bound);
    }
    for (const int threads : {2, 3, 8}) {
      const std::vector<TestType> many = problem.solve(capability, threads);
      INFO(name_of(capability) << " threads " << threads);
      CHECK(std::memcmp(one.data(), many.data(), one.size() * sizeof(TestType)) == 0);
    }
  }
}

TEMPLATE_TEST_CASE("rows written past the caches hold the same bits",
                   "[table_grad]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const Capability capability : capabilities()) {
    for (const int64_t width : {1, 16, 40, 64, 100, 128, 192}) {
      const Problem<TestType> problem(60, 6, 29, width, 200, 5, 2);
      const std::vector<TestType> stored = problem.solve(capability, 1);
      for (const int64_t offset : {0, 1}) {
        const std::vector<TestType> nontemporal = problem.solve(capability, 3, true, offset);
        INFO(name_of(capability) << " width " << width << " offset " << offset);
        CHECK(std::memcmp(stored.data(), nontemporal.data(), stored.size() * sizeof(TestType)) ==
              0);
      }
    }
  }
}

TEMPLATE_TEST_CASE("rows of single pairs hold the same bits if they are written apart",
                   "[table_grad]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  const bool nontemporal = GENERATE(false, true);
  for (const Capability capability : capabilities()) {
    for (const int64_t width : {1, 16, 40, 64, 100, 129, 192}) {
      // Owners with one pair, with several, and a hot one.
      Problem<TestType> problem(60, 6, 300, width, 200, 6, 2);
      // Products that underflow, of both signs.
      problem.source[0] = std::numeric_limits<accumulation_t<TestType>>::denorm_min();
      problem.source[width - 1] = -problem.source[0];
      const std::vector<TestType> expected = problem.solve(capability, 1);
      for (const int64_t offset : {0, 1}) {
        for (const int threads : {1, 3}) {
          const std::vector<TestType> apart =
              problem.solve(capability, threads, nontemporal, offset, SinglePairs::apart);
          INFO(name_of(capability) << " width " << width << " offset " << offset);
          CHECK(have_same_bits(expected, apart));
        }
      }
    }
  }
}
