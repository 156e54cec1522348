// The update of a table's rows by sums over segments, on torch's threads.
#pragma once

#include <ATen/ops/empty.h>

#include "kernels/cpu/table_update.h"
#include "ops/cpu/common.h"

namespace peer::ops::cpu {

// A row takes a fraction of a microsecond.
constexpr int64_t kRowsPerTask = 64;

template <class Table, class Source>
class SegmentUpdate {
 public:
  using Real = accumulation_t<Table>;

  SegmentUpdate(const TableUpdate<Table, Source>& update, const Segments& segments)
      : update_(update),
        segments_(segments),
        partial_sums_(at::empty({segments.partial_rows, update.parts * update.width},
                                c10::CppTypeToScalarType<Real>::value)),
        work_(segments.work(mutable_rows_of<Real>(partial_sums_))) {}

  // The rows of single pairs in [first, last), if they are apart from the chunks. For any thread.
  void update_single_pairs(int64_t first, int64_t last) const {
    if (work_.single_rows != nullptr) {
      kernel().update_single_pairs(update_, work_, first, last);
    }
  }

  // All other rows.
  void update_chunks() const {
    parallel_for(segments_.chunks.size(), kRowsPerTask, [&](int64_t first, int64_t last) {
      kernel().update_chunks(update_, work_, first, last);
    });
    parallel_for(segments_.split_segments.size(), 1, [&](int64_t first, int64_t last) {
      kernel().update_split_segments(update_, work_, first, last);
    });
  }

 private:
  static const TableUpdateFunctions<Table, Source>& kernel() {
    return kernels<TableUpdateKernels>().of<Table, Source>();
  }

  const TableUpdate<Table, Source>& update_;
  const Segments& segments_;
  at::Tensor partial_sums_;
  SegmentWork<Real> work_;
};

}  // namespace peer::ops::cpu
