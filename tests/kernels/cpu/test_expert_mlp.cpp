#include "oracles/activations.h"
#include "support.h"

using namespace peer;
using namespace peer::cpu;
using namespace peer::test;

namespace {

template <class Table>
struct Problem {
  using Real = accumulation_t<Table>;

  Problem(int64_t tokens,
          int64_t experts_per_token,
          int64_t experts,
          int64_t dim,
          bool glu,
          Activation activation,
          uint64_t seed)
      : tokens(tokens),
        experts(experts),
        experts_per_token(experts_per_token),
        dim(dim),
        glu(glu),
        activation(activation) {
    Random random(seed);
    // Rows lie further apart than they are long.
    stride = parts() * dim + 3;
    table = random.normal<Table>(experts * stride);
    x = random.normal<Real>(tokens * dim);
    weights = random.normal<Real>(tokens * experts_per_token);
    indices = random.integers(tokens * experts_per_token, experts);
    grad_out = random.normal<Real>(tokens * dim);
    hidden.resize(indices.size());
    gate.resize(indices.size());
    out.resize(tokens * dim);
    grad_x.resize(x.size());
    for (auto* values : {&grad_weights, &down_coefficients, &gate_coefficients, &up_coefficients}) {
      values->resize(indices.size());
    }
  }

  // A row's parts are down, gate and up, or down and up.
  int64_t parts() const { return glu ? 3 : 2; }
  Rows<const Table> down() const { return {table.data(), stride}; }
  Rows<const Table> gates() const { return glu ? down().from_column(dim) : Rows<const Table>{}; }
  Rows<const Table> up() const { return down().from_column((parts() - 1) * dim); }

  void forward(const Kernels& kernels) {
    kernels.experts<Table>().token_forward(forward_pass(), 0, tokens);
  }

  // Part by part, as with few tokens.
  void forward_in_parts(const Kernels& kernels) {
    const int64_t parts = parts_per_token(experts_per_token);
    std::vector<Real> parts_out(tokens * parts * dim, Real(NAN));
    const ExpertMlpForward<Table> pass = forward_pass();
    for (int64_t item = tokens * parts; item-- > 0;) {
      kernels.experts<Table>().token_parts_forward(pass, parts_out.data(), item, item + 1);
    }
    kernels.experts<Table>().add_token_parts(pass, parts_out.data(), 0, tokens);
  }

  ExpertMlpForward<Table> forward_pass() {
    return {tokens,   experts,        experts_per_token, dim,        activation,
            x.data(), weights.data(), indices.data(),    down(),     up(),
            gates(),  out.data(),     hidden.data(),     gate.data()};
  }

  void backward(const Kernels& kernels) {
    const ExpertMlpBackward<Table> pass = {tokens,
                                           experts,
                                           experts_per_token,
                                           dim,
                                           activation,
                                           grad_out.data(),
                                           weights.data(),
                                           indices.data(),
                                           down(),
                                           up(),
                                           gates(),
                                           hidden.data(),
                                           gate.data(),
                                           grad_x.data(),
                                           grad_weights.data(),
                                           down_coefficients.data(),
                                           gate_coefficients.data(),
                                           up_coefficients.data()};
    kernels.experts<Table>().token_backward(pass, 0, tokens);
  }

  double dot(const Real* v, Rows<const Table> rows, int64_t row) const {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) {
      sum += double(v[i]) * to_double(rows.data[row * stride + i]);
    }
    return sum;
  }

  int64_t tokens, experts, experts_per_token, dim;
  bool glu;
  Activation activation;
  int64_t stride;
  std::vector<Table> table;
  std::vector<Real> x, weights, grad_out, hidden, gate, out, grad_x, grad_weights,
      down_coefficients, gate_coefficients, up_coefficients;
  std::vector<int64_t> indices;
};

// Sums of `terms` products of standard normals: rounding stays far below this, a wrong term far
// above it.
template <class Real>
double tolerance(int64_t terms) {
  return 64 * kEpsilon<Real> * terms + (std::is_same_v<Real, double> ? 1e-8 : 1e-5);
}

