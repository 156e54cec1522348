// The gradient of every table row is the sum, over the pairs that retrieved it, of a coefficient
// times a row of the source: x, grad_out or the queries.
//
// A segment of more than kPairsPerChunk pairs is the ordered sum of its chunks' partial sums. So a
// hot expert does not serialise the pass, and no result depends on the threads.
//
// Shapes      source (pairs / pairs_per_row, width)   coefficients (pairs)   out (·, width)
// Work item   one chunk; then one split segment
// Traffic     per pair, one row of the source, which stays in cache. Per owner, one row written.
//             If these rows exceed the caches, they are written past them, because reading a row
//             from memory before overwriting it would double the traffic
// Exactness   sums in the order of the pairs within a chunk, then in the order of the chunks; each
//             row is rounded once
// Requires    pairs sorted by owner, stably; nothing of widths, strides and alignments, but rows
//             that are not aligned to vectors are written through the caches
#include "kernels/cpu/table_grad.h"

#include "kernels/cpu/segment_sum.h"

namespace peer::cpu {

namespace PEER_CAPABILITY {

namespace {

template <class Element>
bool rows_are_aligned(Rows<Element> rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
         rows.stride * sizeof(Element) % kVectorBytes == 0;
}

template <class Element>
void sum_chunks(const TableGrad<Element>& pass,
                const SegmentWork<accumulation_t<Element>>& segments,
                bool nontemporal,
                int64_t first,
                int64_t last) {
  using Real = accumulation_t<Element>;
  const Terms<Real, Real> terms = {
      .pairs = segments.pairs,
      .width = pass.width,
      .pairs_per_row = pass.pairs_per_row,
      .coefficients = pass.coefficients,
      .source = pass.source,
  };
  nontemporal = nontemporal && rows_are_aligned(pass.out);
  for (int64_t c = first; c < last; ++c) {
    const Chunk& chunk = segments.chunks[c];
    if (chunk.is_partial) {
      sum_chunk<true>(terms, chunk,
                      segments.partial_sums.data + chunk.row * segments.partial_sums.stride);
    } else if (nontemporal) {
      sum_chunk<true, true>(terms, chunk, pass.out.data + chunk.row * pass.out.stride);
    } else {
      sum_chunk<true>(terms, chunk, pass.out.data + chunk.row * pass.out.stride);
    }
  }
  if (nontemporal) {
    fence_nontemporal_stores();
  }
}

template <class Element>
void sum_split_segments(const TableGrad<Element>& pass,
                        const SegmentWork<accumulation_t<Element>>& segments,
                        int64_t first,
                        int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const SplitSegment& segment = segments.split_segments[i];
    sum_split_segment(segments.partial_sums, pass.width, segment,
                      pass.out.data + segment.row * pass.out.stride);
  }
}

template <class Element>
constexpr TableGradFunctions<Element> kFunctions = {
    .sum_chunks = sum_chunks<Element>,
    .sum_split_segments = sum_split_segments<Element>,
};

}  // namespace

}  // namespace PEER_CAPABILITY

constinit const TableGradKernels TableGradKernels::PEER_CAPABILITY = {
    PEER_CAPABILITY::kFunctions<float>,
    PEER_CAPABILITY::kFunctions<double>,
    PEER_CAPABILITY::kFunctions<BFloat16>,
    PEER_CAPABILITY::kFunctions<Half>,
};

}  // namespace peer::cpu
