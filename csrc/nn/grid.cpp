#include "peer/nn/grid.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <ostream>
#include <string>

namespace peer::nn {

namespace {

int64_t floor_of_root(int64_t number) {
  auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(number)));
  // A double has 53 bits, so the root of a larger number may be off by one.
  while (root * root > number) {
    --root;
  }
  while ((root + 1) * (root + 1) <= number) {
    ++root;
  }
  return root;
}

std::string rectangle(int64_t num_experts, int64_t side) {
  int64_t rows = side;
  while (num_experts % rows != 0) {
    --rows;
  }
  return rows == 1 ? "" : c10::str(", or the grid {", rows, ", ", num_experts / rows, "}");
}

}  // namespace

Grid::Grid(int64_t num_experts) {
  TORCH_CHECK_VALUE(num_experts >= 1, "expected num_experts to be positive, got ", num_experts);
  TORCH_CHECK_VALUE(num_experts <= int64_t{1} << 60, "expected num_experts up to 2^60, got ",
                    num_experts);
  const int64_t side = floor_of_root(num_experts);
  TORCH_CHECK_VALUE(side * side == num_experts,
                    "expected num_experts to be a perfect square or a pair {rows, columns}, got ",
                    num_experts, "; the nearest squares are ", side, "^2 = ", side * side, " and ",
                    side + 1, "^2 = ", (side + 1) * (side + 1), rectangle(num_experts, side));
  rows = columns = side;
}

Grid::Grid(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
  TORCH_CHECK_VALUE(rows >= 1 && columns >= 1,
                    "expected num_experts={rows, columns} to be positive, got {", rows, ", ",
                    columns, "}");
  TORCH_CHECK_VALUE(rows <= (int64_t{1} << 60) / columns, "expected num_experts up to 2^60, got {",
                    rows, ", ", columns, "}");
}

std::ostream& operator<<(std::ostream& stream, const Grid& grid) {
  return stream << "{" << grid.rows << ", " << grid.columns << "}";
}

}  // namespace peer::nn
