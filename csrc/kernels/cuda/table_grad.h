// The gradient of a table, by sums over segments of sorted pairs.
#pragma once

#include "kernels/cuda/segments.h"
#include "kernels/table_grad.h"

namespace peer::cuda {

// Writes the rows of `out` that have pairs, and no others.
template <class Element, class Source>
void sum_segments(const TableGrad<Element, Source>& pass,
                  const Segments& segments,
                  const Context& context);

}  // namespace peer::cuda
