// Updates of a table, for the kernels of every device.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <valarray>
#include <vector>

#include "oracles/table_update.h"
#include "support.h"

namespace peer::test {

// Where the gradients of the rows come from.
enum class Given { dense, distinct_rows, pairs, pairs_with_coefficients };

// One update of a table: its inputs, and the distance of a result from the rule in double. Rows of
// the table, the momentum and the source are `stride` elements apart.
template <class Table, class Source>
struct TableUpdateProblem {
  using Real = accumulation_t<Table>;

  // segments: the number of pairs of each of the first rows. The other rows have none, except that
  // the last row makes the number of pairs even. Without pairs, every row is given, or every third.
  TableUpdateProblem(Given given,
                     int64_t rows,
                     int64_t parts,
                     int64_t width,
                     const std::vector<int64_t>& segments,
                     uint64_t seed,
                     int64_t padding = 0)
      : given(given), rows(rows), parts(parts), width(width), stride(parts * width + padding) {
    Random random(seed);
    if (has_pairs()) {
      pairs_per_row = given == Given::pairs ? 1 : 2;
      owners = owners_of_segments(segments);
      owners.resize((owners.size() + 1) / 2 * 2, rows - 1);
    } else {
      for (int64_t row = 0; row < rows; row += given == Given::dense ? 1 : 3) {
        owners.push_back(row);
      }
    }
    source = random.normal<Source>(owners.size() / pairs_per_row * stride);
    coefficients = random.normal<Real>(parts * owners.size());
    start.table = random.normal<Table>(rows * stride);
    start.momentum = random.normal<Table>(rows * stride);
    for (const double value : random.normal<double>(rows * parts)) {
      start.second_moments.push_back(Real(std::abs(value)));
    }
    for (const int64_t value : random.integers(rows, 4)) {
      start.row_steps.push_back(value);
    }
  }

  bool has_pairs() const {
    return given == Given::pairs || given == Given::pairs_with_coefficients;
  }

  const Real* given_coefficients() const {
    return given == Given::pairs_with_coefficients ? coefficients.data() : nullptr;
  }

  const bool* frozen_rows() const { return frozen.size() > 0 ? &frozen[0] : nullptr; }

  // Every third row or so, with and without gradients.
  std::valarray<bool> some_rows() const {
    std::valarray<bool> mask(rows);
    for (int64_t row = 0; row < rows; ++row) {
      mask[row] = row % 7 % 3 == 0;
    }
    return mask;
  }

  // Makes the gradients of the marked rows zero, of both signs.
  void clear_gradients(const std::valarray<bool>& mask) {
    for (size_t i = 0; i < owners.size(); ++i) {
      if (!mask[owners[i]]) {
        continue;
      }
      for (int64_t part = 0; part < parts; ++part) {
        coefficients[part * owners.size() + i] = i % 2 ? Real(-0.) : Real(0);
      }
      if (given != Given::pairs_with_coefficients) {
        std::fill_n(source.begin() + i * stride, stride, from_double<Source>(i % 2 ? -0. : 0.));
      }
    }
  }

  // A result of this problem, if the marked rows had kept their values and their state.
  State<Table> with_start_in(const std::valarray<bool>& mask, State<Table> result) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (mask[row]) {
        std::copy_n(&start.table[row * stride], stride, &result.table[row * stride]);
        std::copy_n(&start.momentum[row * stride], stride, &result.momentum[row * stride]);
        std::copy_n(&start.second_moments[row * parts], parts, &result.second_moments[row * parts]);
        result.row_steps[row] = start.row_steps[row];
      }
    }
    return result;
  }

  // In units of what rounding allows. tolerance: relative, of the sums in the accumulation type.
  double distance(const State<Table>& result, const Hyperparameters& h, double tolerance) const {
    const Gradients gradients = sum_gradients(owners, rows, parts, width, source.data(), stride,
                                              pairs_per_row, given_coefficients(), frozen_rows());
    return distance_from_rule(h, gradients, start, result, rows, parts, width, stride, tolerance);
  }

  Given given;
  int64_t rows, parts, width, stride, pairs_per_row = 1;
  std::vector<int64_t> owners;
  std::vector<Source> source;
  std::vector<Real> coefficients;
  std::valarray<bool> frozen;  // empty if no row is
  State<Table> start;
};

// Floats whose rounding to 16 bits is special.
inline std::vector<float> special_values_to_round() {
  return {0.f, -0.f, INFINITY, -INFINITY, NAN, 3.4028235e38f, 65504.f, 65519.9f, 65520.f, 65535.99f,
          65536.f, 1e10f, 0x1p-149f, 0x1p-126f, 0x1p-14f, 0x1p-24f, 0x1p-25f, -0x1p-149f,
          // NaNs with all bits set: adding the rounding constant would carry into the sign.
          std::bit_cast<float>(0x7fffffffu), std::bit_cast<float>(0xffffffffu)};
}

}  // namespace peer::test
