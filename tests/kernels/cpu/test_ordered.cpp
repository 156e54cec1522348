#include <limits>

#include "catch.hpp"
#include "kernels/ordered.h"

using peer::to_ordered;

TEMPLATE_TEST_CASE("ordered integers sort as the scores do, with NaN highest",
                   "[ordered]",
                   float,
                   double) {
  using limits = std::numeric_limits<TestType>;
  const TestType ascending[] = {-limits::infinity(),  -limits::max(),        TestType(-1),
                                -limits::min(),       -limits::denorm_min(), TestType(0),
                                limits::denorm_min(), limits::min(),         TestType(1),
                                limits::max(),        limits::infinity(),    limits::quiet_NaN()};
  for (size_t i = 1; i < std::size(ascending); ++i) {
    CHECK(to_ordered(ascending[i - 1]) < to_ordered(ascending[i]));
  }
}

TEMPLATE_TEST_CASE("minus zero and zero are equal", "[ordered]", float, double) {
  CHECK(to_ordered(TestType(-0.0)) == to_ordered(TestType(0.0)));
}

TEMPLATE_TEST_CASE("every NaN is the same, whatever its sign", "[ordered]", float, double) {
  const TestType nan = std::numeric_limits<TestType>::quiet_NaN();
  CHECK(to_ordered(-nan) == to_ordered(nan));
}
