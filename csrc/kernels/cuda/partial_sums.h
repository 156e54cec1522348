// The partial sums of split segments (chunks.h): where they are kept, and how they are added up.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

// Rows of whole packs of any type.
template <class Real>
class PartialSums {
 public:
  PartialSums(const Segments& pairs, int64_t width, const Context& context)
      : stride_((width + kVecSize<BFloat16> - 1) / kVecSize<BFloat16> * kVecSize<BFloat16>),
        memory_(context.array<Real>(pairs.max_partial_rows * stride_)) {}

  template <int pack>
  SlicedRows<Real, pack> rows() const {
    return {memory_.get(), stride_, stride_, true};
  }
  template <int pack>
  SlicedRows<const Real, pack> as_source() const {
    return {memory_.get(), stride_, stride_, true};
  }

 private:
  int64_t stride_;
  std::shared_ptr<Real> memory_;
};

// Adds up the partial sums of split segments.
//
// One block  of one run, one slice; then others, however many there are
// One warp   of its eight, every eighth partial row, four of them in flight; one thread per column
//            adds up the warps, in their order
// Traffic    each partial row is read once; a row is written, to the output or in place of the
//            run's first partial row
// Exactness  the order depends on the number of partial rows alone
constexpr int kWarpsPerRun = 8;

template <class Real, class Element>
__global__ void add_partial_sums(const SplitSegment* runs,
                                 const SegmentCounts* counts,
                                 SlicedRows<const Real, kVecSize<Real>> partial_sums,
                                 SlicedRows<Element, kVecSize<Real>> out,
                                 bool is_in_place) {
  constexpr int pack = kVecSize<Real>;
  constexpr int columns = kSliceColumns<pack>;
  Real* const of_warps = reinterpret_cast<Real*>(peer_shared_memory);  // (warps, columns)
  const int64_t slices = count_slices(out.width, columns);
  const int64_t items = counts->split_segments * slices;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const SplitSegment run = runs[item / slices];
    const int64_t slice_column = item % slices * columns;
    LaneValues<Real, pack> sum = {};
#pragma unroll 4
    for (int i = warp_in_block(); i < run.count; i += kWarpsPerRun) {
      const auto values = load(partial_sums.slice(run.first + i, lane_column<pack>(slice_column)));
      for_each_pack([&](int p) {
        const Elements<Real, pack> terms = widen_pack(values.packs[p]);
        for_each_element<pack>([&](int e) { sum.packs[p].values[e] += terms.values[e]; });
      });
    }
    Real* const of_warp = of_warps + warp_in_block() * columns;
    store(Slice<Real, pack>{of_warp + lane_column<pack>(0), columns, true}, sum);
    __syncthreads();
    const int64_t column = slice_column + threadIdx.x;
    if (int(threadIdx.x) < columns && column < out.width) {
      Real total = 0;
      for (int warp = 0; warp < kWarpsPerRun; ++warp) {
        total += of_warps[warp * columns + int(threadIdx.x)];
      }
      const int64_t row = is_in_place ? run.first : run.row;
      out.data[row * out.stride + column] = narrow<Element>(total);
    }
    __syncthreads();  // the memory is written again
  }
}

// Most often there is nothing to add up, of which the host knows nothing: a few blocks find out.
template <class Real, class Element>
void add_up_split_segments(const Segments& pairs,
                           const PartialSums<Real>& partial_sums,
                           const SlicedRows<Element, kVecSize<Real>>& out,
                           bool is_in_place,
                           const Context& context) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  constexpr int columns = kSliceColumns<kVecSize<Real>>;
  static_assert(columns <= kWarpsPerRun * kWarp);
  const int64_t blocks = std::min(pairs.max_split_segments * count_slices(out.width, columns),
                                  sm_count() * kBlocksPerMultiprocessor);
  launch(add_partial_sums<Real, Element>,
         {blocks, kWarpsPerRun * kWarp, kWarpsPerRun * columns * int64_t(sizeof(Real))},
         context.stream, pairs.split_segments.get(), pairs.counts.get(),
         partial_sums.template as_source<kVecSize<Real>>(), out, is_in_place);
}

}  // namespace peer::cuda
