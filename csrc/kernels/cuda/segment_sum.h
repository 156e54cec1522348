// Sums of rows of a source, each multiplied by a coefficient. table_grad stores the sums, and
// table_update applies them.
//
//   sum = Σ over consecutive terms of coefficient·source[row]
//
// A block takes a tile of terms: the terms of the sums that start at up to 64 consecutive positions
// of a list. It reads the terms into shared memory. Each of its warps then goes through all terms
// with one slice of the columns, or with several slices one after the other.
//
// The rows of the source stay in the L2 cache. Each warp copies them from there to shared memory,
// 3 KiB ahead of the sum. A sum ends at any term, often after a single one, so copying continues
// across the ends of sums, and the code for an end is compiled once, not once for each row in
// flight.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/row_slices.h"
#include "kernels/cuda/segment_chunks.h"
#include "kernels/cuda/segments.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

template <class Real>
struct Term {
  int64_t row_offset;  // in the source
  int32_t target;      // of the sum up to this term: see segment_chunks.h
  Real coefficient;
};

// One of three lists:
//
//   sorted pairs      in their order
//   rows              row i of the source is the sum for row i of the output
//   split segments    the first partial row of a segment is the sum for the segment's row of the
//                     output
template <class Real>
struct TermList {
  int32_t max_count;                      // an upper bound on the number of terms
  const int32_t* actual_count = nullptr;  // in device memory; null: max_count
  // Sorted pairs.
  const int32_t* pair_ids = nullptr;
  const int32_t* targets = nullptr;
  const Real* coefficients = nullptr;  // by pair id, or null: all one
  int32_t pairs_per_row = 1;
  // Split segments.
  const SplitSegment* split_segments = nullptr;

  __device__ int32_t count() const { return actual_count ? *actual_count : max_count; }

  __device__ bool starts_sum(int64_t position) const {
    return position == 0 || !targets || targets[position - 1] != kContinueSegment;
  }

  __device__ Term<Real> term(int32_t position, int64_t source_stride) const {
    if (split_segments) {
      const SplitSegment segment = split_segments[position];
      return {segment.first * source_stride, segment.row, Real(1)};
    }
    if (!pair_ids) {
      return {position * source_stride, position, Real(1)};
    }
    const int32_t pair = pair_ids[position];
    const uint32_t row = uint32_t(pair) / uint32_t(pairs_per_row);
    return {row * source_stride, targets[position], coefficients ? coefficients[pair] : Real(1)};
  }
};

template <class Real>
TermList<Real> terms_of_pairs(const Segments& segments,
                              const Real* coefficients,
                              int64_t pairs_per_row) {
  return {.max_count = int32_t(segments.count),
          .actual_count = segments.trained_count.get(),
          .pair_ids = segments.pair_ids.get(),
          .targets = segments.targets.get(),
          .coefficients = coefficients,
          .pairs_per_row = int32_t(pairs_per_row)};
}

template <class Real>
TermList<Real> terms_of_rows(int64_t rows) {
  return {.max_count = int32_t(rows)};
}

template <class Real>
TermList<Real> terms_of_split_segments(const Segments& segments) {
  return {.max_count = int32_t(segments.max_split_segments),
          .actual_count = &segments.counts->split_segments,
          .split_segments = segments.split_segments.get()};
}

// The first position from `position` on at which a sum starts, or the list's end. Called by all
// lanes of a warp.
template <class Real>
__device__ int32_t find_sum_start(const TermList<Real>& list, int32_t count, int64_t position) {
  for (;; position += kWarp) {
    const int64_t mine = position + lane();
    const unsigned ballot = __ballot_sync(kAllLanes, mine >= count || list.starts_sum(mine));
    if (ballot != 0) {
      const int64_t found = position + __ffs(int(ballot)) - 1;
      return int32_t(found < count ? found : count);
    }
  }
}

constexpr int kMaxPositions = 64;
constexpr int kMaxTerms = kMaxPositions + kPairsPerChunk - 1;
constexpr int kMaxWarpsPerTile = 16;

// The number of slices in a warp's ring buffer: one being added, the others in flight.
constexpr int kRowsInRing = 4;
constexpr int64_t kRingBytes = kRowsInRing * 1024;

