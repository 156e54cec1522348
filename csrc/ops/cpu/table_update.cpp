#include "ops/device/table_update.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/cpu/table_update.h"
#include "ops/cpu/common.h"

namespace peer::ops::cpu {

namespace {

// A row takes a fraction of a microsecond.
constexpr int64_t kRowsPerTask = 64;

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
    const Segments segments = make_segments(indices, rows, update.frozen, OutputRows::by_owner);
    const Tensor partial_sums =
        at::empty({segments.partial_rows, update.parts * update.width},
                  source.options().dtype(accumulation_type(source.scalar_type())));
    update.pairs_per_row = indices.numel() / source.size(0);
    const auto work = segments.work(mutable_rows_of<accumulation_t<Table>>(partial_sums));
    parallel_for(segments.chunks.size(), kRowsPerTask, [&](int64_t first, int64_t last) {
      kernel.update_chunks(update, work, first, last);
    });
    parallel_for(segments.split_segments.size(), 1, [&](int64_t first, int64_t last) {
      kernel.update_split_segments(update, work, first, last);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CPU, m) {
  m.impl("rowwise_adagrad_", RowwiseAdagradOp::kernel<rowwise_adagrad_on<Cpu>>);
  m.impl("sgd_", SgdOp::kernel<sgd_on<Cpu>>);
  m.impl("rowwise_adam_", RowwiseAdamOp::kernel<rowwise_adam_on<Cpu>>);
}

}  // namespace peer::ops::cpu
