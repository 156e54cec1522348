// Counter-based random bits: functions of a key and a position, without state. They depend neither
// on the threads nor on other draws.
//
// Everything is static, for the reason given in activation.h.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

// The finalizer of SplitMix64: a bijection in which every bit of the result depends on every bit of
// the argument.
PEER_HOST_DEVICE static inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A key from another key and a number. The odd constant prevents key 0 with number 0 from being a
// fixed point.
PEER_HOST_DEVICE static inline uint64_t derive_key(uint64_t key, uint64_t number) {
  return mix_bits(key + mix_bits(number + 0x9e3779b97f4a7c15u));
}

// An odd number near 2^32 divided by the golden ratio: its multiples modulo 2^32 are spread evenly.
constexpr uint32_t kWeylStep = 0x9e3779b9u;

// A sequence of 32-bit words from a row's key. A Weyl sequence that starts at the key's lower half
// passes through a 32-bit finalizer of low bias: two rounds of xorshift and multiplication. The
// key's upper half is added between the rounds. Word is uint32_t or a vector of uint32_t.
//
// A row's places are its columns, except that each part begins at an even place. Word i has 16
// random bits for place 2·i, its lower half, and 16 for place 2·i + 1.
template <class Word>
PEER_HOST_DEVICE static inline Word random_word(uint64_t row_key, Word number) {
  Word x = number * kWeylStep + uint32_t(row_key);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x += uint32_t(row_key >> 32);
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The place of the first column of a part.
PEER_HOST_DEVICE static inline uint32_t first_place_of_part(int64_t part, int64_t width) {
  return uint32_t(part * (width + width % 2));
}

}  // namespace peer
