// The k best keys of one half of some queries, among a range of keys. A block goes through the
// range in batches, whose sub-scores are in shared memory. A query's warp finds the keys that can
// be among the k best:
//
//   1. bound     if k groups of keys (score_tiles.h) have one that reaches the bound, the k best
//                keys reach it, too. So the bound is the k-th greatest of the groups' maxima, or
//                little less. A group is the same place of every batch, so that the bound rises
//                from batch to batch
//   2. collect   the scores that reach the bound, and their keys, are appended to a list
//   3. rank      after the last batch, or if the list is full, they become candidates
//                (warp_select.h), which are compared exactly
//
// Special scores. An infinite sub-score counts as the largest finite number of its sign, so a bound
// above that number becomes that number, and the lowest finite bound becomes -infinity. NaN ranks
// above all: it reaches every bound, but is not counted when a bound is chosen. Keys beyond the
// range and unused keys have the score -infinity. The former are never collected, the latter rank
// behind all others. The result does not depend on bounds, on batches, or on the division of the
// keys into ranges.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/score_tiles.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/warp_select.h"
#include "kernels/ordered.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

// A warp finds the bounds of kTeams queries at once, by kTeam lanes each.
constexpr int kTeam = 8;
constexpr int kTeams = kWarp / kTeam;

// The groups of a batch: kGroupsPerTile for each warp.
constexpr int kMaxGroups = 64;
constexpr int kMaxWarps = kMaxGroups / kGroupsPerTile;
constexpr int kGroupsPerLane = kMaxGroups / kTeam;

template <class Order>
using KeyList = CandidateList<Order, capacity_for(kMaxRetrieved)>;

// The maximum, or NaN if one value is NaN.
template <class Real>
__device__ Real nan_max(Real a, Real b) {
  return a < b || b != b ? b : a;
}

#ifdef __CUDA_ARCH__
template <>
__device__ inline float nan_max(float a, float b) {
  float maximum;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(maximum) : "f"(a), "f"(b));
  return maximum;
}
#endif

// The sub-score as it counts: an infinite one as the largest finite number of its sign. NaN stays.
template <class Real>
__device__ Real clamp_to_finite(Real score) {
  constexpr Real largest = std::numeric_limits<Real>::max();
  return nan_max(-nan_max(-score, -largest), -largest);
}

// The candidates of a list, and all of its items.
struct alignas(4) ListLengths {
  uint16_t candidates, all;
};

// The layout of a block's shared memory, in bytes from its start.
template <class Query, int queries>
class BestKeysMemory {
 public:
  using Real = accumulation_t<Query>;
  using Item = Packed<ordered_t<Real>>;

  BestKeysMemory(int k, int warps) : k_(k), warps_(warps) {
    scores_ = Stage<Query, queries>::kBytes;
    maxima_ = scores_ + queries * score_stride() * int(sizeof(Real));
    bests_ = maxima_ + queries * kMaxGroups * int(sizeof(Real));
    items_ = bests_ + queries * kMaxGroups * int(sizeof(Real));
    floors_ = items_ + queries * list_capacity() * int(sizeof(Item));
    lengths_ = floors_ + queries * int(sizeof(Item));
    bytes_ = lengths_ + queries * int(sizeof(ListLengths));
  }

  int bytes() const { return bytes_; }
  int threads() const { return warps_ * kWarp; }
  PEER_HOST_DEVICE int k() const { return k_; }
  PEER_HOST_DEVICE int warps() const { return warps_; }
  PEER_HOST_DEVICE int keys_per_batch() const { return warps_ * kKeysPerTile<Query>; }

  __device__ OperandVec<Query>* stage_vecs() const { return at<OperandVec<Query>>(0); }

  // The scores of a query, in order of groups.
  __device__ Real* scores(int query) const { return at<Real>(scores_) + query * score_stride(); }

  // The maxima of a batch's groups, and of all batches.
  __device__ Real* maxima(int query) const { return at<Real>(maxima_) + query * kMaxGroups; }
  __device__ Real* bests(int query) const { return at<Real>(bests_) + query * kMaxGroups; }

