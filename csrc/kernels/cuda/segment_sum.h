// Sums of rows of a source, each multiplied by a coefficient: what the expert pass stores and the
// row updates follow.
//
//   sum = Σ over some consecutive terms of coefficient·source[row]
//
// A block takes a tile of terms: the sums that begin in some 64 consecutive positions of a list. It
// reads the terms themselves into shared memory; then each of its warps goes through all of them
// with a slice of the columns, or one after the other with several slices.
//
// Rows of the source stay in the second-level cache, from where each warp copies them to shared
// memory, 3 KiB ahead of where it is. A sum ends wherever a term says so, after one pair as often
// as not: copying goes on across the ends of sums, and what is done at an end is compiled once, not
// once for each row in flight.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/segments.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

template <class Real>
struct Term {
  int64_t row_offset;  // in the source
  int32_t target;      // what becomes of the sum after this term: see chunks.h
  Real coefficient;
};

// Sorted pairs, in their order; or rows of the source as they are, each of them the sum for the row
// of the output of the same number; or the first partial rows of split segments, each the sum for
// the run's row of the output.
template <class Real>
struct TermList {
  int32_t most;  // how many there are; of split segments, at most
  // Of sorted pairs.
  const int32_t* numbers = nullptr;
  const int32_t* targets = nullptr;
  const Real* coefficients = nullptr;  // by pair number, or null: all one
  int32_t pairs_per_row = 1;
  // Of split segments.
  const SplitSegment* split_segments = nullptr;
  const SegmentCounts* counts = nullptr;

  __device__ int32_t count() const { return counts ? counts->split_segments : most; }

  // Whether a sum begins at a position.
  __device__ bool begins(int64_t position) const {
    return position == 0 || !targets || targets[position - 1] != kContinueSegment;
  }

  __device__ Term<Real> term(int32_t position, int64_t source_stride) const {
    if (split_segments) {
      const SplitSegment run = split_segments[position];
      return {run.first * source_stride, run.row, Real(1)};
    }
    if (!numbers) {
      return {position * source_stride, position, Real(1)};
    }
    const int32_t number = numbers[position];
    const uint32_t row = uint32_t(number) / uint32_t(pairs_per_row);
    return {row * source_stride, targets[position], coefficients ? coefficients[number] : Real(1)};
  }
};

template <class Real>
TermList<Real> terms_of_pairs(const Segments& pairs,
                              const Real* coefficients,
                              int64_t pairs_per_row) {
  TermList<Real> list = {int32_t(pairs.count)};
  list.numbers = pairs.numbers.get();
  list.targets = pairs.targets.get();
  list.coefficients = coefficients;
  list.pairs_per_row = int32_t(pairs_per_row);
  return list;
}

template <class Real>
TermList<Real> terms_of_rows(int64_t rows) {
  return {int32_t(rows)};
}

template <class Real>
TermList<Real> terms_of_split_runs(const Segments& pairs) {
  TermList<Real> list = {int32_t(pairs.max_split_segments)};
  list.split_segments = pairs.split_segments.get();
  list.counts = pairs.counts.get();
  return list;
}

// The first position from `position` on where a sum begins, or the list's end. By a whole warp.
template <class Real>
__device__ int32_t find_beginning(const TermList<Real>& list, int32_t count, int64_t position) {
  for (;; position += kWarp) {
    const int64_t mine = position + lane();
    const unsigned ballot = __ballot_sync(kAllLanes, mine >= count || list.begins(mine));
    if (ballot != 0) {
      const int64_t found = position + __ffs(int(ballot)) - 1;
      return int32_t(found < count ? found : count);
    }
  }
}

constexpr int kMaxPositions = 64;
constexpr int kMaxTerms = kMaxPositions + kPairsPerChunk - 1;
constexpr int kMaxWarps = 16;

// Rows of a slice that a warp has place for, one of which it is adding.
constexpr int kRowsInRing = 4;
constexpr int64_t kRingBytes = kRowsInRing * 1024;

// The shared memory of a block: the rings of its warps, then the terms.
template <class Source, class Real>
struct TileMemory {
  static_assert(kSliceColumns<kVecSize<Source>> * sizeof(Source) * kRowsInRing == kRingBytes);

  static constexpr int64_t bytes(int warps) {
    return warps * kRingBytes + kMaxTerms * int64_t(sizeof(Term<Real>));
  }
  static __device__ Source* ring() {
    return reinterpret_cast<Source*>(peer_shared_memory + warp_in_block() * kRingBytes);
  }
  static __device__ Term<Real>* terms() {
    return reinterpret_cast<Term<Real>*>(peer_shared_memory + blockDim.x / kWarp * kRingBytes);
  }
};

// Reads the terms of the block's tile into shared memory, and returns how many there are: of the
// sums that begin at its positions. By all threads of the block.
template <class Source, class Real>
__device__ int read_terms(const TermList<Real>& list, int positions, int64_t source_stride) {
  const int32_t count = list.count();
  const int64_t begin = int64_t(blockIdx.x) * positions;
  const int32_t first = find_beginning(list, count, begin);
  const int32_t end = find_beginning(list, count, begin + positions);
  Term<Real>* const terms = TileMemory<Source, Real>::terms();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < end - first; i += int(blockDim.x)) {
    terms[i] = list.term(first + i, source_stride);
  }
  __syncthreads();
  return end - first;
}

