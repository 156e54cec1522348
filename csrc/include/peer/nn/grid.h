#pragma once

#include <peer/export.h>

#include <cstdint>
#include <iosfwd>

namespace peer::nn {

// Rows and columns of the grid of experts. Expert (r, c) has the id r·columns + c.
//
//   Grid(1024 * 1024)   a perfect square; for other numbers, the ValueError names the nearest
//   Grid(4, 6)          any rectangle
struct PEER_API Grid {
  // Not explicit, so that options accept a number: PEEROptions(512).num_experts(1024 * 1024).
  Grid(int64_t num_experts);  // NOLINT(google-explicit-constructor)
  Grid(int64_t rows, int64_t columns);

  int64_t num_experts() const { return rows * columns; }
  bool operator==(const Grid&) const = default;

  int64_t rows;
  int64_t columns;
};

PEER_API std::ostream& operator<<(std::ostream& stream, const Grid& grid);

}  // namespace peer::nn
