// What one block of retrieval works on: some queries of one head, and the head's keys.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/score_tiles.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

// The two halves of a query.
constexpr int kRows = 0, kColumns = 1;

// Vectorizable arrays are read 16 bytes at a time.
struct Vectorizable {
  bool queries, rows, columns;
};

template <class Query>
Vectorizable find_vectorizable(const ProductKeyTopk<Query>& retrieval) {
  const int64_t width = retrieval.half_width;
  const auto are_vectorizable = [&](const Keys<Query>& keys) {
    return is_vectorizable(keys.data, keys.head_stride, width);
  };
  return {.queries = is_vectorizable(retrieval.query, 2 * width, width),
          .rows = are_vectorizable(retrieval.rows),
          .columns = are_vectorizable(retrieval.columns)};
}

template <class Query>
int64_t count_query_blocks(const ProductKeyTopk<Query>& retrieval, int queries) {
  return (retrieval.tokens + queries - 1) / queries * retrieval.heads;
}

template <class Query, int queries>
class QueryBlock {
 public:
  __device__ QueryBlock(const ProductKeyTopk<Query>& retrieval,
                        const Vectorizable& vectorizable,
                        int64_t block)
      : retrieval_(retrieval), vectorizable_(vectorizable), head_(block % retrieval.heads) {
    const int64_t first_token = block / retrieval.heads * queries;
    first_query_ = first_token * retrieval.heads + head_;
    count_ = int(std::min<int64_t>(queries, retrieval.tokens - first_token));
  }

  // The number of queries.
  __device__ int count() const { return count_; }

  // The position of a query among all queries of the retrieval.
  __device__ int64_t query(int i) const { return first_query_ + i * retrieval_.heads; }

  __device__ HalfRows<Query> query_rows(int half) const {
    const int64_t stride = 2 * retrieval_.half_width;
    const int width = int(retrieval_.half_width);
    return {
        .data = retrieval_.query + first_query_ * stride + half * width,
        .stride = retrieval_.heads * stride,
        .count = count_,
        .width = width,
        .is_vectorizable = vectorizable_.queries,
    };
  }

  __device__ HalfRows<Query> key_rows(int half) const {
    const Keys<Query>& keys = half == kRows ? retrieval_.rows : retrieval_.columns;
    return {
        .data = keys.data + head_ * keys.head_stride,
        .stride = retrieval_.half_width,
        .count = keys.count,
        .width = int(retrieval_.half_width),
        .is_vectorizable = half == kRows ? vectorizable_.rows : vectorizable_.columns,
    };
  }

 private:
  const ProductKeyTopk<Query>& retrieval_;
  const Vectorizable& vectorizable_;
  int64_t head_, first_query_;
  int count_;
};

}  // namespace peer::cuda
