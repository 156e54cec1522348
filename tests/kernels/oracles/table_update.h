// The optimizers' rules in double, one row at a time, and how far a result is from them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels/random_bits.h"
#include "kernels/table_update.h"
#include "support.h"

namespace peer::test {

struct Hyperparameters {
  Rule rule;
  double lr = 0.05, weight_decay = 0.1, eps = 1e-3, beta1 = 0.8, beta2 = 0.9;
  bool nesterov = false, has_momentum = true;
};

inline const std::vector<Hyperparameters> kRules = {
    {.rule = Rule::rowwise_adagrad},
    {.rule = Rule::sgd, .has_momentum = false},
    {.rule = Rule::sgd},
    {.rule = Rule::sgd, .nesterov = true},
    {.rule = Rule::rowwise_adam},
};

// A table and what the rules keep for it.
template <class Table>
struct State {
  std::vector<Table> table, momentum;  // rows, which may be strided
  std::vector<accumulation_t<Table>> second_moments;
  std::vector<int32_t> row_steps;

  bool operator==(const State& other) const {
    return have_same_bits(table, other.table) && have_same_bits(momentum, other.momentum) &&
           have_same_bits(second_moments, other.second_moments) && row_steps == other.row_steps;
  }
};

template <class Table>
UpdateRule<Table> rule_of(const Hyperparameters& h, Rows<Table> momentum, State<Table>& state) {
  return {.rule = h.rule,
          .lr = h.lr,
          .decay_factor = 1 - h.lr * h.weight_decay,
          .eps = h.eps,
          .beta1 = h.beta1,
          .beta2 = h.beta2,
          .nesterov = h.nesterov,
          .momentum = h.has_momentum ? momentum : Rows<Table>{},
          .second_moments = state.second_moments.data(),
          .row_steps = state.row_steps.data()};
}

// The gradients of rows (rows, parts·width), the sums of absolute values, which bound the rounding,
// and which rows are updated: those that are not frozen and whose gradient is not zero.
struct Gradients {
  std::vector<double> sums, magnitudes;
  std::vector<bool> are_updated;
};

template <class Source, class Real>
Gradients sum_gradients(const std::vector<int64_t>& owners,
                        int64_t rows,
                        int64_t parts,
                        int64_t width,
                        const Source* source,
                        int64_t stride,
                        int64_t pairs_per_row,
                        const Real* coefficients,
                        const bool* frozen) {
  const int64_t columns = parts * width;
  Gradients gradients = {std::vector<double>(rows * columns), std::vector<double>(rows * columns),
                         std::vector<bool>(rows)};
  for (size_t i = 0; i < owners.size(); ++i) {
    for (int64_t column = 0; column < columns; ++column) {
      const double coefficient =
          coefficients ? double(coefficients[column / width * owners.size() + i]) : 1;
      const double term = coefficient * to_double(source[i / pairs_per_row * stride + column]);
      gradients.sums[owners[i] * columns + column] += term;
      gradients.magnitudes[owners[i] * columns + column] += std::abs(term);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const double* first = gradients.sums.data() + row * columns;
    const bool is_zero = std::all_of(first, first + columns, [](double sum) { return sum == 0; });
    gradients.are_updated[row] = !is_zero && !(frozen && frozen[row]);
  }
  return gradients;
}

// The largest distance of a result from the rule, in units of what rounding allows. What lies
// between the rows is to stay as it is.
template <class Table>
double distance_from_rule(const Hyperparameters& h,
                          const Gradients& gradients,
                          const State<Table>& start,
                          const State<Table>& result,
                          int64_t rows,
                          int64_t parts,
                          int64_t width,
                          int64_t stride,
                          double tolerance) {
  double worst = 0;
  const auto compare = [&](double actual, double expected, double allowed) {
    const double distance = std::abs(actual - expected) / (allowed + 1e-30);
    worst = std::isnan(distance) ? INFINITY : std::max(worst, distance);
  };
  const int64_t columns = parts * width;
  for (int64_t row = 0; row < rows; ++row) {
    const bool is_updated = gradients.are_updated[row];
    const int32_t step = start.row_steps[row] + int32_t(is_updated && h.rule == Rule::rowwise_adam);
    REQUIRE(result.row_steps[row] == step);
    for (int64_t part = row * parts; part < (row + 1) * parts; ++part) {
      double mean = 0, mean_magnitude = 0;
      for (int64_t i = part * width; i < (part + 1) * width; ++i) {
        mean += std::pow(gradients.sums[i], 2) / width;
        mean_magnitude += std::pow(gradients.magnitudes[i], 2) / width;
      }
      double second = start.second_moments[part];
      double scale = h.lr;
      if (is_updated && h.rule == Rule::rowwise_adagrad) {
        second += mean;
        scale = h.lr / (std::sqrt(second) + h.eps);
      }
      if (is_updated && h.rule == Rule::rowwise_adam) {
        second = h.beta2 * second + (1 - h.beta2) * mean;
        scale = h.lr / (1 - std::pow(h.beta1, step)) /
                (std::sqrt(second / (1 - std::pow(h.beta2, step))) + h.eps);
      }
      compare(result.second_moments[part], second,
              is_updated ? tolerance * (second + mean_magnitude) : 0);
      for (int64_t column = 0; is_updated && column < width; ++column) {
        const int64_t place = part * width + column;
        const int64_t i = row * stride + place - row * columns;
        const double w = to_double(start.table[i]), m = to_double(start.momentum[i]);
        const double g = gradients.sums[place];
        const double magnitude = gradients.magnitudes[place];
        double direction = g, momentum = m;
        if (h.rule == Rule::sgd && h.has_momentum) {
          momentum = h.beta1 * m + g;
          direction = h.nesterov ? g + h.beta1 * momentum : momentum;
        } else if (h.rule == Rule::rowwise_adam) {
          momentum = h.beta1 * m + (1 - h.beta1) * g;
          direction = momentum;
        }
        const double expected = (1 - h.lr * h.weight_decay) * w - scale * direction;
        compare(to_double(result.momentum[i]), momentum,
                momentum == m
                    ? 0
                    : kEpsilon<Table> * std::abs(momentum) + tolerance * (std::abs(m) + magnitude));
        compare(to_double(result.table[i]), expected,
                kEpsilon<Table> * std::abs(expected) +
                    tolerance * (std::abs(w) + scale * (std::abs(m) + 2 * magnitude) +
                                 std::abs(scale * direction)));
      }
    }
    for (int64_t i = row * stride + (is_updated ? columns : 0); i < (row + 1) * stride; ++i) {
      compare(to_double(result.table[i]), to_double(start.table[i]), 0);
      compare(to_double(result.momentum[i]), to_double(start.momentum[i]), 0);
    }
  }
  return worst;
}

// The 16 random bits of a column of a part of a row. Two neighbouring columns of a part share a
// word, so each part starts at an even place.
inline uint32_t random_bits_of(uint64_t row_key, int64_t part, int64_t width, int64_t column) {
  const int64_t place = part * (width + width % 2) + column;
  const uint32_t word = random_word(row_key, uint32_t(place / 2));
  return place % 2 == 0 ? word & 0xffffu : word >> 16;
}

// Stochastic rounding of one value by 16 random bits. The bits of nonnegative numbers of a 16-bit
// type ascend with their values, so the neighbour below is found by bisection.
template <class Narrow>
Narrow round_by_bits(float value, uint32_t random) {
  constexpr bool is_half = std::is_same_v<Narrow, Half>;
  constexpr uint16_t infinity = is_half ? 0x7c00 : 0x7f80;
  if (std::isnan(value)) {
    const bool keeps_sign = is_half && std::signbit(value);
    return {uint16_t((keeps_sign ? 0x8000 : 0) | (is_half ? 0x7e00 : 0x7fc0))};
  }
  const auto number = [](uint16_t bits) {  // infinity stands where the next value would be
    return bits == infinity ? std::ldexp(1, is_half ? 16 : 128) : to_double(Narrow{bits});
  };
  const double magnitude = std::abs(double(value));
  uint16_t below = 0, end = infinity + 1;
  while (end - below > 1) {
    const uint16_t middle = uint16_t(below + (end - below) / 2);
    (number(middle) <= magnitude ? below : end) = middle;
  }
  if (below != infinity) {
    const double fraction = (magnitude - number(below)) / (number(below + 1) - number(below));
    const bool is_up = is_half && magnitude < 0x1p-14 ? random * 0x1p-16 < fraction
                       : is_half                      ? (random >> 3) * 0x1p-13 + fraction >= 1
                                                      : random * 0x1p-16 + fraction >= 1;
    below = uint16_t(below + is_up);
  }
  return {uint16_t((std::signbit(value) ? 0x8000 : 0) | below)};
}

}  // namespace peer::test
