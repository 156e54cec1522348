// Sorted pairs: from a list of owners (which expert did each pair retrieve?) to the order in which
// the expert pass takes the pairs, and where the sums over them go.
//
// Sorting     a stable radix sort of pair numbers by owner, over as many bits as owners have
// Work list   one target per sorted position (chunks.h). Tiles of positions count what ends in
//             them, one block adds the counts up over all tiles, tiles write what begins there.
// One thread  one position, whose neighbours tell what ends there; only within runs of a chunk and
//             more it searches for the run's start
// Traffic     12 bytes per pair besides the sort's: 4 read twice, 4 written
// Exactness   everything is determined by the owners; nothing is known to the host
// Requires    fewer than 2^31 pairs, and owners
#include <cstdio>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/segments.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

namespace {

using Counts = SegmentCounts;

constexpr int kTile = 512;         // positions, and threads
constexpr int kTilesAtOnce = 256;  // that are added up, and threads

__device__ Counts operator+(const Counts& a, const Counts& b) {
  return {a.owners + b.owners, a.split_segments + b.split_segments,
          a.partial_rows + b.partial_rows};
}

__device__ Counts shuffle_up(const Counts& counts, int distance) {
  return {__shfl_up_sync(kAllLanes, counts.owners, distance),
          __shfl_up_sync(kAllLanes, counts.split_segments, distance),
          __shfl_up_sync(kAllLanes, counts.partial_rows, distance)};
}

__device__ int64_t position_of_thread() { return int64_t(blockIdx.x) * kTile + threadIdx.x; }

// Sums over the warps of a block.
struct SumsOfWarps {
  Counts before;  // of the warps before this one
  Counts all;
};

// By all threads of the block; each warp's counts are those of its last lane.
__device__ SumsOfWarps add_up_warps(const Counts& counts) {
  Counts* const of_warps = reinterpret_cast<Counts*>(peer_shared_memory);
  if (lane() == kWarp - 1) {
    of_warps[warp_in_block()] = counts;
  }
  __syncthreads();
  SumsOfWarps sums = {};
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) {
    if (warp == warp_in_block()) {
      sums.before = sums.all;
    }
    sums.all = sums.all + of_warps[warp];
  }
  __syncthreads();  // the memory may be written again
  return sums;
}

LaunchShape shape_of(int64_t blocks, int threads) {
  return {blocks, threads, threads / kWarp * int64_t(sizeof(Counts))};
}

// What ends in a warp, one bit per lane.
struct EndsInWarp {
  unsigned runs, split_segments, partial_rows;

  __device__ Counts count() const {
    return {__popc(runs), __popc(split_segments), __popc(partial_rows)};
  }
  __device__ Counts count_before_lane() const {
    return {count_before(runs), count_before(split_segments), count_before(partial_rows)};
  }
};

__device__ EndsInWarp vote(const PairEnds& ends) {
  return {__ballot_sync(kAllLanes, ends.run), __ballot_sync(kAllLanes, ends.run && ends.is_split),
          __ballot_sync(kAllLanes, ends.chunk && ends.is_split)};
}

__global__ void number_pairs(const int64_t* owners,
                             int32_t count,
                             int64_t owner_count,
                             int32_t* narrow_owners,
                             int32_t* numbers) {
  const int64_t i = position_of_thread();
  if (i >= count) {
    return;
  }
  const int64_t owner = owners[i];
  if (owner < 0 || owner >= owner_count) {
    printf("peer: index %lld at position %lld is out of range for %lld rows\n", (long long)(owner),
           (long long)(i), (long long)(owner_count));
    __trap();
  }
  narrow_owners[i] = int32_t(owner);
  numbers[i] = int32_t(i);
}

__global__ void count_in_tiles(const int32_t* owners, int32_t count, Counts* tiles) {
  const int64_t i = position_of_thread();
  const PairEnds ends = i < count ? ends_at(owners, count, int32_t(i)) : PairEnds{};
  const Counts all = add_up_warps(vote(ends).count()).all;
  if (threadIdx.x == 0) {
    tiles[blockIdx.x] = all;
  }
}

// One block. Each tile's counts become the sum over the tiles before it.
__global__ void add_up_tiles(Counts* tiles, int32_t tile_count, Counts* total) {
  Counts sum = {};
  for (int32_t first = 0; first < tile_count; first += int32_t(blockDim.x)) {
    const int32_t tile = first + int32_t(threadIdx.x);
    Counts up_to_lane = tile < tile_count ? tiles[tile] : Counts{};
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Counts lower = shuffle_up(up_to_lane, distance);
      up_to_lane = up_to_lane + (lane() >= distance ? lower : Counts{});
    }
    const SumsOfWarps warps = add_up_warps(up_to_lane);
    const Counts lower = shuffle_up(up_to_lane, 1);
    if (tile < tile_count) {
      tiles[tile] = sum + warps.before + (lane() == 0 ? Counts{} : lower);
    }
    sum = sum + warps.all;
  }
  if (threadIdx.x == 0) {
    *total = sum;
  }
}

