// The CPU kernels as their callers see them: raw pointers and sizes, and one table of functions per
// capability.
//
// Every function works on a range of independent work items, so the caller decides how many threads
// share them; no result depends on how the ranges are cut.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common.h"
#include "kernels/expert_mlp.h"
#include "kernels/table_update.h"

namespace peer::cpu {

// A token's output is the sum of its parts, each the sum over so many of its experts: where there
// are fewer tokens than threads, parts are shared out. Fixed, so that a token's result does not
// depend on the others.
constexpr int64_t kExpertsPerPart = 32;

constexpr int64_t parts_per_token(int64_t experts_per_token) {
  return (experts_per_token + kExpertsPerPart - 1) / kExpertsPerPart;
}

// A pair is one retrieval: token t's p-th expert has the pair number t·P + p.
struct Pair {
  int64_t owner;  // the expert, or whatever row the pair contributes to
  int64_t number;
};

// A run of sorted pairs with one owner, of at most kPairsPerChunk pairs. A whole run goes to the
// owner's row of the output; a piece of a longer run goes to a row of partial sums.
struct Chunk {
  int64_t first, last;  // range of sorted pairs
  int64_t row;          // row of the output, or of the partial sums
  bool is_partial;
};

// The partial sums [first, last) that make up one row of the output.
struct SplitSegment {
  int64_t first, last;
  int64_t row;
};

// Expert pass. Work items are chunks, then split segments.
//
//   out[row] = Σ over the run's pairs of coefficients[pair]·source[pair / pairs_per_row]
template <class Element>
struct TableGrad {
  using Real = accumulation_t<Element>;
  int64_t width;
  int64_t pairs_per_row;
  const Pair* pairs;         // sorted by owner, stable
  const Real* coefficients;  // by pair number
  Rows<const Real> source;
  const Chunk* chunks;
  const SplitSegment* split_segments;
  Rows<Element> out;
  Rows<Real> partial_sums;
  bool exceeds_caches;  // whether the rows of out that are written do, all together
};

// Updates the rows of a table by sums that are not stored. A row of the table, of its momentum and
// of the source has so many parts of the same width, side by side. A work item is a row of source
// for update_rows, which takes the rows of source as the gradients of the rows `ids`, all distinct;
// for the others it is as in the expert pass, whose sums the gradients of each part are.
//
// Rounding to a 16-bit table and momentum is to nearest, or stochastic, with random bits from the
// key, the row and the column in the row.
template <class Table, class Source>
struct TableUpdate {
  using Real = accumulation_t<Table>;
  int64_t parts = 1;
  int64_t width;  // of a part
  Rows<Table> table;
  UpdateRule<Table> rule;
  bool stochastic_rounding;
  uint64_t key;
  Rows<const Source> source;
  const int64_t* ids = nullptr;  // for update_rows: null where row i belongs to row i
  // For the others.
  int64_t pairs_per_row = 1;
  int64_t pair_count = 0;
  const Pair* pairs = nullptr;         // sorted by owner, stable
  const Real* coefficients = nullptr;  // by part and pair number, or null: all one
  const Chunk* chunks = nullptr;
  const SplitSegment* split_segments = nullptr;
  Rows<Real> partial_sums = {};  // (·, parts·width)
};

// Keys of one half, to be packed for the sub-score product: panels of keys_per_panel keys, each
// panel (half_width, keys_per_panel), zero-padded at the end. A work item is a panel of a head:
// number head·panels + panel.
template <class Real>
struct PackKeys {
  int64_t count;  // keys per head
  int64_t half_width;
  const Real* keys;  // (heads, count, half_width)
  Real* packed;      // (heads, count rounded up to whole panels, half_width)
};

template <class Real>
struct PackedKeys {
  const Real* data;
  int64_t keys;
  int64_t head_stride;  // 0 where the heads share their keys
};

// Enough queries to read every key from memory seldom, few enough that their sub-scores stay in the
// second-level cache.
constexpr int64_t kMaxTokensPerBlock = 16;

// Retrieval by product keys. A work item is a block of tokens_per_block tokens and a head: number
// block·heads + head.
template <class Real>
struct ProductKeyTopk {
  int64_t tokens;
  int64_t heads;
  int64_t half_width;  // dim_key / 2
  int64_t k;
  int64_t tokens_per_block;
  const Real* query;  // (T, H, dim_key)
  PackedKeys<Real> rows, columns;
  Real* scores;      // (T, H, k)
  int64_t* indices;  // (T, H, k)
};

template <class Table, class Source>
struct UpdateKernels {
  void (*update_rows)(const TableUpdate<Table, Source>&, int64_t first, int64_t last);
  void (*update_chunks)(const TableUpdate<Table, Source>&, int64_t first, int64_t last);
  void (*update_split_segments)(const TableUpdate<Table, Source>&, int64_t first, int64_t last);
};

template <class Table>
struct ExpertKernels {
  // A work item of the token passes is a token. Indices are all in range.
  void (*token_forward)(const ExpertMlpForward<Table>&, int64_t first, int64_t last);
  // A work item is a part of a token, number token·parts + part, whose sum is left in parts_out
  // (T, parts, D).
  void (*token_parts_forward)(const ExpertMlpForward<Table>&,
                              accumulation_t<Table>* parts_out,
                              int64_t first,
                              int64_t last);
  // Adds up the parts of a token, of which there is one at least. A work item is a token.
  void (*add_token_parts)(const ExpertMlpForward<Table>&,
                          const accumulation_t<Table>* parts_out,
                          int64_t first,
                          int64_t last);
  void (*token_backward)(const ExpertMlpBackward<Table>&, int64_t first, int64_t last);
  void (*sum_chunks)(const TableGrad<Table>&, int64_t first, int64_t last);
  void (*sum_split_segments)(const TableGrad<Table>&, int64_t first, int64_t last);
  UpdateKernels<Table, accumulation_t<Table>> update_by_wide;  // source in the accumulation type
  UpdateKernels<Table, Table> update_by_narrow;                // source in the table's own type