// The shared memory of a block: the ring buffers of its warps, then the terms.
template <class Source, class Real>
struct TileStorage {
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

// Reads the terms of the block's tile into shared memory and returns their number. Called by all
// threads of the block.
template <class Source, class Real>
__device__ int read_terms(const TermList<Real>& list, int positions, int64_t source_stride) {
  const int32_t count = list.count();
  const int64_t begin = int64_t(blockIdx.x) * positions;
  const int32_t first = find_sum_start(list, count, begin);
  const int32_t end = find_sum_start(list, count, begin + positions);
  Term<Real>* const terms = TileStorage<Source, Real>::terms();
#pragma unroll 1
  for (int i = int(threadIdx.x); i < end - first; i += int(blockDim.x)) {
    terms[i] = list.term(first + i, source_stride);
  }
  __syncthreads();
  return end - first;
}

// The same for a list of rows, without the frozen ones. Every warp counts the others; the first one
// writes their terms.
template <class Source, class Real>
__device__ int read_trained_rows(const TermList<Real>& list,
                                 int positions,
                                 int64_t source_stride,
                                 const bool* frozen) {
  const int64_t begin = int64_t(blockIdx.x) * positions;
  Term<Real>* const terms = TileStorage<Source, Real>::terms();
  int trained = 0;
#pragma unroll 1
  for (int first = 0; first < positions; first += kWarp) {
    const int64_t row = begin + first + lane();
    const bool is_trained = first + lane() < positions && row < list.max_count && !frozen[row];
    const unsigned ballot = __ballot_sync(kAllLanes, is_trained);
    if (is_trained && warp_in_block() == 0) {
      terms[trained + count_lower_lanes(ballot)] = list.term(int32_t(row), source_stride);
    }
    trained += __popc(ballot);
  }
  __syncthreads();
  return trained;
}

// Asynchronous copies of 16 bytes from global to shared memory, in groups per lane. CUDA's own
// functions do not tell the compiler that memory changes while they wait.
template <class Element>
__device__ void cp_async(Element* target, const Element* source) {
  __pipeline_memcpy_async(target, source, 16);
}

__device__ inline void cp_async_commit() { __pipeline_commit(); }

// Waits for all groups but the last ones.
template <int groups_in_flight>
__device__ void cp_async_wait() {
  __pipeline_wait_prior(groups_in_flight);
  asm volatile("" ::: "memory");
}

// A warp's ring buffer: its slices of the rows that it adds next. A lane reads only what it wrote,
// so lanes need not wait for each other.
template <class Source, int vec_size>
class Ring {
 public:
  // Columns beyond the row's end are zeros in all rows, so they are written once.
  __device__ Ring(Source* memory, int columns) : memory_(memory + lane_column<vec_size>(0)) {
    for (int i = 0; i < kRowsInRing; ++i) {
      for_each_vec([&](int k) {
        if (vec_offset<vec_size>(k) >= columns) {
          store_vec(slot(i), k, {});
        }
      });
    }
  }

  // Vectors are copied asynchronously. Rows that are not vectorizable are copied at once.
  __device__ void copy(int i, const Slice<const Source, vec_size>& row) {
    if (row.is_vectorizable) {
      for_each_vec([&](int k) {
        if (row.has_vec(k)) {
          cp_async(slot(i).vec_address(k), row.vec_address(k));
        }
      });
    } else {
      store(slot(i), load(row));
    }
  }

  __device__ RawSliceValues<Source, vec_size> read(int i) const { return load(slot(i)); }

 private:
  __device__ Slice<Source, vec_size> slot(int i) const {
    constexpr int columns = kSliceColumns<vec_size>;
    return {memory_ + i % kRowsInRing * columns, columns, true};
  }

  Source* memory_;
};

// Adds the terms of the block's tile, for the lane's columns from `column` on. Calls
// prefetch(target) for each term kRowsInRing - 1 terms before it is added, and
// finish(i, target, sum) if a sum ends with term i.
template <class Source, class Real, int vec_size, class Prefetch, class Finish>
__device__ void add_terms(int count,
                          const SlicedRows<const Source, vec_size>& source,
                          int64_t column,
                          const Prefetch& prefetch,
                          const Finish& finish) {
  constexpr int kAhead = kRowsInRing - 1;
  const Term<Real>* const terms = TileStorage<Source, Real>::terms();
  Ring<Source, vec_size> ring(TileStorage<Source, Real>::ring(), source.columns_from(column));
  const auto prefetch_term = [&](int i) {
    if (i < count) {
      prefetch(terms[i].target);
      ring.copy(i, source.slice_at(terms[i].row_offset, column));
    }
    cp_async_commit();
  };

  for (int i = 0; i < kAhead; ++i) {
    prefetch_term(i);
  }
  SliceValues<Real, vec_size> sum = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    prefetch_term(i + kAhead);
    cp_async_wait<kAhead>();
    const Term<Real> term = terms[i];
    const RawSliceValues<Source, vec_size> row = ring.read(i);
    for_each_vec([&](int k) {
      const Vec<Real, vec_size> values = widen_vec(row.vecs[k]);
      for_each_element<vec_size>([&](int e) {
        Real& value = sum.vecs[k].values[e];
        value = std::fma(term.coefficient, values.values[e], value);
      });
    });
    if (term.target != kContinueSegment) {
      finish(i, term.target, sum);
      sum = {};
    }
  }
}

struct TileShape {
  int positions;  // of a tile
  int warps;      // of a block: one per slice, or one per equal number of slices
};

// Launch regimes:
//
//   few terms     the smallest tiles
//   more terms    two waves of warps, so that SMs idle only shortly at the end
//   many terms    the largest tiles, so that reading terms is a small part of the work
//
// Results do not depend on the shape.
template <int vec_size>
TileShape choose_tile_shape(int64_t terms, int64_t width) {
  constexpr int64_t kMinPositions = 8;
  constexpr int64_t kWarpsPerSm = 2 * 64;  // in two waves
  const int64_t slices = count_slices(width, kSliceColumns<vec_size>);
  const int64_t rounds = (slices + kMaxWarpsPerTile - 1) / kMaxWarpsPerTile;
  const int64_t warps = (slices + rounds - 1) / rounds;
  const int64_t two_waves_of_tiles = sm_count() * kWarpsPerSm / warps;
  const int64_t positions =
      std::clamp<int64_t>(terms / two_waves_of_tiles, kMinPositions, kMaxPositions);
  return {.positions = int(positions), .warps = int(warps)};
}

template <class Source, class Real>
LaunchShape launch_shape(const TileShape& shape, int64_t terms, int64_t extra_shared_bytes = 0) {
  return {.blocks = (terms + shape.positions - 1) / shape.positions,
          .threads = shape.warps * kWarp,
          .shared_bytes = TileStorage<Source, Real>::bytes(shape.warps) + extra_shared_bytes};
}

}  // namespace peer::cuda
