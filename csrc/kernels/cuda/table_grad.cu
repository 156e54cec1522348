// The gradient of a table: every row is the sum, over the pairs that retrieved it, of a coefficient
// times a row of the source: x, grad_out or the queries.
//
//   out[row] = Σ over the segment's pairs of coefficients[pair]·source[pair / pairs_per_row]
//
// Shapes      source (pairs / pairs_per_row, width)   coefficients (pairs)   out (·, width)
// One block   the chunks that start at up to 64 sorted positions, at most 191 pairs; one warp for
//             every 2 KiB of a row of the source (segment_sum.h). Rows of at most 256 bytes take 16
//             lanes, so a warp has two such lists of chunks. A second kernel adds the partial sums
//             of split segments (partial_sums.h)
// Traffic     per pair, one row of the source, from the L2 cache, and 12 bytes that describe it.
//             Per owner, one row written, which the L2 cache evicts first. Three
//             slices of the source are in flight per warp
// Exactness   sums in the order of the pairs within a chunk, then in an order of the chunks that
//             depends only on their number; accumulation in float (double for double); each row is
//             rounded once
// Requires    any widths, strides and alignments; only vectorizable rows are copied asynchronously
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/table_grad.h"

namespace peer::cuda {

namespace {

template <class Element, class Source, class Real, class Form>
__global__ void sum_segments_kernel(TermList<Real> list,
                                    int positions,
                                    SlicedRows<const Source, Form> source,
                                    SlicedRows<Element, Form> out,
                                    SlicedRows<Real, Form> partial_sums) {
  const int count =
      read_terms<Form, Source>(list, positions, source.stride, [](int, const Term<Real>&) {});
  const auto prefetch_nothing = [](int32_t) {};
  const int columns_per_round = int(blockDim.x) / kWarp * Form::kColumns;
  for (int64_t first = 0; first < source.width; first += columns_per_round) {
    const int64_t column = Form::lane_column(first + warp_in_block() * Form::kColumns);
    const auto write_row = [&](int, int32_t target, const SliceValues<Real, Form>& sum) {
      if (is_row_of_output(target)) {
        const auto row = out.slice(target, column);
        for_each_vec<Form>([&](int k) {
          store_vec<CacheHint::evict_first>(row, k, narrow_vec<Element>(sum.vecs[k]));
        });
      } else {
        store(partial_sums.slice(partial_row_of(target), column), sum);
      }
    };
    add_terms<Real>(count, source, column, prefetch_nothing, write_row);
  }
}

}  // namespace

template <class Element, class Source>
void sum_segments(const TableGrad<Element, Source>& pass,
                  const Segments& segments,
                  const Context& context) {
  using Real = accumulation_t<Element>;
  if (segments.count == 0 || pass.width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(segments, pass.width, context);
  with_slice_form<Source>(pass.width, [&]<class Form>() {
    const TileShape shape = choose_tile_shape<Form, Source, Real>(segments.count, pass.width);
    launch(sum_segments_kernel<Element, Source, Real, Form>,
           launch_shape<Form, Source, Real>(shape, segments.count), context.stream,
           terms_of_pairs(segments, pass.coefficients, pass.pairs_per_row), shape.positions,
           slice_rows<Form>(pass.source, pass.width), slice_rows<Form>(pass.out, pass.width),
           partial_sums.template rows<Form>());
  });
  add_partial_sums(segments, partial_sums, slice_rows<PartialSumForm<Real>>(pass.out, pass.width),
                   /*is_in_place=*/false, context);
}

template void sum_segments(const TableGrad<float, float>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<double, double>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<BFloat16, BFloat16>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<BFloat16, float>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<Half, Half>&, const Segments&, const Context&);
template void sum_segments(const TableGrad<Half, float>&, const Segments&, const Context&);

}  // namespace peer::cuda
