// Selection: the k best of many scores, sorted, on ordered integers (ordered.h).
//
//   1. bound    a value that at least k of the scores reach, and few more than k
//   2. filter   the positions of the scores that reach it, from bit masks of 64 comparisons
//   3. rank     the number of better survivors, for each survivor. No branch depends on the scores
//
// Order       higher score first, equal scores by position
// Padding     scores are padded with kBelowAll to a multiple of 64. Padding is never selected
#pragma once

#include <algorithm>

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/sub_scores.h"

namespace peer::cpu::PEER_CAPABILITY {

// A bit mask: which of 64 scores are above a value.
template <class Real>
static inline uint64_t bits_above(const ordered_t<Real>* scores, ordered_t<Real> value) {
  constexpr int lanes = kLanes<Real>;
  uint64_t bits = 0;
  for (int i = 0; i < kScoresPerWord; i += lanes) {
    bits |= lane_bits(load_ordered<Real>(scores + i) > value) << i;
  }
  return bits;
}

// Reduces all lanes to one by an operation on two vectors.
template <class Real, int width = kLanes<Real> / 2, class Operation>
static inline ordered_t<Real> reduce(OrderedVector<Real> v, const Operation& operation) {
  v = operation(v, rotate<width>(v, std::make_index_sequence<kLanes<Real>>{}));
  if constexpr (width > 1) {
    return reduce<Real, width / 2>(v, operation);
  } else {
    return v[0];
  }
}

// A bound that at least k of `padded` scores reach, by bisection of the integers between the
// smallest and the largest score. Stops early when few more than k scores reach it.
template <class Real>
static inline ordered_t<Real> bound_of_kth(const ordered_t<Real>* scores,
                                           int64_t padded,
                                           int64_t k) {
  using Integer = ordered_t<Real>;
  using Integers = OrderedVector<Real>;
  constexpr int lanes = kLanes<Real>;
  const auto minimum = [](Integers a, Integers b) { return a < b ? a : b; };
  const auto maximum = [](Integers a, Integers b) { return a > b ? a : b; };
  Integers smallest = load_ordered<Real>(scores);
  Integers largest = smallest;
  for (int64_t i = lanes; i < padded; i += lanes) {
    const Integers v = load_ordered<Real>(scores + i);
    smallest = minimum(smallest, v);
    largest = maximum(largest, v);
  }
  Integer low = std::max(reduce<Real>(smallest, minimum), Integer(kBelowAll<Real> + 1));
  Integer high = reduce<Real>(largest, maximum);
  const int64_t enough = k + k / 8 + 1;
  while (low < high) {
    const Integer middle = middle_of(low, high);
    Integers reaching = {};  // counts down: true is -1
    for (int64_t i = 0; i < padded; i += lanes) {
      reaching += load_ordered<Real>(scores + i) > middle - 1;
    }
    const int64_t count = -reduce<Real>(reaching, [](Integers a, Integers b) { return a + b; });
    narrow_to_kth(low, high, middle, count, k, enough);
  }
  return low;
}

// A bound from the maxima of groups. Scores i with equal i mod `groups` form a group. Every maximum
// is a score, so a bound that k maxima reach is a bound that k scores reach. About k + 3 of 1024
// random scores reach it. Every group must have a score.
template <class Real>
static inline ordered_t<Real> bound_by_groups(const ordered_t<Real>* scores,
                                              int64_t padded,
                                              int64_t k,
                                              int64_t groups,
                                              ordered_t<Real>* maxima) {
  constexpr int lanes = kLanes<Real>;
  constexpr int vectors = kScoresPerWord / lanes;
  for (int64_t g = 0; g < groups; g += kScoresPerWord) {
    OrderedVector<Real> maximum[vectors];
    for (int v = 0; v < vectors; ++v) {
      maximum[v] = load_ordered<Real>(scores + g + v * lanes);
    }
    for (int64_t i = g + groups; i < padded; i += groups) {
      for (int v = 0; v < vectors; ++v) {
        const OrderedVector<Real> score = load_ordered<Real>(scores + i + v * lanes);
        maximum[v] = score > maximum[v] ? score : maximum[v];
      }
    }
    for (int v = 0; v < vectors; ++v) {
      store_ordered<Real>(maxima + g + v * lanes, maximum[v]);
    }
  }
  return bound_of_kth<Real>(maxima, groups, k);
}

// Up to this many survivors are ranked by comparing each with each; more are sorted.
constexpr int64_t kMaxRanked = 192;

// Selects from up to max_scores scores, any number of times.
template <class Real>
class Selection {
 public:
  Selection(int64_t max_scores, int64_t max_selected)
      : groups_(round_up(2 * max_selected, kScoresPerWord)),
        positions_(round_up(max_scores, kScoresPerWord)),
        survivors_(round_up(max_scores, kScoresPerWord)),
        maxima_(groups_) {}

