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

// The gradients are the rows of the source, fewer than 2^31: row i of the source updates row i of
// the table.
template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>& update, int64_t rows, const Context& context);

}  // namespace peer::cuda
