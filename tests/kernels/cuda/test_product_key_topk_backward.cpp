#include "cuda_support.h"
#include "kernels/cuda/product_key_topk.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

template <class Table>
struct Problem {
  Problem(int64_t items, int64_t terms, int64_t width, const Layout& layout = kAligned)
      : items(items),
        terms(terms),
        width(width),
        offset(layout.offset),
        stride(width + layout.padding) {
    Random random(11);
    coefficients = random.normal<Table>(items * terms);
    indices = random.integers(items * terms, kRows);
    const std::vector<Table> dense = random.normal<Table>(kRows * width);
    table.resize(offset + kRows * stride, Table(1e3));
    for (int64_t i = 0; i < kRows * width; ++i) {
      table[offset + i / width * stride + i % width] = dense[i];
    }
    out.resize(offset + items * stride, Table(77));
  }

  void run() {
    const GatherSum<Table> pass = {
        .items = items,
        .terms = terms,
        .width = width,
        .coefficients = coefficients.data(),
        .indices = indices.data(),
        .table = {table.data() + offset, stride},
        .out = {out.data() + offset, stride},
    };
    gather_sum(pass, kContext);
  }

  // The sums. Checks that nothing else was written.
  std::vector<Table> sums() const {
    std::vector<Table> result;
    for (int64_t i = 0; i < int64_t(out.size()); ++i) {
      if (i >= offset && (i - offset) % stride < width) {
        result.push_back(out[i]);
      } else {
        CHECK(out[i] == 77);
      }
    }
    return result;
  }

  double error() const {
    const std::vector<Table> actual = sums();
    double worst = 0;
    for (int64_t i = 0; i < items * width; ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t p = i / width * terms; p < (i / width + 1) * terms; ++p) {
        const double term =
            double(coefficients[p]) * double(table[offset + indices[p] * stride + i % width]);
        sum += term;
        magnitude += std::abs(term);
      }
      const double error = std::abs(double(actual[i]) - sum);
      if (!(error <= 64 * kEpsilon<Table> * magnitude)) {
        worst = std::max(worst, std::isfinite(error) ? error : INFINITY);
      }
    }
    return worst;
  }

  static constexpr int64_t kRows = 40;
  int64_t items, terms, width, offset, stride;
  std::vector<Table> coefficients, table, out;
  std::vector<int64_t> indices;
};

template <class Table>
void check_against_oracle(int64_t items, int64_t terms, int64_t width, const Layout& layout) {
  Problem<Table> problem(items, terms, width, layout);
  problem.run();
  INFO(items << " items, " << terms << " terms, width " << width << ", offset " << layout.offset);
  CHECK(problem.error() == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("weighted sums of rows agree with the oracle for every number of terms",
                   "[product_key_topk_backward]",
                   float,
                   double) {
  for (const int64_t terms : {0, 1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 70}) {
    check_against_oracle<TestType>(9, terms, 20, kAligned);
    check_against_oracle<TestType>(3, terms, 19, kUnaligned);
  }
}

TEMPLATE_TEST_CASE("weighted sums of rows agree with the oracle at every width",
                   "[product_key_topk_backward]",
                   float,
                   double) {
  for (const int64_t width : {1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 132, 256, 260, 1000}) {
    for (const Layout& layout : {kAligned, kUnaligned, Layout{0, 0}, Layout{4, 0}, Layout{0, 1}}) {
      check_against_oracle<TestType>(2, 6, width, layout);
    }
  }
}

TEMPLATE_TEST_CASE("every item gets its sum, whatever the number of items",
                   "[product_key_topk_backward]",
                   float,
                   double) {
  for (const int64_t items : {0, 1, 7, 8, 9, 100}) {
    check_against_oracle<TestType>(items, 5, 12, kAligned);
  }
}

TEMPLATE_TEST_CASE("alignment does not change the bits of weighted sums",
                   "[product_key_topk_backward]",
                   float,
                   double) {
  Problem<TestType> aligned(5, 33, 140, kAligned), unaligned(5, 33, 140, kUnaligned);
  aligned.run();
  unaligned.run();
  CHECK(aligned.sums() == unaligned.sums());
}

TEST_CASE("infinite coefficients give infinite weighted sums, not NaN",
          "[product_key_topk_backward]") {
  Problem<float> problem(2, 5, 8);
  std::fill(problem.coefficients.begin(), problem.coefficients.end(), INFINITY);
  std::fill(problem.table.begin(), problem.table.end(), 1.0f);
  problem.run();
  CHECK(problem.sums() == std::vector<float>(16, INFINITY));
}

TEST_CASE("the warps of weighted sums do not race", "[product_key_topk_backward][races]") {
  check_against_oracle<float>(9, 17, 140, kAligned);
}

TEST_CASE("key owners are the rows and columns of a head's part of the keys",
          "[product_key_topk_backward]") {
  const int64_t rows = 7, columns = 11, heads = 3, k = 5, tokens = 40;
  Random random(16);
  const std::vector<int64_t> indices = random.integers(tokens * heads * k, rows * columns);
  for (const bool shared : {true, false}) {
    std::vector<int64_t> row_owners(indices.size(), -1), column_owners(indices.size(), -1);
    const KeyOwners pass = {
        .queries = tokens * heads,
        .heads = heads,
        .k = k,
        .columns = columns,
        .experts = rows * columns,
        .row_head_stride = shared ? 0 : rows,
        .column_head_stride = shared ? 0 : columns,
        .indices = indices.data(),
        .row_owners = row_owners.data(),
        .column_owners = column_owners.data(),
    };
    find_key_owners(pass, kContext);
    for (size_t i = 0; i < indices.size(); ++i) {
      const int64_t head = shared ? 0 : int64_t(i) / k % heads;
      REQUIRE(row_owners[i] == head * rows + indices[i] / columns);
      REQUIRE(column_owners[i] == head * columns + indices[i] % columns);
    }
  }
}

TEST_CASE("an index that is out of range for the experts traps", "[product_key_topk_backward]") {
  std::vector<int64_t> indices(10, 3), row_owners(10), column_owners(10);
  KeyOwners pass = {
      .queries = 5,
      .heads = 1,
      .k = 2,
      .columns = 11,
      .experts = 77,
      .row_head_stride = 0,
      .column_head_stride = 0,
      .indices = indices.data(),
      .row_owners = row_owners.data(),
      .column_owners = column_owners.data(),
  };
  for (const int64_t bad : {int64_t(-1), int64_t(77), int64_t(1) << 40}) {
    indices[9] = bad;
    CHECK_THROWS_AS(find_key_owners(pass, kContext), std::runtime_error);
  }
  pass.queries = 0;
  find_key_owners(pass, kContext);
}