  // The positions and orders of the k best of the first `count` scores, best first.
  void select(const ordered_t<Real>* scores,
              int64_t count,
              int64_t k,
              int32_t* best_positions,
              ordered_t<Real>* best_orders) {
    const int64_t padded = round_up(count, kScoresPerWord);
    const ordered_t<Real> bound =
        count >= 4 * groups_ ? bound_by_groups<Real>(scores, padded, k, groups_, maxima_.data())
                             : bound_of_kth<Real>(scores, padded, k);
    int64_t survivors = 0;
    for (int64_t first = 0; first < padded; first += kScoresPerWord) {
      for (uint64_t bits = bits_above<Real>(scores + first, bound - 1); bits != 0;
           bits &= bits - 1) {
        const int64_t position = first + __builtin_ctzll(bits);
        positions_[survivors] = int32_t(position);
        survivors_[survivors++] = scores[position];
      }
    }
    if (survivors <= kMaxRanked) {
      rank(survivors, k, best_positions, best_orders);
    } else {
      sort(scores, survivors, k, best_positions, best_orders);
    }
  }

 private:
  // A lane is a survivor. It counts the survivors that come before it: the better ones, and the
  // equal ones at smaller positions.
  void rank(int64_t survivors, int64_t k, int32_t* best_positions, ordered_t<Real>* best_orders) {
    using Integers = OrderedVector<Real>;
    constexpr int lanes = kLanes<Real>;
    std::fill(survivors_.data() + survivors, survivors_.data() + round_up(survivors, lanes),
              kBelowAll<Real>);
    Integers lane;
    for (int i = 0; i < lanes; ++i) {
      lane[i] = i;
    }
    for (int64_t first = 0; first < survivors; first += lanes) {
      const Integers own = load_ordered<Real>(survivors_.data() + first);
      Integers before = Integers{} - ordered_t<Real>(first);  // counts down: true is -1
      for (int64_t j = 0; j < first; ++j) {
        before -= own > survivors_[j];
      }
      for (int64_t j = 0; j < lanes; ++j) {
        const Integers other = Integers{} + survivors_[first + j];
        before += (other > own) | ((other == own) & (lane > ordered_t<Real>(j)));
      }
      for (int64_t j = first + lanes; j < survivors; ++j) {
        before += survivors_[j] > own;
      }
      store_ordered<Real>(ranks_ + first, -before);
    }
    for (int64_t i = 0; i < survivors; ++i) {
      ranked_[ranks_[i]] = int32_t(i);
    }
    for (int64_t i = 0; i < k; ++i) {
      best_positions[i] = positions_[ranked_[i]];
      best_orders[i] = survivors_[ranked_[i]];
    }
  }

  void sort(const ordered_t<Real>* scores,
            int64_t survivors,
            int64_t k,
            int32_t* best_positions,
            ordered_t<Real>* best_orders) {
    const auto is_better = [scores](int32_t a, int32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    std::partial_sort(positions_.data(), positions_.data() + k, positions_.data() + survivors,
                      is_better);
    for (int64_t i = 0; i < k; ++i) {
      best_positions[i] = positions_[i];
      best_orders[i] = scores[positions_[i]];
    }
  }

  int64_t groups_;
  Scratch<int32_t> positions_;
  Scratch<ordered_t<Real>> survivors_;
  Scratch<ordered_t<Real>> maxima_;
  ordered_t<Real> ranks_[kMaxRanked];
  int32_t ranked_[kMaxRanked];
};

}  // namespace peer::cpu::PEER_CAPABILITY
