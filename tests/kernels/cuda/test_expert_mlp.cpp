// expert_mlp on the emulated device, which has 3 SMs. So 3 tokens or more have one block each, and
// fewer tokens have one-warp blocks: with the same shares if that makes at least 3 blocks, with the
// smallest shares otherwise.
#include <tuple>

#include "cuda_support.h"
#include "kernels/cuda/expert_mlp.h"
#include "oracles/activations.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

namespace {

using AllTypes = std::tuple<Types<float, float>,
                            Types<double, double>,
                            Types<BFloat16, BFloat16>,
                            Types<BFloat16, float>,
                            Types<Half, Half>,
                            Types<Half, float>>;

struct Sizes {
  int64_t tokens, experts_per_token, dim;
  bool has_gate = false;
  Activation activation = Activation::gelu;
  int64_t experts = 50;
};

// An array `offset` elements into separate memory, so that sanitizers see its ends.
template <class Element>
struct Array {
  Array() = default;
  Array(const std::vector<Element>& values, int64_t offset) : offset(offset), values(offset) {
    this->values.insert(this->values.end(), values.begin(), values.end());
  }

  void shift_by_one() {
    values.insert(values.begin(), values.empty() ? Element{} : values[0]);
    ++offset;
  }
  Element* data() { return values.data() + offset; }
  Element& operator[](int64_t i) { return values[offset + i]; }

  int64_t offset = 0;
  std::vector<Element> values;
};

template <class Table>
struct TableOfRows {
  TableOfRows() = default;
  TableOfRows(const std::vector<Table>& dense, int64_t width, const Layout& layout)
      : stride(width + layout.padding) {
    const int64_t rows = width == 0 ? 0 : int64_t(dense.size()) / width;
    std::vector<Table> values(rows * stride, from_double<Table>(1e3));
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(&dense[row * width], width, &values[row * stride]);
    }
    array = {values, layout.offset};
  }

  Rows<const Table> rows() { return {array.data(), stride}; }
  double at(int64_t row, int64_t column) { return to_double(array[row * stride + column]); }

  int64_t stride = 0;
  Array<Table> array;
};

// The inputs and outputs of both directions.
template <class Types>
struct Problem {
  using Table = typename Types::Table;
  using Input = typename Types::Source;
  using Real = accumulation_t<Table>;

  Problem(const Sizes& sizes, const Layout& layout = kAligned, uint64_t seed = 5) : sizes(sizes) {
    Random random(seed);
    const int64_t pairs = sizes.tokens * sizes.experts_per_token;
    w_down = {random.normal<Table>(sizes.experts * sizes.dim), sizes.dim, layout};
    w_up = {random.normal<Table>(sizes.experts * sizes.dim), sizes.dim, layout};
    w_gate = {random.normal<Table>(sizes.experts * sizes.dim), sizes.dim, layout};
    x = {random.normal<Input>(sizes.tokens * sizes.dim), layout.offset};
    grad_out = {random.normal<Input>(sizes.tokens * sizes.dim), layout.offset};
    weights = random.normal<Real>(pairs);
    indices = random.integers(pairs, sizes.experts);
    out = {std::vector<Input>(sizes.tokens * sizes.dim, from_double<Input>(77)), layout.offset};
    grad_x = {std::vector<Input>(sizes.tokens * sizes.dim, from_double<Input>(77)), layout.offset};
    for (auto* values : {&hidden, &gate, &grad_weights, &down_coefficients, &gate_coefficients,
                         &up_coefficients}) {
      values->assign(pairs, Real(77));
    }
  }

  Rows<const Table> gate_rows() { return sizes.has_gate ? w_gate.rows() : Rows<const Table>{}; }

  // For the tokens [first, first + count) alone.
  void forward(int64_t first, int64_t count) {
    const int64_t pair = first * sizes.experts_per_token;
    const ExpertMlpForward<Table, Input> pass = {
        .tokens = count,
        .experts = sizes.experts,
        .experts_per_token = sizes.experts_per_token,
        .dim = sizes.dim,
        .activation = sizes.activation,
        .x = x.data() + first * sizes.dim,
        .weights = weights.data() + pair,
        .indices = indices.data() + pair,
        .w_down = w_down.rows(),
        .w_up = w_up.rows(),
        .w_gate = gate_rows(),
        .out = out.data() + first * sizes.dim,
        .hidden = hidden.data() + pair,
        .gate = sizes.has_gate ? gate.data() + pair : nullptr,
    };
    expert_mlp_forward(pass, kContext);
  }

