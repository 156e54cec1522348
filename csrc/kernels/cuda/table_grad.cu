// The gradient of a table: every row is the sum, over the pairs that retrieved it, of a coefficient
// times a row of the source: x, grad_out or the queries.
//
//   out[row] = Σ over the segment's pairs of coefficients[pair]·source[pair / pairs_per_row]
//
// Shapes      source (pairs / pairs_per_row, width)   coefficients (pairs)   out (·, width)
// One block   the chunks that start at up to 64 sorted positions, at most 191 pairs; one warp per
//             KiB of a row of the source (segment_sum.h). A second kernel adds the partial sums of
//             split segments (partial_sums.h)
// Traffic     per pair, one row of the source, from the L2 cache, and 12 bytes that describe it.
//             Per owner, one row written, which the L2 cache evicts first. 3 KiB of the source are
//             in flight per warp
// Exactness   sums in the order of the pairs within a chunk, then in an order of the chunks that
//             depends only on their number; accumulation in float (double for double); each row is
//             rounded once
// Requires    any widths, strides and alignments; only vectorizable rows are copied asynchronously
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/table_grad.h"

namespace peer::cuda {

namespace {

template <class Element, class Source, class Real, int vec_size = kVecSize<Source>>
__global__ void sum_segments_kernel(TermList<Real> list,
                                    int positions,
                                    SlicedRows<const Source, vec_size> source,
                                    SlicedRows<Element, vec_size> out,
                                    SlicedRows<Real, vec_size> partial_sums) {
  const int count = read_terms<Source>(list, positions, source.stride);
  const auto prefetch_nothing = [](int32_t) {};
  const int columns_per_round = int(blockDim.x) * kVecsPerLane * vec_size;
  for (int64_t first = 0; first < source.width; first += columns_per_round) {
    const int64_t column = lane_column<vec_size>(first + warp_in_block() * kSliceColumns<vec_size>);
    const auto write_row = [&](int, int32_t target, const SliceValues<Real, vec_size>& sum) {
      if (is_row_of_output(target)) {
        const auto row = out.slice(target, column);
        for_each_vec([&](int k) {
          store_vec<CacheHint::evict_first>(row, k, narrow_vec<Element>(sum.vecs[k]));
        });
      } else {
        store(partial_sums.slice(partial_row_of(target), column), sum);
      }
    };
    add_terms<Source, Real>(count, source, column, prefetch_nothing, write_row);
  }
}

}  // namespace

template <class Element, class Source>
void sum_segments(const TableGrad<Element, Source>& pass,
                  const Segments& segments,
                  const Context& context) {
  using Real = accumulation_t<Element>;
  constexpr int vec_size = kVecSize<Source>;
  if (segments.count == 0 || pass.width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(segments, pass.width, context);
  const TileShape shape = choose_tile_shape<vec_size>(segments.count, pass.width);
  launch(sum_segments_kernel<Element, Source, Real>,
         launch_shape<Source, Real>(shape, segments.count), context.stream,
         terms_of_pairs(segments, pass.coefficients, pass.pairs_per_row), shape.positions,
         slice_rows<vec_size>(pass.source, pass.width), slice_rows<vec_size>(pass.out, pass.width),
         partial_sums.template rows<vec_size>());
  add_partial_sums(segments, partial_sums, slice_rows<kVecSize<Real>>(pass.out, pass.width),
                   /*is_in_place=*/false, context);
}

template void sum_segments(const TableGrad<float, float>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<double, double>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<BFloat16, BFloat16>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<BFloat16, float>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<Half, Half>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<Half, float>&, const Segments&, const Context&);

}  // namespace peer::cuda
