// Sub-scores: the products of a block's queries with one half of a head's keys. Every warp
// multiplies one tile of keys at a time and has its sums in registers (score_tiles.h).
//
// Staging    the queries' half, in shared memory, as many columns at once as fit
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/score_tiles.h"
#include "kernels/cuda/warp.h"

namespace peer::cuda {

// Called by all threads of the block, with a barrier before the stage is read. The last query
// stands in for queries beyond it.
template <class Query, int queries>
__device__ void fill_stage(const Stage<Query, queries>& stage, const HalfRows<Query>& rows) {
  constexpr unsigned vecs = Stage<Query, queries>::kMaxColumns / kVecSize<Query>;
  for (unsigned i = threadIdx.x; i < queries * vecs; i += blockDim.x) {
    const int query = int(i / vecs);
    const int column = int(i % vecs * kVecSize<Query>);
    if (column >= stage.columns) {
      continue;
    }
    const int row_column = stage.first_column + column;
    const Query* place = rows.row_or_last(query) + row_column;
    ScoreTile<Query, queries>::put(stage, query, column,
                                   rows.is_vectorizable
                                       ? rows.template load<true>(place, row_column)
                                       : rows.template load<false>(place, row_column));
  }
}

// Multiplies the block's queries with the keys of a tile. Called by all threads of the block, by a
// warp without keys with is_used = false. A stage that holds all columns is filled only if
// `is_first`, and serves the calls that follow.
template <class Query, int queries>
__device__ void multiply_tile(const HalfRows<Query>& rows,
                              const HalfRows<Query>& keys,
                              OperandVec<Query>* stage_vecs,
                              bool is_first,
                              bool is_used,
                              ScoreTile<Query, queries>& tile) {
  using QueryStage = Stage<Query, queries>;
  constexpr int max_columns = QueryStage::kMaxColumns;
  constexpr int step = kColumnsPerStep<Query>;
  for (int column = 0; column < keys.width; column += max_columns) {
    const int remaining = (keys.width - column + step - 1) / step * step;
    const QueryStage stage = {.vecs = stage_vecs,
                              .first_column = column,
                              .columns = remaining < max_columns ? remaining : max_columns};
    if (is_first || keys.width > max_columns) {
      __syncthreads();
      fill_stage(stage, rows);
      __syncthreads();
    }
    if (is_used) {
      if (keys.is_vectorizable) {
        tile.template multiply<true>(keys, stage);
      } else {
        tile.template multiply<false>(keys, stage);
      }
    }
  }
}

}  // namespace peer::cuda
