// The product of queries and keys, for one warp: all of the block's queries times kKeysPerTile
// keys. The lanes hold the sums in registers.
//
// Keys       read from global memory, 64 (16-bit) or 32 bytes of a row at a time. The L2 cache has
//            room for the keys of all heads
// Queries    a stage of their columns, in shared memory
// Product    16-bit: tensor cores. Others: a lane multiplies two keys with all queries, with enough
//            independent sums to hide the latency of multiply-add
// Exactness  the order of a sub-score's sum depends only on its width
//
// A lane holds the sums of kLaneQueries queries with kLaneKeys keys. A tile's keys form
// kGroupsPerTile groups: the keys of the lanes with the same group_of_lane(). The two tile types
// have the same interface:
//
//   put         writes a vector of a query's elements to its place in the stage
//   multiply    adds the products of the tile's keys with the staged queries to the sums
//   sum(i, j)   of the lane's i-th query, number query_of(i) of the block, and j-th key. Query
//               numbers are kQueryStep apart
//   place()     of the lane's first key among a tile's keys in the order of their groups. The
//               lane's keys have consecutive places
//   key_at      the number in the tile of the key at a place. The key of an odd place has the
//               number of that before it plus kKeysBetweenPlaces
//   group_max   the maximum over the group's lanes, in the lane that is_first_of_group() at least
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/common.h"
#include "kernels/cuda/elements.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

template <class Query>
constexpr bool kUsesTensorCores = sizeof(Query) == 2;

// The queries of a block that has few, or no memory for more. Half as many for double, so that sums
// and scores take as many registers and as much shared memory as for float.
template <class Query>
constexpr int kFewQueries = sizeof(Query) == 8 ? 16 : 32;

// The most queries of a block. Twice as many halve the reads of keys. With tensor cores, their sums
// fit in registers.
template <class Query>
constexpr int kManyQueries = kUsesTensorCores<Query> ? 64 : kFewQueries<Query>;

template <class Query>
constexpr int kKeysPerTile = kUsesTensorCores<Query> ? 32 : 64;

constexpr int kGroupsPerTile = 4;

template <class Query>
constexpr int kKeysPerGroup = kKeysPerTile<Query> / kGroupsPerTile;

// Columns per step of the product: two tensor-core instructions, or a memory sector.
template <class Query>
constexpr int kColumnsPerStep = (kUsesTensorCores<Query> ? 64 : 32) / int(sizeof(Query));

// A vector of a row, as the product reads it.
template <class Query>
using OperandVec =
    std::conditional_t<kUsesTensorCores<Query>, RawVec<Query>, Vec<Query, kVecSize<Query>>>;

// One half of some queries, or the keys of one half.
template <class Query>
struct HalfRows {
  const Query* data;
  int64_t stride;
  int64_t count;
  int width;
  bool is_vectorizable;

  __device__ const Query* row(int64_t i) const { return data + i * stride; }
  // Rows are fewer than 2^31.
  __device__ const Query* row_or_last(int64_t i) const {
    const auto last = uint32_t(count) - 1;
    return row(uint32_t(i) < last ? uint32_t(i) : last);
  }

  // The vector at a place, which is that of a column; zeros beyond the row's end.
  template <bool is_vectorized>
  __device__ OperandVec<Query> load(const Query* place, int column) const {
    OperandVec<Query> vec = {};
    if constexpr (is_vectorized) {
      if (column < width) {
        vec = *reinterpret_cast<const OperandVec<Query>*>(place);
      }
    } else {
      Query elements[kVecSize<Query>] = {};
#pragma unroll
      for (int i = 0; i < kVecSize<Query>; ++i) {
        if (column + i < width) {
          elements[i] = place[i];
        }
      }
      std::memcpy(&vec, elements, sizeof(vec));
    }
    return vec;
  }
};