  // The list of a query, between batches.
  __device__ Item* items(int query) const { return at<Item>(items_) + query * list_capacity(); }
  __device__ ListLengths& lengths(int query) const { return at<ListLengths>(lengths_)[query]; }
  __device__ Item& floor(int query) const { return at<Item>(floors_)[query]; }

  // With this padding, lanes that write two scores of four queries use different banks.
  PEER_HOST_DEVICE int score_stride() const { return keys_per_batch() + 2; }

  PEER_HOST_DEVICE int list_capacity() const { return (capacity_for(k_) + 1) / 2 * 2; }

 private:
  template <class Item>
  __device__ static Item* at(int byte) {
    return reinterpret_cast<Item*>(peer_shared_memory + byte);
  }

  int k_, warps_;
  int scores_, maxima_, bests_, items_, floors_, lengths_, bytes_;
};

// The place of a group's maximum among those of a query. The order of vectors depends on the query,
// which avoids bank conflicts.
template <class Real>
__device__ int place_of_vec(int query, int vec) {
  return (vec ^ query % 8) * kVecSize<Real>;
}
template <class Real>
__device__ int place_of_group(int query, int group) {
  return place_of_vec<Real>(query, group / kVecSize<Real>) + group % kVecSize<Real>;
}

// The keys of a half that a block goes through.
template <class Query>
struct KeyRange {
  HalfRows<Query> rows;
  int64_t first, end;
  const bool* unused;  // null without a mask
};

// The part of the range whose scores are in shared memory.
struct KeyBatch {
  uint32_t first_id;
  uint32_t count;
  int groups;  // of whole tiles
};

// Gives unused keys and keys beyond the range the score -infinity.
template <bool is_masked, class Query, int queries>
__device__ void clear_unused_keys(ScoreTile<Query, queries>& tile,
                                  const KeyRange<Query>& range,
                                  int64_t first_key) {
  using Tile = ScoreTile<Query, queries>;
#pragma unroll
  for (int j = 0; j < Tile::kLaneKeys; ++j) {
    const int64_t key = first_key + Tile::key_at(Tile::place() + j);
    if (key >= range.end || (is_masked && range.unused[key])) {
#pragma unroll
      for (int i = 0; i < Tile::kLaneQueries; ++i) {
        tile.sum(i, j) = -std::numeric_limits<accumulation_t<Query>>::infinity();
      }
    }
  }
}

// Writes the scores and the maxima of a warp's tile.
template <class Query, int queries>
__device__ void store_tile(ScoreTile<Query, queries>& tile,
                           const BestKeysMemory<Query, queries>& memory) {
  using Tile = ScoreTile<Query, queries>;
  using Real = accumulation_t<Query>;
  constexpr int size = 2;  // sums in registers side by side
  const int place = warp_in_block() * kKeysPerTile<Query> + Tile::place();
  const int group = warp_in_block() * kGroupsPerTile + Tile::group_of_lane();
  Real* scores = memory.scores(Tile::query_of(0)) + place;
  Real* const maxima = memory.maxima(Tile::query_of(0));
#pragma unroll
  for (int i = 0; i < Tile::kLaneQueries; ++i) {
    Real maximum = std::fmax(tile.sum(i, 0), tile.sum(i, 1));  // NaN does not count
#pragma unroll
    for (int j = 0; j < Tile::kLaneKeys; j += size) {
      const Vec<Real, size> pair = {tile.sum(i, j), tile.sum(i, j + 1)};
      if (j > 0) {
        maximum = std::fmax(std::fmax(maximum, pair.values[0]), pair.values[1]);
      }
      *reinterpret_cast<Vec<Real, size>*>(scores + j) = pair;
    }
    scores += Tile::kQueryStep * memory.score_stride();
    maximum = Tile::group_max(maximum);
    if (Tile::is_first_of_group()) {
      // The order of vectors repeats after 8 queries.
      const int step = i * Tile::kQueryStep;
      const int place = place_of_group<Real>(Tile::query_of(0) + step % 8, group);
      maxima[step * kMaxGroups + place] = maximum;
    }
  }
}

