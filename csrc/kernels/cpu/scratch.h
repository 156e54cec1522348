// Memory for one call of a kernel.
#pragma once

#include <cstdint>
#include <new>

#include "kernels/cpu/capability.h"

namespace peer::cpu::PEER_CAPABILITY {

// Uninitialised, aligned to a cache line. (Not std::vector: its instantiations would be shared
// between the capabilities, see capability.h.)
template <class Element>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(
            static_cast<Element*>(::operator new(count * sizeof(Element), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Element* data() { return data_; }
  const Element* data() const { return data_; }
  Element& operator[](int64_t i) { return data_[i]; }
  const Element& operator[](int64_t i) const { return data_[i]; }

 private:
  Element* data_;
};

}  // namespace peer::cpu::PEER_CAPABILITY