// Some columns of the block's queries in shared memory, in the layout of the tile type, padded with
// zeros to whole steps.
template <class Query, int queries>
struct Stage {
  static constexpr int kMaxColumns = 128;
  static constexpr int kBytes = queries * kMaxColumns * int(sizeof(Query));

  OperandVec<Query>* vecs;
  int first_column;
  int columns;
};

// Lane 4g + q reads elements 8q to 8q + 7 of a step's columns, of the keys 8n + g. Two tensor-core
// instructions, j = 0 and 1, take them: elements 8q + 4j and 8q + 4j + 1 as the instruction's
// columns 2q and 2q + 1, and the next two elements as its columns 2q + 8 and 2q + 9. Queries are
// staged in the same order: for every 16 queries and every instruction, the four words of lane 0,
// then those of lane 1, and so on.
template <class Query, int queries>
struct TensorCoreTile {
  static constexpr int kQueryTiles = queries / 16;
  static constexpr int kKeyTiles = kKeysPerTile<Query> / 8;
  static constexpr int kLaneQueries = 2 * kQueryTiles;
  static constexpr int kLaneKeys = 2 * kKeyTiles;
  static constexpr int kQueryStep = 8;
  static constexpr int kKeysBetweenPlaces = 1;

  const Query* rows[kKeyTiles];
  float sums[kQueryTiles][kKeyTiles][4] = {};

  __device__ TensorCoreTile(const HalfRows<Query>& keys, int64_t first_key) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      rows[n] = keys.row_or_last(first_key + 8 * n + group());
    }
  }

  __device__ static void put(const Stage<Query, queries>& stage,
                             int query,
                             int column,
                             const RawVec<Query>& vec) {
    const int owner = query % 8 * 4 + column / 8 % 4;
    const int is_lower = query / 8 % 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      RawVec<Query>& staged = stage.vecs[place_of(column / 32 * 2 + j, query / 16, owner)];
      staged.words[is_lower] = vec.words[2 * j];
      staged.words[is_lower + 2] = vec.words[2 * j + 1];
    }
  }

  // With few queries, all warps wait for the same loads, and there are registers to load the keys
  // of a step while those of the previous step are multiplied. With many queries, warps multiply
  // while others wait.
  template <bool is_vectorized>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query, queries>& stage) {
    constexpr int step = kColumnsPerStep<Query>;
    constexpr bool loads_ahead = queries <= kFewQueries<Query>;
    const Query* places[kKeyTiles];
    int column = stage.first_column + 8 * quarter();
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      places[n] = rows[n] + column;
    }
    const auto load_next = [&](RawVec<Query>(&vecs)[kKeyTiles]) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        vecs[n] = keys.template load<is_vectorized>(places[n], column);
        places[n] += step;
      }
      column += step;
    };
    RawVec<Query> current[kKeyTiles];
    RawVec<Query> next[kKeyTiles];
    if (loads_ahead) {
      load_next(next);
    }
#pragma unroll 1
    for (int done = 0; done < stage.columns; done += step) {
      if (!loads_ahead) {
        load_next(current);
      } else {
        std::memcpy(current, next, sizeof(current));
        if (done + step < stage.columns) {
          load_next(next);
        }
      }
      multiply_step(current, stage, done);
    }
  }

  __device__ float& sum(int i, int j) { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ static int query_of(int i) { return kQueryStep * i + group(); }

  __device__ static int place() { return quarter() * kLaneKeys; }
  __device__ static unsigned key_at(unsigned place) {
    return place % kLaneKeys / 2 * 8 + place / kLaneKeys * 2 + place % 2;
  }

  __device__ static int group_of_lane() { return quarter(); }
  __device__ static bool is_first_of_group() { return true; }
  __device__ static float group_max(float maximum) { return maximum; }

 private:
  __device__ static int group() { return lane() / 4; }
  __device__ static int quarter() { return lane() % 4; }

  // The place in the stage of a lane's words for an instruction.
  __device__ static int place_of(int instruction, int m, int lane) {
    return (instruction * kQueryTiles + m) * kWarp + lane;
  }

  __device__ void multiply_step(const RawVec<Query> (&vecs)[kKeyTiles],
                                const Stage<Query, queries>& stage,
                                int column) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int m = 0; m < kQueryTiles; ++m) {
        const RawVec<Query> a = stage.vecs[place_of(column / 16 + j, m, lane())];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const uint32_t b[] = {vecs[n].words[2 * j], vecs[n].words[2 * j + 1]};
          mma_m16n8k16<Query>(sums[m][n], a.words, b);
        }
      }
    }
  }
};

