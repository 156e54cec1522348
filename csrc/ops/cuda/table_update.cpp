#include "ops/device/table_update.h"

#include <torch/library.h>

#include "kernels/cuda/table_update.h"
#include "ops/cuda/common.h"

namespace peer::ops::cuda {

namespace {

struct Cuda : Device {
  // Indices are always sorted: to see whether they need to be, the host would have to wait for
  // them.
  template <class Table, class Source>
  static void update(TableUpdate<Table, Source> update,
                     const Tensor& indices,
                     const Tensor& source,
                     int64_t rows) {
    const Context context = current_context();
    if (!indices.defined()) {
      update_rows(update, rows, context);
      return;
    }
    update.pairs_per_row = indices.numel() / source.size(0);
    update_by_segments(update,
                       make_segments(indices.const_data_ptr<int64_t>(), indices.numel(), rows,
                                     update.frozen, OutputRows::by_owner, context),
                       context);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(peer, CUDA, m) {
  m.impl("rowwise_adagrad_", RowwiseAdagradOp::kernel<rowwise_adagrad_on<Cuda>>);
  m.impl("sgd_", SgdOp::kernel<sgd_on<Cuda>>);
  m.impl("rowwise_adam_", RowwiseAdamOp::kernel<rowwise_adam_on<Cuda>>);
}

}  // namespace peer::ops::cuda
