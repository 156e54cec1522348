// Of the pairs of a row and a column, those whose sum can be among the k best, by the ranks of the
// two in their sorted lists.
//
// Pair (i, j) comes after every pair (i', j') with i' <= i and j' <= j, since rounding is monotone
// and equal sums are ordered by rank: if (i + 1)(j + 1) > k there are k better ones. 50 of 256
// pairs are left at k = 16.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

PEER_HOST_DEVICE static constexpr bool is_candidate(int64_t row_rank,
                                                    int64_t column_rank,
                                                    int64_t k) {
  return (row_rank + 1) * (column_rank + 1) <= k;
}

// With how many columns, the first ones, a row can be chosen.
template <class Integer>
PEER_HOST_DEVICE static constexpr Integer count_candidate_columns(Integer row_rank,
                                                                  Integer column_count,
                                                                  Integer k) {
  const Integer most = k / (row_rank + 1);
  return most < column_count ? most : column_count;
}

// The pairs that can be chosen are listed in order of (row rank, column rank), so that a pair's
// position decides between equal sums. How many there are of the first rows:
template <class Integer>
PEER_HOST_DEVICE static constexpr Integer count_candidate_pairs(Integer row_count,
                                                                Integer column_count,
                                                                Integer k) {
  Integer pairs = 0;
  for (Integer i = 0; i < row_count && i < k; ++i) {
    pairs += count_candidate_columns(i, column_count, k);
  }
  return pairs;
}

}  // namespace peer