// About 1 / count, of a count in [1, kMaxGroups].
__device__ inline float fast_reciprocal(int count) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(float(count)));
  return result;
#else
  return 1 / float(count);
#endif
}

// -1 if the sign bit is set, or 0.
template <class Real>
__device__ int sign_of(Real value) {
  ordered_t<Real> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return int(bits >> (8 * sizeof(bits) - 1));
}

// The bounds of the queries of a warp's teams. A lane returns that of its team. Without a query,
// the team takes part in the collectives.
template <class Query, int queries>
__device__ accumulation_t<Query> find_bound(const BestKeysMemory<Query, queries>& memory,
                                            int query,
                                            bool has_query) {
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;
  constexpr Real infinity = std::numeric_limits<Real>::infinity();
  constexpr Real largest = std::numeric_limits<Real>::max();
  constexpr int size = kVecSize<Real>;
  const int k = memory.k();
  // The maxima of all batches, without NaN.
  Real own[kGroupsPerLane];
  Real least = infinity;
  Real greatest = -infinity;
#pragma unroll
  for (int i = 0; i < kGroupsPerLane; i += size) {
    using RealVec = Vec<Real, size>;
    const int vec = lane() % kTeam + i / size * kTeam;
    const int place = place_of_vec<Real>(query, vec);
    auto& bests = *reinterpret_cast<RealVec*>(memory.bests(query) + place);
    RealVec maxima;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      maxima.values[e] = -infinity;
    }
    if (has_query) {
      // Of a short batch, these are maxima of the previous one, which are counted already.
      const RealVec batch = *reinterpret_cast<const RealVec*>(memory.maxima(query) + place);
      maxima = bests;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        maxima.values[e] = std::fmax(maxima.values[e], batch.values[e]);
      }
      bests = maxima;
    }
#pragma unroll
    for (int e = 0; e < size; ++e) {
      own[i + e] = maxima.values[e];
      least = std::fmin(least, maxima.values[e]);
      greatest = std::fmax(greatest, maxima.values[e]);
    }
  }
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    least = std::fmin(least, __shfl_xor_sync(kAllLanes, least, distance));
    greatest = std::fmax(greatest, __shfl_xor_sync(kAllLanes, greatest, distance));
  }
  // At least k maxima reach `low`, and none is above `high`, between which the bound is sought by
  // interpolation of the counts. Every third step bisects, so that the number of steps is limited.
  using Unsigned = std::make_unsigned_t<Order>;
  Order low = to_ordered(least);
  Order high = to_ordered(greatest);
  int reaching_low = kMaxGroups;
  int reaching_high = 0;
  const int enough = k + k / 4;
  for (int step = 1; __ballot_sync(kAllLanes, low < high) != 0; ++step) {
    const Unsigned range = Unsigned(high) - Unsigned(low);
    const int wanted = std::min((k + enough) / 2, reaching_low - 1);
    const float fraction =
        float(wanted - reaching_high) * fast_reciprocal(reaching_low - reaching_high);
    const auto distance = step % 3 == 0 ? range / 2 : Unsigned(float(range) * fraction);
    const Order middle = low < high ? Order(Unsigned(high) - std::min(distance, range - 1)) : low;
    const Real bound = from_ordered<Real>(middle);
    // The sign of a zero or of the difference of infinities may be set, too. Then the count is too
    // low, and so is the bound, which does no harm.
    int reaching = kGroupsPerLane;
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      reaching += sign_of(own[i] - bound);
    }
    for (int distance = kTeam / 2; distance > 0; distance /= 2) {
      reaching += __shfl_xor_sync(kAllLanes, reaching, distance);
    }
    if (reaching < k) {
      high = low < high ? middle - 1 : high;
      reaching_high = reaching;
    } else {
      low = middle;
      reaching_low = reaching;
      high = reaching <= enough ? low : high;
    }
  }
  const Real bound = from_ordered<Real>(low);
  return bound <= -largest ? -infinity : std::fmin(bound, largest);
}