template <class Table>
void check_against_oracle(const NamedKernels& capability,
                          int64_t dim,
                          int64_t experts_per_token,
                          bool glu,
                          Activation activation) {
  using Real = accumulation_t<Table>;
  Problem<Table> p(3, experts_per_token, 50, dim, glu, activation, 5);
  p.forward(*capability.kernels);
  p.backward(*capability.kernels);
  const double scale = glu ? 10.0 * dim : 10.0;
  double worst = 0;
  const auto compare = [&](double actual, double expected, double magnitude) {
    worst = std::max(worst, std::abs(actual - expected) / magnitude);
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    std::vector<double> out(dim), grad_x(dim);
    for (int64_t i = 0; i < experts_per_token; ++i) {
      const int64_t pair = t * experts_per_token + i;
      const int64_t e = p.indices[pair];
      const double z = p.dot(&p.x[t * dim], p.down(), e);
      const double g = glu ? p.dot(&p.x[t * dim], p.gates(), e) : 1;
      const double s = p.dot(&p.grad_out[t * dim], p.up(), e);
      const double w = p.weights[pair], a = activate(activation, z), d = derivative(activation, z);
      compare(p.hidden[pair], z, 1);
      if (glu) {
        compare(p.gate[pair], g, 1);
        compare(p.gate_coefficients[pair], s * w * a, scale * dim);
      }
      compare(p.grad_weights[pair], s * a * g, scale * dim);
      compare(p.down_coefficients[pair], s * w * d * g, scale * dim);
      compare(p.up_coefficients[pair], w * a * g, scale * dim);
      for (int64_t j = 0; j < dim; ++j) {
        const int64_t place = e * p.stride + j;
        out[j] += w * a * g * to_double(p.up().data[place]);
        grad_x[j] += s * w * d * g * to_double(p.down().data[place]);
        grad_x[j] += glu ? s * w * a * to_double(p.gates().data[place]) : 0;
      }
    }
    for (int64_t j = 0; j < dim; ++j) {
      compare(p.out[t * dim + j], out[j], scale * dim);
      compare(p.grad_x[t * dim + j], grad_x[j], scale * dim * dim);
    }
  }
  INFO(capability.name << " dim " << dim << " experts " << experts_per_token << " glu " << glu
                       << " activation " << int(activation));
  CHECK(worst <= tolerance<Real>(dim));
}

}  // namespace

TEMPLATE_TEST_CASE("the token pass agrees with the oracle at every width around the vectors",
                   "[token_pass]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const NamedKernels& capability : capabilities()) {
    for (const int64_t dim : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100}) {
      check_against_oracle<TestType>(capability, dim, 10, false, Activation::gelu);
      check_against_oracle<TestType>(capability, dim, 10, true, Activation::silu);
    }
  }
}

TEMPLATE_TEST_CASE(
    "the token pass agrees with the oracle for every number of experts around the rows in flight",
    "[token_pass]",
    float,
    BFloat16) {
  for (const NamedKernels& capability : capabilities()) {
    for (const int64_t experts : {0, 1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 70}) {
      check_against_oracle<TestType>(capability, 24, experts, false, Activation::relu);
    }
  }
}

TEMPLATE_TEST_CASE("a token's parts add up to the same bits as the token",
                   "[token_pass]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const NamedKernels& capability : capabilities()) {
    for (const int64_t experts : {1, 31, 32, 33, 64, 100}) {
      Problem<TestType> whole(5, experts, 50, 33, true, Activation::gelu, 3);
      Problem<TestType> parts = whole;
      whole.forward(*capability.kernels);
      parts.forward_in_parts(*capability.kernels);
      INFO(capability.name << ", " << experts << " experts");
      CHECK(parts.hidden == whole.hidden);
      CHECK(parts.gate == whole.gate);
      CHECK(parts.out == whole.out);
    }
  }
}

