// Updates of a table's rows by an optimizer.
#pragma once

#include <cstdint>

#include "kernels/cuda/segments.h"
#include "kernels/table_update.h"

namespace peer::cuda {

// The gradients are sums over segments, made with OutputRows::by_owner and the update's frozen
// rows.
template <class Table, class Source>
void update_by_segments(const TableUpdate<Table, Source>& update,
                        const Segments& segments,
                        const Context& context);

// The gradients are `count` rows of the source, fewer than 2^31. Row i of the source updates row
// ids[i] of the table's `table_rows`, or row i if ids is null. The ids must ascend and be distinct:
// an id that is out of order or out of range ends a kernel with a message and a trap before any row
// is written.
template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update,
                 const int64_t* ids,
                 int64_t count,
                 int64_t table_rows,
                 const Context& context);

}  // namespace peer::cuda
