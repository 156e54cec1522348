// What the CUDA operators share: the stream and the memory for kernels, and the gradients of
// tables.
//
// All work is queued on the current stream of the tensors' device. Only sparse gradients wait for
// the device; every other operator can be captured in a CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <memory>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/segments.h"
#include "ops/device/common.h"

namespace peer::ops::cuda {

using namespace peer::cuda;

// The current stream of the current device, and memory from Torch's allocator. The allocator reuses
// freed memory on the same stream only, so memory may be freed while kernels still use it.
Context current_context();

// A table's gradient from the pairs that retrieved its rows: part p of row `owner` is the sum of
// coefficients[p, pair]·sources[p][pair / pairs_per_row]. Dense (owner_count, parts, width), or
// sparse: coalesced COO with the owners that occur and are not frozen. Only the device knows their
// number: the construction queues a copy of it, and sum waits for that copy.
class TableGradient {
 public:
  // frozen: (owner_count,) contiguous, or undefined.
  TableGradient(const Tensor& contiguous_owners,
                int64_t owner_count,
                bool sparse,
                const Tensor& frozen = {});

  // coefficients: by part and pair, in the accumulation dtype of `like`; sources: for each part,
  // (rows, width) contiguous rows, as the kernels take inputs beside a table like this.
  Tensor sum(const Tensor& coefficients,
             at::TensorList sources,
             const at::TensorOptions& like) const;

 private:
  int64_t owner_count_;
  Context context_;
  Segments segments_;
  std::unique_ptr<DistinctOwnerCount> distinct_owner_count_;  // null: the gradient is dense
};

// What ops/device requires of every device.
struct Device {
  // Kernels read inputs in the table's dtype, which halves the traffic of 16-bit inputs.
  static at::ScalarType input_type(at::ScalarType given, at::ScalarType table) {
    return given == table ? table : accumulation_type(table);
  }

  static constexpr int64_t kMaxSortable = std::numeric_limits<int32_t>::max();

  // Checks nothing, because the host would have to wait for the ids. Kernels trap on an id that is
  // out of range.
  static void check_index_range(const char*, const Tensor&, int64_t) {}

  using TableGradient = cuda::TableGradient;
};

}  // namespace peer::ops::cuda
