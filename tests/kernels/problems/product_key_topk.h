// Retrieval among special sub-scores, for the kernels of every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "support.h"

namespace peer::test {

template <class Value>
struct SpecialScores {
  int64_t k;
  std::vector<Value> rows, columns;
};

// Up to 12 rows and 12 columns of these values. Few kinds of values make constant rows and long
// ties.
template <class Value>
SpecialScores<Value> draw_special_scores(Random& random, const std::vector<Value>& special) {
  const int64_t rows = 1 + random.integer(12), columns = 1 + random.integer(12);
  const int64_t k = 1 + random.integer(std::min<int64_t>(rows * columns, 20));
  const int64_t kinds = 1 + random.integer(special.size());
  const auto draw = [&](int64_t count) {
    std::vector<Value> values;
    const int64_t first = random.integer(special.size());
    for (const int64_t kind : random.integers(count, kinds)) {
      values.push_back(special[(first + kind) % special.size()]);
    }
    return values;
  };
  return {.k = k, .rows = draw(rows), .columns = draw(columns)};
}

}  // namespace peer::test
