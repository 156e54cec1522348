// The partial sums of split segments: their memory, and the kernel that adds them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/segments.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

// The rows are vectorizable for every form.
template <class Real>
class PartialSums {
 public:
  PartialSums(const Segments& segments, int64_t width, const Context& context)
      : stride_((width + kVecSize<BFloat16> - 1) / kVecSize<BFloat16> * kVecSize<BFloat16>),
        memory_(context.array<Real>(segments.max_partial_rows * stride_)) {}

  template <class Form>
  SlicedRows<Real, Form> rows() const {
    return {memory_.get(), stride_, stride_, true};
  }
  template <class Form>
  SlicedRows<const Real, Form> as_source() const {
    return {memory_.get(), stride_, stride_, true};
  }

 private:
  int64_t stride_;
  std::shared_ptr<Real> memory_;
};

// Adds the partial sums of split segments.
//
// One block  one slice of one segment, then further ones at the stride of the grid
// One warp   every eighth partial row, four of them in flight. One thread per column then adds the
//            sums of the warps in their order
// Traffic    each partial row is read once; one row is written, to the output or in place of the
//            segment's first partial row
// Exactness  the order depends only on the number of partial rows
constexpr int kWarpsPerSegment = 8;

template <class Real>
using PartialSumForm = SliceForm<kVecSize<Real>, 2>;

template <class Real, class Element, class Form = PartialSumForm<Real>>
__global__ void add_partial_sums_kernel(const SplitSegment* segments,
                                        const SegmentCounts* counts,
                                        SlicedRows<const Real, Form> partial_sums,
                                        SlicedRows<Element, Form> out,
                                        bool is_in_place) {
  constexpr int columns = Form::kColumns;
  Real* const warp_sums = reinterpret_cast<Real*>(peer_shared_memory);  // (warps, columns)
  const int64_t slices = count_slices(out.width, columns);
  const int64_t items = counts->split_segments * slices;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const SplitSegment segment = segments[item / slices];
    const int64_t slice_column = item % slices * columns;
    SliceValues<Real, Form> sum = {};
#pragma unroll 4
    for (int i = warp_in_block(); i < segment.count; i += kWarpsPerSegment) {
      const auto values =
          load(partial_sums.slice(segment.first + i, Form::lane_column(slice_column)));
      for_each_vec<Form>([&](int k) {
        const auto terms = widen_vec(values.vecs[k]);
        for_each_element<Form>([&](int e) { sum.vecs[k].values[e] += terms.values[e]; });
      });
    }
    Real* const own_sums = warp_sums + warp_in_block() * columns;
    store(Slice<Real, Form>{own_sums + Form::lane_column(0), columns, true}, sum);
    __syncthreads();
    const int64_t column = slice_column + threadIdx.x;
    if (int(threadIdx.x) < columns && column < out.width) {
      Real total = 0;
      for (int warp = 0; warp < kWarpsPerSegment; ++warp) {
        total += warp_sums[warp * columns + int(threadIdx.x)];
      }
      const int64_t row = is_in_place ? segment.first : segment.row;
      out.data[row * out.stride + column] = narrow<Element>(total);
    }
    __syncthreads();  // the next item overwrites warp_sums
  }
}

// Usually no segment is split, but only the device knows. The grid is small, so that this costs
// little.
template <class Real, class Element>
void add_partial_sums(const Segments& segments,
                      const PartialSums<Real>& partial_sums,
                      const SlicedRows<Element, PartialSumForm<Real>>& out,
                      bool is_in_place,
                      const Context& context) {
  constexpr int64_t kBlocksPerSm = 8;
  constexpr int columns = PartialSumForm<Real>::kColumns;
  static_assert(columns <= kWarpsPerSegment * kWarp);
  const int64_t blocks = std::min(segments.max_split_segments * count_slices(out.width, columns),
                                  sm_count() * kBlocksPerSm);
  launch(add_partial_sums_kernel<Real, Element>,
         {blocks, kWarpsPerSegment * kWarp, kWarpsPerSegment * columns * int64_t(sizeof(Real))},
         context.stream, segments.split_segments.get(), segments.counts.get(),
         partial_sums.template as_source<PartialSumForm<Real>>(), out, is_in_place);
}

}  // namespace peer::cuda
