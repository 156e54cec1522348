// What the CPU glue of the operators shares: threads, element types, and the expert pass over any
// owners.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/sorted_pairs.h"
#include "kernels/parallel.h"

namespace peer::ops::cpu {

using namespace peer::cpu;

inline const ParallelFor& torch_threads() {
  static const ParallelFor loop = [](int64_t begin, int64_t end, int64_t grain,
                                     const RangeBody& body) {
    at::parallel_for(begin, end, grain, body);
  };
  return loop;
}

// Calls body.template operator()<Table>() for the kernels' element type of a table's dtype, which
// was checked before.
template <class Body>
auto with_table_type(at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat:
      return body.template operator()<float>();
    case at::kDouble:
      return body.template operator()<double>();
    case at::kBFloat16:
      return body.template operator()<BFloat16>();
    default:
      return body.template operator()<Half>();
  }
}

// The kernels' own 16-bit types have the layout of Torch's.
static_assert(sizeof(BFloat16) == sizeof(c10::BFloat16) && sizeof(Half) == sizeof(c10::Half));

template <class Element>
Element* data_of(const at::Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

template <class Element>
const Element* const_data_of(const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

// The tensor in one dtype and contiguous; itself where it already is.
inline at::Tensor contiguous_as(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.to(type).contiguous();
}

// A table whose rows are contiguous, however far apart.
inline at::Tensor with_contiguous_rows(const at::Tensor& table) {
  return table.stride(1) == 1 || table.size(1) <= 1 ? table : table.contiguous();
}

template <class Element>
Rows<const Element> rows_of(const at::Tensor& table) {
  return {const_data_of<Element>(table), table.stride(0)};
}

// Every id must lie in [0, count): reading a row elsewhere would be silent corruption.
void check_index_range(const char* op, const at::Tensor& contiguous_indices, int64_t count);

// Pairs by the row that they contribute to, and the work list over them.
struct SortedPairs {
  SortedPairs(const at::Tensor& contiguous_owners, int64_t owner_count, OutputRows rows);

  List<Pair> pairs;
  ExpertPassPlan plan;
};

// One table's gradient from the pairs that retrieved its rows: row `owner` is the sum of
// coefficients[pair]·source[pair / pairs_per_row]. Dense (owner_count, width), or sparse: coalesced
// COO with the owners that occur.
class TableGradient {
 public:
  TableGradient(const at::Tensor& owners, int64_t owner_count, bool sparse);

  // coefficients: by pair; source: (rows, width) contiguous rows; both in the accumulation dtype of
  // `like`.
  at::Tensor sum(const at::Tensor& coefficients,
                 const at::Tensor& source,
                 const at::TensorOptions& like) const;

 private:
  int64_t owner_count_;
  int64_t count_;
  bool sparse_;
  SortedPairs sorted_;
};

}  // namespace peer::ops::cpu
