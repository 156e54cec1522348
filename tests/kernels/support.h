// What the kernel tests share: the capabilities of this processor, conversions of element types,
// seeded data, and loops over threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/segments.h"

namespace peer::test {

// The capabilities that this processor can run.
inline std::vector<cpu::Capability> capabilities() {
  std::vector<cpu::Capability> result;
  for (const auto capability :
       {cpu::Capability::baseline, cpu::Capability::avx2, cpu::Capability::avx512}) {
    if (cpu::is_available(capability)) {
      result.push_back(capability);
    }
  }
  return result;
}

// The oracles' own conversions, one value at a time.

template <class Element>
double to_double(Element value) {
  return value;
}

template <>
inline double to_double(BFloat16 value) {
  return std::bit_cast<float>(uint32_t(value.bits) << 16);
}

template <>
inline double to_double(Half value) {
  const int exponent = (value.bits >> 10) & 31;
  const int mantissa = value.bits & 1023;
  const double sign = value.bits & 0x8000 ? -1 : 1;
  if (exponent == 31) {
    return mantissa ? std::nan("") : sign * INFINITY;
  }
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// A value that the type holds exactly, by truncation of the float's mantissa; for inputs.
template <class Element>
Element from_double(double value) {
  return Element(value);
}

template <>
inline BFloat16 from_double(double value) {
  return {uint16_t(std::bit_cast<uint32_t>(float(value)) >> 16)};
}

template <>
inline Half from_double(double value) {
  if (std::isnan(value)) {
    return {0x7e00};
  }
  if (std::abs(value) < 0x1p-14) {
    return {uint16_t(value < 0 ? 0x8000 : 0)};
  }
  if (std::abs(value) >= 0x1p16) {
    return {uint16_t(value < 0 ? 0xfc00 : 0x7c00)};
  }
  int exponent;
  const double fraction = std::frexp(std::abs(value), &exponent);  // in [0.5, 1)
  return {uint16_t((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | int(fraction * 2048) - 1024)};
}

// The relative distance between neighbouring values.
template <class Element>
constexpr double kEpsilon = 0x1p-23;
template <>
inline constexpr double kEpsilon<double> = 0x1p-52;
template <>
inline constexpr double kEpsilon<BFloat16> = 0x1p-7;
template <>
inline constexpr double kEpsilon<Half> = 0x1p-10;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  template <class Element>
  std::vector<Element> normal(int64_t count) {
    std::normal_distribution<double> distribution;
    std::vector<Element> values(count);
    for (Element& value : values) {
      value = from_double<Element>(distribution(engine_));
    }
    return values;
  }

  std::vector<int64_t> integers(int64_t count, int64_t end) {
    std::uniform_int_distribution<int64_t> distribution(0, end - 1);
    std::vector<int64_t> values(count);
    for (int64_t& value : values) {
      value = distribution(engine_);
    }
    return values;
  }

  int64_t integer(int64_t end) { return integers(1, end)[0]; }

 private:
  std::mt19937_64 engine_;
};

// The owners of segments of these many pairs, shuffled.
inline std::vector<int64_t> owners_of_segments(const std::vector<int64_t>& segments) {
  std::vector<int64_t> owners;
  for (size_t owner = 0; owner < segments.size(); ++owner) {
    owners.insert(owners.end(), segments[owner], owner);
  }
  std::shuffle(owners.begin(), owners.end(), std::mt19937_64(7));
  return owners;
}

// Memory for the lists of segments.
inline std::shared_ptr<void> plain_memory(int64_t bytes) {
  return {std::malloc(std::max<int64_t>(bytes, 1)), std::free};
}

// Contiguous ranges on new threads, as many as given.
inline ParallelFor on_threads(int threads) {
  return [threads](int64_t count, int64_t /*grain*/, const RangeBody& body) {
    std::vector<std::thread> workers;
    const int64_t share = (count + threads - 1) / threads;
    for (int64_t first = 0; first < count; first += share) {
      workers.emplace_back(
          [&body, first, last = std::min(first + share, count)] { body(first, last); });
    }
    for (std::thread& worker : workers) {
      worker.join();
    }
  };
}

template <class Element>
bool have_same_bits(const std::vector<Element>& a, const std::vector<Element>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Element)) == 0);
}

}  // namespace peer::test
