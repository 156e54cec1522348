// From a list of owners (which expert did each pair retrieve?) to the work list of the expert pass.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/parallel.h"

namespace peer::cpu {

// Long enough that partial sums stay small beside x (at 128 experts per token they never exceed
// it), short enough to share a hot expert's pairs among many threads.
constexpr int64_t kPairsPerChunk = 128;

// The pairs 0 .. count-1 sorted by owners[pair], pairs of equal owners in their own order. Owners
// lie in [0, owner_count).
std::unique_ptr<Pair[]> sort_pairs(const int64_t* owners,
                                   int64_t count,
                                   int64_t owner_count,
                                   const ParallelFor& parallel_for);

enum class OutputRows {
  by_owner,  // row = owner: a dense gradient
  compact,   // row = how many smaller owners occur: a sparse gradient's values
};

struct ExpertPassPlan {
  std::vector<Chunk> chunks;
  std::vector<SplitRun> split_runs;
  std::vector<int64_t> owners;  // distinct, ascending; only for compact rows
  int64_t partial_rows = 0;
};

ExpertPassPlan plan_expert_pass(const Pair* pairs, int64_t count, OutputRows rows);

}  // namespace peer::cpu
