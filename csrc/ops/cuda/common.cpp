#include "ops/cuda/common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/table_grad.h"
#include "ops/cuda/distinct_ids.h"

namespace peer::ops::cuda {

namespace {

std::shared_ptr<void> stream_ordered_memory(int64_t bytes) {
  const auto data = std::make_shared<c10::DataPtr>(
      c10::cuda::CUDACachingAllocator::get()->allocate(size_t(bytes)));
  return {data, data->get()};
}

std::unique_ptr<DistinctOwnerCount> count_distinct_owners(const Segments& segments,
                                                          const Context& context) {
  TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
              "peer::expert_mlp: sparse_grad=True cannot be captured in a CUDA graph, because the "
              "host has to read how many experts were retrieved; use sparse_grad=False, or fused "
              "updates, with CUDA graphs");
  return std::make_unique<DistinctOwnerCount>(segments, context);
}

}  // namespace

Context current_context() {
  return {c10::cuda::getCurrentCUDAStream().stream(), stream_ordered_memory};
}

TableGradient::TableGradient(const Tensor& contiguous_owners,
                             int64_t owner_count,
                             bool sparse,
                             const Tensor& frozen)
    : owner_count_(owner_count),
      context_(current_context()),
      segments_(make_segments(contiguous_owners.const_data_ptr<int64_t>(),
                              contiguous_owners.numel(),
                              owner_count,
                              const_data_or_null<bool>(frozen),
                              sparse ? OutputRows::compact : OutputRows::by_owner,
                              context_)),
      distinct_owner_count_(sparse ? count_distinct_owners(segments_, context_) : nullptr) {}

Tensor TableGradient::sum(const Tensor& coefficients,
                          at::TensorList sources,
                          const at::TensorOptions& like) const {
  const int64_t parts = sources.size();
  const int64_t width = sources[0].size(1);
  const bool is_sparse = distinct_owner_count_ != nullptr;
  const int64_t distinct_owners = is_sparse ? distinct_owner_count_->wait() : 0;
  const Tensor values = is_sparse ? at::empty({distinct_owners, parts, width}, like)
                                  : at::zeros({owner_count_, parts, width}, like);
  for (int64_t part = 0; part < parts; ++part) {
    const Tensor& source = sources[part];
    with_table_and_input_type(
        values.scalar_type(), source.scalar_type(), [&]<class Element, class Source>() {
          using Real = accumulation_t<Element>;
          const TableGrad<Element, Source> pass = {
              .width = width,
              .pairs_per_row = source.size(0) > 0 ? segments_.count / source.size(0) : 1,
              .coefficients = const_data_of<Real>(coefficients) + part * segments_.count,
              .source = rows_of<Source>(source),
              .out = mutable_rows_of<Element>(values.select(1, part)),
          };
          sum_segments(pass, segments_, context_);
        });
  }
  if (!is_sparse) {
    return values;
  }
  // The kernels' ids are freed with segments_, after the copy has been queued.
  const Tensor ids = at::for_blob(segments_.distinct_owners.get(), {1, distinct_owners})
                         .options(like.dtype(at::kInt))
                         .target_device(values.device())
                         .make_tensor()
                         .to(at::kLong);
  remember_distinct_ids(ids);
  return sparse_gradient(owner_count_, ids, values);
}

}  // namespace peer::ops::cuda
