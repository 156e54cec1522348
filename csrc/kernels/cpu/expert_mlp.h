// The CPU kernels of expert_mlp.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/expert_mlp.h"

namespace peer::cpu {

// A token's experts are cut into splits of this many. The token's output is the sum of the splits'
// partial sums, in their order, whether one thread computes the token or several share its splits.
// The size is fixed, so a token's result does not depend on the number of tokens.
constexpr int64_t kExpertsPerSplit = 32;

constexpr int64_t splits_per_token(int64_t experts_per_token) {
  return (experts_per_token + kExpertsPerSplit - 1) / kExpertsPerSplit;
}

// What the backward pass calls for ranges of pairs: after it has written their coefficients and has
// read the rows of their experts for the last time. It calls it once for each pair. The rows of
// experts that no other pair has may then be written.
struct AfterPairs {
  void (*call)(const void* context, int64_t first, int64_t last) = nullptr;  // null: call nothing
  const void* context = nullptr;
};

// Indices are all in range.
template <class Table>
struct ExpertMlpFunctions {
  using Real = accumulation_t<Table>;
  // A work item is a token.
  void (*forward)(const ExpertMlpForward<Table>& pass, int64_t first, int64_t last);
  // A work item is a split, token·splits + split. Writes partial_sums (T, splits, D).
  void (*forward_splits)(const ExpertMlpForward<Table>& pass,
                         Real* partial_sums,
                         int64_t first,
                         int64_t last);
  // Adds the partial sums of each token, of which there must be at least one. A work item is a
  // token.
  void (*add_splits)(const ExpertMlpForward<Table>& pass,
                     const Real* partial_sums,
                     int64_t first,
                     int64_t last);
  // A work item is a token.
  void (*backward)(const ExpertMlpBackward<Table>& pass,
                   AfterPairs after_pairs,
                   int64_t first,
                   int64_t last);
};

struct ExpertMlpKernels : ExpertMlpFunctions<float>,
                          ExpertMlpFunctions<double>,
                          ExpertMlpFunctions<BFloat16>,
                          ExpertMlpFunctions<Half> {
  static const ExpertMlpKernels baseline, avx2, avx512;

  template <class Table>
  const ExpertMlpFunctions<Table>& of() const {
    return *this;
  }
};

}  // namespace peer::cpu
