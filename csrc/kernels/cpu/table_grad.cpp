// The gradient of a part of a table row is the sum, over the pairs that retrieved the row, of a
// coefficient times a row of the source: x, grad_out or the queries. The parts of a row are summed
// one after the other, so each gradient row is written at once.
//
// The rows of single pairs can be written as soon as their coefficients are known, by the pass over
// the tokens, which has their sources in the nearest cache.
//
// A segment of more than kPairsPerChunk pairs is the ordered sum of its chunks' partial sums. So a
// hot expert does not serialise the pass, and no result depends on the threads.
//
// Shapes      of each part: source (pairs / pairs_per_row, width)   coefficients (pairs)
//             out (·, width)
// Work item   one pair, if single pairs are apart; one chunk; then one split segment
// Traffic     per pair, one row of each source, which stays in cache. Per owner, one row written.
//             If these rows exceed the caches, they are written past them, because reading a row
//             from memory before overwriting it would double the traffic
// Exactness   sums in the order of the pairs within a chunk, then in the order of the chunks; each
//             row is rounded once
// Requires    pairs sorted by owner, stably; nothing of widths, strides and alignments, but rows
//             that are not aligned to vectors are written through the caches
#include "kernels/cpu/table_grad.h"

#include <algorithm>

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
bool all_are_aligned(std::span<const TableGrad<Element>> parts) {
  return std::all_of(parts.begin(), parts.end(),
                     [](const auto& part) { return rows_are_aligned(part.out); });
}

template <class Terms, class Element>
void write_sum(const Terms& terms, int64_t width, bool nontemporal, Element* out) {
  if (nontemporal) {
    sum_terms<true>(terms, width, out);
  } else {
    sum_terms(terms, width, out);
  }
}

template <class Element>
void sum_chunks(std::span<const TableGrad<Element>> parts,
                const SegmentWork<accumulation_t<Element>>& segments,
                bool nontemporal,
                int64_t first,
                int64_t last) {
  using Real = accumulation_t<Element>;
  nontemporal = nontemporal && all_are_aligned(parts);
  for (int64_t c = first; c < last; ++c) {
    if (c + kChunksAhead < last) {
      for (const TableGrad<Element>& part : parts) {
        prefetch_coefficients(segments, segments.chunks[c + kChunksAhead], part.coefficients);
      }
    }
    const Chunk& chunk = segments.chunks[c];
    const ChunkSources sources(segments.pairs, chunk, parts[0].pairs_per_row);
    Real* partial_sum = segments.partial_sums.data + chunk.row * segments.partial_sums.stride;
    for (const TableGrad<Element>& part : parts) {
      const ChunkTerms<Real, Real> terms(sources, part.coefficients, part.source);
      Element* const out = part.out.data + chunk.row * part.out.stride;
      if (chunk.is_partial) {
        sum_terms(terms, part.width, partial_sum);
        partial_sum += part.width;
      } else {
        write_sum(terms, part.width, nontemporal, out);
      }
    }
  }
  if (nontemporal) {
    fence_nontemporal_stores();
  }
}

template <class Element>
void sum_single_pairs(std::span<const TableGrad<Element>> parts,
                      const SegmentWork<accumulation_t<Element>>& segments,
                      bool nontemporal,
                      int64_t first,
                      int64_t last) {
  using Real = accumulation_t<Element>;
  nontemporal = nontemporal && all_are_aligned(parts);
  for (int64_t id = first; id < last; ++id) {
    const int64_t row = segments.single_rows[id];
    if (row < 0) {
      continue;
    }
    const int64_t source = id / parts[0].pairs_per_row;
    for (const TableGrad<Element>& part : parts) {
      const SingleTerm<Real, Real> term = {{part.coefficients[id]},
                                           {part.source.data + source * part.source.stride}};
      write_sum(term, part.width, nontemporal, part.out.data + row * part.out.stride);
    }
  }
  if (nontemporal) {
    fence_nontemporal_stores();
  }
}

template <class Element>
void sum_split_segments(std::span<const TableGrad<Element>> parts,
                        const SegmentWork<accumulation_t<Element>>& segments,
                        int64_t first,
                        int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const SplitSegment& segment = segments.split_segments[i];
    int64_t column = 0;
    for (const TableGrad<Element>& part : parts) {
      sum_split_segment(segments.partial_sums.from_column(column), part.width, segment,
                        part.out.data + segment.row * part.out.stride);
      column += part.width;
    }
  }
}

template <class Element>
constexpr TableGradFunctions<Element> kFunctions = {
    .sum_chunks = sum_chunks<Element>,
    .sum_single_pairs = sum_single_pairs<Element>,
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
