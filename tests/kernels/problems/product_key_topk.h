// Problems of retrieval, special sub-scores and masks, for the kernels of every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "support.h"

namespace peer::test {

struct Sizes {
  int64_t tokens, heads, half_width, rows, columns, k;
  bool shared = true;  // whether heads share their keys
};

// A device's problem, whose queries, row keys and column keys are drawn by draw(count), in this
// order.
template <class Problem, class Draw>
Problem draw_problem(const Sizes& sizes, const Draw& draw) {
  const int64_t key_heads = sizes.shared ? 1 : sizes.heads;
  return {sizes.tokens,
          sizes.heads,
          sizes.half_width,
          sizes.rows,
          sizes.columns,
          sizes.k,
          sizes.shared,
          draw(sizes.tokens * sizes.heads * 2 * sizes.half_width),
          draw(key_heads * sizes.rows * sizes.half_width),
          draw(key_heads * sizes.columns * sizes.half_width)};
}

inline std::string describe_grid(int64_t rows, int64_t columns, int64_t k) {
  return "grid " + std::to_string(rows) + "x" + std::to_string(columns) + " k " + std::to_string(k);
}

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

// Which experts are disabled, and which keys have only disabled experts. Empty without a mask.
struct Mask {
  std::vector<char> disabled, unused_rows, unused_columns;

  // As the kernels take them.
  static const bool* data(const std::vector<char>& flags) {
    return flags.empty() ? nullptr : reinterpret_cast<const bool*>(flags.data());
  }
};

inline Mask make_mask(const std::vector<char>& disabled, int64_t rows, int64_t columns) {
  Mask mask = {disabled, std::vector<char>(rows, 1), std::vector<char>(columns, 1)};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      mask.unused_rows[r] &= disabled[r * columns + c];
      mask.unused_columns[c] &= disabled[r * columns + c];
    }
  }
  return mask;
}

// Disables some percent of the experts, but leaves at least k. With 100 percent, exactly k.
inline Mask draw_mask(Random& random, int64_t rows, int64_t columns, int64_t k, int64_t percent) {
  const int64_t experts = rows * columns;
  std::vector<char> disabled;
  for (const int64_t drawn : random.integers(experts, 100)) {
    disabled.push_back(drawn < percent);
  }
  while (std::count(disabled.begin(), disabled.end(), 0) < k) {
    disabled[random.integer(experts)] = 0;
  }
  return make_mask(disabled, rows, columns);
}

// Masks for sub-scores in descending order, so that the best `depth` keys of a half are the first.
struct NamedMask {
  const char* name;
  Mask mask;
};

inline std::vector<NamedMask> hostile_masks(int64_t rows,
                                            int64_t columns,
                                            int64_t k,
                                            int64_t depth) {
  const auto disable = [&](const auto& is_disabled) {
    std::vector<char> disabled;
    for (int64_t id = 0; id < rows * columns; ++id) {
      disabled.push_back(is_disabled(id / columns, id % columns));
    }
    return make_mask(disabled, rows, columns);
  };
  return {
      {"nothing", disable([](int64_t, int64_t) { return false; })},
      {"the best rows with the best columns",
       disable([&](int64_t r, int64_t c) { return r < depth && c < depth; })},
      {"the best rows or the best columns",
       disable([&](int64_t r, int64_t c) { return r < depth || c < depth; })},
      {"the best rows", disable([&](int64_t r, int64_t) { return r < depth; })},
      {"the best columns", disable([&](int64_t, int64_t c) { return c < depth; })},
      {"every other row and column",
       disable([](int64_t r, int64_t c) { return r % 2 == 0 || c % 3 == 0; })},
      {"all but the worst column", disable([&](int64_t, int64_t c) { return c + 1 < columns; })},
      {"all but the worst row", disable([&](int64_t r, int64_t) { return r + 1 < rows; })},
      {"all but the last k",
       disable([&](int64_t r, int64_t c) { return r * columns + c < rows * columns - k; })},
      {"all but the diagonal", disable([](int64_t r, int64_t c) { return r != c; })},
  };
}

}  // namespace peer::test
