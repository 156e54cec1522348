#include <valarray>

#include "kernels/cpu/expert_mlp.h"
#include "kernels/cpu/table_grad.h"
#include "kernels/cpu/table_update.h"
#include "oracles/activations.h"
#include "oracles/table_update.h"
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
    // Rows are padded: the stride exceeds the width.
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

  void forward(Capability capability) {
    kernels<ExpertMlpKernels>(capability).of<Table>().forward(forward_pass(), 0, tokens);
  }

  // Split by split, as with few tokens.
  void forward_in_splits(Capability capability) {
    const int64_t splits = splits_per_token(experts_per_token);
    std::vector<Real> partial_sums(tokens * splits * dim, Real(NAN));
    const ExpertMlpForward<Table> pass = forward_pass();
    const auto& kernel = kernels<ExpertMlpKernels>(capability).of<Table>();
    for (int64_t item = tokens * splits; item-- > 0;) {
      kernel.forward_splits(pass, partial_sums.data(), item, item + 1);
    }
    kernel.add_splits(pass, partial_sums.data(), 0, tokens);
  }

  ExpertMlpForward<Table> forward_pass() {
    return {.tokens = tokens,
            .experts = experts,
            .experts_per_token = experts_per_token,
            .dim = dim,
            .activation = activation,
            .x = x.data(),
            .weights = weights.data(),
            .indices = indices.data(),
            .w_down = down(),
            .w_up = up(),
            .w_gate = gates(),
            .out = out.data(),
            .hidden = hidden.data(),
            .gate = gate.data()};
  }

  ExpertMlpBackward<Table> backward_pass() {
    return {.tokens = tokens,
            .experts = experts,
            .experts_per_token = experts_per_token,
            .dim = dim,
            .activation = activation,
            .grad_out = grad_out.data(),
            .weights = weights.data(),
            .indices = indices.data(),
            .w_down = down(),
            .w_up = up(),
            .w_gate = gates(),
            .hidden = hidden.data(),
            .gate = gate.data(),
            .grad_x = grad_x.data(),
            .grad_weights = grad_weights.data(),
            .down_coefficients = down_coefficients.data(),
            .gate_coefficients = gate_coefficients.data(),
            .up_coefficients = up_coefficients.data()};
  }

  void backward(Capability capability) {
    kernels<ExpertMlpKernels>(capability).of<Table>().backward(backward_pass(), {}, 0, tokens);
  }

  // after_pairs(first, last): see AfterPairs.
  template <class Body>
  void backward(Capability capability, int threads, const Body& after_pairs) {
    const AfterPairs after = {
        .call = [](const void* body, int64_t first,
                   int64_t last) { (*static_cast<const Body*>(body))(first, last); },
        .context = &after_pairs};
    const ExpertMlpBackward<Table> pass = backward_pass();
    const auto& kernel = kernels<ExpertMlpKernels>(capability).of<Table>();
    on_threads(threads)(
        tokens, 1, [&](int64_t first, int64_t last) { kernel.backward(pass, after, first, last); });
  }

  std::vector<std::vector<Real>> gradients() const {
    return {grad_x, grad_weights, down_coefficients, gate_coefficients, up_coefficients};
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
void check_against_oracle(const Capability capability,
                          int64_t dim,
                          int64_t experts_per_token,
                          bool glu,
                          Activation activation) {
  using Real = accumulation_t<Table>;
  Problem<Table> p(3, experts_per_token, 50, dim, glu, activation, 5);
  p.forward(capability);
  p.backward(capability);
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
  INFO(name_of(capability) << " dim " << dim << " experts " << experts_per_token << " glu " << glu
                           << " activation " << int(activation));
  CHECK(worst <= tolerance<Real>(dim));
}

}  // namespace

