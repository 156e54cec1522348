// The CPU kernels of the optimizers' table updates.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cpu/segment_work.h"
#include "kernels/table_update.h"

namespace peer::cpu {

template <class Table, class Source>
struct TableUpdateFunctions {
  using Real = accumulation_t<Table>;
  // A work item is a row of the source: the gradient of the table's row ids[i], or of row i if ids
  // is null. The ids are distinct.
  void (*update_rows)(const TableUpdate<Table, Source>& update,
                      const int64_t* ids,
                      int64_t first,
                      int64_t last);
  // A work item is a chunk.
  void (*update_chunks)(const TableUpdate<Table, Source>& update,
                        const SegmentWork<Real>& segments,
                        int64_t first,
                        int64_t last);
  // A work item is a pair. Updates the rows of single pairs that are apart from the chunks.
  void (*update_single_pairs)(const TableUpdate<Table, Source>& update,
                              const SegmentWork<Real>& segments,
                              int64_t first,
                              int64_t last);
  // A work item is a split segment. Runs after update_chunks.
  void (*update_split_segments)(const TableUpdate<Table, Source>& update,
                                const SegmentWork<Real>& segments,
                                int64_t first,
                                int64_t last);
};

// The source is in the table's type or its accumulation type.
struct TableUpdateKernels : TableUpdateFunctions<float, float>,
                            TableUpdateFunctions<double, double>,
                            TableUpdateFunctions<BFloat16, BFloat16>,
                            TableUpdateFunctions<BFloat16, float>,
                            TableUpdateFunctions<Half, Half>,
                            TableUpdateFunctions<Half, float> {
  static const TableUpdateKernels baseline, avx2, avx512;

  template <class Table, class Source>
  const TableUpdateFunctions<Table, Source>& of() const {
    return *this;
  }
};

}  // namespace peer::cpu
