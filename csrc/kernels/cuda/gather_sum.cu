// Weighted sums of rows:  out[i] = Σ_p coefficients[i, p]·table[indices[i, p]]
//
// Shapes      coefficients, indices (items, terms)   table (·, width)   out (items, width)
// One warp    one item, from its first column to its last, up to 16 rows side by side with 16 bytes
//             of each per lane in flight
// Traffic     terms·width table elements an item. The table is meant to be small: the keys of
//             retrieval stay in the second-level cache, where all but the first reads end.
// Exactness   accumulation in the table's own type, in an order fixed by p
// Requires    indices in range, width and terms below 2^30; nothing of strides and alignments
#include "kernels/cuda/expert_mlp.h"
#include "kernels/cuda/kernels.h"

namespace peer::cuda {

namespace {

constexpr int kWarpsPerBlock = 8;

// For rows of half a KiB, as those of keys are.
using KeyTile = RowTile<16, 1, true>;

template <class Tile, class Table>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp, 2)
    gather_sum_kernel(GatherSum<Table> pass) {
  const int64_t item = int64_t(blockIdx.x) * kWarpsPerBlock + warp_in_block();
  if (item >= pass.items) {
    return;
  }
  const PairRows<Table, const Table> rows = {pass.indices, {pass.table, pass.coefficients}};
  const PairRange pairs = {item * pass.terms, int(pass.terms)};
  const int width = int(pass.width);
  for (int first = 0; first < width; first += kTileColumns<Tile, Table>) {
    const auto sums = sum_weighted_rows<Tile>(rows, pairs, first, width);
    for (int k = 0; k < Tile::kVecs; ++k) {
      store_elements<Tile::kIsAligned>(sums.packs[k], pass.out.data + item * pass.out.stride,
                                       column_of_pack<Table>(first, k), width);
    }
  }
}

}  // namespace

template <class Table>
void gather_sum(const GatherSum<Table>& pass, const Context& context) {
  const bool is_aligned = is_packed(pass.table.data, pass.table.stride, pass.width) &&
                          is_packed(pass.out.data, pass.out.stride, pass.width);
  const int64_t blocks = (pass.items + kWarpsPerBlock - 1) / kWarpsPerBlock;
  launch(is_aligned ? gather_sum_kernel<KeyTile, Table> : gather_sum_kernel<UnalignedTile, Table>,
         {blocks, kWarpsPerBlock * kWarp}, context.stream, pass);
}

template void gather_sum(const GatherSum<float>&, const Context&);
template void gather_sum(const GatherSum<double>&, const Context&);

}  // namespace peer::cuda
