// Element types of the kernels, without Torch: the two 16-bit floats as bit patterns, and the type
// that each is accumulated in.
#pragma once

#include <cstdint>

namespace peer {

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

template <class Element>
using accumulation_t = typename Accumulation<Element>::type;

}  // namespace peer
