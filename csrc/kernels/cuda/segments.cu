// Segments: pairs sorted by owner (the table row that each pair retrieved), and the target of every
// sum over them.
//
// Sorting     a stable radix sort of pair ids by owner, over as many bits as owners have. Frozen
//             owners have one key, above the others: the number of owners
// Targets     one per sorted position (segment_chunks.h). A scan over tiles of positions: tiles
//             count what ends in them, one block scans the counts, tiles write the targets
// One thread  one position. Its neighbours tell what ends there; only in segments of at least a
//             chunk does it search for the segment's start. Threads behind the last segment, of
//             frozen pairs, write nothing
// Traffic     12 bytes per pair in addition to the sort's: 4 read twice, 4 written; with a mask, a
//             byte of it per pair
// Exactness   everything is determined by the owners; the host reads nothing
// Requires    fewer than 2^31 pairs and owners
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/check_row.h"
#include "kernels/cuda/segment_chunks.h"
#include "kernels/cuda/segments.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

namespace {

using Counts = SegmentCounts;

constexpr int kTileSize = 512;     // positions per block, one per thread
constexpr int kScanThreads = 256;  // of the block that scans the counts of tiles

__device__ Counts operator+(const Counts& a, const Counts& b) {
  return {a.owners + b.owners, a.split_segments + b.split_segments,
          a.partial_rows + b.partial_rows};
}

__device__ Counts shuffle_up(const Counts& counts, int distance) {
  return {__shfl_up_sync(kAllLanes, counts.owners, distance),
          __shfl_up_sync(kAllLanes, counts.split_segments, distance),
          __shfl_up_sync(kAllLanes, counts.partial_rows, distance)};
}

__device__ int64_t thread_position() { return int64_t(blockIdx.x) * kTileSize + threadIdx.x; }

// An exclusive scan over the warps of a block.
struct WarpScan {
  Counts before;  // the sum over lower warps
  Counts total;
};

// Called by all threads of the block. A warp's counts are those of its last lane.
__device__ WarpScan scan_warps(const Counts& counts) {
  Counts* const warp_counts = reinterpret_cast<Counts*>(peer_shared_memory);
  if (lane() == kWarp - 1) {
    warp_counts[warp_in_block()] = counts;
  }
  __syncthreads();
  WarpScan scan = {};
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
    if (warp == warp_in_block()) {
      scan.before = scan.total;
    }
    scan.total = scan.total + warp_counts[warp];
  }
  __syncthreads();  // warp_counts may be overwritten
  return scan;
}

LaunchShape scan_shape(int64_t blocks, int threads) {
  return {blocks, threads, threads / kWarp * int64_t(sizeof(Counts))};
}

// What ends in a warp, one bit per lane.
struct WarpEnds {
  unsigned segments, split_segments, partial_rows;

  __device__ Counts count() const {
    return {__popc(segments), __popc(split_segments), __popc(partial_rows)};
  }
  __device__ Counts count_in_lower_lanes() const {
    return {count_lower_lanes(segments), count_lower_lanes(split_segments),
            count_lower_lanes(partial_rows)};
  }
};

__device__ WarpEnds ballot_ends(const PairEnds& ends) {
  return {__ballot_sync(kAllLanes, ends.segment),
          __ballot_sync(kAllLanes, ends.segment && ends.is_split),
          __ballot_sync(kAllLanes, ends.chunk && ends.is_split)};
}

__global__ void make_pair_ids(const int64_t* owners,
                              int32_t count,
                              int64_t owner_count,
                              const bool* frozen,
                              int32_t* sort_keys,
                              int32_t* pair_ids) {
  const int64_t i = thread_position();
  if (i >= count) {
    return;
  }
  const int64_t owner = owners[i];
  check_row(owner, i, owner_count);
  sort_keys[i] = int32_t(frozen && frozen[owner] ? owner_count : owner);
  pair_ids[i] = int32_t(i);
}

// The sorted keys of pairs: their owners, then those of frozen pairs.
struct SortedKeys {
  const int32_t* keys;
  int32_t count;
  int32_t owner_count;

  __device__ bool is_in_segment(int64_t i) const { return i < count && keys[i] < owner_count; }
  __device__ PairEnds ends_at(int64_t i) const {
    return is_in_segment(i) ? cuda::ends_at(keys, count, int32_t(i)) : PairEnds{};
  }
};

__global__ void count_ends(SortedKeys sorted, Counts* tiles) {
  const PairEnds ends = sorted.ends_at(thread_position());
  const Counts total = scan_warps(ballot_ends(ends).count()).total;
  if (threadIdx.x == 0) {
    tiles[blockIdx.x] = total;
  }
}

// One block. An exclusive scan of the counts of tiles, in place.
__global__ void scan_tiles(Counts* tiles, int32_t tile_count, Counts* total) {
  Counts sum = {};
  for (int32_t first = 0; first < tile_count; first += int32_t(blockDim.x)) {
    const int32_t tile = first + int32_t(threadIdx.x);
    Counts up_to_lane = tile < tile_count ? tiles[tile] : Counts{};
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Counts lower = shuffle_up(up_to_lane, distance);
      up_to_lane = up_to_lane + (lane() >= distance ? lower : Counts{});
    }
    const WarpScan warps = scan_warps(up_to_lane);
    const Counts lower = shuffle_up(up_to_lane, 1);
    if (tile < tile_count) {
      tiles[tile] = sum + warps.before + (lane() == 0 ? Counts{} : lower);
    }
    sum = sum + warps.total;
  }
  if (threadIdx.x == 0) {
    *total = sum;
  }
}