  void backward(int64_t first, int64_t count, bool wants_grad_x = true) {
    const int64_t pair = first * sizes.experts_per_token;
    const ExpertMlpBackward<Table, Input> pass = {
        .tokens = count,
        .experts = sizes.experts,
        .experts_per_token = sizes.experts_per_token,
        .dim = sizes.dim,
        .activation = sizes.activation,
        .grad_out = grad_out.data() + first * sizes.dim,
        .weights = weights.data() + pair,
        .indices = indices.data() + pair,
        .w_down = w_down.rows(),
        .w_up = w_up.rows(),
        .w_gate = gate_rows(),
        .hidden = hidden.data() + pair,
        .gate = sizes.has_gate ? gate.data() + pair : nullptr,
        .grad_x = wants_grad_x ? grad_x.data() + first * sizes.dim : nullptr,
        .grad_weights = grad_weights.data() + pair,
        .down_coefficients = down_coefficients.data() + pair,
        .gate_coefficients = sizes.has_gate ? gate_coefficients.data() + pair : nullptr,
        .up_coefficients = up_coefficients.data() + pair,
    };
    expert_mlp_backward(pass, kContext);
  }

  void run() {
    forward(0, sizes.tokens);
    backward(0, sizes.tokens);
  }

  Sizes sizes;
  TableOfRows<Table> w_down, w_up, w_gate;
  Array<Input> x, grad_out, out, grad_x;
  std::vector<Real> weights, hidden, gate, grad_weights, down_coefficients, gate_coefficients,
      up_coefficients;
  std::vector<int64_t> indices;
};

// A sum in double, and the sum of its terms' magnitudes, which bounds the rounding error.
struct Sum {
  double value = 0;
  double magnitude = 0;

  void add(double term, double term_magnitude) {
    value += term;
    magnitude += term_magnitude;
  }
  void add(double term) { add(term, std::abs(term)); }
};

// The largest error, in units of the tolerance; 0 if every error is within it.
template <class Types>
struct Comparison {
  using Real = accumulation_t<typename Types::Table>;
  using Input = typename Types::Source;

  void add(double actual, double expected, double allowed) {
    const double error = std::abs(actual - expected);
    if (!(error <= allowed)) {
      worst = std::max(worst, std::isfinite(error) && allowed > 0 ? error / allowed : INFINITY);
    }
  }
  void add_accumulated(double actual, double expected, double magnitude) {
    add(actual, expected, 64 * kEpsilon<Real> * magnitude);
  }
  // The oracle's derivatives are difference quotients.
  void add_derivative(double actual, double expected, double magnitude) {
    add(actual, expected, std::max(64 * kEpsilon<Real>, 1e-8) * magnitude);
  }
  // Rounded to nearest. 2^-25 is half of the smallest subnormal half.
  void add_rounded(double actual, const Sum& sum) {
    const double rounding =
        std::is_same_v<Input, Real> ? 0 : 0.5 * kEpsilon<Input> * std::abs(sum.value) + 0x1p-25;
    add(actual, sum.value, 64 * kEpsilon<Real> * sum.magnitude + rounding);
  }

  double worst = 0;
};

