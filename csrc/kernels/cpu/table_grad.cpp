// Expert pass: the gradient of every table row is the sum, over the pairs that retrieved it, of a
// coefficient times a row of x or grad_out.
//
// Pairs come sorted by owner, cut into chunks of at most kPairsPerChunk, each summed by one thread.
// An owner with more pairs than that is the ordered sum of its chunks' partial sums: one hot expert
// neither serialises the pass nor makes a result depend on the threads.
//
// Work item   one chunk; then one split segment
// Traffic     per pair, one row of x or grad_out, which stay in cache; per owner, one row written,
//             past the caches where all rows are larger than these: reading a row from memory
//             before overwriting it would double the traffic
// Exactness   sums in the order of the pairs within a chunk, then in the order of the chunks; each
//             row is rounded once
#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/segment_sum.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

template <class Element>
bool rows_are_aligned(Rows<Element> rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
         rows.stride * sizeof(Element) % kVectorBytes == 0;
}

}  // namespace

template <class Element>
void sum_chunks(const TableGrad<Element>& pass, int64_t first, int64_t last) {
  const bool streamed = pass.exceeds_caches && rows_are_aligned(pass.out);
  for (int64_t c = first; c < last; ++c) {
    const Chunk& chunk = pass.chunks[c];
    if (chunk.is_partial) {
      sum_chunk<true>(pass, chunk, pass.partial_sums.data + chunk.row * pass.partial_sums.stride);
    } else if (streamed) {
      sum_chunk<true, true>(pass, chunk, pass.out.data + chunk.row * pass.out.stride);
    } else {
      sum_chunk<true>(pass, chunk, pass.out.data + chunk.row * pass.out.stride);
    }
  }
  if (streamed) {
    finish_streaming();
  }
}

template <class Element>
void sum_split_segments(const TableGrad<Element>& pass, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const SplitSegment& run = pass.split_segments[r];
    sum_split_segment(pass.partial_sums, pass.width, run,
                      pass.out.data + run.row * pass.out.stride);
  }
}

template void sum_chunks(const TableGrad<float>&, int64_t, int64_t);
template void sum_chunks(const TableGrad<double>&, int64_t, int64_t);
template void sum_chunks(const TableGrad<BFloat16>&, int64_t, int64_t);
template void sum_chunks(const TableGrad<Half>&, int64_t, int64_t);
template void sum_split_segments(const TableGrad<float>&, int64_t, int64_t);
template void sum_split_segments(const TableGrad<double>&, int64_t, int64_t);
template void sum_split_segments(const TableGrad<BFloat16>&, int64_t, int64_t);
template void sum_split_segments(const TableGrad<Half>&, int64_t, int64_t);

}  // namespace peer::cpu::PEER_CAPABILITY