// Lane l has the keys l and l + 32. All lanes read the same elements of a query at once.
template <class Query, int queries>
struct MultiplyAddTile {
  static constexpr int kLaneQueries = queries;
  static constexpr int kLaneKeys = kKeysPerTile<Query> / kWarp;
  static constexpr int kLanesPerGroup = kWarp / kGroupsPerTile;
  static constexpr int kQueryStep = 1;
  static constexpr int kKeysBetweenPlaces = kWarp;
  static constexpr int kVecs = kColumnsPerStep<Query> / kVecSize<Query>;

  const Query* rows[kLaneKeys];
  Query sums[kLaneQueries][kLaneKeys] = {};

  __device__ MultiplyAddTile(const HalfRows<Query>& keys, int64_t first_key) {
#pragma unroll
    for (int n = 0; n < kLaneKeys; ++n) {
      rows[n] = keys.row_or_last(first_key + n * kWarp + lane());
    }
  }

  __device__ static void put(const Stage<Query, queries>& stage,
                             int query,
                             int column,
                             const OperandVec<Query>& vec) {
    stage.vecs[place_of(query, column)] = vec;
  }

  template <bool is_vectorized>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query, queries>& stage) {
    for (int column = 0; column < stage.columns; column += kColumnsPerStep<Query>) {
      OperandVec<Query> vecs[kLaneKeys][kVecs];
#pragma unroll
      for (int n = 0; n < kLaneKeys; ++n) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          const int first = stage.first_column + column + v * kVecSize<Query>;
          vecs[n][v] = keys.template load<is_vectorized>(rows[n] + first, first);
        }
      }
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int query = 0; query < queries; ++query) {
          const OperandVec<Query> factors =
              stage.vecs[place_of(query, column + v * kVecSize<Query>)];
#pragma unroll
          for (int i = 0; i < kVecSize<Query>; ++i) {
#pragma unroll
            for (int n = 0; n < kLaneKeys; ++n) {
              sums[query][n] = std::fma(factors.values[i], vecs[n][v].values[i], sums[query][n]);
            }
          }
        }
      }
    }
  }

  __device__ Query& sum(int i, int j) { return sums[i][j]; }
  __device__ static int query_of(int i) { return i; }

  __device__ static int place() { return lane() * kLaneKeys; }
  __device__ static unsigned key_at(unsigned place) {
    return place % kLaneKeys * kWarp + place / kLaneKeys;
  }

  __device__ static int group_of_lane() { return lane() / kLanesPerGroup; }
  __device__ static bool is_first_of_group() { return lane() % kLanesPerGroup == 0; }
  __device__ static Query group_max(Query maximum) {
    for (int distance = kLanesPerGroup / 2; distance > 0; distance /= 2) {
      maximum = std::fmax(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
    }
    return maximum;
  }

 private:
  __device__ static int place_of(int query, int column) {
    return (query * Stage<Query, queries>::kMaxColumns + column) / kVecSize<Query>;
  }
};

template <class Query, int queries>
using ScoreTile = std::conditional_t<kUsesTensorCores<Query>,
                                     TensorCoreTile<Query, queries>,
                                     MultiplyAddTile<Query, queries>>;

}  // namespace peer::cuda
