// From a list of owners to segments of sorted pairs and the work list over them: see
// kernels/segments.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/segment_work.h"
#include "kernels/segments.h"

namespace peer::cpu {

// Uninitialised memory, aligned to a cache line. The lists here are a few megabytes and are made
// anew in every step, so the caller may pass memory whose pages are already mapped.
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

// What becomes of single pairs.
enum class SinglePairs {
  in_chunks,  // each is a chunk
  apart,      // they are in single_rows instead
};

struct Segments {
  int64_t pair_count;  // with the pairs of frozen owners
  List<Pair> pairs;    // the others, by owner; pairs of equal owners by id
  List<Chunk> chunks;
  List<int64_t> single_rows;  // see SegmentWork; empty if no pair is apart
  int64_t single_count = 0;
  List<SplitSegment> split_segments;
  List<int64_t> distinct_owners;  // ascending; only for compact rows
  int64_t partial_rows = 0;

  template <class Real>
  SegmentWork<Real> work(Rows<Real> partial_sums) const {
    return {
        .pair_count = pair_count,
        .pairs = pairs.data(),
        .chunks = chunks.data(),
        .single_rows = single_rows.data(),
        .split_segments = split_segments.data(),
        .partial_sums = partial_sums,
    };
  }
};

// Owners are in [0, owner_count). frozen: by owner, or null. Pairs of frozen owners are dropped, so
// a frozen owner has no segment.
Segments make_segments(const int64_t* owners,
                       int64_t count,
                       int64_t owner_count,
                       const bool* frozen,
                       OutputRows rows,
                       SinglePairs single_pairs,
                       const ParallelFor& parallel_for,
                       const Allocate& allocate);

}  // namespace peer::cpu
