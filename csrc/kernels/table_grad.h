// The gradient of a table, of experts or of keys, as the kernels of every device take it.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

// Sums over segments of sorted pairs:
//
//   out[row] = Σ over the segment's pairs of coefficients[pair]·source[pair / pairs_per_row]
template <class Element, class Source = accumulation_t<Element>>
struct TableGrad {
  using Real = accumulation_t<Element>;
  int64_t width;
  int64_t pairs_per_row;
  const Real* coefficients;  // by pair id
  Rows<const Source> source;
  Rows<Element> out;
};

}  // namespace peer