// trained_count: null if no owner can be frozen.
__global__ void write_targets(SortedKeys sorted,
                              OutputRows rows,
                              const Counts* before_tiles,
                              int32_t* trained_count,
                              int32_t* targets,
                              int32_t* distinct_owners,
                              SplitSegment* split_segments) {
  const int64_t i = thread_position();
  const PairEnds ends = sorted.ends_at(i);
  const WarpEnds warp_ends = ballot_ends(ends);
  const Counts before_warp = before_tiles[blockIdx.x] + scan_warps(warp_ends.count()).before;
  if (!sorted.is_in_segment(i)) {
    if (trained_count && i == 0) {
      *trained_count = 0;
    }
    return;
  }
  if (trained_count && ends.segment && !sorted.is_in_segment(i + 1)) {
    *trained_count = int32_t(i + 1);
  }
  if (!ends.chunk) {
    targets[i] = kContinueSegment;
    return;
  }
  const Counts before = before_warp + warp_ends.count_in_lower_lanes();
  const int32_t owner = sorted.keys[i];
  const int32_t row = rows == OutputRows::compact ? before.owners : owner;
  targets[i] = ends.is_split ? to_partial_row(before.partial_rows) : row;
  if (ends.segment && rows == OutputRows::compact) {
    distinct_owners[before.owners] = owner;
  }
  if (ends.segment && ends.is_split) {
    split_segments[before.split_segments] = {before.partial_rows + 1 - ends.chunks, ends.chunks,
                                             row};
  }
}

// The number of bits of the largest key.
int count_key_bits(int64_t key_count) {
  int bits = 0;
  while ((key_count - 1) >> bits > 0) {
    ++bits;
  }
  return bits;
}

struct Pairs {
  std::shared_ptr<int32_t> keys, ids;
};

Pairs sort_stably(const Pairs& given, int32_t count, int64_t key_count, const Context& context) {
  const int bits = count_key_bits(key_count);
  if (bits == 0) {
    return given;
  }
  const Pairs sorted = {context.array<int32_t>(count), context.array<int32_t>(count)};
  const auto sort = [&](void* workspace, size_t& workspace_bytes) {
    check(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, given.keys.get(),
                                          sorted.keys.get(), given.ids.get(), sorted.ids.get(),
                                          count, 0, bits, context.stream),
          "pairs were not sorted");
  };
  size_t workspace_bytes = 0;
  sort(nullptr, workspace_bytes);
  const auto workspace = context.allocate(int64_t(workspace_bytes));
  sort(workspace.get(), workspace_bytes);
  return sorted;
}

}  // namespace

Segments make_segments(const int64_t* owners,
                       int64_t count,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       const Context& context) {
  Segments segments;
  if (count == 0) {
    return segments;
  }
  const int64_t tile_count = (count + kTileSize - 1) / kTileSize;
  const LaunchShape per_tile = scan_shape(tile_count, kTileSize);
  const int32_t narrow_count = int32_t(count);

  const Pairs given = {context.array<int32_t>(count), context.array<int32_t>(count)};
  launch(make_pair_ids, per_tile, context.stream, owners, narrow_count, owner_count, frozen,
         given.keys.get(), given.ids.get());
  const int64_t key_count = owner_count + (frozen ? 1 : 0);
  const Pairs sorted = sort_stably(given, narrow_count, key_count, context);
  const SortedKeys sorted_keys = {sorted.keys.get(), narrow_count, int32_t(owner_count)};

  segments.count = count;
  segments.trained_count = frozen ? context.array<int32_t>(1) : nullptr;
  segments.pair_ids = sorted.ids;
  segments.max_split_segments = max_split_segments(count, owner_count);
  segments.max_partial_rows = max_partial_rows(count, owner_count);
  segments.targets = context.array<int32_t>(count);
  segments.distinct_owners = context.array<int32_t>(rows == OutputRows::compact ? count : 0);
  segments.split_segments = context.array<SplitSegment>(segments.max_split_segments);
  segments.counts = context.array<Counts>(1);
  const auto tiles = context.array<Counts>(tile_count);
  launch(count_ends, per_tile, context.stream, sorted_keys, tiles.get());
  launch(scan_tiles, scan_shape(1, kScanThreads), context.stream, tiles.get(), int32_t(tile_count),
         segments.counts.get());
  launch(write_targets, per_tile, context.stream, sorted_keys, rows, tiles.get(),
         segments.trained_count.get(), segments.targets.get(), segments.distinct_owners.get(),
         segments.split_segments.get());
  return segments;
}

DistinctOwnerCount::DistinctOwnerCount(const Segments& segments, const Context& context)
    : counts_(segments.count > 0
                  ? std::make_unique<ReadBack<SegmentCounts>>(segments.counts.get(), context)
                  : nullptr) {}

int64_t DistinctOwnerCount::wait() const { return counts_ ? counts_->wait().owners : 0; }

}  // namespace peer::cuda
