#include "kernels/cuda/elements.h"
#include "support.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

TEMPLATE_TEST_CASE("widening is exact for every bit pattern", "[elements]", BFloat16, Half) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const TestType element{uint16_t(bits)};
    const double expected = to_double(element);
    const float value = widen(element);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(value));
    } else {
      REQUIRE(value == expected);
      REQUIRE(std::signbit(value) == std::signbit(expected));
    }
  }
}

TEMPLATE_TEST_CASE("narrowing rounds to nearest, ties to even", "[elements]", BFloat16, Half) {
  // Between every two neighbours: the middle, and the values next to it.
  for (int bits = 0; bits < 0x7fff; ++bits) {
    const TestType low{uint16_t(bits)}, high{uint16_t(bits + 1)};
    const double a = to_double(low), b = to_double(high);
    if (!std::isfinite(b)) {
      break;
    }
    const TestType even = bits % 2 == 0 ? low : high;
    const float middle = float((a + b) / 2);
    for (const float sign : {1.0f, -1.0f}) {
      const uint16_t flag = sign < 0 ? 0x8000 : 0;
      REQUIRE(narrow<TestType>(sign * float(a)).bits == (low.bits | flag));
      REQUIRE(narrow<TestType>(sign * middle).bits == (even.bits | flag));
      REQUIRE(narrow<TestType>(sign * std::nextafter(middle, 0.0f)).bits == (low.bits | flag));
      REQUIRE(narrow<TestType>(sign * std::nextafter(middle, INFINITY)).bits == (high.bits | flag));
    }
  }
}

TEMPLATE_TEST_CASE("values that are too large become infinite, NaN stays NaN",
                   "[elements]",
                   BFloat16,
                   Half) {
  CHECK(std::isinf(to_double(narrow<TestType>(3.4e38f))));
  CHECK(std::isinf(to_double(narrow<TestType>(-INFINITY))));
  CHECK(std::isnan(to_double(narrow<TestType>(NAN))));
  CHECK(to_double(narrow<Half>(65519.0f)) == 65504);
  CHECK(std::isinf(to_double(narrow<Half>(65520.0f))));
}
