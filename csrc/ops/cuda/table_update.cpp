#include "ops/device/table_update.h"

#include <torch/library.h>

#include "kernels/cuda/table_update.h"
#include "ops/cuda/common.h"
#include "ops/cuda/distinct_ids.h"

namespace peer::ops::cuda {

namespace {

struct Cuda : Device {
  // To see whether indices need to be sorted, the host would have to wait for them. Those of a
  // gradient that peer made do not, and a kernel checks that they have not been changed.
  template <class Table, class Source>
  static void update(TableUpdate<Table, Source> update,
                     const Tensor& indices,
                     const Tensor& source,
                     int64_t rows) {
    const Context context = current_context();
    if (!indices.defined() ||
        (update.coefficients == nullptr && indices.dim() == 1 && were_made_distinct(indices))) {
      update_rows(update, const_data_or_null<int64_t>(indices), source.size(0), rows, context);
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
  m.impl("rowwise_adagrad_", RowwiseAdagradOp::kernel<update_table_on<Cuda, RowwiseAdagrad>>);
  m.impl("sgd_", SgdOp::kernel<update_table_on<Cuda, Sgd>>);
  m.impl("rowwise_adam_", RowwiseAdamOp::kernel<update_table_on<Cuda, RowwiseAdam>>);
}

}  // namespace peer::ops::cuda
