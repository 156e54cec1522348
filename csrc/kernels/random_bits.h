// Random bits without a state: functions of what they are for, so that they depend neither on the
// threads nor on what else is drawn.
//
// Everything is static, for the reason given in activation.h.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace peer {

// The finalizer of SplitMix64: a bijection under which every bit of the result depends on every bit
// of the argument.
PEER_HOST_DEVICE static inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// One key from another and a number. The odd constant keeps the key 0 with the number 0 from being
// a fixed point.
PEER_HOST_DEVICE static inline uint64_t derive_key(uint64_t key, uint64_t number) {
  return mix_bits(key + mix_bits(number + 0x9e3779b97f4a7c15u));
}

// An odd number near 2^32 divided by the golden ratio: multiples of it modulo 2^32 are spread
// evenly.
constexpr uint32_t kWeylStep = 0x9e3779b9u;

// A 32-bit word for each column of a row, from the row's key: a Weyl sequence from the key's lower
// half, through a 32-bit finalizer of low bias (two rounds of xorshift and multiplication) into
// which the upper half enters between the rounds. Word is uint32_t or a vector of it.
template <class Word>
PEER_HOST_DEVICE static inline Word random_word(uint64_t row_key, Word column) {
  Word x = column * kWeylStep + uint32_t(row_key);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x += uint32_t(row_key >> 32);
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace peer
