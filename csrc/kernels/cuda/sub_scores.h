// Sub-scores: the products of a block's queries with one half of a head's keys, for a batch of keys
// at a time. They stay in shared memory, where selection reads them.
//
// Staging    the queries' half, in shared memory, as many columns at once as fit
// Tiles      the warps divide the batch's keys (score_tiles.h); each key is read once per block
// Result     ordered integers (ordered.h)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tiles.h"
#include "kernels/cuda/warp.h"
#include "kernels/ordered.h"

namespace peer::cuda {

// Called by all threads of the block, with a barrier before the stage is read. The last query
// stands in for queries beyond it.
template <class Query>
__device__ void fill_stage(const Stage<Query>& stage, const HalfRows<Query>& queries) {
  const int vecs = stage.columns / kVecSize<Query>;
  for (int i = int(threadIdx.x); i < kQueriesPerBlock<Query> * vecs; i += int(blockDim.x)) {
    const int query = i / vecs;
    const int column = i % vecs * kVecSize<Query>;
    const Query* row = queries.row_or_last(query);
    ScoreTile<Query>::put(stage, query, column,
                          queries.is_vectorizable
                              ? queries.template load<true>(row, stage.first_column + column)
                              : queries.template load<false>(row, stage.first_column + column));
  }
}

// Adds the products of the staged columns to the scores of a tile's keys. The last key stands in
// for keys beyond it. Scores are ordered integers between stages, too: a sum loses only the sign of
// a zero, which makes no difference.
template <bool is_vectorized, class Query, class Real = accumulation_t<Query>>
__device__ void score_tile(const HalfRows<Query>& keys,
                           int64_t first_key,
                           const Stage<Query>& stage,
                           const ScoreRows<Real>& scores) {
  ScoreTile<Query> tile(keys, first_key);
  tile.visit(scores, [&]<int count>(Real* sums, const Vec<ordered_t<Real>, count>& partial) {
    for (int i = 0; i < count; ++i) {
      sums[i] = stage.first_column == 0 ? Real(0) : from_ordered<Real>(partial.values[i]);
    }
  });
  tile.template multiply<is_vectorized>(keys, stage);
  tile.visit(scores, []<int count>(const Real* sums, Vec<ordered_t<Real>, count>& result) {
    Vec<ordered_t<Real>, count> orders;
    for (int i = 0; i < count; ++i) {
      orders.values[i] = to_ordered(sums[i]);
    }
    result = orders;
  });
}

// Computes scores[query, key] of `count` keys from first_key on. Called by all threads of the
// block, with a barrier before the scores are read. Writes whole tiles, so also places beyond
// `count`.
template <class Query, class Real = accumulation_t<Query>>
__device__ void score_batch(const HalfRows<Query>& queries,
                            const HalfRows<Query>& keys,
                            int64_t first_key,
                            int count,
                            OperandVec<Query>* stage_vecs,
                            const ScoreRows<Real>& scores) {
  constexpr int max_columns = Stage<Query>::kMaxColumns;
  constexpr int step = kColumnsPerStep<Query>;
  for (int column = 0; column < keys.width; column += max_columns) {
    const int remaining = (keys.width - column + step - 1) / step * step;
    const Stage<Query> stage = {.vecs = stage_vecs,
                                .first_column = column,
                                .columns = remaining < max_columns ? remaining : max_columns};
    // A stage that holds all columns serves every batch.
    if (first_key == 0 || keys.width > max_columns) {
      __syncthreads();
      fill_stage(stage, queries);
      __syncthreads();
    }
    const int warps = int(blockDim.x) / kWarp;
    for (int tile = warp_in_block() * kKeysPerTile<Query>; tile < count;
         tile += warps * kKeysPerTile<Query>) {
      const ScoreRows<Real> target = {scores.data + tile, scores.stride};
      if (keys.is_vectorizable) {
        score_tile<true>(keys, first_key + tile, stage, target);
      } else {
        score_tile<false>(keys, first_key + tile, stage, target);
      }
    }
  }
}

}  // namespace peer::cuda
