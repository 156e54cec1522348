// Sums of rows of a source, each multiplied by a coefficient. table_grad stores the sums, and
// table_update applies them.
//
//   sum = Σ over consecutive terms of coefficient·source[row]
//
// A block takes a tile of terms: the terms of the sums that start at up to 64 consecutive positions
// of a list. It reads the terms into shared memory. Each of its warps then goes through all terms
// with one slice of the columns, or with several slices one after the other. What a term costs
// besides its columns is paid once per warp, so slices are as large as registers allow: one warp
// takes rows of up to 2 KiB. Of rows of at most 256 bytes, a warp takes two tiles at once, with 16
// lanes each.
//
// The rows of the source stay in the L2 cache. Each warp copies them from there to shared memory,
// three slices ahead of the sum. A sum ends at any term, often after a single one, so copying
// continues across the ends of sums, and the code for an end is compiled once, not once for each
// row in flight.
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
//   rows              row i of the source is the sum for row i of the output, or for row ids[i]
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
  // Rows.
  const int64_t* ids = nullptr;

  __device__ int32_t count() const { return actual_count ? *actual_count : max_count; }

  // For a list of rows.
  __device__ int32_t row_of_output(int32_t position) const {
    return ids ? int32_t(ids[position]) : position;
  }

  __device__ bool starts_sum(int64_t position) const {
    return position == 0 || !targets || targets[position - 1] != kContinueSegment;
  }

  __device__ Term<Real> term(int32_t position, int64_t source_stride) const {
    if (split_segments) {
      const SplitSegment segment = split_segments[position];
      return {segment.first * source_stride, segment.row, Real(1)};
    }
    if (!pair_ids) {
      return {position * source_stride, row_of_output(position), Real(1)};
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
TermList<Real> terms_of_rows(int64_t rows, const int64_t* ids) {
  return {.max_count = int32_t(rows), .ids = ids};
}

template <class Real>
TermList<Real> terms_of_split_segments(const Segments& segments) {
  return {.max_count = int32_t(segments.max_split_segments),
          .actual_count = &segments.counts->split_segments,
          .split_segments = segments.split_segments.get()};
}

// The first position from `position` on at which a sum starts, or the list's end. Called by all
// lanes of a warp; `lanes` neighbouring ones have the same position.
template <int lanes, class Real>
__device__ int32_t find_sum_start(const TermList<Real>& list, int32_t count, int64_t position) {
  constexpr unsigned kOwnLanes = kAllLanes >> (kWarp - lanes);
  int64_t found = -1;
  do {
    const int64_t mine = position + lane() % lanes;
    const unsigned ballot = __ballot_sync(kAllLanes, mine >= count || list.starts_sum(mine));
    const unsigned starts = ballot >> lane() / lanes * lanes & kOwnLanes;
    if (found < 0 && starts != 0) {
      found = position + __ffs(int(starts)) - 1;
    }
    position += lanes;
  } while (__ballot_sync(kAllLanes, found < 0) != 0);
  return int32_t(found < count ? found : count);
}

constexpr int kMaxPositions = 64;
constexpr int kMaxTerms = kMaxPositions + kPairsPerChunk - 1;
constexpr int kMaxWarpsPerTile = 16;

// The number of slices in a warp's ring buffer: one being added, the others in flight.
constexpr int kRowsInRing = 4;

// The shared memory of a block: the ring buffers of its warps, then the terms of its tiles. If a
// slice has all lanes of a warp, all warps of a block have one tile. Otherwise, a block is one warp
// with a tile for each of its slices.
template <class Form, class Source, class Real>
struct TileStorage {
  static constexpr int kTiles = kWarp / Form::kLanes;
  static constexpr int64_t kRingBytes = kRowsInRing * Form::kColumns * int64_t(sizeof(Source));
  static constexpr int64_t kTermBytes = kMaxTerms * int64_t(sizeof(Term<Real>));

  // Rings of at most 64 KiB in a block.
  static constexpr int kMaxWarps =
      kTiles > 1 ? 1 : int(std::min((int64_t(64) << 10) / kRingBytes, int64_t(kMaxWarpsPerTile)));

  static constexpr int64_t bytes(int warps) { return kTiles * (warps * kRingBytes + kTermBytes); }
  static __device__ int tile_of_lane() { return lane() / Form::kLanes; }
  static __device__ Source* ring() {
    return reinterpret_cast<Source*>(peer_shared_memory +
                                     (warp_in_block() * kTiles + tile_of_lane()) * kRingBytes);
  }
  static __device__ Term<Real>* terms() {
    unsigned char* const first = peer_shared_memory + int(blockDim.x) / kWarp * kTiles * kRingBytes;
    return reinterpret_cast<Term<Real>*>(first + tile_of_lane() * kTermBytes);
  }
};

// Reads the terms of the thread's tile into shared memory and returns their number. Calls
// prepare(i, term) for each, by one thread. Called by all threads of the block.
template <class Form, class Source, class Real, class Prepare>
__device__ int read_terms(const TermList<Real>& list,
                          int positions,
                          int64_t source_stride,
                          const Prepare& prepare) {
  using Storage = TileStorage<Form, Source, Real>;
  constexpr int lanes = Form::kLanes;
  const int32_t count = list.count();
  const int64_t tile = int64_t(blockIdx.x) * Storage::kTiles + Storage::tile_of_lane();
  const int32_t first = find_sum_start<lanes>(list, count, tile * positions);
  const int32_t end = find_sum_start<lanes>(list, count, (tile + 1) * positions);
  Term<Real>* const terms = Storage::terms();
  const int threads = lanes < kWarp ? lanes : int(blockDim.x);
#pragma unroll 1
  for (int i = int(threadIdx.x) % threads; i < end - first; i += threads) {
    const Term<Real> term = list.term(first + i, source_stride);
    terms[i] = term;
    prepare(i, term);
  }
  __syncthreads();
  return end - first;
}

// The same for a list of rows, without the frozen ones. Every warp counts the others; the first one
// writes their terms.
template <class Form, class Source, class Real, class Prepare>
__device__ int read_trained_rows(const TermList<Real>& list,
                                 int positions,
                                 int64_t source_stride,
                                 const bool* frozen,
                                 const Prepare& prepare) {
  static_assert(Form::kLanes == kWarp);
  const int64_t begin = int64_t(blockIdx.x) * positions;
  Term<Real>* const terms = TileStorage<Form, Source, Real>::terms();
  int trained = 0;
#pragma unroll 1
  for (int first = 0; first < positions; first += kWarp) {
    const int64_t row = begin + first + lane();
    const bool is_trained = first + lane() < positions && row < list.max_count &&
                            !frozen[list.row_of_output(int32_t(row))];
    const unsigned ballot = __ballot_sync(kAllLanes, is_trained);
    if (is_trained && warp_in_block() == 0) {
      const int i = trained + count_lower_lanes(ballot);
      const Term<Real> term = list.term(int32_t(row), source_stride);
      terms[i] = term;
      prepare(i, term);
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

// A ring buffer: slices of the rows that are added next. A lane reads only what it wrote, so lanes
// need not wait for each other.
template <class Source, class Form>
class Ring {
 public:
  // Columns beyond the row's end are zeros in all rows, so they are written once.
  __device__ Ring(Source* memory, int columns) : memory_(memory + Form::lane_column(0)) {
    for (int i = 0; i < kRowsInRing; ++i) {
      for_each_vec<Form>([&](int k) {
        if (Form::vec_offset(k) >= columns) {
          store_vec(slot(i), k, {});
        }
      });
    }
  }

  // Vectors are copied asynchronously. Rows that are not vectorizable are copied at once. Most
  // lanes have all of their vectors; one test then replaces one for each.
  __device__ void copy(int i, const Slice<const Source, Form>& row) {
    const Slice<Source, Form> target = slot(i);
    if (!row.is_vectorizable) {
      store(target, load(row));
    } else if (row.has_vec(Form::kVecs - 1)) {
      for_each_vec<Form>([&](int k) { cp_async(target.vec_address(k), row.vec_address(k)); });
    } else {
      for_each_vec<Form>([&](int k) {
        if (row.has_vec(k)) {
          cp_async(target.vec_address(k), row.vec_address(k));
        }
      });
    }
  }

  __device__ RawSliceValues<Source, Form> read(int i) const { return load(slot(i)); }

 private:
  __device__ Slice<Source, Form> slot(int i) const {
    return {memory_ + i % kRowsInRing * Form::kColumns, Form::kColumns, true};
  }

  Source* memory_;
};

// Adds the terms of the thread's tile, for the lane's columns from `column` on. Calls
// prefetch(target) for each term kRowsInRing - 1 terms before it is added, and
// finish(i, target, sum) if a sum ends with term i.
template <class Real, class Source, class Form, class Prefetch, class Finish>
__device__ void add_terms(int count,
                          const SlicedRows<const Source, Form>& source,
                          int64_t column,
                          const Prefetch& prefetch,
                          const Finish& finish) {
  using Storage = TileStorage<Form, Source, Real>;
  constexpr int kAhead = kRowsInRing - 1;
  const Term<Real>* const terms = Storage::terms();
  Ring<Source, Form> ring(Storage::ring(), source.columns_from(column));
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
  SliceValues<Real, Form> sum = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    prefetch_term(i + kAhead);
    cp_async_wait<kAhead>();
    const Term<Real> term = terms[i];
    const RawSliceValues<Source, Form> row = ring.read(i);
    for_each_vec<Form>([&](int k) {
      const auto values = widen_vec(row.vecs[k]);
      for_each_element<Form>([&](int e) {
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
template <class Form, class Source, class Real>
TileShape choose_tile_shape(int64_t terms, int64_t width) {
  using Storage = TileStorage<Form, Source, Real>;
  constexpr int64_t kMinPositions = 8;
  constexpr int64_t kWarpsPerSm = 2 * 64;  // in two waves
  const int64_t slices = count_slices(width, Form::kColumns);
  const int64_t rounds = (slices + Storage::kMaxWarps - 1) / Storage::kMaxWarps;
  const int64_t warps = (slices + rounds - 1) / rounds;
  const int64_t two_waves_of_tiles = sm_count() * kWarpsPerSm * Storage::kTiles / warps;
  const int64_t positions =
      std::clamp<int64_t>(terms / two_waves_of_tiles, kMinPositions, kMaxPositions);
  return {.positions = int(positions), .warps = int(warps)};
}

template <class Form, class Source, class Real>
LaunchShape launch_shape(const TileShape& shape, int64_t terms, int64_t extra_shared_bytes = 0) {
  using Storage = TileStorage<Form, Source, Real>;
  const int64_t positions = int64_t(shape.positions) * Storage::kTiles;
  return {.blocks = (terms + positions - 1) / positions,
          .threads = shape.warps * kWarp,
          .shared_bytes = Storage::bytes(shape.warps) + extra_shared_bytes};
}

// Calls body.template operator()<Form>() with a form for rows of a source. Sums over rows do not
// depend on it.
template <class Source, class Body>
void with_slice_form(int64_t width, const Body& body) {
  constexpr int vec_size = kVecSize<Source>;
  const int64_t vecs = (width + vec_size - 1) / vec_size;
  if (vecs <= kWarp / 2) {
    body.template operator()<SliceForm<vec_size, 1, kWarp / 2>>();
  } else if (vecs <= kWarp) {
    body.template operator()<SliceForm<vec_size, 1>>();
  } else if (vecs <= 2 * kWarp) {
    body.template operator()<SliceForm<vec_size, 2>>();
  } else {
    body.template operator()<SliceForm<vec_size, 4>>();
  }
}

}  // namespace peer::cuda
