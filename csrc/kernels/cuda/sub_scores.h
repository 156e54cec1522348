// Sub-scores: the products of a block's queries with one half of a head's keys, a chunk of the keys
// at a time, so that they are selected from while they are in shared memory.
//
// Staging    the queries' half, as many of its columns as fit, in shared memory
// Tiles      the chunk's keys are shared out among the warps (score_tiles.h): each key is read once
//            per block
// Result     ordered integers (ordered.h), which is what selection compares
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tiles.h"
#include "kernels/cuda/warp.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// By all threads of the block, which meet before the stage is read. Beyond the last query it is
// taken again.
template <class Query>
__device__ void fill(const Stage<Query>& stage, const HalfRows<Query>& queries) {
  const int packs = stage.columns / kVecSize<Query>;
  for (int i = int(threadIdx.x); i < kQueriesPerBlock<Query> * packs; i += int(blockDim.x)) {
    const int query = i / packs;
    const int column = i % packs * kVecSize<Query>;
    const Query* row = queries.row_or_last(query);
    Tile<Query>::put(stage, query, column,
                     queries.is_packed
                         ? queries.template load<true>(row, stage.first_column + column)
                         : queries.template load<false>(row, stage.first_column + column));
  }
}

// Adds what the staged columns contribute to the scores of a tile's keys; beyond the last key it is
// taken again. Between stages, too, scores are kept as ordered integers: what a sum loses that way,
// the sign of a zero, makes no difference.
template <bool packed, class Query, class Real = accumulation_t<Query>>
__device__ void score_tile(const HalfRows<Query>& keys,
                           int64_t first_key,
                           const Stage<Query>& stage,
                           const ScoreRows<Real>& scores) {
  Tile<Query> tile(keys, first_key);
  tile.visit(scores, [&]<int count>(Real* sums, const Elements<ordered_t<Real>, count>& partial) {
    for (int i = 0; i < count; ++i) {
      sums[i] = stage.first_column == 0 ? Real(0) : from_ordered<Real>(partial.values[i]);
    }
  });
  tile.template multiply<packed>(keys, stage);
  tile.visit(scores, []<int count>(const Real* sums, Elements<ordered_t<Real>, count>& result) {
    Elements<ordered_t<Real>, count> orders;
    for (int i = 0; i < count; ++i) {
      orders.values[i] = to_ordered(sums[i]);
    }
    result = orders;
  });
}

// scores[query, key] of `count` keys, from first_key on. By all threads of the block, which meet
// before the scores are read. Each place up to a whole tile more is written to.
template <class Query, class Real = accumulation_t<Query>>
__device__ void score_chunk(const HalfRows<Query>& queries,
                            const HalfRows<Query>& keys,
                            int64_t first_key,
                            int count,
                            Pack<Query>* packs,
                            const ScoreRows<Real>& scores) {
  constexpr int most = Stage<Query>::kMaxColumns;
  constexpr int step = kColumnsPerStep<Query>;
  for (int column = 0; column < keys.width; column += most) {
    const int remaining = (keys.width - column + step - 1) / step * step;
    const Stage<Query> stage = {packs, column, remaining < most ? remaining : most};
    // What is staged already serves all chunks if it is all there is.
    if (first_key == 0 || keys.width > most) {
      __syncthreads();
      fill(stage, queries);
      __syncthreads();
    }
    const int warps = int(blockDim.x) / kWarp;
    for (int tile = warp_in_block() * kKeysPerTile<Query>; tile < count;
         tile += warps * kKeysPerTile<Query>) {
      const ScoreRows<Real> target = {scores.data + tile, scores.stride};
      if (keys.is_packed) {
        score_tile<true>(keys, first_key + tile, stage, target);
      } else {
        score_tile<false>(keys, first_key + tile, stage, target);
      }
    }
  }
}

}  // namespace peer::cuda
