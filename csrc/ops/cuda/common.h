// What the CUDA glue of the operators shares: the stream and memory that the kernels get, and the
// expert pass over any owners.
//
// Everything is queued on the current stream of the tensors' device, and nothing waits for it, so
// that the operators can be captured in a CUDA graph; sparse gradients are the one exception.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/segments.h"
#include "ops/device/common.h"

namespace peer::ops::cuda {

using namespace peer::cuda;

// The current stream of the current device, and memory from Torch's allocator. What is freed there
// goes to later work on the same stream only, so it may be freed while kernels still use it.
Context current_context();

// A table's gradient from the pairs that retrieved its rows: part p of row `owner` is the sum of
// coefficients[p, pair]·sources[p][pair / pairs_per_row]. Dense (owner_count, parts, width), or
// sparse: coalesced COO with the owners that occur. How many do is known to the device alone: a
// sparse gradient waits for the stream.
class TableGradient {
 public:
  TableGradient(const Tensor& contiguous_owners, int64_t owner_count, bool sparse);

  // coefficients: by part and pair, in the accumulation dtype of `like`; sources: for each part,
  // (rows, width) contiguous rows, as the kernels take inputs beside a table like this.
  Tensor sum(const Tensor& coefficients,
             at::TensorList sources,
             const at::TensorOptions& like) const;

 private:
  int64_t owner_count_;
  bool sparse_;
  Context context_;
  Segments pairs_;
  int64_t distinct_owners_ = 0;  // of a sparse gradient
};

// What the operators of ops/device ask of every device.
struct Device {
  // Inputs in the table's own type are read as they are, which halves what 16-bit ones take.
  static at::ScalarType input_type(at::ScalarType given, at::ScalarType table) {
    return given == table ? table : accumulation_type(table);
  }

  static constexpr int64_t kMaxPairs = std::numeric_limits<int32_t>::max();

  // Nothing: reading ids would be waiting for them. The kernels that use an id trap where it is out
  // of range.
  static void check_index_range(const char*, const Tensor&, int64_t) {}

  using TableGradient = cuda::TableGradient;
};

}  // namespace peer::ops::cuda