TEMPLATE_TEST_CASE("expert_mlp agrees with the oracle at every width around the vectors",
                   "[expert_mlp]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const Capability capability : capabilities()) {
    for (const int64_t dim : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100}) {
      check_against_oracle<TestType>(capability, dim, 10, false, Activation::gelu);
      check_against_oracle<TestType>(capability, dim, 10, true, Activation::silu);
    }
  }
}

TEMPLATE_TEST_CASE(
    "expert_mlp agrees with the oracle for every number of experts around the rows in flight",
    "[expert_mlp]",
    float,
    BFloat16) {
  for (const Capability capability : capabilities()) {
    for (const int64_t experts : {0, 1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 70}) {
      check_against_oracle<TestType>(capability, 24, experts, false, Activation::relu);
    }
  }
}

TEMPLATE_TEST_CASE("a token's splits add up to the same bits as the token",
                   "[expert_mlp]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  for (const Capability capability : capabilities()) {
    for (const int64_t experts : {1, 31, 32, 33, 64, 100}) {
      Problem<TestType> whole(5, experts, 50, 33, true, Activation::gelu, 3);
      Problem<TestType> splits = whole;
      whole.forward(capability);
      splits.forward_in_splits(capability);
      INFO(name_of(capability) << ", " << experts << " experts");
      CHECK(splits.hidden == whole.hidden);
      CHECK(splits.gate == whole.gate);
      CHECK(splits.out == whole.out);
    }
  }
}

TEMPLATE_TEST_CASE("every activation and its derivative, with and without gate",
                   "[expert_mlp]",
                   float,
                   double) {
  for (const Capability capability : capabilities()) {
    for (const Activation activation : kActivations) {
      check_against_oracle<TestType>(capability, 12, 16, false, activation);
      check_against_oracle<TestType>(capability, 12, 16, true, activation);
    }
  }
}

namespace {

// The element of a table that the gradient of one pair with coefficient 1 is rounded to. In a row,
// whole vectors and the last columns are stored by different functions.
template <class Element>
Element store_gradient(Capability capability, float value) {
  constexpr int64_t width = 32 + 15;
  const float one = 1;
  const std::vector<float> source(width, value);
  const Pair pair = {.owner = 0, .id = 0};
  const Chunk chunk = {.first = 0, .last = 1, .row = 0, .is_partial = false};
  std::vector<Element> written(width, Element{0x1234});
  const TableGrad<Element> pass = {.width = width,
                                   .pairs_per_row = 1,
                                   .coefficients = &one,
                                   .source = {source.data(), width},
                                   .out = {written.data(), width}};
  const SegmentWork<float> work = {.pair_count = 1,
                                   .pairs = &pair,
                                   .chunks = &chunk,
                                   .split_segments = nullptr,
                                   .partial_sums = {}};
  kernels<TableGradKernels>(capability).of<Element>().sum_chunks({&pass, 1}, work, false, 0, 1);
  REQUIRE(std::all_of(written.begin(), written.end(),
                      [&](const Element& each) { return each.bits == written[0].bits; }));
  return written[0];
}

}  // namespace

TEST_CASE("every half-precision value is read and written as itself", "[expert_mlp]") {
  // One expert of width 1 with weight 1 and hidden value 1: out is the table's element, widened.
  // The table's gradient writes it back.
  for (const Capability capability : capabilities()) {
    int64_t wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const Half up{uint16_t(bits)};
      const Half down{0x3c00};
      const float one = 1;
      const int64_t index = 0;
      float out, hidden;
      const ExpertMlpForward<Half> forward = {.tokens = 1,
                                              .experts = 1,
                                              .experts_per_token = 1,
                                              .dim = 1,
                                              .activation = Activation::identity,
                                              .x = &one,
                                              .weights = &one,
                                              .indices = &index,
                                              .w_down = {&down, 1},
                                              .w_up = {&up, 1},
                                              .w_gate = {},
                                              .out = &out,
                                              .hidden = &hidden,
                                              .gate = nullptr};
      kernels<ExpertMlpKernels>(capability).of<Half>().forward(forward, 0, 1);
      const double expected = to_double(up);
      const bool is_read = std::isnan(expected) ? std::isnan(out) : double(out) == expected;
      const double written = to_double(store_gradient<Half>(capability, out));
      const bool is_written = std::isnan(expected) ? std::isnan(written) : written == expected;
      wrong += !is_read || !is_written;
    }
    INFO(name_of(capability));
    CHECK(wrong == 0);
  }
}

