#include "cuda_support.h"
#include "kernels/cuda/mma.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

// NVIDIA's documented layout, element by element: the lane that holds row i and column j of each
// matrix, and the place in the lane.
TEMPLATE_TEST_CASE("the stand-in for the tensor cores multiplies matrices in their layout",
                   "[mma]",
                   BFloat16,
                   Half) {
  Random random(15);
  const auto a = random.normal<TestType>(16 * 16), b = random.normal<TestType>(16 * 8);
  const auto c = random.normal<float>(16 * 8);
  struct Fragments {
    TestType a[8], b[4];
    float sums[4];
  };
  std::vector<Fragments> lanes(32);
  const auto a_at = [&](int i, int j) -> TestType& {
    return lanes[i % 8 * 4 + j % 8 / 2].a[j % 2 + i / 8 * 2 + j / 8 * 4];
  };
  const auto b_at = [&](int i, int j) -> TestType& {
    return lanes[j * 4 + i % 8 / 2].b[i % 2 + i / 8 * 2];
  };
  const auto sum_at = [&](int i, int j) -> float& {
    return lanes[i % 8 * 4 + j / 2].sums[j % 2 + i / 8 * 2];
  };
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      a_at(i, j) = a[i * 16 + j];
    }
    for (int j = 0; j < 8; ++j) {
      b_at(i, j) = b[i * 8 + j];
      sum_at(i, j) = c[i * 8 + j];
    }
  }
  play_grid({1, 32, 0}, [&] {
    Fragments& own = lanes[threadIdx.x];
    uint32_t own_a[4], own_b[2];
    std::memcpy(own_a, own.a, sizeof(own_a));
    std::memcpy(own_b, own.b, sizeof(own_b));
    for (int repeat = 0; repeat < 2; ++repeat) {  // back to back, as in a loop
      mma_m16n8k16<TestType>(own.sums, own_a, own_b);
    }
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double product = 0;
      for (int k = 0; k < 16; ++k) {
        product += to_double(a[i * 16 + k]) * to_double(b[k * 8 + j]);
      }
      CHECK(sum_at(i, j) == Approx(c[i * 8 + j] + 2 * product).margin(1e-4));
    }
  }
}
