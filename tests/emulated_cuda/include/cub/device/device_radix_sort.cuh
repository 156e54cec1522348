// Stands in for CUB's header: a stable sort.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  template <class Key, class Value, class Count>
  static cudaError_t SortPairs(void* workspace,
                               size_t& workspace_bytes,
                               const Key* keys,
                               Key* sorted_keys,
                               const Value* values,
                               Value* sorted_values,
                               Count count,
                               int first_bit,
                               int last_bit,
                               cudaStream_t /*stream*/) {
    if (workspace == nullptr) {
      workspace_bytes = 1;
      return cudaSuccess;
    }
    const auto digits = [&](Key key) {
      const unsigned long long shifted = static_cast<unsigned long long>(key) >> first_bit;
      return shifted & ((1ull << (last_bit - first_bit)) - 1);
    };
    std::vector<Count> order(count);
    std::iota(order.begin(), order.end(), Count(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](Count a, Count b) { return digits(keys[a]) < digits(keys[b]); });
    for (Count i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaPeekAtLastError();  // reports errors of earlier calls, too, like CUB
  }
};

}  // namespace cub
