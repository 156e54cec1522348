// The CUDA passes as their callers see them: raw device pointers and sizes, and functions that
// queue work on a stream and return. The CPU's counterparts are in kernels/cpu/kernels.h.
//
// Table is the element type of expert tables, Input that of activations: the table's own type or
// that of its accumulation. No pass synchronises with the host, unless it says so; none adds floats
// atomically; sums have an order that depends on shapes alone.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/cuda/launch.h"
#include "kernels/expert_mlp.h"
#include "kernels/product_key_topk.h"
#include "kernels/segments.h"
#include "kernels/table_grad.h"
#include "kernels/table_update.h"

namespace peer::cuda {

// An index outside [0, experts) ends the kernel with a message and a trap.
template <class Table, class Input>
void expert_mlp_forward(const ExpertMlpForward<Table, Input>& pass, const Context& context);
template <class Table, class Input>
void expert_mlp_backward(const ExpertMlpBackward<Table, Input>& pass, const Context& context);

// Segments of sorted pairs (kernels/segments.h), and where the sums over them go
// (kernels/cuda/segments.h). All of it is in device memory, and the host knows none of it.

// The partial sums [first, first + count) that make up one row of the output.
struct SplitSegment {
  int32_t first, count;
  int32_t row;
};

// How many there are of each.
struct SegmentCounts {
  int32_t owners, split_segments, partial_rows;
};

struct Segments {
  int64_t count = 0;
  std::shared_ptr<int32_t> numbers;          // (count), by ascending owner
  std::shared_ptr<int32_t> targets;          // (count): what becomes of the sum after each
  std::shared_ptr<int32_t> distinct_owners;  // (count), of which counts->owners are set; if compact
  std::shared_ptr<SplitSegment> split_segments;  // (max_split_segments)
  std::shared_ptr<SegmentCounts> counts;         // (1)
  // Bounds that the host knows, for grids and for memory.
  int64_t max_split_segments = 0;
  int64_t max_partial_rows = 0;
};

// Owners and pair numbers are held in 32 bits: both counts must be below 2^31. An owner outside
// [0, owner_count) ends the kernel with a message and a trap.
Segments make_segments(const int64_t* owners,
                       int64_t count,
                       int64_t owner_count,
                       OutputRows rows,
                       const Context& context);

// Reads the number of distinct owners back: waits for the stream. What a sparse gradient needs to
// know its size, and the one wait there is.
int64_t count_distinct_owners(const Segments& pairs, const Context& context);

// The gradient of a table: see kernels/table_grad.h.
template <class Element, class Source>
void sum_pairs(const TableGrad<Element, Source>& pass,
               const Segments& pairs,
               const Context& context);

// The update of a table: see kernels/table_update.h.
//
// By the sums over sorted pairs, by_owner.
template <class Table, class Source>
void update_by_pairs(const TableUpdate<Table, Source>& update,
                     const Segments& pairs,
                     const Context& context);
// By the rows of source themselves, fewer than 2^31: row i updates row i of the table.
template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update, int64_t rows, const Context& context);

// The largest k of product_key_topk.
constexpr int64_t kMaxRetrieved = 64;

// Query is float, double, BFloat16 or Half; scores are in its accumulation type.
template <class Query>
void product_key_topk(const ProductKeyTopk<Query>& retrieval, const Context& context);

// Which row and which column of the keys every retrieval took; in a head's own part of them where
// heads do not share keys.
struct KeyOwners {
  int64_t retrievals;  // T·H
  int64_t heads;
  int64_t k;
  int64_t columns;             // C
  int64_t experts;             // R·C
  int64_t row_head_stride;     // R, or 0 where the heads share keys
  int64_t column_head_stride;  // C, or 0
  const int64_t* indices;      // (T·H, k)
  int64_t* row_owners;         // (T·H, k)
  int64_t* column_owners;      // (T·H, k)
};

void find_key_owners(const KeyOwners& pass, const Context& context);

template <class Real>
void gather_sum(const GatherSum<Real>& pass, const Context& context);

}  // namespace peer::cuda
