// The product of queries and keys, by one warp: all the block's queries times kKeysPerTile keys, of
// which a lane keeps the sums in registers.
//
// Keys       read from global memory, 64 (16-bit) or 32 bytes of a row at a time. The second-level
//            cache has room for the keys of all heads
// Queries    a stage of them in shared memory
// Product    16-bit: tensor cores. Others: a lane multiplies two keys with all queries, with as
//            many independent sums as hide the latency of multiply-add
// Exactness  every sub-score is summed in an order that depends on nothing but its width
//
// The two forms of a tile have in common
//
//   put         puts a pack of a query's elements where it belongs in the stage
//   multiply    adds the products of the tile's keys with the staged queries to its sums
//   visit       calls visit(sums, scores): some sums that the lane holds, and their place in memory
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
#include "kernels/ordered.h"

namespace peer::cuda {

template <class Query>
constexpr bool kUsesTensorCores = sizeof(Query) == 2;

// Double takes half as many queries, so that its sums take as many registers and its scores as much
// shared memory as those of float.
template <class Query>
constexpr int kQueriesPerBlock = sizeof(Query) == 8 ? 16 : 32;

template <class Query>
constexpr int kKeysPerTile = kUsesTensorCores<Query> ? 32 : 64;

// Columns that a step of the product takes: two steps of the tensor cores, or a sector of memory.
template <class Query>
constexpr int kColumnsPerStep = (kUsesTensorCores<Query> ? 64 : 32) / int(sizeof(Query));

// 16 bytes of a row, as the product wants them.
struct alignas(16) [[gnu::may_alias]] Words {
  uint32_t values[4];
};

template <class Query>
using Pack = std::conditional_t<kUsesTensorCores<Query>, Words, Elements<Query, kVecSize<Query>>>;

// Rows of half_width elements: one half of some queries, or keys.
template <class Query>
struct HalfRows {
  const Query* data;
  int64_t stride;
  int64_t count;
  int width;
  bool is_packed;

  __device__ const Query* row(int64_t i) const { return data + i * stride; }
  __device__ const Query* row_or_last(int64_t i) const { return row(i < count ? i : count - 1); }

  // A pack of a row from a column on; zeros beyond the row's end.
  template <bool packed>
  __device__ Pack<Query> load(const Query* row, int column) const {
    Pack<Query> pack = {};
    if constexpr (packed) {
      if (column < width) {
        pack = *reinterpret_cast<const Pack<Query>*>(row + column);
      }
    } else {
      Query elements[kVecSize<Query>] = {};
#pragma unroll
      for (int i = 0; i < kVecSize<Query>; ++i) {
        if (column + i < width) {
          elements[i] = row[column + i];
        }
      }
      std::memcpy(&pack, elements, sizeof(pack));
    }
    return pack;
  }
};

// Some columns of the block's queries in shared memory, laid out as a tile wants them, and padded
// with zeros to whole steps.
template <class Query>
struct Stage {
  static constexpr int kMaxColumns = 128;
  static constexpr int kBytes = kQueriesPerBlock<Query> * kMaxColumns * int(sizeof(Query));

  Pack<Query>* packs;
  int first_column;
  int columns;
};

// scores[query, key], the key counted from the first of a chunk or of a tile.
template <class Real>
struct ScoreRows {
  ordered_t<Real>* data;
  int stride;
};

// Lane 4g + q reads elements 8q to 8q + 7 of a step's columns of the keys 8n + g. Of these the
// tensor cores, in two steps, j = 0 and 1, take elements 8q + 4j and the next as what they call
// columns 2q and 2q + 1, and the two after those as columns 2q + 8 and 2q + 9. The queries are
// staged in that order: of every 16 of them, for each step of the tensor cores, the four words of
// lane 0, then those of lane 1, and so on.
template <class Query>
struct TensorCoreTile {
  static constexpr int kQueryTiles = kQueriesPerBlock<Query> / 16;
  static constexpr int kKeyTiles = kKeysPerTile<Query> / 8;

  const Query* rows[kKeyTiles];
  float sums[kQueryTiles][kKeyTiles][4];