// The keys of one query that may be among the k best: candidates, then collected scores. A
// collected score has its bits in place of the order.
template <bool is_masked, class Real>
struct CollectedKeys {
  using Order = ordered_t<Real>;
  using Bits = std::make_unsigned_t<Order>;
  using Item = Packed<Order>;

  KeyList<Order> candidates;
  int end;
  const bool* unused;

  __device__ bool has_room(int count) const { return end + count <= candidates.capacity; }

  // Makes room for a score of each lane.
  __device__ void make_room(int count) {
    rank();
    if (!has_room(count)) {
      candidates.keep_best();
      end = candidates.length;
    }
  }

  // Appends a score of each lane in `collecting`, or 0 if its key is beyond the range.
  __device__ void append(unsigned collecting, Real score, uint32_t id, bool is_in_range) {
    if (collecting >> lane() & 1) {
      Bits bits;
      std::memcpy(&bits, &score, sizeof(bits));
      candidates.items[end + count_lower_lanes(collecting)] =
          is_in_range ? Item(bits) << 32 | uint32_t(~id) : Item(0);
    }
    end += __popc(collecting);
  }

  // Turns the collected scores into candidates.
  __device__ void rank() {
    __syncwarp();
    for (int first = candidates.length; first < end; first += kWarp) {
      const int i = first + lane();
      const Item collected = i < end ? candidates.items[i] : Item(0);
      __syncwarp();
      const auto bits = Bits(collected >> 32);
      Real score;
      std::memcpy(&score, &bits, sizeof(score));
      const int32_t id = id_of<Order>(collected);
      const bool is_unused = is_masked && collected != 0 && unused[id];
      const Order order = is_unused ? unused_key_order<Real>() : to_ordered(clamp_to_finite(score));
      candidates.add(collected != 0 ? pack(order, uint32_t(id)) : Item(0));
    }
    __syncwarp();
    end = candidates.length;
  }
};

// Collects the keys of a batch that reach the bound. Called by one warp.
template <bool is_masked, class Query, int queries, class Real = accumulation_t<Query>>
__device__ void collect_keys(CollectedKeys<is_masked, Real>& keys,
                             const BestKeysMemory<Query, queries>& memory,
                             const KeyBatch& batch,
                             int query,
                             Real bound) {
  using Tile = ScoreTile<Query, queries>;
  constexpr unsigned keys_per_tile = kKeysPerTile<Query>;
  constexpr unsigned keys_per_step = 2 * kWarp;
  constexpr int max_steps = int(kMaxWarps * keys_per_tile / keys_per_step);
  static_assert(2 * max_steps <= 32);
  const unsigned place_of_lane = 2 * lane();
  const Real* scores = memory.scores(query);
  uint32_t reaching = 0;  // bit 2i + j: the j-th of the lane's two scores of step i
#pragma unroll
  for (int i = 0; i < max_steps; ++i) {
    if (i * keys_per_step < unsigned(batch.groups * kKeysPerGroup<Query>)) {
      const auto pair =
          *reinterpret_cast<const Vec<Real, 2>*>(scores + i * keys_per_step + place_of_lane);
      reaching |= pair.values[0] < bound ? 0 : 1u << 2 * i;
      reaching |= pair.values[1] < bound ? 0 : 2u << 2 * i;
    }
  }
  // The two scores of a step are those of keys at a fixed distance. The same keys follow in every
  // step.
  const unsigned key_of_lane =
      Tile::key_at(place_of_lane % keys_per_tile) + place_of_lane / keys_per_tile * keys_per_tile;
  const bool is_tight = !keys.has_room(__reduce_add_sync(kAllLanes, __popc(reaching)));
  for (unsigned collecting; (collecting = __ballot_sync(kAllLanes, reaching != 0)) != 0;) {
    if (is_tight && !keys.has_room(__popc(collecting))) {
      keys.make_room(__popc(collecting));
    }
    const unsigned bit = 31u - unsigned(__clz(int(reaching | 1u)));
    const unsigned step = bit / 2 * keys_per_step;
    const unsigned key = step + bit % 2 * Tile::kKeysBetweenPlaces + key_of_lane;
    keys.append(collecting, scores[step + place_of_lane + bit % 2], batch.first_id + key,
                key < batch.count);
    reaching &= ~(1u << bit);
  }
}

