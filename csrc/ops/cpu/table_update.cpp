#include "ops/device/table_update.h"

#include <torch/library.h>

#include "ops/cpu/segment_update.h"

namespace peer::ops::cpu {

namespace {

// Strictly ascending indices are distinct and sorted, so no sort and no sum is needed.
bool ascend_strictly(const Tensor& contiguous_indices) {
  const int64_t* indices = contiguous_indices.const_data_ptr<int64_t>();
  const int64_t count = contiguous_indices.numel();
  for (int64_t i = 1; i < count; ++i) {
    if (indices[i] <= indices[i - 1]) {
      return false;
    }
  }
  return true;
}

struct Cpu : Device {
  template <class Table, class Source>
  static void update(TableUpdate<Table, Source> update,
                     const Tensor& indices,
                     const Tensor& source,
                     int64_t rows) {
    const auto& kernel = kernels<TableUpdateKernels>().of<Table, Source>();
    if (!indices.defined() ||
        (update.coefficients == nullptr && indices.dim() == 1 && ascend_strictly(indices))) {
      const int64_t* const ids = const_data_or_null<int64_t>(indices);
      parallel_for(source.size(0), kRowsPerTask, [&](int64_t first, int64_t last) {
        kernel.update_rows(update, ids, first, last);
      });
      return;
    }
    update.pairs_per_row = indices.numel() / source.size(0);
    const Segments segments =
        make_segments(indices, rows, update.frozen, OutputRows::by_owner, SinglePairs::in_chunks);
    SegmentUpdate(update, segments).update_chunks();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("rowwise_adagrad_", RowwiseAdagradOp::kernel<update_table_on<Cpu, RowwiseAdagrad>>);
  m.impl("sgd_", SgdOp::kernel<update_table_on<Cpu, Sgd>>);
  m.impl("rowwise_adam_", RowwiseAdamOp::kernel<update_table_on<Cpu, RowwiseAdam>>);
}

}  // namespace peer::ops::cpu
