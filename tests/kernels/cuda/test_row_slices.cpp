#include "cuda_support.h"
#include "kernels/cuda/row_slices.h"

using namespace peer;
using namespace peer::cuda;
using namespace peer::test;

TEST_CASE("a slice is prefetched in units of 16 bytes, which hold it and no unit more",
          "[row_slices]") {
  alignas(16) static unsigned char memory[128];
  const uint64_t base = reinterpret_cast<uint64_t>(memory);
  for (int offset = 0; offset < 48; ++offset) {
    for (int bytes = 1; bytes < 64; ++bytes) {
      const PrefetchRange range = prefetch_range(memory + offset, bytes);
      INFO("offset " << offset << " bytes " << bytes);
      REQUIRE(range.begin % 16 == 0);
      REQUIRE(range.bytes % 16 == 0);
      REQUIRE((range.begin <= base + offset && base + offset < range.begin + 16));
      const uint64_t end = range.begin + range.bytes;
      REQUIRE((end >= base + offset + bytes && base + offset + bytes > end - 16));
    }
  }
}
