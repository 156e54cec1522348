// What the CPU operators share: threads, and the gradients of tables.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/segments.h"
#include "ops/device/common.h"

namespace peer::ops::cpu {

using namespace peer::cpu;

// Calls body(first, last) for ranges of `grain` work items that cover [0, count), on torch's
// threads. A thread takes the next range when it has finished one. at::parallel_for alone gives
// every thread one range, so the loop takes as long as the thread that other programs interrupt
// most.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t ranges = (count + grain - 1) / grain;
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(ranges, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t range = next++; range < ranges; range = next++) {
      body(range * grain, std::min((range + 1) * grain, count));
    }
  });
}

// frozen: by owner, or null. Pairs of frozen owners are dropped.
Segments make_segments(const at::Tensor& contiguous_owners,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       SinglePairs single_pairs);

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

  // The same, but the coefficients are computed by `pass`. It calls its argument once for each
  // pair, as soon as the coefficients of the pair are written.
  using Pass = std::function<void(const RangeBody& after_pairs)>;
  at::Tensor sum_during(const Pass& pass,
                        const at::Tensor& coefficients,
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
