// Expert pass: the gradient of every table row is the sum, over the pairs that retrieved it, of a
// coefficient times a row of x or grad_out.
//
//   out[row] = Σ over the run's pairs of coefficients[pair]·source[pair / pairs_per_row]
//
// Shapes      source (pairs / pairs_per_row, width)   coefficients (pairs)   out (·, width)
// One block   the chunks that begin at up to 64 sorted positions, at most 191 pairs; one warp for
//             each KiB of a row of the source (pair_sums.h). Partial sums of split segments are
//             added by a second kernel.
// Traffic     per pair, one row of the source, from the second-level cache; and 12 bytes to know
//             which. Per owner, one row written, which makes way in that cache first. 3 KiB of the
//             source are in flight per warp.
// Exactness   sums in the order of the pairs within a chunk, then in an order of the chunks that
//             depends on their number; accumulation in float (double for double); each row is
//             rounded once
// Requires    nothing of widths, strides and alignments, though rows of whole and aligned packs are
//             copied ahead and others are not
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/partial_sums.h"
#include "kernels/cuda/segment_sum.h"

namespace peer::cuda {

namespace {

template <class Element, class Source, class Real, int pack = kVecSize<Source>>
__global__ void sum_tiles(TermList<Real> list,
                          int positions,
                          SlicedRows<const Source, pack> source,
                          SlicedRows<Element, pack> out,
                          SlicedRows<Real, pack> partial_sums) {
  const int count = read_terms<Source>(list, positions, source.stride);
  const auto prefetch_nothing = [](int32_t) {};
  const int columns_per_round = int(blockDim.x) * kVecsPerLane * pack;
  for (int64_t first = 0; first < source.width; first += columns_per_round) {
    const int64_t column = lane_column<pack>(first + warp_in_block() * kSliceColumns<pack>);
    const auto write_row = [&](int, int32_t target, const LaneValues<Real, pack>& sum) {
      if (is_row_of_output(target)) {
        const auto row = out.slice(target, column);
        for_each_pack(
            [&](int p) { store_pack<Kept::briefly>(row, p, narrow_pack<Element>(sum.packs[p])); });
      } else {
        store(partial_sums.slice(partial_row_of(target), column), sum);
      }
    };
    add_terms<Source, Real>(count, source, column, prefetch_nothing, write_row);
  }
}

}  // namespace

template <class Element, class Source>
void sum_pairs(const TableGrad<Element, Source>& pass,
               const Segments& pairs,
               const Context& context) {
  using Real = accumulation_t<Element>;
  constexpr int pack = kVecSize<Source>;
  if (pairs.count == 0 || pass.width == 0) {
    return;
  }
  const PartialSums<Real> partial_sums(pairs, pass.width, context);
  const TileShape shape = tile_shape<pack>(pairs.count, pass.width);
  launch(sum_tiles<Element, Source, Real>, launch_shape<Source, Real>(shape, pairs.count),
         context.stream, terms_of_pairs(pairs, pass.coefficients, pass.pairs_per_row),
         shape.positions, sliced<pack>(pass.source, pass.width), sliced<pack>(pass.out, pass.width),
         partial_sums.template rows<pack>());
  add_up_split_segments(pairs, partial_sums, sliced<kVecSize<Real>>(pass.out, pass.width),
                        /*is_in_place=*/false, context);
}

template void sum_pairs(const TableGrad<float, float>&, const Segments&, const Context&);
template void sum_pairs(const TableGrad<double, double>&, const Segments&, const Context&);
template void sum_pairs(const TableGrad<BFloat16, BFloat16>&, const Segments&, const Context&);
template void sum_pairs(const TableGrad<BFloat16, float>&, const Segments&, const Context&);
template void sum_pairs(const TableGrad<Half, Half>&, const Segments&, const Context&);
template void sum_pairs(const TableGrad<Half, float>&, const Segments&, const Context&);

}  // namespace peer::cuda
