// The CPU kernels of the gradient of a table, of experts or of keys.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/common.h"
#include "kernels/cpu/segment_work.h"
#include "kernels/table_grad.h"

namespace peer::cpu {

template <class Element>
struct TableGradFunctions {
  using Real = accumulation_t<Element>;
  // All parts of the rows, with the same pairs_per_row. A row of partial sums has the parts side by
  // side. A work item is a chunk. nontemporal: the rows of `out` are written past the caches if
  // they are aligned, because together they exceed the caches.
  void (*sum_chunks)(std::span<const TableGrad<Element>> parts,
                     const SegmentWork<Real>& segments,
                     bool nontemporal,
                     int64_t first,
                     int64_t last);
  // A work item is a pair. Writes the rows of single pairs that are apart from the chunks.
  void (*sum_single_pairs)(std::span<const TableGrad<Element>> parts,
                           const SegmentWork<Real>& segments,
                           bool nontemporal,
                           int64_t first,
                           int64_t last);
  // A work item is a split segment. Runs after sum_chunks.
  void (*sum_split_segments)(std::span<const TableGrad<Element>> parts,
                             const SegmentWork<Real>& segments,
                             int64_t first,
                             int64_t last);
};

struct TableGradKernels : TableGradFunctions<float>,
                          TableGradFunctions<double>,
                          TableGradFunctions<BFloat16>,
                          TableGradFunctions<Half> {
  static const TableGradKernels baseline, avx2, avx512;

  template <class Element>
  const TableGradFunctions<Element>& of() const {
    return *this;
  }
};

}  // namespace peer::cpu
