// Order-preserving integers: a total order on floating-point scores, so that selection can neither
// lose a NaN nor distinguish -0 from 0.
//
//   NaN (any)  >  +inf  >  finite values  >  -inf,      -0 == +0
//
// A comparison of floats is false for NaN, so a filter on floats may keep fewer than k candidates
// and leave slots unwritten. On these integers every row yields exactly k.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/common.h"

namespace peer {

template <class Real>
struct OrderedInteger;
template <>
struct OrderedInteger<float> {
  using type = int32_t;
};
template <>
struct OrderedInteger<double> {
  using type = int64_t;
};

template <class Real>
using ordered_t = typename OrderedInteger<Real>::type;

template <class Real>
PEER_HOST_DEVICE static inline ordered_t<Real> to_ordered(Real score) {
  using Integer = ordered_t<Real>;
  if (score != score) {
    return std::numeric_limits<Integer>::max();
  }
  score += Real(0);  // -0 + 0 is +0
  Integer bits;
  std::memcpy(&bits, &score, sizeof(bits));
  // Negative floats sort backwards as integers: flip all bits but the sign.
  return bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max());
}

// The inverse of to_ordered, except that NaN payloads and the sign of zero are lost.
template <class Real>
PEER_HOST_DEVICE static inline Real from_ordered(ordered_t<Real> order) {
  using Integer = ordered_t<Real>;
  const Integer bits =
      order ^ ((order >> (8 * sizeof(Integer) - 1)) & std::numeric_limits<Integer>::max());
  Real score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// Bisection for the k-th best score. At least k scores reach `low`, and no score is above `high`.
// While low < high, count the scores that reach the middle, then narrow. At the end, `low` is the
// k-th best score, or a bound that at least k and at most `enough` scores reach.
template <class Order>
PEER_HOST_DEVICE static inline Order middle_of(Order low, Order high) {
  using Unsigned = std::make_unsigned_t<Order>;
  return Order(Unsigned(high) - (Unsigned(high) - Unsigned(low)) / 2);
}

template <class Order, class Count>
PEER_HOST_DEVICE static inline void narrow_to_kth(Order& low,
                                                  Order& high,
                                                  Order middle,
                                                  Count reaching,
                                                  Count k,
                                                  Count enough) {
  if (reaching < k) {
    high = middle - 1;
    return;
  }
  low = middle;
  if (reaching <= enough) {
    high = low;
  }
}

}  // namespace peer