TEMPLATE_TEST_CASE("sums are rounded to the nearest 16-bit value, ties to even",
                   "[expert_mlp]",
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
  for (const Capability capability : capabilities()) {
    for (const auto& [value, expected] : cases) {
      const TestType written = store_gradient<TestType>(capability, float(value));
      INFO(name_of(capability) << " " << value);
      CHECK(to_double(written) == expected);
    }
  }
}

namespace {

// Retrievals of which most are the only ones of their expert. One expert is hot: it has a split
// segment.
template <class Table>
Problem<Table> mostly_single_pairs(int64_t experts_per_token, int64_t dim, bool glu) {
  const int64_t tokens = 200 / experts_per_token + 3;
  Problem<Table> p(tokens, experts_per_token, 3 * tokens * experts_per_token, dim, glu,
                   Activation::gelu, 17);
  for (size_t i = 0; i < p.indices.size() && 3 * i < 2 * p.indices.size(); ++i) {
    p.indices[i] = p.experts / 2;
  }
  std::shuffle(p.indices.begin(), p.indices.end(), std::mt19937_64(3));
  p.forward(Capability::baseline);
  return p;
}

}  // namespace

TEMPLATE_TEST_CASE(
    "the pass over the tokens hands over each pair once, when its coefficients are "
    "there and no row of a single pair is read any more",
    "[expert_mlp]",
    float,
    double,
    BFloat16,
    Half) {
  using Real = accumulation_t<TestType>;
  const bool glu = GENERATE(false, true);
  const bool wants_grad_x = GENERATE(false, true);
  for (const Capability capability : capabilities()) {
    for (const int64_t experts_per_token : {1, 15, 16, 17, 70}) {
      for (const int64_t dim : {9, 64}) {
        auto expected = mostly_single_pairs<TestType>(experts_per_token, dim, glu);
        if (!wants_grad_x) {
          expected.grad_x = {};
        }
        auto p = expected;
        expected.backward(capability);
        std::vector<int64_t> pairs_of_expert(p.experts);
        for (const int64_t expert : p.indices) {
          ++pairs_of_expert[expert];
        }
        p.up_coefficients.assign(p.up_coefficients.size(), Real(NAN));
        p.down_coefficients = p.up_coefficients;
        std::vector<int> calls(p.indices.size());
        bool are_written = true;
        p.backward(capability, 1, [&](int64_t first, int64_t last) {
          for (int64_t pair = first; pair < last; ++pair) {
            ++calls[pair];
            are_written = are_written &&
                          p.up_coefficients[pair] == expected.up_coefficients[pair] &&
                          p.down_coefficients[pair] == expected.down_coefficients[pair] &&
                          p.gate_coefficients[pair] == expected.gate_coefficients[pair];
            if (pairs_of_expert[p.indices[pair]] == 1) {
              std::fill_n(&p.table[p.indices[pair] * p.stride], p.parts() * dim,
                          from_double<TestType>(NAN));
            }
          }
        });
        INFO(name_of(capability) << " experts per token " << experts_per_token << " dim " << dim);
        CHECK(std::count(calls.begin(), calls.end(), 1) == int64_t(calls.size()));
        CHECK(are_written);
        for (size_t i = 0; i < p.gradients().size(); ++i) {
          CHECK(have_same_bits(p.gradients()[i], expected.gradients()[i]));
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("an update of single pairs during the pass gives the bits of an update after it",
                   "[expert_mlp]",
                   float,
                   double,
                   BFloat16,
                   Half) {
  using Real = accumulation_t<TestType>;
  const bool glu = GENERATE(false, true);
  const bool is_stochastic = GENERATE(false, true);
  for (const Capability capability : capabilities()) {
    const auto start = mostly_single_pairs<TestType>(17, 40, glu);
    const int64_t parts = start.parts(), columns = parts * start.dim;
    std::valarray<bool> frozen(start.experts);
    for (int64_t expert = 0; expert < start.experts; ++expert) {
      frozen[expert] = expert % 5 == 3;
    }
    const auto solve = [&](const Hyperparameters& h, SinglePairs single_pairs, int threads) {
      auto p = start;
      State<TestType> state = {.table = {},
                               .momentum = Random(1).normal<TestType>(p.table.size()),
                               .second_moments = std::vector<Real>(p.experts * parts, Real(0.5)),
                               .row_steps = std::vector<int32_t>(p.experts, 3)};
      std::vector<Real> coefficients(parts * p.indices.size()), source;
      for (int64_t t = 0; t < p.tokens; ++t) {
        for (int64_t part = 0; part < parts; ++part) {
          const Real* row = (part + 1 < parts ? p.x.data() : p.grad_out.data()) + t * p.dim;
          source.insert(source.end(), row, row + p.dim);
        }
      }
      const TableUpdate<TestType, Real> update = {
          .parts = parts,
          .width = p.dim,
          .table = {p.table.data(), p.stride},
          .rule = rule_of<TestType>(h, {state.momentum.data(), p.stride}, state),
          .stochastic_rounding = is_stochastic,
          .key = 5,
          .source = {source.data(), columns},
          .pairs_per_row = p.experts_per_token,
          .coefficients = coefficients.data(),
          .frozen = &frozen[0],
      };
      const ParallelFor parallel_for = on_threads(threads);
      const Segments segments =
          make_segments(p.indices.data(), p.indices.size(), p.experts, &frozen[0],
                        OutputRows::by_owner, single_pairs, parallel_for, plain_memory);
      std::vector<Real> partial_sums(segments.partial_rows * columns);
      const auto work = segments.work(Rows<Real>{partial_sums.data(), columns});
      const auto& kernel = kernels<TableUpdateKernels>(capability).of<TestType, Real>();
      p.backward(capability, threads, [&](int64_t first, int64_t last) {
        const auto copy = [&](const std::vector<Real>& of_part, int64_t part) {
          std::copy(of_part.begin() + first, of_part.begin() + last,
                    coefficients.begin() + part * p.indices.size() + first);
        };
        copy(p.down_coefficients, 0);
        if (glu) {
          copy(p.gate_coefficients, 1);
        }
        copy(p.up_coefficients, parts - 1);
        if (work.single_rows != nullptr) {
          kernel.update_single_pairs(update, work, first, last);
        }
      });
      parallel_for(segments.chunks.size(), 1, [&](int64_t first, int64_t last) {
        kernel.update_chunks(update, work, first, last);
      });
      parallel_for(segments.split_segments.size(), 1, [&](int64_t first, int64_t last) {
        kernel.update_split_segments(update, work, first, last);
      });
      REQUIRE((segments.single_count > 20) == (single_pairs == SinglePairs::apart));
      REQUIRE(segments.split_segments.size() == 1);
      state.table = p.table;
      return std::pair(state, p.gradients());
    };
    for (const Hyperparameters& rule : kRules) {
      INFO(name_of(capability) << " rule " << int(rule.rule));
      const auto [expected, expected_gradients] = solve(rule, SinglePairs::in_chunks, 1);
      for (const int threads : {1, 2, 3, 8}) {
        const auto [state, gradients] = solve(rule, SinglePairs::apart, threads);
        CHECK(state == expected);
        for (size_t i = 0; i < gradients.size(); ++i) {
          CHECK(have_same_bits(gradients[i], expected_gradients[i]));
        }
      }
    }
  }
}
