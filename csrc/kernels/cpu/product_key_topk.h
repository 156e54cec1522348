// The CPU kernels of product_key_topk.
#pragma once

#include <cstdint>

#include "kernels/product_key_topk.h"

namespace peer::cpu {

// Packs the keys of one half for the sub-score product: panels of keys_per_panel keys, each panel
// (half_width, keys_per_panel), padded with zeros at the end.
template <class Real>
struct PackKeys {
  int64_t count;  // keys per head
  int64_t half_width;
  const Real* keys;  // (heads, count, half_width)
  Real* packed;      // (heads, count rounded up to whole panels, half_width)
};

// Enough queries to make reads of the keys from memory rare, few enough that their sub-scores stay
// in the second-level cache.
constexpr int64_t kMaxTokensPerBlock = 16;

template <class Real>
struct ProductKeyTopkFunctions {
  int64_t keys_per_panel;
  // A work item is a panel of a head, head·panels + panel.
  void (*pack_keys)(const PackKeys<Real>& pass, int64_t first, int64_t last);
  // A work item is a block of tokens_per_block tokens and a head, block·heads + head. The keys are
  // packed. One function is for retrieval without a mask, the other for retrieval with one: in one
  // function, the registers that the search under a mask needs slow down both.
  using Retrieve = void (*)(const ProductKeyTopk<Real>& pass,
                            int64_t tokens_per_block,
                            int64_t first,
                            int64_t last);
  Retrieve retrieve_from_all, retrieve_from_enabled;
  // A work item is one output row.
  void (*gather_sum)(const GatherSum<Real>& pass, int64_t first, int64_t last);

  Retrieve retrieve(const ProductKeyTopk<Real>& pass) const {
    return pass.disabled == nullptr ? retrieve_from_all : retrieve_from_enabled;
  }
};

struct ProductKeyTopkKernels : ProductKeyTopkFunctions<float>, ProductKeyTopkFunctions<double> {
  static const ProductKeyTopkKernels baseline, avx2, avx512;

  template <class Real>
  const ProductKeyTopkFunctions<Real>& of() const {
    return *this;
  }
};

}  // namespace peer::cpu