// A lane's copies from global to shared memory, 16 bytes each, in batches. CUDA's own functions do
// not tell the compiler that memory changes while they wait.
template <class Element>
__device__ void cp_async(Element* target, const Element* source) {
  __pipeline_memcpy_async(target, source, 16);
}

__device__ inline void end_batch_of_copies() { __pipeline_commit(); }

template <int batches_left>
__device__ void wait_for_copies() {
  __pipeline_wait_prior(batches_left);
  asm volatile("" ::: "memory");
}

// A warp's slices of the rows that it adds next. A lane reads what it has written itself, so it
// need not wait for others.
template <class Source, int pack>
class Ring {
 public:
  // Columns beyond a row's end are zeros: of all rows, so they are written once.
  __device__ Ring(Source* memory, int columns) : memory_(memory + lane_column<pack>(0)) {
    for (int i = 0; i < kRowsInRing; ++i) {
      for_each_pack([&](int p) {
        if (pack_offset<pack>(p) >= columns) {
          store_pack(place(i), p, {});
        }
      });
    }
  }

  // Packs are copied while the warp goes on; elements that do not form any are copied at once.
  __device__ void copy(int i, const Slice<const Source, pack>& row) {
    if (row.is_packed) {
      for_each_pack([&](int p) {
        if (row.has_pack(p)) {
          cp_async(place(i).pack_address(p), row.pack_address(p));
        }
      });
    } else {
      store(place(i), load(row));
    }
  }

  __device__ RawValues<Source, pack> read(int i) const { return load(place(i)); }

 private:
  __device__ Slice<Source, pack> place(int i) const {
    constexpr int columns = kSliceColumns<pack>;
    return {memory_ + i % kRowsInRing * columns, columns, true};
  }

  Source* memory_;
};

// Goes through the terms with a lane's columns, from this one on. Calls request(target) for each
// term, some time before it is added, and finish(i, target, sum) where a sum ends with term i.
template <class Source, class Real, int pack, class Request, class Finish>
__device__ void add_terms(int count,
                          const SlicedRows<const Source, pack>& source,
                          int64_t column,
                          const Request& request,
                          const Finish& finish) {
  constexpr int kAhead = kRowsInRing - 1;
  const Term<Real>* const terms = TileMemory<Source, Real>::terms();
  Ring<Source, pack> ring(TileMemory<Source, Real>::ring(), source.columns_from(column));
  const auto prefetch_term = [&](int i) {
    if (i < count) {
      request(terms[i].target);
      ring.copy(i, source.slice_at(terms[i].row_offset, column));
    }
    end_batch_of_copies();
  };

  for (int i = 0; i < kAhead; ++i) {
    prefetch_term(i);
  }
  LaneValues<Real, pack> sum = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    prefetch_term(i + kAhead);
    wait_for_copies<kAhead>();
    const Term<Real> term = terms[i];
    const RawValues<Source, pack> row = ring.read(i);
    for_each_pack([&](int p) {
      const Elements<Real, pack> values = widen_pack(row.packs[p]);
      for_each_element<pack>([&](int e) {
        Real& value = sum.packs[p].values[e];
        value = std::fma(term.coefficient, values.values[e], value);
      });
    });
    if (term.target != kContinueSegment) {
      finish(i, term.target, sum);
      sum = {};
    }
  }
}

// How a pass over a list of terms is started.
struct TileShape {
  int positions;  // of a tile: the sums that begin at these are a block's
  int warps;      // of a block: one for each slice, or for several slices each the same number
};

// Two waves of as many warps as the sm_count hold are wanted, so that none of these is idle
// for long at the end. With more terms than that takes, tiles are as large as they may be, so that
// reading the terms is a small part of the work. Results do not depend on any of it.
template <int pack>
TileShape tile_shape(int64_t terms, int64_t width) {
  constexpr int64_t kFewestPositions = 8;
  constexpr int64_t kWarpsWanted = 2 * 64;
  const int64_t slices = count_slices(width, kSliceColumns<pack>);
  const int64_t rounds = (slices + kMaxWarps - 1) / kMaxWarps;
  const int64_t warps = (slices + rounds - 1) / rounds;
  const int64_t tiles_wanted = sm_count() * kWarpsWanted / warps;
  const int64_t positions =
      std::clamp<int64_t>(terms / tiles_wanted, kFewestPositions, kMaxPositions);
  return {int(positions), int(warps)};
}

template <class Source, class Real>
LaunchShape launch_shape(const TileShape& shape, int64_t terms, int64_t more_shared_bytes = 0) {
  return {(terms + shape.positions - 1) / shape.positions, shape.warps * kWarp,
          TileMemory<Source, Real>::bytes(shape.warps) + more_shared_bytes};
}

}  // namespace peer::cuda
