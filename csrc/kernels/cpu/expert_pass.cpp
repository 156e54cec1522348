// Expert pass: the gradient of every table row is the sum, over the pairs that retrieved it, of a
// coefficient times a row of x or grad_out.
//
// Pairs come sorted by owner, cut into chunks of at most kPairsPerChunk, each summed by one thread.
// An owner with more pairs than that is the ordered sum of its chunks' partial sums: one hot expert
// neither serialises the pass nor makes a result depend on the threads.
//
// Work item   one chunk; then one split run
// Traffic     per pair, one row of x or grad_out, which stay in cache; per owner, one row written
// Exactness   sums in the order of the pairs within a chunk, then in the order of the chunks; each
//             row is rounded once
#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/vector.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

// A strip of a row that stays in registers while the pairs of a chunk pass by.
constexpr int kVectorsPerStrip = 4;

template <int vectors, class Element, class Target>
void sum_strip(const ExpertPass<Element>& pass, const Chunk& chunk, int64_t column, Target* out) {
  using Real = accumulation_t<Element>;
  constexpr int lanes = kLanes<Real>;
  Vector<Real> sum[vectors] = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t number = pass.pairs[i].number;
    const Real coefficient = pass.coefficients[number];
    const Real* source =
        pass.source.data + (number / pass.pairs_per_row) * pass.source.stride + column;
    for (int v = 0; v < vectors; ++v) {
      sum[v] += coefficient * load(source + v * lanes);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store(out + column + v * lanes, sum[v]);
  }
}

template <class Element, class Target>
void sum_tail(const ExpertPass<Element>& pass, const Chunk& chunk, int64_t column, Target* out) {
  using Real = accumulation_t<Element>;
  const int64_t count = pass.width - column;
  Vector<Real> sum = {};
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const int64_t number = pass.pairs[i].number;
    const Real* source =
        pass.source.data + (number / pass.pairs_per_row) * pass.source.stride + column;
    sum += pass.coefficients[number] * load_first(source, count);
  }
  store_first(out + column, sum, count);
}

template <class Element, class Target>
void sum_chunk(const ExpertPass<Element>& pass, const Chunk& chunk, Target* out) {
  constexpr int lanes = kLanes<accumulation_t<Element>>;
  int64_t column = 0;
  for (; column + kVectorsPerStrip * lanes <= pass.width; column += kVectorsPerStrip * lanes) {
    sum_strip<kVectorsPerStrip>(pass, chunk, column, out);
  }
  for (; column + lanes <= pass.width; column += lanes) {
    sum_strip<1>(pass, chunk, column, out);
  }
  if (column < pass.width) {
    sum_tail(pass, chunk, column, out);
  }
}

}  // namespace

template <class Element>
void sum_chunks(const ExpertPass<Element>& pass, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const Chunk& chunk = pass.chunks[c];
    if (chunk.is_partial) {
      sum_chunk(pass, chunk, pass.partial_sums.data + chunk.row * pass.partial_sums.stride);
    } else {
      sum_chunk(pass, chunk, pass.out.data + chunk.row * pass.out.stride);
    }
  }
}

template <class Element>
void sum_split_runs(const ExpertPass<Element>& pass, int64_t first, int64_t last) {
  using Real = accumulation_t<Element>;
  constexpr int lanes = kLanes<Real>;
  for (int64_t r = first; r < last; ++r) {
    const SplitRun& run = pass.split_runs[r];
    const Real* partial = pass.partial_sums.data + run.first * pass.partial_sums.stride;
    Element* out = pass.out.data + run.row * pass.out.stride;
    for (int64_t column = 0; column < pass.width; column += lanes) {
      const int64_t count = pass.width - column < lanes ? pass.width - column : lanes;
      Vector<Real> sum = {};
      for (int64_t i = 0; i < run.last - run.first; ++i) {
        sum += load_first(partial + i * pass.partial_sums.stride + column, count);
      }
      store_first(out + column, sum, count);
    }
  }
}

template void sum_chunks(const ExpertPass<float>&, int64_t, int64_t);
template void sum_chunks(const ExpertPass<double>&, int64_t, int64_t);
template void sum_chunks(const ExpertPass<BFloat16>&, int64_t, int64_t);
template void sum_chunks(const ExpertPass<Half>&, int64_t, int64_t);
template void sum_split_runs(const ExpertPass<float>&, int64_t, int64_t);
template void sum_split_runs(const ExpertPass<double>&, int64_t, int64_t);
template void sum_split_runs(const ExpertPass<BFloat16>&, int64_t, int64_t);
template void sum_split_runs(const ExpertPass<Half>&, int64_t, int64_t);

}  // namespace peer::cpu::PEER_CAPABILITY
