// What the CPU operators share: threads, and the gradients of tables.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <limits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/segments.h"
#include "ops/device/common.h"

namespace peer::ops::cpu {

using namespace peer::cpu;

inline const ParallelFor& torch_threads() {
  static const ParallelFor loop = [](int64_t begin, int64_t end, int64_t grain,
                                     const RangeBody& body) {
    at::parallel_for(begin, end, grain, body);
  };
  return loop;
}

// frozen: by owner, or null. Pairs of frozen owners are dropped.
Segments make_segments(const at::Tensor& contiguous_owners,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows);

// A table's gradient from the pairs that retrieved its rows: part p of row `owner` is the sum of
// coefficients[p, pair]·sources[p][pair / pairs_per_row]. Dense (owner_count, parts, width), or
// sparse: coalesced COO with the owners that occur. Frozen owners have no gradient: their rows are
// zero or missing.
class TableGradient {
 public:
  // frozen: (owner_count,) contiguous, or undefined.
  TableGradient(const at::Tensor& owners,
                int64_t owner_count,
                bool sparse,
                const at::Tensor& frozen = {});

  // coefficients: by part and pair; sources: for each part, (rows, width) contiguous rows; all in
  // the accumulation dtype of `like`.
  at::Tensor sum(const at::Tensor& coefficients,
                 at::TensorList sources,
                 const at::TensorOptions& like) const;

 private:
  int64_t owner_count_;
  int64_t count_;
  bool sparse_;
  Segments segments_;
};

// What ops/device requires of every device.
struct Device {
  static at::ScalarType input_type(at::ScalarType /*given*/, at::ScalarType table) {
    return accumulation_type(table);
  }

  static constexpr int64_t kMaxSortable = std::numeric_limits<int64_t>::max();

  // Every id must lie in [0, count): reading a row elsewhere would be silent corruption.
  static void check_index_range(const char* op,
                                const at::Tensor& contiguous_indices,
                                int64_t count);

  using TableGradient = cpu::TableGradient;
};

}  // namespace peer::ops::cpu
