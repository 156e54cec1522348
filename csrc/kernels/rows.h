#pragma once

#include <cstdint>

#include "kernels/host_device.h"

namespace peer {

// A table of expert rows, or a part of one. Rows are contiguous, but may lie further apart than
// they are long.
template <class Element>
struct Rows {
  Element* data = nullptr;
  int64_t stride = 0;

  PEER_HOST_DEVICE explicit operator bool() const { return data != nullptr; }

  // The rows from a column on; none where there are none.
  Rows from_column(int64_t column) const { return {data ? data + column : nullptr, stride}; }
};

}  // namespace peer