// Compares sums with the oracle's, and everything that follows from the hidden values with what the
// oracle computes from the same hidden values.
template <class Types>
double error_of(Problem<Types>& p) {
  const Sizes& sizes = p.sizes;
  Comparison<Types> compare;
  for (int64_t t = 0; t < sizes.tokens; ++t) {
    std::vector<Sum> out(sizes.dim), grad_x(sizes.dim);
    for (int64_t i = 0; i < sizes.experts_per_token; ++i) {
      const int64_t pair = t * sizes.experts_per_token + i;
      const int64_t e = p.indices[pair];
      Sum hidden, gate, upstream;
      for (int64_t j = 0; j < sizes.dim; ++j) {
        const double x = to_double(p.x[t * sizes.dim + j]);
        hidden.add(x * p.w_down.at(e, j));
        gate.add(x * p.w_gate.at(e, j));
        upstream.add(to_double(p.grad_out[t * sizes.dim + j]) * p.w_up.at(e, j));
      }
      const double z = p.hidden[pair], w = p.weights[pair];
      const double g = sizes.has_gate ? double(p.gate[pair]) : 1;
      const double a = activate(sizes.activation, z), a_magnitude = 1 + std::abs(z) + std::abs(a);
      const double d = derivative(sizes.activation, z), d_magnitude = 1 + std::abs(z) + std::abs(d);
      const double s = upstream.value, s_magnitude = upstream.magnitude;
      const double w_magnitude = std::abs(w), g_magnitude = std::abs(g);

      compare.add_accumulated(z, hidden.value, hidden.magnitude);
      compare.add_accumulated(p.grad_weights[pair], s * a * g,
                              s_magnitude * a_magnitude * g_magnitude);
      compare.add_derivative(p.down_coefficients[pair], s * w * d * g,
                             s_magnitude * w_magnitude * d_magnitude * g_magnitude);
      compare.add_accumulated(p.up_coefficients[pair], w * a * g,
                              w_magnitude * a_magnitude * g_magnitude);
      if (sizes.has_gate) {
        compare.add_accumulated(g, gate.value, gate.magnitude);
        compare.add_accumulated(p.gate_coefficients[pair], s * w * a,
                                s_magnitude * w_magnitude * a_magnitude);
      }
      for (int64_t j = 0; j < sizes.dim; ++j) {
        const double up = p.w_up.at(e, j);
        out[j].add(w * a * g * up, w_magnitude * a_magnitude * g_magnitude * std::abs(up));
        grad_x[j].add(p.down_coefficients[pair] * p.w_down.at(e, j));
        grad_x[j].add(sizes.has_gate ? p.gate_coefficients[pair] * p.w_gate.at(e, j) : 0);
      }
    }
    for (int64_t j = 0; j < sizes.dim; ++j) {
      compare.add_rounded(to_double(p.out[t * sizes.dim + j]), out[j]);
      compare.add_rounded(to_double(p.grad_x[t * sizes.dim + j]), grad_x[j]);
    }
  }
  return compare.worst;
}

template <class Types>
void check_against_oracle(const Sizes& sizes, const Layout& layout = kAligned) {
  Problem<Types> problem(sizes, layout);
  problem.run();
  INFO(sizes.tokens << " tokens, dim " << sizes.dim << ", experts " << sizes.experts_per_token
                    << ", gate " << sizes.has_gate << ", activation " << int(sizes.activation)
                    << ", offset " << layout.offset);
  CHECK(error_of(problem) == 0);
}

// For the tokens [first, last).
template <class Types>
void check_same_bits(Problem<Types>& a, Problem<Types>& b, int64_t first, int64_t last) {
  const auto are_same = [&](auto& a_values, auto& b_values, int64_t per_token) {
    const int64_t begin = first * per_token, count = (last - first) * per_token;
    return count == 0 || std::memcmp(a_values.data() + begin, b_values.data() + begin,
                                     count * sizeof(a_values[0])) == 0;
  };
  const int64_t pairs = a.sizes.experts_per_token;
  CHECK(are_same(a.hidden, b.hidden, pairs));
  CHECK(are_same(a.gate, b.gate, pairs));
  CHECK(are_same(a.out, b.out, a.sizes.dim));
  CHECK(are_same(a.grad_weights, b.grad_weights, pairs));
  CHECK(are_same(a.down_coefficients, b.down_coefficients, pairs));
  CHECK(are_same(a.gate_coefficients, b.gate_coefficients, pairs));
  CHECK(are_same(a.up_coefficients, b.up_coefficients, pairs));
  CHECK(are_same(a.grad_x, b.grad_x, a.sizes.dim));
}

