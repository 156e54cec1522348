// From a list of owners (which expert did each pair retrieve?) to the work list of the expert pass.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace peer::cpu {

// Long enough that partial sums stay small beside x (at 128 experts per token they never exceed
// it), short enough to share a hot expert's pairs among many threads.
constexpr int64_t kPairsPerChunk = 128;

// Uninitialised memory, aligned to a cache line. Handed in by the caller, who may know memory whose
// pages are there already: the lists here are a few megabytes, made anew in every step.
using Allocate = std::function<std::shared_ptr<void>(int64_t bytes)>;

template <class Item>
class List {
 public:
  List() = default;
  List(const Allocate& allocate, int64_t size)
      : memory_(allocate(size * int64_t(sizeof(Item)))), size_(size) {}

  Item* data() const { return static_cast<Item*>(memory_.get()); }
  int64_t size() const { return size_; }
  Item& operator[](int64_t i) const { return data()[i]; }
  Item* begin() const { return data(); }
  Item* end() const { return data() + size_; }

 private:
  std::shared_ptr<void> memory_;
  int64_t size_ = 0;
};

// The pairs 0 .. count-1 sorted by owners[pair], pairs of equal owners in their own order. Owners
// lie in [0, owner_count).
List<Pair> make_segments(const int64_t* owners,
                         int64_t count,
                         int64_t owner_count,
                         const ParallelFor& parallel_for,
                         const Allocate& allocate);

enum class OutputRows {
  by_owner,  // row = owner: a dense gradient
  compact,   // row = how many smaller owners occur: a sparse gradient's values
};

struct SegmentPlan {
  List<Chunk> chunks;
  List<SplitSegment> split_segments;
  List<int64_t> owners;  // distinct, ascending; only for compact rows
  int64_t partial_rows = 0;
};

SegmentPlan plan_expert_pass(const List<Pair>& pairs,
                             OutputRows rows,
                             const ParallelFor& parallel_for,
                             const Allocate& allocate);

}  // namespace peer::cpu
