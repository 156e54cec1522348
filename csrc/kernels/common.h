// What the kernels of all devices share: element types without Torch, rows of tables, and the mark
// of functions that both CPU and CUDA kernels call.
#pragma once

#include <cstdint>

// nvcc compiles marked functions for the host and for the device.
#ifdef __CUDACC__
#define PEER_HOST_DEVICE __host__ __device__
#else
#define PEER_HOST_DEVICE
#endif

namespace peer {

// The two 16-bit floats, as bit patterns.
struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class Element>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

// The type in which sums over elements are accumulated: float, but double for double.
template <class Element>
using accumulation_t = typename Accumulation<Element>::type;

// A table of rows, or a range of its columns. Each row is contiguous; rows are `stride` elements
// apart.
template <class Element>
struct Rows {
  Element* data = nullptr;
  int64_t stride = 0;

  PEER_HOST_DEVICE explicit operator bool() const { return data != nullptr; }

  // The rows from a column on. A null table stays null.
  Rows from_column(int64_t column) const { return {data ? data + column : nullptr, stride}; }
};

}  // namespace peer
