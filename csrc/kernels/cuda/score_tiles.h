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
// The two tile types have the same interface:
//
//   put         writes a vector of a query's elements to its place in the stage
//   multiply    adds the products of the tile's keys with the staged queries to the sums
//   visit       calls visit(sums, scores) with sums that the lane holds and their place in memory
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

// Half as many for double, so that sums and scores take as many registers and as much shared memory
// as for float.
template <class Query>
constexpr int kQueriesPerBlock = sizeof(Query) == 8 ? 16 : 32;

template <class Query>
constexpr int kKeysPerTile = kUsesTensorCores<Query> ? 32 : 64;

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
  __device__ const Query* row_or_last(int64_t i) const { return row(i < count ? i : count - 1); }

  // A vector of a row from a column on; zeros beyond the row's end.
  template <bool is_vectorized>
  __device__ OperandVec<Query> load(const Query* row, int column) const {
    OperandVec<Query> vec = {};
    if constexpr (is_vectorized) {
      if (column < width) {
        vec = *reinterpret_cast<const OperandVec<Query>*>(row + column);
      }
    } else {
      Query elements[kVecSize<Query>] = {};
#pragma unroll
      for (int i = 0; i < kVecSize<Query>; ++i) {
        if (column + i < width) {
          elements[i] = row[column + i];
        }
      }
      std::memcpy(&vec, elements, sizeof(vec));
    }
    return vec;
  }
};

// Some columns of the block's queries in shared memory, in the layout of the tile type, padded with
// zeros to whole steps.
template <class Query>
struct Stage {
  static constexpr int kMaxColumns = 128;
  static constexpr int kBytes = kQueriesPerBlock<Query> * kMaxColumns * int(sizeof(Query));

  OperandVec<Query>* vecs;
  int first_column;
  int columns;
};

// scores[query, key], with keys counted from the first key of a batch or of a tile.
template <class Real>
struct ScoreRows {
  ordered_t<Real>* data;
  int stride;
};

// Lane 4g + q reads elements 8q to 8q + 7 of a step's columns, of the keys 8n + g. Two tensor-core
// instructions, j = 0 and 1, take them: elements 8q + 4j and 8q + 4j + 1 as the instruction's
// columns 2q and 2q + 1, and the next two elements as its columns 2q + 8 and 2q + 9. Queries are
// staged in the same order: for every 16 queries and every instruction, the four words of lane 0,
// then those of lane 1, and so on.
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

  __device__ static void put(const Stage<Query>& stage,
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

  // A step's keys are loaded while the keys of the previous step are multiplied.
  template <bool is_vectorized>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query>& stage) {
    constexpr int step = kColumnsPerStep<Query>;
    RawVec<Query> next[kKeyTiles];
    load_keys<is_vectorized>(keys, stage.first_column, next);
    for (int column = 0; column < stage.columns; column += step) {
      RawVec<Query> current[kKeyTiles];
      std::memcpy(current, next, sizeof(current));
      if (column + step < stage.columns) {
        load_keys<is_vectorized>(keys, stage.first_column + column + step, next);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 0; m < kQueryTiles; ++m) {
          const RawVec<Query> a = stage.vecs[place_of(column / 16 + j, m, lane())];
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const uint32_t b[] = {current[n].words[2 * j], current[n].words[2 * j + 1]};
            mma_m16n8k16<Query>(sums[m][n], a.words, b);
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
          visit(sums[m][n] + i, *reinterpret_cast<Vec<ordered_t<float>, 2>*>(place));
        }
      }
    }
  }

 private:
  __device__ static int group() { return lane() / 4; }
  __device__ static int quarter() { return lane() % 4; }

  // The place in the stage of a lane's words for an instruction.
  __device__ static int place_of(int instruction, int m, int lane) {
    return (instruction * kQueryTiles + m) * kWarp + lane;
  }

  template <bool is_vectorized>
  __device__ void load_keys(const HalfRows<Query>& keys,
                            int column,
                            RawVec<Query> (&vecs)[kKeyTiles]) const {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      vecs[n] = keys.template load<is_vectorized>(rows[n], column + 8 * quarter());
    }
  }
};

// Lane l has the keys l and l + 32. All lanes read the same elements of a query at once.
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
                             const OperandVec<Query>& vec) {
    stage.vecs[place_of(query, column)] = vec;
  }

  template <bool is_vectorized>
  __device__ void multiply(const HalfRows<Query>& keys, const Stage<Query>& stage) {
    for (int column = 0; column < stage.columns; column += kColumnsPerStep<Query>) {
      OperandVec<Query> vecs[kKeys][kVecs];
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          vecs[n][v] = keys.template load<is_vectorized>(
              rows[n], stage.first_column + column + v * kVecSize<Query>);
        }
      }
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int query = 0; query < kQueries; ++query) {
          const OperandVec<Query> factors =
              stage.vecs[place_of(query, column + v * kVecSize<Query>)];
#pragma unroll
          for (int i = 0; i < kVecSize<Query>; ++i) {
#pragma unroll
            for (int n = 0; n < kKeys; ++n) {
              sums[query][n] = std::fma(factors.values[i], vecs[n][v].values[i], sums[query][n]);
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
        visit(&sums[query][n], *reinterpret_cast<Vec<ordered_t<Query>, 1>*>(place));
      }
    }
  }

 private:
  __device__ static int place_of(int query, int column) {
    return (query * Stage<Query>::kMaxColumns + column) / kVecSize<Query>;
  }
};

template <class Query>
using ScoreTile =
    std::conditional_t<kUsesTensorCores<Query>, TensorCoreTile<Query>, MultiplyAddTile<Query>>;

}  // namespace peer::cuda