__global__ void list_targets(const int32_t* owners,
                             int32_t count,
                             OutputRows rows,
                             const Counts* before_tiles,
                             int32_t* targets,
                             int32_t* distinct_owners,
                             SplitSegment* split_segments) {
  const int64_t i = position_of_thread();
  const PairEnds ends = i < count ? ends_at(owners, count, int32_t(i)) : PairEnds{};
  const EndsInWarp in_warp = vote(ends);
  const Counts before_warp = before_tiles[blockIdx.x] + add_up_warps(in_warp.count()).before;
  if (i >= count) {
    return;
  }
  if (!ends.chunk) {
    targets[i] = kContinueSegment;
    return;
  }
  const Counts before = before_warp + in_warp.count_before_lane();
  const int32_t row = rows == OutputRows::compact ? before.owners : owners[i];
  targets[i] = ends.is_split ? to_partial_row(before.partial_rows) : row;
  if (ends.run && rows == OutputRows::compact) {
    distinct_owners[before.owners] = owners[i];
  }
  if (ends.run && ends.is_split) {
    split_segments[before.split_segments] = {before.partial_rows + 1 - ends.chunks, ends.chunks,
                                             row};
  }
}

int bits_of(int64_t owner_count) {
  int bits = 0;
  while ((owner_count - 1) >> bits > 0) {
    ++bits;
  }
  return bits;
}

struct Order {
  std::shared_ptr<int32_t> owners, numbers;
};

Order sort_stably(const Order& given, int32_t count, int64_t owner_count, const Context& context) {
  const int bits = bits_of(owner_count);
  if (bits == 0) {
    return given;
  }
  const Order sorted = {context.array<int32_t>(count), context.array<int32_t>(count)};
  const auto sort = [&](void* workspace, size_t& workspace_bytes) {
    check(cub::DeviceRadixSort::SortPairs(workspace, workspace_bytes, given.owners.get(),
                                          sorted.owners.get(), given.numbers.get(),
                                          sorted.numbers.get(), count, 0, bits, context.stream),
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
                       OutputRows rows,
                       const Context& context) {
  Segments pairs;
  if (count == 0) {
    return pairs;
  }
  const int64_t tile_count = (count + kTile - 1) / kTile;
  const LaunchShape per_tile = shape_of(tile_count, kTile);
  const int32_t narrow_count = int32_t(count);

  const Order given = {context.array<int32_t>(count), context.array<int32_t>(count)};
  launch(number_pairs, per_tile, context.stream, owners, narrow_count, owner_count,
         given.owners.get(), given.numbers.get());
  const Order sorted = sort_stably(given, narrow_count, owner_count, context);

  pairs.count = count;
  pairs.numbers = sorted.numbers;
  pairs.max_split_segments = max_split_segments(count, owner_count);
  pairs.max_partial_rows = max_partial_rows(count, owner_count);
  pairs.targets = context.array<int32_t>(count);
  pairs.distinct_owners = context.array<int32_t>(rows == OutputRows::compact ? count : 0);
  pairs.split_segments = context.array<SplitSegment>(pairs.max_split_segments);
  pairs.counts = context.array<Counts>(1);
  const auto tiles = context.array<Counts>(tile_count);
  launch(count_in_tiles, per_tile, context.stream, sorted.owners.get(), narrow_count, tiles.get());
  launch(add_up_tiles, shape_of(1, kTilesAtOnce), context.stream, tiles.get(), int32_t(tile_count),
         pairs.counts.get());
  launch(list_targets, per_tile, context.stream, sorted.owners.get(), narrow_count, rows,
         tiles.get(), pairs.targets.get(), pairs.distinct_owners.get(), pairs.split_segments.get());
  return pairs;
}

int64_t count_distinct_owners(const Segments& pairs, const Context& context) {
  if (pairs.count == 0) {
    return 0;
  }
  Counts counts;
  check(cudaMemcpyAsync(&counts, pairs.counts.get(), sizeof(counts), cudaMemcpyDeviceToHost,
                        context.stream),
        "counts were not copied");
  check(cudaStreamSynchronize(context.stream), "sorting pairs failed");
  return counts.owners;
}

}  // namespace peer::cuda