  __device__ TensorCoreTile(const HalfRows<Query>& keys, int64_t first_key) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      rows[n] = keys.row_or_last(first_key + 8 * n + group());
    }
  }

  __device__ static void put(const Stage<Query>& stage, int query, int column, const Words& pack) {
    const int owner = query % 8 * 4 + column / 8 % 4;
    const int is_lower = query / 8 % 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Words& words = stage.packs[place_of(column / 32 * 2 + j, query / 16, owner)];
      words.values[is_lower] = pack.values[2 * j];
      words.values[is_lower + 2] = pack.values[2 * j + 1];
    }
  }

  // A step's keys are on their way while those of the step before are multiplied.
  template <bool packed>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query>& stage) {
    constexpr int step = kColumnsPerStep<Query>;
    Words next[kKeyTiles];
    load_keys<packed>(keys, stage.first_column, next);
    for (int column = 0; column < stage.columns; column += step) {
      Words current[kKeyTiles];
      std::memcpy(current, next, sizeof(current));
      if (column + step < stage.columns) {
        load_keys<packed>(keys, stage.first_column + column + step, next);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
          const Words a = stage.packs[place_of(column / 16 + j, m, lane())];
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const uint32_t b[] = {current[n].values[2 * j], current[n].values[2 * j + 1]};
            multiply_add<Query>(sums[m][n], a.values, b);
          }
        }
      }
    }
  }

  template <class Visit>
  __device__ void visit(const ScoreRows<float>& scores, const Visit& visit) {
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int query = 16 * m + 4 * i + group();
          ordered_t<float>* place = scores.data + query * scores.stride + 8 * n + 2 * quarter();
          visit(sums[m][n] + i, *reinterpret_cast<Elements<ordered_t<float>, 2>*>(place));
        }
      }
    }
  }

 private:
  __device__ static int group() { return lane() / 4; }
  __device__ static int quarter() { return lane() % 4; }

  // In the stage, of what a lane wants for a step of the tensor cores.
  __device__ static int place_of(int tensor_core_step, int m, int lane) {
    return (tensor_core_step * kQueryTiles + m) * kWarp + lane;
  }

  template <bool packed>
  __device__ void load_keys(const HalfRows<Query>& keys,
                            int column,
                            Words (&packs)[kKeyTiles]) const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      packs[n] = keys.template load<packed>(rows[n], column + 8 * quarter());
    }
  }
};

// Lane l has keys l and l + 32; a query's elements are read by all lanes at once.
template <class Query>
struct MultiplyAddTile {
  static constexpr int kQueries = kQueriesPerBlock<Query>;
  static constexpr int kKeys = kKeysPerTile<Query> / kWarp;
  static constexpr int kVecs = kColumnsPerStep<Query> / kVecSize<Query>;

  const Query* rows[kKeys];
  Query sums[kQueries][kKeys];

  __device__ MultiplyAddTile(const HalfRows<Query>& keys, int64_t first_key) {
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      rows[n] = keys.row_or_last(first_key + n * kWarp + lane());
    }
  }

  __device__ static void put(const Stage<Query>& stage,
                             int query,
                             int column,
                             const Pack<Query>& pack) {
    stage.packs[place_of(query, column)] = pack;
  }

  template <bool packed>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query>& stage) {
    for (int column = 0; column < stage.columns; column += kColumnsPerStep<Query>) {
      Pack<Query> packs[kKeys][kVecs];
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
#pragma unroll
        for (int p = 0; p < kVecs; ++p) {
          packs[n][p] = keys.template load<packed>(
              rows[n], stage.first_column + column + p * kVecSize<Query>);
        }
      }
#pragma unroll
      for (int p = 0; p < kVecs; ++p) {
#pragma unroll
        for (int query = 0; query < kQueries; ++query) {
          const Pack<Query> factors = stage.packs[place_of(query, column + p * kVecSize<Query>)];
#pragma unroll
          for (int i = 0; i < kVecSize<Query>; ++i) {
#pragma unroll
            for (int n = 0; n < kKeys; ++n) {
              sums[query][n] = std::fma(factors.values[i], packs[n][p].values[i], sums[query][n]);
            }
          }
        }
      }
    }
  }

  template <class Visit>
  __device__ void visit(const ScoreRows<Query>& scores, const Visit& visit) {
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        ordered_t<Query>* place = scores.data + query * scores.stride + n * kWarp + lane();
        visit(&sums[query][n], *reinterpret_cast<Elements<ordered_t<Query>, 1>*>(place));
      }
    }
  }

 private:
  __device__ static int place_of(int query, int column) {
    return (query * Stage<Query>::kMaxColumns + column) / kVecSize<Query>;
  }
};

template <class Query>
using Tile =
    std::conditional_t<kUsesTensorCores<Query>, TensorCoreTile<Query>, MultiplyAddTile<Query>>;

}  // namespace peer::cuda