// Writes the k best keys of each of a block's queries, best first. Places without a key are 0. The
// result of a query is at best(query). Called by all threads of the block.
template <bool is_masked, class Query, int queries, class Best>
__device__ void find_best_keys(const HalfRows<Query>& query_rows,
                               const KeyRange<Query>& range,
                               const BestKeysMemory<Query, queries>& memory,
                               const Best& best) {
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;
  using Item = Packed<Order>;
  const int query_count = int(query_rows.count);
  const int warps = memory.warps();
  const int k = memory.k();
  // With a barrier before the first scores.
  for (int i = int(threadIdx.x); i < queries * kMaxGroups; i += int(blockDim.x)) {
    memory.maxima(0)[i] = -std::numeric_limits<Real>::infinity();
    memory.bests(0)[i] = -std::numeric_limits<Real>::infinity();
  }
  for (int64_t first = range.first; first < range.end; first += memory.keys_per_batch()) {
    const bool is_first = first == range.first;
    const bool is_last = first + memory.keys_per_batch() >= range.end;
    const int count = int(std::min<int64_t>(memory.keys_per_batch(), range.end - first));
    const KeyBatch batch = {
        .first_id = uint32_t(first),
        .count = uint32_t(count),
        .groups = divide_up(count, kKeysPerTile<Query>) * kGroupsPerTile,
    };
    const int first_of_warp = warp_in_block() * kKeysPerTile<Query>;
    const bool is_used = first_of_warp < count;
    {
      ScoreTile<Query, queries> tile(range.rows, first + first_of_warp);
      multiply_tile<Query, queries>(query_rows, range.rows, memory.stage_vecs(), is_first, is_used,
                                    tile);
      __syncthreads();  // the scores of the previous batch are read
      if (is_used) {
        if (is_masked || first_of_warp + kKeysPerTile<Query> > count) {
          clear_unused_keys<is_masked, Query, queries>(tile, range, first + first_of_warp);
          store_tile<Query, queries>(tile, memory);
        } else {  // a branch of its own, so that no sums are moved between registers
          store_tile<Query, queries>(tile, memory);
        }
      }
    }
    __syncthreads();
    for (int base = warp_in_block(); base < query_count; base += warps * kTeams) {
      const int team_query = base + lane() / kTeam * warps;
      const Real team_bound = find_bound(memory, team_query, team_query < query_count);
      for (int team = 0; team < kTeams; ++team) {
        const int query = base + team * warps;
        if (query >= query_count) {
          break;
        }
        const Real bound = __shfl_sync(kAllLanes, team_bound, team * kTeam);
        const ListLengths lengths = is_first ? ListLengths{0, 0} : memory.lengths(query);
        CollectedKeys<is_masked, Real> keys = {
            .candidates = {.items = memory.items(query),
                           .capacity = memory.list_capacity(),
                           .k = k,
                           .length = lengths.candidates,
                           .floor = is_first ? Item(0) : memory.floor(query)},
            .end = lengths.all,
            .unused = range.unused,
        };
        collect_keys(keys, memory, batch, query, bound);
        KeyList<Order>& list = keys.candidates;
        if (!is_last) {
          __syncwarp();
          if (lane() == 0) {
            memory.lengths(query) = {uint16_t(list.length), uint16_t(keys.end)};
            memory.floor(query) = list.floor;
          }
          continue;
        }
        keys.rank();
        if (list.length > kWarp) {
          list.keep_from(pack_lowest(to_ordered(bound)));
        }
        Item* sorted = best(query);
        list.visit_best([&](int rank, Item key) { sorted[rank] = key; });
        for (int i = list.length + lane(); i < k; i += kWarp) {
          sorted[i] = 0;
        }
      }
    }
  }
}

}  // namespace peer::cuda
