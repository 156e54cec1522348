#pragma once

#include <cstdint>

#include "kernels/host_device.h"

namespace peer {

// A table of expert rows. Rows are contiguous, but may lie further apart than they are long.
template <class Element>
struct Rows {
  Element* data = nullptr;
  int64_t stride = 0;

  PEER_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

}  // namespace peer