template <class Types>
void check_same_bits(Problem<Types>& a, Problem<Types>& b) {
  check_same_bits(a, b, 0, a.sizes.tokens);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("expert_mlp agrees with the oracle at every width around vectors and tiles",
                        "[expert_mlp]",
                        AllTypes) {
  // Vectors have 2, 4 and 8 elements; tiles have 128, 256, 512 and 1024 columns.
  for (const int64_t dim :
       {1, 7, 8, 16, 100, 128, 136, 248, 256, 264, 512, 520, 1024, 1032, 2056}) {
    check_against_oracle<TestType>({3, 5, dim, false});
    check_against_oracle<TestType>({1, 5, dim, true});
    check_against_oracle<TestType>({3, 5, dim, true});
  }
}

TEMPLATE_LIST_TEST_CASE("rows may be unaligned and strided", "[expert_mlp]", AllTypes) {
  for (const Layout& layout : {kUnaligned, Layout{0, 3}, Layout{8, 0}, Layout{3, 8}}) {
    check_against_oracle<TestType>({3, 20, 40, false}, layout);
    check_against_oracle<TestType>({1, 20, 72, true}, layout);
  }
}

TEMPLATE_TEST_CASE("expert_mlp agrees with the oracle for every number of experts per token",
                   "[expert_mlp]",
                   (Types<float, float>),
                   (Types<BFloat16, BFloat16>)) {
  for (const int64_t experts :
       {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 127, 128, 129, 132, 133, 520}) {
    for (const int64_t tokens : {1, 2, 3}) {
      check_against_oracle<TestType>({tokens, experts, 8, experts % 2 == 0});
    }
  }
}

TEMPLATE_TEST_CASE("every activation and its derivative are right, with and without gate",
                   "[expert_mlp]",
                   (Types<float, float>),
                   (Types<double, double>)) {
  for (const Activation activation : kActivations) {
    check_against_oracle<TestType>({1, 16, 12, false, activation});
    check_against_oracle<TestType>({1, 16, 12, true, activation});
  }
}

TEMPLATE_LIST_TEST_CASE("a token has the same bits alone, among few and among many",
                        "[expert_mlp]",
                        AllTypes) {
  for (const bool has_gate : {false, true}) {
    for (const int64_t experts : {1, 5, 18, 31, 66, 135}) {
      const Sizes sizes = {4, experts, 40, has_gate};
      Problem<TestType> many(sizes), few = many, alone = many;
      many.run();
      few.forward(1, 2);
      few.backward(1, 2);
      alone.forward(2, 1);
      alone.backward(2, 1);
      INFO(experts << " experts, gate " << has_gate);
      check_same_bits(many, few, 1, 3);
      check_same_bits(many, alone, 2, 3);
    }
  }
}

TEMPLATE_TEST_CASE("a token has the same bits alone and among many if rows are wide",
                   "[expert_mlp]",
                   (Types<float, float>),
                   (Types<BFloat16, BFloat16>)) {
  for (const int64_t experts : {18, 40}) {
    Problem<TestType> many({3, experts, 1544, true}), alone = many;
    many.run();
    alone.forward(1, 1);
    alone.backward(1, 1);
    check_same_bits(many, alone, 1, 2);
  }
}

TEMPLATE_LIST_TEST_CASE("alignment does not change the bits", "[expert_mlp]", AllTypes) {
  for (const int64_t dim : {40, 600, 1304}) {
    for (const bool has_gate : {false, true}) {
      Problem<TestType> aligned({2, 18, dim, has_gate}, kAligned);
      Problem<TestType> unaligned({2, 18, dim, has_gate}, kUnaligned);
      aligned.run();
      unaligned.run();
      INFO("dim " << dim << ", gate " << has_gate);
      check_same_bits(aligned, unaligned);
    }
  }
}

TEST_CASE("one array out of alignment does not change the bits", "[expert_mlp]") {
  using Problem = Problem<Types<BFloat16, float>>;
  for (const int64_t tokens : {1, 3}) {
    Problem aligned({tokens, 20, 32, true});
    aligned.run();
    void (*const shifts[])(Problem&) = {[](Problem& p) { p.x.shift_by_one(); },
                                        [](Problem& p) { p.grad_out.shift_by_one(); },
                                        [](Problem& p) { p.out.shift_by_one(); },
                                        [](Problem& p) { p.grad_x.shift_by_one(); },
                                        [](Problem& p) { p.w_down.array.shift_by_one(); },
                                        [](Problem& p) { p.w_up.array.shift_by_one(); },
                                        [](Problem& p) { p.w_gate.array.shift_by_one(); }};
    for (const auto& shift : shifts) {
      Problem shifted({tokens, 20, 32, true});
      shift(shifted);
      shifted.run();
      check_same_bits(aligned, shifted);
    }
  }
}

TEST_CASE("without the gradient of x, the other gradients are the same", "[expert_mlp]") {
  for (const int64_t tokens : {1, 3}) {
    Problem<Types<BFloat16, float>> with({tokens, 20, 40, true}), without = with;
    with.run();
    without.forward(0, tokens);
    without.backward(0, tokens, false);
    CHECK(to_double(without.grad_x[0]) == 77);
    without.grad_x = with.grad_x;
    check_same_bits(with, without);
  }
}

TEST_CASE("an expert that a token retrieves several times counts every time", "[expert_mlp]") {
  for (const int64_t tokens : {1, 3}) {
    Problem<Types<float, float>> problem({tokens, 40, 16, true});
    std::fill(problem.indices.begin(), problem.indices.end(), 7);
    problem.run();
    CHECK(error_of(problem) == 0);
  }
}

TEST_CASE("no tokens are no error", "[expert_mlp]") {
  Problem<Types<float, float>> problem({0, 16, 8});
  CHECK_NOTHROW(problem.run());
}

TEST_CASE("the sum over no experts is zero", "[expert_mlp]") {
  for (const int64_t tokens : {1, 3}) {
    Problem<Types<BFloat16, BFloat16>> problem({tokens, 0, 16, true});
    problem.run();
    for (int64_t i = 0; i < tokens * 16; ++i) {
      CHECK(problem.out[i].bits == 0);
      CHECK(problem.grad_x[i].bits == 0);
    }
  }
}

TEST_CASE("an index out of range ends the kernel", "[expert_mlp]") {
  const Sizes sizes = {3, 20, 8};
  for (const int64_t position : {0, 19, 59}) {
    for (const int64_t index : {int64_t(-1), sizes.experts, INT64_MAX, INT64_MIN}) {
      for (const bool is_alone : {false, true}) {
        Problem<Types<float, float>> problem(sizes);
        problem.indices[position] = index;
        const int64_t first = is_alone ? position / sizes.experts_per_token : 0;
        const int64_t count = is_alone ? 1 : sizes.tokens;
        CHECK_THROWS_AS(problem.forward(first, count), std::runtime_error);
        CHECK_THROWS_AS(problem.backward(first, count), std::runtime_error);
      }
    }
  }
}

TEST_CASE("infinite weights and rows give infinite sums, not NaN", "[expert_mlp]") {
  // Tiles are filled with rows that must not contribute.
  for (const bool are_weights_infinite : {false, true}) {
    for (const int64_t experts : {1, 3, 17}) {
      for (const int64_t tokens : {1, 3}) {
        Problem<Types<float, float>> problem({tokens, experts, 8, false, Activation::identity});
        const auto fill = [](auto& values, float value) {
          std::fill(values.begin(), values.end(), value);
        };
        fill(problem.x.values, 1);
        fill(problem.w_down.array.values, 1);
        fill(problem.weights, are_weights_infinite ? INFINITY : 1);
        fill(problem.w_up.array.values, are_weights_infinite ? 1 : INFINITY);
        problem.forward(0, tokens);
        for (int64_t i = 0; i < tokens * 8; ++i) {
          CHECK(problem.out[i] == INFINITY);
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("outputs are rounded to the nearest 16-bit value, ties to even",
                   "[expert_mlp]",
                   (Types<BFloat16, BFloat16>),
                   (Types<Half, Half>)) {
  using Table = typename TestType::Table;
  constexpr double step = kEpsilon<Table>;
  const std::pair<double, double> cases[] = {{1 + 0.5 * step, 1},
                                             {1 + 1.5 * step, 1 + 2 * step},
                                             {1 + 0.5 * step + 0x1p-20, 1 + step},
                                             {-(1 + 1.5 * step), -(1 + 2 * step)},
                                             {INFINITY, INFINITY}};
  for (const auto& [value, expected] : cases) {
    for (const int64_t tokens : {1, 3}) {
      Problem<TestType> problem({tokens, 1, 1, false, Activation::identity, 1});
      problem.x[tokens - 1] = problem.w_down.array[0] = problem.w_up.array[0] =
          from_double<Table>(1);
      problem.weights[tokens - 1] = float(value);
      problem.forward(0, tokens);
      CHECK(to_double(problem.out[tokens - 1]) == expected);
    }
  }
}

TEST_CASE("the lanes and warps of expert_mlp do not race", "[expert_mlp][races]") {
  // Blocks of three warps with two tiles of columns; one-warp blocks with the smallest shares.
  check_against_oracle<Types<BFloat16, BFloat16>>({3, 36, 1032, false});
  check_against_oracle<Types<BFloat16, float>>({1, 18, 520, true});
}