TEMPLATE_TEST_CASE("every activation and its derivative, with and without gate",
                   "[token_pass]",
                   float,
                   double) {
  for (const NamedKernels& capability : capabilities()) {
    for (const Activation activation : kActivations) {
      check_against_oracle<TestType>(capability, 12, 16, false, activation);
      check_against_oracle<TestType>(capability, 12, 16, true, activation);
    }
  }
}

TEST_CASE("every half-precision value is read and written as itself", "[token_pass]") {
  // One expert of width 1 with weight 1 and hidden value 1: out is the table's element, widened.
  // The expert pass writes it back.
  for (const NamedKernels& capability : capabilities()) {
    int64_t wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      Half up{uint16_t(bits)};
      const Half down{0x3c00};
      const float one = 1;
      const int64_t index = 0;
      float out, hidden;
      const ExpertMlpForward<Half> forward = {1,    1,    1,       1,          Activation::identity,
                                              &one, &one, &index,  {&down, 1}, {&up, 1},
                                              {},   &out, &hidden, nullptr};
      capability.kernels->experts<Half>().token_forward(forward, 0, 1);
      const double expected = to_double(up);
      const bool is_read = std::isnan(expected) ? std::isnan(out) : double(out) == expected;

      const Pair pair{0, 0};
      const Chunk chunk{0, 1, 0, false};
      Half written{0x1234};
      const TableGrad<Half> pass = {1,      1,       &pair,         &one, {&out, 1},
                                    &chunk, nullptr, {&written, 1}, {},   false};
      capability.kernels->experts<Half>().sum_chunks(pass, 0, 1);
      const bool is_written =
          std::isnan(expected) ? std::isnan(to_double(written)) : to_double(written) == expected;
      wrong += !is_read || !is_written;
    }
    INFO(capability.name);
    CHECK(wrong == 0);
  }
}

TEMPLATE_TEST_CASE("sums are rounded to the nearest 16-bit value, ties to even",
                   "[token_pass]",
                   BFloat16,
                   Half) {
  constexpr double step = kEpsilon<TestType>;
  const std::pair<double, double> cases[] = {
      {1 + 0.5 * step, 1},
      {1 + 1.5 * step, 1 + 2 * step},
      {1 + 0.5 * step + 0x1p-20, 1 + step},
      {-(1 + 1.5 * step), -(1 + 2 * step)},
      {0, 0},
      {INFINITY, INFINITY},
      {3e38, std::is_same_v<TestType, Half> ? INFINITY : 0x1.c4p127}};
  for (const NamedKernels& capability : capabilities()) {
    for (const auto& [value, expected] : cases) {
      const float source = value, one = 1;
      const Pair pair{0, 0};
      const Chunk chunk{0, 1, 0, false};
      TestType written;
      const TableGrad<TestType> pass = {1,      1,       &pair,         &one, {&source, 1},
                                        &chunk, nullptr, {&written, 1}, {},   false};
      capability.kernels->experts<TestType>().sum_chunks(pass, 0, 1);
      INFO(capability.name << " " << value);
      CHECK(to_double(written) == expected);
    }
  }
}

TEMPLATE_TEST_CASE("a weighted sum of rows lands in its strip of the output and nowhere else",
                   "[token_pass]",
                   float,
                   double) {
  for (const NamedKernels& capability : capabilities()) {
    const TestType table[] = {1, 2, 3, 10, 20, 30};
    const TestType coefficients[] = {2, 1, -1, 3};
    const int64_t indices[] = {0, 1, 1, 1};
    std::vector<TestType> out(12, -7);
    const GatherSum<TestType> pass = {
        2, 2, 3, coefficients, indices, {table, 3}, {out.data() + 2, 6}};
    capability.kernels->retrieval<TestType>().gather_sum(pass, 0, 2);
    CHECK(out == std::vector<TestType>{-7, -7, 12, 24, 36, -7, -7, -7, 20, 40, 60, -7});
  }
}
