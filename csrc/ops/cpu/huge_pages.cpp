#include "ops/cpu/huge_pages.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "peer/functional.h"

namespace peer::ops::cpu {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;

// A layer's backward needs six: the table's gradient, and five lists of its retrievals.
constexpr size_t kMaxCachedBlocks = 6;

struct Block {
  void* data;
  size_t bytes;
};

size_t round_to_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

void request_huge_pages([[maybe_unused]] const Block& block) {
#if defined(MADV_HUGEPAGE)
  madvise(block.data, block.bytes, MADV_HUGEPAGE);  // if this fails, pages stay small
#endif
}

Block map(size_t bytes, int protection = PROT_READ | PROT_WRITE) {
  bytes = round_to_pages(bytes);
  // Maps one page more than needed, and unmaps what lies before and after the aligned part.
  void* mapped = mmap(nullptr, bytes + kHugePage, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "peer: cannot allocate ", bytes,
                   " bytes: ", std::strerror(errno));
  char* const start = static_cast<char*>(mapped);
  char* const aligned =
      start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (aligned > start) {
    munmap(start, aligned - start);
  }
  if (aligned + bytes < start + bytes + kHugePage) {
    munmap(aligned + bytes, start + kHugePage - aligned);
  }
  const Block block{aligned, bytes};
  request_huge_pages(block);
  return block;
}

void unmap(const Block& block) { munmap(block.data, block.bytes); }

// Makes a block larger without copying, and returns whether it did. The block may move. New pages
// read as zero and take memory once they are touched.
bool enlarge([[maybe_unused]] Block& block, [[maybe_unused]] size_t bytes) {
#if defined(MREMAP_MAYMOVE)
  bytes = round_to_pages(bytes);
  void* data = mremap(block.data, block.bytes, bytes, 0);
  if (data == MAP_FAILED) {
    // The addresses after the block are taken. The pages move to a reserved range, because the
    // system would choose one that is not aligned to huge pages. If the move fails, the reservation
    // stays: the system may have given its addresses to another thread already.
    const Block target = map(bytes, PROT_NONE);
    data = mremap(block.data, block.bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target.data);
    if (data == MAP_FAILED) {
      return false;
    }
  }
  block = {data, bytes};
  request_huge_pages(block);
  return true;
#else
  return false;
#endif
}

// Freed blocks for later requests, the last freed at the back.
class BlockCache {
 public:
  // The smallest block that fits and is less than twice too large. If there is none, a new block
  // that is large enough for slightly larger requests later.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
        if (block->bytes >= bytes && block->bytes / 2 <= bytes &&
            (best == blocks_.end() || block->bytes < best->bytes)) {
          best = block;
        }
      }
      if (best != blocks_.end()) {
        const Block block = *best;
        blocks_.erase(best);
        return block;
      }
    }
    return map(bytes + bytes / 16);
  }

  void put(const Block& block) {
#if defined(MADV_FREE)
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
    if (blocks_.size() > kMaxCachedBlocks) {
      unmap(blocks_.front());
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

bool is_large(size_t bytes) { return bytes >= kHugePage; }

// Allocates large blocks from the cache, or by a new mapping if there is no cache.
class PageAllocator final : public c10::Allocator {
 public:
  explicit PageAllocator(BlockCache* cache) : cache_(cache) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (!is_large(bytes)) {
      return c10::GetCPUAllocator()->allocate(bytes);
    }
    auto* loan = new Loan{cache_ == nullptr ? map(bytes) : cache_->take(bytes), cache_};
    return {loan->block.data, loan, &give_back, c10::DeviceType::CPU};
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  // A storage is not resizable if something holds its address, such as a NumPy array.
  static bool enlarge_storage(c10::StorageImpl& storage, size_t bytes) {
    auto* loan = storage.data_ptr().cast_context<Loan>(&give_back);
    if (loan == nullptr || loan->cache != nullptr || !storage.resizable() ||
        !enlarge(loan->block, bytes)) {
      return false;
    }
    // The old pointer gives its loan to the new one.
    storage.set_data_ptr({loan->block.data, loan, &give_back, c10::DeviceType::CPU})
        .release_context();
    storage.set_nbytes(bytes);
    return true;
  }

 private:
  struct Loan {
    Block block;
    BlockCache* cache;
  };

  static void give_back(void* context) {
    const auto* loan = static_cast<Loan*>(context);
    loan->cache == nullptr ? unmap(loan->block) : loan->cache->put(loan->block);
    delete loan;
  }

  BlockCache* cache_;
};

}  // namespace

// Never destroyed: tensors may be freed while the program ends.
c10::Allocator& huge_pages() {
  static auto* const allocator = new PageAllocator(nullptr);
  return *allocator;
}

c10::Allocator& cached_huge_pages() {
  static auto* const allocator = new PageAllocator(new BlockCache);
  return *allocator;
}

at::Tensor empty_in(c10::Allocator& allocator, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   dtype, std::nullopt);
}

at::Tensor zeros_in_huge_pages(at::IntArrayRef sizes, at::ScalarType dtype) {
  if (!is_large(size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype))) {
    return at::zeros(sizes, dtype);
  }
  return empty_in(huge_pages(), sizes, dtype);
}

bool enlarge_in_huge_pages(const at::Tensor& tensor, size_t bytes) {
  const bool fills_storage = tensor.is_contiguous() && tensor.storage_offset() == 0 &&
                             tensor.storage().nbytes() == tensor.nbytes();
  return fills_storage &&
         PageAllocator::enlarge_storage(*tensor.storage().unsafeGetStorageImpl(), bytes);
}

}  // namespace peer::ops::cpu

namespace peer {

at::Tensor empty_huge(at::IntArrayRef size, at::ScalarType dtype) {
  return ops::cpu::empty_in(ops::cpu::huge_pages(), size, dtype);
}

at::Tensor zeros_huge(at::IntArrayRef size, at::ScalarType dtype) {
  return ops::cpu::zeros_in_huge_pages(size, dtype);
}

at::Tensor append_zero_rows(const at::Tensor& table, int64_t rows) {
  TORCH_CHECK_VALUE(table.dim() > 0 && rows >= 0,
                    "peer::append_zero_rows: expected a table with rows and a number of rows that "
                    "is not negative, got shape ",
                    table.sizes(), " and ", rows);
  std::vector<int64_t> sizes = table.sizes().vec();
  sizes[0] += rows;
  if (table.is_cpu() && table.layout() == at::kStrided &&
      ops::cpu::enlarge_in_huge_pages(
          table, at::detail::computeStorageNbytesContiguous(sizes, table.element_size()))) {
    return at::empty({0}, table.options()).set_(table.storage(), 0, sizes);
  }
  const at::Tensor larger =
      table.is_cpu() ? zeros_huge(sizes, table.scalar_type()) : at::zeros(sizes, table.options());
  larger.narrow(0, 0, table.size(0)).copy_(table);
  return larger;
}

}  // namespace peer

TORCH_LIBRARY_FRAGMENT(peer, m) {
  m.def("empty_huge(int[] size, ScalarType dtype) -> Tensor", &peer::empty_huge);
  m.def("zeros_huge(int[] size, ScalarType dtype) -> Tensor", &peer::zeros_huge);
  m.def("append_zero_rows(Tensor(a) table, int rows) -> Tensor(a)", &peer::append_zero_rows);
}
