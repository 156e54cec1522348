#include "ops/cpu/common.h"

#include <ATen/ops/empty.h>

#include <atomic>

#include "kernels/cpu/table_grad.h"
#include "ops/cpu/huge_pages.h"

namespace peer::ops::cpu {

namespace {

// Roughly the share of the last-level cache that one program gets.
constexpr int64_t kCacheBytes = int64_t(16) << 20;

// A pair or a chunk takes a fraction of a microsecond.
constexpr int64_t kItemsPerTask = 64;

std::shared_ptr<void> cached_memory(int64_t bytes) {
  const auto data = std::make_shared<c10::DataPtr>(cached_huge_pages().allocate(bytes));
  return {data, data->get()};
}

}  // namespace

Segments make_segments(const at::Tensor& contiguous_owners,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       SinglePairs single_pairs) {
  return peer::cpu::make_segments(contiguous_owners.const_data_ptr<int64_t>(),
                                  contiguous_owners.numel(), owner_count, frozen, rows,
                                  single_pairs, parallel_for<RangeBody>, cached_memory);
}

TableGradient::TableGradient(const at::Tensor& owners,
                             int64_t owner_count,
                             bool sparse,
                             const at::Tensor& frozen)
    : owner_count_(owner_count),
      count_(owners.numel()),
      sparse_(sparse),
      segments_(make_segments(owners,
                              owner_count,
                              const_data_or_null<bool>(frozen),
                              sparse ? OutputRows::compact : OutputRows::by_owner,
                              SinglePairs::apart)) {}

at::Tensor TableGradient::sum(const at::Tensor& coefficients,
                              at::TensorList sources,
                              const at::TensorOptions& like) const {
  const auto visit_pairs = [&](const RangeBody& after_pairs) {
    parallel_for(count_, kItemsPerTask, after_pairs);
  };
  return sum_during(visit_pairs, coefficients, sources, like);
}

at::Tensor TableGradient::sum_during(const Pass& pass,
                                     const at::Tensor& coefficients,
                                     at::TensorList sources,
                                     const at::TensorOptions& like) const {
  const int64_t parts = sources.size();
  const int64_t width = sources[0].size(1);
  const int64_t distinct = segments_.distinct_owners.size();
  const at::ScalarType dtype = c10::typeMetaToScalarType(like.dtype());
  const at::Tensor values = sparse_ ? empty_in(cached_huge_pages(), {distinct, parts, width}, dtype)
                                    : zeros_in_huge_pages({owner_count_, parts, width}, dtype);
  with_table_type(values.scalar_type(), [&]<class Element>() {
    using Real = accumulation_t<Element>;
    const at::Tensor partial_sums =
        at::empty({segments_.partial_rows, parts * width}, sources[0].options());
    const SegmentWork<Real> work = segments_.work(mutable_rows_of<Real>(partial_sums));
    std::vector<TableGrad<Element>> passes;
    for (int64_t part = 0; part < parts; ++part) {
      const at::Tensor& source = sources[part];
      passes.push_back({
          .width = width,
          .pairs_per_row = source.size(0) > 0 ? count_ / source.size(0) : 1,
          .coefficients = const_data_of<Real>(coefficients) + part * count_,
          .source = rows_of<Real>(source),
          .out = mutable_rows_of<Element>(values.select(1, part)),
      });
    }
    const int64_t written_rows = segments_.single_count + segments_.chunks.size();
    const bool exceeds_caches =
        written_rows * parts * width * int64_t(sizeof(Element)) > kCacheBytes;
    const auto& kernel = kernels<TableGradKernels>().of<Element>();
    pass([&](int64_t first, int64_t last) {
      if (work.single_rows != nullptr) {
        kernel.sum_single_pairs(passes, work, exceeds_caches, first, last);
      }
    });
    parallel_for(segments_.chunks.size(), kItemsPerTask, [&](int64_t first, int64_t last) {
      kernel.sum_chunks(passes, work, exceeds_caches, first, last);
    });
    parallel_for(segments_.split_segments.size(), 1, [&](int64_t first, int64_t last) {
      kernel.sum_split_segments(passes, work, first, last);
    });
  });
  if (!sparse_) {
    return values;
  }
  const at::Tensor ids = at::empty({1, distinct}, like.dtype(at::kLong));
  std::copy_n(segments_.distinct_owners.data(), distinct, ids.mutable_data_ptr<int64_t>());
  return sparse_gradient(owner_count_, ids, values);
}

void Device::check_index_range(const char* op,
                               const at::Tensor& contiguous_indices,
                               int64_t count) {
  const int64_t* indices = contiguous_indices.const_data_ptr<int64_t>();
  const int64_t total = contiguous_indices.numel();
  std::atomic<int64_t> first_bad = total;
  parallel_for(total, 1 << 15, [&](int64_t first, int64_t last) {
    // Unsigned, so that one comparison catches negative ids too; no branch, so that the loop
    // vectorises.
    uint64_t largest = 0;
    for (int64_t i = first; i < last; ++i) {
      largest = std::max(largest, uint64_t(indices[i]));
    }
    if (largest < uint64_t(count)) {
      return;
    }
    int64_t bad = first;
    while (uint64_t(indices[bad]) < uint64_t(count)) {
      ++bad;
    }
    int64_t known = first_bad.load();
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  if (first_bad < total) {
    const int64_t bad = first_bad;
    std::vector<int64_t> position;
    for (int64_t axis = 0, rest = bad; axis < contiguous_indices.dim(); ++axis) {
      position.push_back(rest / contiguous_indices.stride(axis));
      rest %= contiguous_indices.stride(axis);
    }
    TORCH_CHECK_INDEX(false, op, ": index ", indices[bad], " at position ",
                      at::IntArrayRef(position), " of indices is out of range for ", count,
                      " experts");
  }
}

}  // namespace peer::ops::cpu
