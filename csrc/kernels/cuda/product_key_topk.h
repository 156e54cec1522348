// product_key_topk and the two kernels of its backward.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

// The largest k.
constexpr int64_t kMaxRetrieved = 64;

// The most keys of each half under a mask. A block's sub-scores are then fewer than 2^31.
constexpr int64_t kMaxMaskedKeys = (int64_t(1) << 26) - 64;

// Query is float, double, BFloat16 or Half. With fewer than k enabled experts, it ends the
// kernel with a message and a trap.
template <class Query>
void product_key_topk(const ProductKeyTopk<Query>& retrieval, const Context& context);

// Finds the row key and the column key of every retrieved expert. Unless the heads share keys, the
// keys of all heads are numbered consecutively: head h's row r is number h·R + r.
struct KeyOwners {
  int64_t queries;  // T·H
  int64_t heads;
  int64_t k;
  int64_t columns;             // C
  int64_t experts;             // R·C
  int64_t row_head_stride;     // R, or 0 if the heads share keys
  int64_t column_head_stride;  // C, or 0 if the heads share keys
  const int64_t* indices;      // (T·H, k)
  int64_t* row_owners;         // (T·H, k)
  int64_t* column_owners;      // (T·H, k)
};

// An index outside [0, experts) ends the kernel with a message and a trap.
void find_key_owners(const KeyOwners& pass, const Context& context);

// The indices must be in range.
template <class Real>
void gather_sum(const GatherSum<Real>& pass, const Context& context);

}  // namespace peer::cuda
