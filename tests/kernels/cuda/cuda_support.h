// Set-up that the tests of the CUDA kernels share. They run on a device that is emulated on the
// CPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/launch.h"
#include "support.h"

namespace peer::test {

// Like the memory of a device's allocator, it holds what was there before. Here that is NaN.
inline std::shared_ptr<void> used_memory(int64_t bytes) {
  const std::shared_ptr<void> memory = plain_memory(bytes);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

inline const cuda::Context kContext = {nullptr, used_memory};

// The element types of a table and of the inputs beside it.
template <class TableType, class SourceType>
struct Types {
  using Table = TableType;
  using Source = SourceType;
};

#define PEER_TABLE_AND_SOURCE_TYPES                                            \
  (Types<float, float>), (Types<double, double>), (Types<BFloat16, BFloat16>), \
      (Types<BFloat16, float>), (Types<Half, Half>), (Types<Half, float>)

// Sets the number of SMs of the emulated device for the lifetime of the object.
class ScopedSmCount {
 public:
  explicit ScopedSmCount(int count) : before_(emulated_sm_count) { emulated_sm_count = count; }
  ~ScopedSmCount() { emulated_sm_count = before_; }

 private:
  int before_;
};

// Rows in separate memory. The first row is `offset` elements behind an address aligned to 64
// bytes, and `padding` elements separate the rows.
struct Layout {
  int64_t offset = 0, padding = 0;
};

inline constexpr Layout kAligned = {0, 8};
inline constexpr Layout kUnaligned = {1, 3};

template <class Element>
class RowMemory {
 public:
  RowMemory(int64_t rows, int64_t width, Layout layout, Element value)
      : width_(width),
        stride_(std::max<int64_t>(width + layout.padding, 1)),
        memory_(rows * stride_ + layout.offset + 64 / sizeof(Element), value) {
    while (reinterpret_cast<uintptr_t>(memory_.data() + first_) % 64 != 0) {
      ++first_;
    }
    first_ += layout.offset;
  }

  RowMemory(const RowMemory&) = delete;

  Rows<Element> rows() { return {memory_.data() + first_, stride_}; }
  Rows<const Element> rows() const { return {memory_.data() + first_, stride_}; }
  Element& at(int64_t row, int64_t column) { return memory_[first_ + row * stride_ + column]; }
  const Element& at(int64_t row, int64_t column) const {
    return memory_[first_ + row * stride_ + column];
  }

  // The rows, without the padding.
  std::vector<Element> values(int64_t rows) const {
    std::vector<Element> values;
    for (int64_t row = 0; row < rows; ++row) {
      const Element* first = memory_.data() + first_ + row * stride_;
      values.insert(values.end(), first, first + width_);
    }
    return values;
  }

  void set(const std::vector<Element>& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      at(i / width_, i % width_) = values[i];
    }
  }

  // Whether all memory but the rows holds this value.
  bool holds_elsewhere(int64_t rows, Element value) const {
    for (int64_t i = 0; i < int64_t(memory_.size()); ++i) {
      const int64_t place = i - first_;
      const bool is_in_row = place >= 0 && place / stride_ < rows && place % stride_ < width_;
      if (!is_in_row && std::memcmp(&memory_[i], &value, sizeof(value)) != 0) {
        return false;
      }
    }
    return true;
  }

 private:
  int64_t width_, stride_, first_ = 0;
  std::vector<Element> memory_;
};

}  // namespace peer::test
