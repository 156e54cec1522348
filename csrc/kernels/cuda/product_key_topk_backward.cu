// The backward of product_key_topk: the keys of every retrieved expert, and weighted sums of keys.
#include <cstdint>
#include <cstdio>

#include "kernels/cuda/product_key_topk.h"
#include "kernels/cuda/row_tiles.h"

namespace peer::cuda {

namespace {

// Key owners.
//
// One thread  one retrieved expert
// Traffic     8 bytes read and 16 bytes written per retrieved expert
constexpr int kOwnerThreads = 256;

__global__ void key_owners_kernel(KeyOwners pass) {
  const int64_t i = int64_t(blockIdx.x) * kOwnerThreads + threadIdx.x;
  if (i >= pass.queries * pass.k) {
    return;
  }
  const int64_t id = pass.indices[i];
  if (id < 0 || id >= pass.experts) {
    printf("peer: index %lld at position %lld of indices is out of range for %lld experts\n",
           (long long)(id), (long long)(i), (long long)(pass.experts));
    __trap();
  }
  const int64_t head = i / pass.k % pass.heads;
  const int64_t row = id / pass.columns;
  pass.row_owners[i] = head * pass.row_head_stride + row;
  pass.column_owners[i] = head * pass.column_head_stride + (id - row * pass.columns);
}

// Weighted sums of rows:  out[i] = Σ_p coefficients[i, p]·table[indices[i, p]]
//
// Shapes      coefficients, indices (items, terms)   table (·, width)   out (items, width)
// One warp    one item, all columns; up to 16 rows at once, with 16 bytes of each in flight per
//             lane
// Traffic     terms·width table elements per item. The table is expected to be small: keys stay in
//             the L2 cache, which serves all but the first reads
// Exactness   accumulation in the table's own type, in an order fixed by p
// Requires    indices in range; width and terms below 2^30; any strides and alignments
constexpr int kGatherWarps = 8;

// For rows of half a KiB, such as keys.
using KeyTile = RowTile<16, 1, true>;

template <class Tile, class Table>
__global__ void __launch_bounds__(kGatherWarps* kWarp, 2) gather_sum_kernel(GatherSum<Table> pass) {
  const int64_t item = int64_t(blockIdx.x) * kGatherWarps + warp_in_block();
  if (item >= pass.items) {
    return;
  }
  const PairRows<Table, const Table> rows = {
      .indices = pass.indices,
      .main = {.table = pass.table, .scalars = pass.coefficients},
  };
  const PairRange pairs = {.first = item * pass.terms, .count = int(pass.terms)};
  const int width = int(pass.width);
  for (int first = 0; first < width; first += kTileColumns<Tile, Table>) {
    const auto sums = sum_weighted_rows<Tile>(rows, pairs, first, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      store_columns<Tile::kIsVectorized>(sums.vecs[k], pass.out.data + item * pass.out.stride,
                                         column_of_vec<Table>(first, k), width);
    }
  }
}

}  // namespace

void find_key_owners(const KeyOwners& pass, const Context& context) {
  const int64_t blocks = (pass.queries * pass.k + kOwnerThreads - 1) / kOwnerThreads;
  launch(key_owners_kernel, {blocks, kOwnerThreads}, context.stream, pass);
}

template <class Table>
void gather_sum(const GatherSum<Table>& pass, const Context& context) {
  const bool are_vectorizable = is_vectorizable(pass.table.data, pass.table.stride, pass.width) &&
                                is_vectorizable(pass.out.data, pass.out.stride, pass.width);
  const int64_t blocks = (pass.items + kGatherWarps - 1) / kGatherWarps;
  launch(
      are_vectorizable ? gather_sum_kernel<KeyTile, Table> : gather_sum_kernel<ScalarTile, Table>,
      {blocks, kGatherWarps * kWarp}, context.stream, pass);
}

template void gather_sum(const GatherSum<float>&, const Context&);
template void gather_sum(const GatherSum<double>&, const Context&);

}  // namespace peer::cuda