  template <class Source>
  const UpdateKernels<Table, Source>& update() const {
    if constexpr (std::is_same_v<Source, Table>) {
      return update_by_narrow;
    } else {
      return update_by_wide;
    }
  }
};

template <class Real>
struct ProductKeyTopkKernels {
  int64_t keys_per_panel;
  void (*pack_keys)(const PackKeys<Real>&, int64_t first, int64_t last);
  void (*retrieve)(const ProductKeyTopk<Real>&, int64_t first, int64_t last);
  void (*gather_sum)(const GatherSum<Real>&, int64_t first, int64_t last);  // of items
};

struct Kernels {
  ExpertKernels<float> experts_float;
  ExpertKernels<double> experts_double;
  ExpertKernels<BFloat16> experts_bfloat16;
  ExpertKernels<Half> experts_half;
  ProductKeyTopkKernels<float> product_key_topk_float;
  ProductKeyTopkKernels<double> product_key_topk_double;

  template <class Table>
  const ExpertKernels<Table>& experts() const;
  template <class Real>
  const ProductKeyTopkKernels<Real>& retrieval() const;
};

template <>
inline const ExpertKernels<float>& Kernels::experts<float>() const {
  return experts_float;
}
template <>
inline const ExpertKernels<double>& Kernels::experts<double>() const {
  return experts_double;
}
template <>
inline const ExpertKernels<BFloat16>& Kernels::experts<BFloat16>() const {
  return experts_bfloat16;
}
template <>
inline const ExpertKernels<Half>& Kernels::experts<Half>() const {
  return experts_half;
}
template <>
inline const ProductKeyTopkKernels<float>& Kernels::retrieval<float>() const {
  return product_key_topk_float;
}
template <>
inline const ProductKeyTopkKernels<double>& Kernels::retrieval<double>() const {
  return product_key_topk_double;
}

// The kernels for this processor, or for the capability that the environment variable
// PEER_CPU_CAPABILITY names. Read once; throws std::runtime_error when the name is unknown or
// the processor lacks it.
const Kernels& kernels();

// The name of the capability whose kernels those are: "default", "avx2" or "avx512".
const char* capability();

// The kernels of one capability by name; null when they were not compiled or cannot run here.
const Kernels* kernels_for(const char* capability);

// The names of the capabilities that were compiled, separated by spaces.
const char* compiled_capabilities();

}  // namespace peer::cpu
