// Token pass: for every token, z = rows(A)·v, c = f(z), y = Σ c·rows(B), over the P experts that
// the token retrieved.
//
// Forward     A = w_down, w_gate    v = x          f = weights·act(z)·gate    B = w_up
// Backward    A = w_up              v = grad_out   f = the chain rule         B = w_down, w_gate
//
// Shapes      v (T, ·)   A, B (N, ·)   indices, weights, z, c (T, P)   y (T, ·)
// One block   one token. Its pairs are dealt to up to 8 warps, 16 or more in a row to each. Where
//             there are fewer tokens than sm_count, a block is one warp, which takes some of
//             those pairs and leaves their sum to add_shares.
// One warp    dots of its pairs' rows with v, 4 or 8 rows side by side; one lane per pair computes
//             c; sums of its pairs' rows. z and c pass from lane to lane through memory. Up to 16
//             loads of 16 bytes per lane are in flight.
// Traffic     P·(A's width + B's width) table elements a token, each read once; v is read from the
//             first-level cache, once for every batch of rows; nothing of size P·width is written
// Exactness   accumulation in float (double for double), in an order fixed by p and by the widths;
//             y is rounded once. A token has the same bits however many there are.
// Requires    widths and P below 2^30; nothing of strides and alignments, but rows are read in
//             packs only where all that takes part is aligned to 16 bytes
#include <algorithm>
#include <cstdio>

#include "kernels/cuda/expert_mlp.h"
#include "kernels/cuda/kernels.h"

namespace peer::cuda {

namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxThreads = kMaxWarps * kWarp;
constexpr int kPairsPerWarp = 16;  // at least, before a second warp is put to work

// Leaves a thread 128 registers, half of which hold what is in flight.
constexpr int kBlocksPerMultiprocessor = 2;

// The two products of the pass.
template <class Table, class Input>
struct Dots {
  const Input* v;
  int width;
  PairRows<Table, accumulation_t<Table>> rows;
};

template <class Table, class Input>
struct Sums {
  Input* y;  // or null: not wanted
  int width;
  PairRows<Table, const accumulation_t<Table>> rows;
};

// An activation and its derivative at z, for with_activation.
template <class Real>
struct ActivationAt {
  Real z;
  Real value, derivative;

  template <Activation activation>
  PEER_HOST_DEVICE void operator()() {
    value = activate<activation>(z);
    derivative = activate_derivative<activation>(z);
  }
};

template <class Real>
__device__ ActivationAt<Real> evaluate(Activation activation, Real z) {
  ActivationAt<Real> at = {z, 0, 0};
  with_activation(activation, at);
  return at;
}

// What happens between the products, pair by pair.
template <class Real>
struct ForwardRule {
  Activation activation;
  const Real* weights;
  const Real* hidden;
  const Real* gate;  // or null
  Real* coefficients;

  __device__ void apply(int64_t pair) const {
    const Real value = weights[pair] * evaluate(activation, hidden[pair]).value;
    coefficients[pair] = gate ? value * gate[pair] : value;
  }
};

template <class Real>
struct BackwardRule {
  Activation activation;
  const Real* weights;
  const Real* hidden;
  const Real* gate;    // or null
  Real* grad_weights;  // holds <grad_out, w_up[e]> before
  Real* down_coefficients;
  Real* gate_coefficients;  // where there is a gate
  Real* up_coefficients;

  __device__ void apply(int64_t pair) const {
    const Real upstream = grad_weights[pair];
    const Real weight = weights[pair];
    const Real gate_value = gate ? gate[pair] : Real(1);
    const ActivationAt<Real> at = evaluate(activation, hidden[pair]);
    const Real weighted = weight * at.value;
    grad_weights[pair] = upstream * at.value * gate_value;
    down_coefficients[pair] = upstream * weight * at.derivative * gate_value;
    up_coefficients[pair] = weighted * gate_value;
    if (gate) {
      gate_coefficients[pair] = upstream * weighted;
    }
  }
};

// One direction of the pass, as the kernel sees it.
template <class Table, class Input, class Rule>
struct Direction {
  int64_t tokens;
  int64_t experts;
  int experts_per_token;
  Dots<Table, Input> dots;
  Rule rule;
  Sums<Table, Input> sums;
};

// How the pairs of a token are shared out: so many to a warp, in whole parts; the last gets what
// remains.
struct Shares {
  int pairs_per_token;
  int pairs_per_share;
  int per_token;

  __device__ PairRange count_candidate_pairs(int64_t token, int share) const {
    const int first = share * pairs_per_share;
    const int remaining = pairs_per_token - first;
    return {token * pairs_per_token + first,
            remaining < pairs_per_share ? remaining : pairs_per_share};
  }
};

// A token without pairs has one share, for its zeros are to be written.
Shares share_out(int pairs_per_token, int pairs_per_share) {
  const int shares = (pairs_per_token + pairs_per_share - 1) / pairs_per_share;
  return {pairs_per_token, pairs_per_share, std::max(shares, 1)};
}

__device__ void check_indices(const int64_t* indices, PairRange pairs, int64_t experts) {
#pragma unroll 1
  for (int i = lane(); i < pairs.count; i += kWarp) {
    const int64_t index = indices[pairs.first + i];
    if (index < 0 || index >= experts) {
      printf("peer: index %lld at position %lld of indices is out of range for %lld experts\n",
             (long long)(index), (long long)(pairs.first + i), (long long)(experts));
      __trap();
    }
  }
  __syncwarp();  // no lane reads a row before all indices have been found good
}

template <class Tile, class Table, class Input>
__device__ void dot_pairs(const Dots<Table, Input>& dots, int64_t token, PairRange pairs) {
  accumulation_t<Table> sums[Tile::kRows];
  for (int done = 0; done < pairs.count; done += Tile::kRows / dots.rows.per_pair()) {
    const PairRange rest = pairs.after(done);
    dot_with_rows<Tile>(dots.v + token * dots.width, dots.width, dots.rows, rest, sums);
    const auto z = sum_transposed(sums);
    if (lane() < Tile::kRows && lane() < dots.rows.count(rest)) {
      dots.rows.source_of(lane()).numbers[dots.rows.pair_of(rest, lane())] = z;
    }
  }
}

// y = the sums of the block's warps, added in their order, in the columns of one tile.
template <class Tile, class Table, class Input>
__device__ void add_up_warps(const ColumnSums<Tile, Table>& sums,
                             int first_column,
                             int width,
                             Input* y) {
  using Real = accumulation_t<Table>;
  constexpr int kColumns = kTileColumns<Tile, Table>;
  Real* const all = reinterpret_cast<Real*>(peer_shared_memory);  // (warps, kColumns)
  for (int k = 0; k < Tile::kVecs; ++k) {
    store_elements<true>(sums.packs[k], all + warp_in_block() * kColumns,
                         column_of_pack<Table>(0, k), kColumns);
  }
  __syncthreads();
  const int warps = int(blockDim.x) / kWarp;
  for (int column = int(threadIdx.x) * kVecSize<Input>; column < kColumns;
       column += int(blockDim.x) * kVecSize<Input>) {
    Elements<Real, kVecSize<Input>> total = {};
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp) {
      const auto part =
          load_elements<true, kVecSize<Input>>(all + warp * kColumns, column, kColumns);
      for (int i = 0; i < kVecSize<Input>; ++i) {
        total.values[i] += part.values[i];
      }
    }
    Elements<Input, kVecSize<Input>> rounded;
    for (int i = 0; i < kVecSize<Input>; ++i) {
      rounded.values[i] = narrow<Input>(total.values[i]);
    }
    store_elements<Tile::kIsAligned>(rounded, y, first_column + column, width);
  }
  __syncthreads();  // the memory is written again for the next columns
}

// The shares of a token are taken by the warps of one block, unless there is partial_y: then by as
// many blocks of one warp, each of which leaves its sum there.
template <class Tile, class Table, class Input, class Rule>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    token_pass(Direction<Table, Input, Rule> direction,
               Shares shares,
               accumulation_t<Table>* partial_y,
               int partial_width) {
  const Sums<Table, Input>& sums = direction.sums;
  const int blocks_per_token = shares.per_token / (int(blockDim.x) / kWarp);
  const int64_t token = int(blockIdx.x) / blocks_per_token;
  const int share = int(blockIdx.x) % blocks_per_token + warp_in_block();
  const PairRange pairs = shares.count_candidate_pairs(token, share);

  check_indices(sums.rows.indices, pairs, direction.experts);
  dot_pairs<Tile>(direction.dots, token, pairs);
  __syncwarp();  // the dots are in memory
#pragma unroll 1
  for (int i = lane(); i < pairs.count; i += kWarp) {
    direction.rule.apply(pairs.first + i);
  }
  __syncwarp();  // the coefficients are
  if (!sums.y) {
    return;
  }
  for (int first = 0; first < sums.width; first += kTileColumns<Tile, Table>) {
    const auto columns = sum_weighted_rows<Tile>(sums.rows, pairs, first, sums.width);
    if (partial_y) {
      auto* const row = partial_y + (token * shares.per_token + share) * partial_width;
      for (int k = 0; k < Tile::kVecs; ++k) {
        store_elements<true>(columns.packs[k], row, column_of_pack<Table>(first, k), partial_width);
      }
    } else {
      add_up_warps(columns, first, sums.width, sums.y + token * sums.width);
    }
  }
}

// Adds up what warps have left of a token, in the order in which a block would have: the shares of
// each of its warps, then the warps.
//
// One thread    one column of a token; blocks_per_token blocks a token
// Traffic       shares.per_token elements of partial_y per column, read once
template <class Real, class Input>
__global__ void add_shares(Shares shares,
                           int shares_per_warp,
                           int width,
                           const Real* partial_y,
                           int partial_width,
                           Input* y,
                           int blocks_per_token) {
  const int64_t token = int(blockIdx.x) / blocks_per_token;
  const int column = int(blockIdx.x) % blocks_per_token * int(blockDim.x) + int(threadIdx.x);
  if (column >= width) {
    return;
  }
  const Real* partial = partial_y + token * shares.per_token * partial_width + column;
  Real total = 0;
  for (int first = 0; first < shares.per_token; first += shares_per_warp) {
    const int remaining = shares.per_token - first;
    const int count = remaining < shares_per_warp ? remaining : shares_per_warp;
    Real sum = 0;
#pragma unroll 8
    for (int share = 0; share < count; ++share) {
      sum += *partial;
      partial += partial_width;
    }
    total += sum;
  }
  y[token * width + column] = narrow<Input>(total);
}

// What a warp of a whole token's block takes: equal shares, so that the warps end together.
Shares share_among_block(int pairs_per_token) {
  const int equal = (pairs_per_token + kMaxWarps - 1) / kMaxWarps;
  const int whole_parts = (equal + kRowsPerPart - 1) / kRowsPerPart * kRowsPerPart;
  return share_out(pairs_per_token, std::max(whole_parts, kPairsPerWarp));
}

// Every multiprocessor is to have work: a block of up to 8 warps where there are tokens enough, a
// warp with what it would take of such a block where there are enough of those, and the least that
// a warp can take where there are not.
template <class Tile, class Table, class Input, class Rule>
void run(const Direction<Table, Input, Rule>& direction, const Context& context) {
  using Real = accumulation_t<Table>;
  const auto kernel = token_pass<Tile, Table, Input, Rule>;
  const int64_t tokens = direction.tokens;
  const int64_t enough = sm_count();
  const Shares of_block = share_among_block(direction.experts_per_token);
  const int warps = of_block.per_token;
  if (tokens >= enough) {
    const int64_t shared_bytes = warps * kTileColumns<Tile, Table> * int64_t(sizeof(Real));
    launch(kernel, {tokens, warps * kWarp, shared_bytes}, context.stream, direction, of_block,
           nullptr, 0);
    return;
  }
  const Sums<Table, Input>& sums = direction.sums;
  const int pairs_per_part = kRowsPerPart / sums.rows.per_pair();
  const Shares shares =
      tokens * warps >= enough ? of_block : share_out(direction.experts_per_token, pairs_per_part);
  const int64_t blocks = tokens * shares.per_token;
  const int partial_width = (sums.width + kVecSize<Table> - 1) / kVecSize<Table> * kVecSize<Table>;
  const auto partial_y = context.array<Real>(sums.y ? blocks * partial_width : 0);
  launch(kernel, {blocks, kWarp}, context.stream, direction, shares, partial_y.get(),
         partial_width);
  if (sums.y) {
    constexpr int kThreads = 128;
    const int blocks_per_token = (sums.width + kThreads - 1) / kThreads;
    launch(add_shares<Real, Input>, {tokens * blocks_per_token, kThreads}, context.stream, shares,
           of_block.pairs_per_share / shares.pairs_per_share, sums.width, partial_y.get(),
           partial_width, sums.y, blocks_per_token);
  }
}

// Chooses the tile: what the rows allow, and what keeps loads in flight for them.
template <class Table, class Input, class Rule>
void run(const Direction<Table, Input, Rule>& direction, const Context& context) {
  const auto& [v, dot_width, dotted] = direction.dots;
  const auto& [y, sum_width, summed] = direction.sums;
  const bool are_dots_packed = is_packed(v, dot_width, dot_width) && are_packed(dotted, dot_width);
  const bool are_sums_packed =
      !y || (is_packed(y, sum_width, sum_width) && are_packed(summed, sum_width));
  if (!are_dots_packed || !are_sums_packed) {
    run<UnalignedTile>(direction, context);
  } else if (std::max(dot_width, sum_width) <= kTileColumns<NarrowTile, Table>) {
    run<NarrowTile>(direction, context);
  } else {
    run<WideTile>(direction, context);
  }
}

}  // namespace

template <class Table, class Input>
void expert_mlp_forward(const ExpertMlpForward<Table, Input>& pass, const Context& context) {
  using Real = accumulation_t<Table>;
  const int64_t pairs = pass.tokens * pass.experts_per_token;
  const std::shared_ptr<Real> coefficients = context.array<Real>(pairs);
  Real* const gate = pass.w_gate ? pass.gate : nullptr;
  const Direction<Table, Input, ForwardRule<Real>> forward = {
      pass.tokens,
      pass.experts,
      int(pass.experts_per_token),
      {pass.x, int(pass.dim), {pass.indices, {pass.w_down, pass.hidden}, {pass.w_gate, gate}}},
      {pass.activation, pass.weights, pass.hidden, gate, coefficients.get()},
      {pass.out, int(pass.dim), {pass.indices, {pass.w_up, coefficients.get()}}}};
  run(forward, context);
}

template <class Table, class Input>
void expert_mlp_backward(const ExpertMlpBackward<Table, Input>& pass, const Context& context) {
  using Real = accumulation_t<Table>;
  const Direction<Table, Input, BackwardRule<Real>> backward = {
      pass.tokens,
      pass.experts,
      int(pass.experts_per_token),
      {pass.grad_out, int(pass.dim), {pass.indices, {pass.w_up, pass.grad_weights}}},
      {pass.activation, pass.weights, pass.hidden, pass.w_gate ? pass.gate : nullptr,
       pass.grad_weights, pass.down_coefficients, pass.gate_coefficients, pass.up_coefficients},
      {pass.grad_x,
       int(pass.dim),
       {pass.indices,
        {pass.w_down, pass.down_coefficients},
        {pass.w_gate, pass.gate_coefficients}}}};
  run(backward, context);
}

template void expert_mlp_forward(const ExpertMlpForward<float, float>&, const Context&);
template void expert_mlp_forward(const ExpertMlpForward<double, double>&, const Context&);
template void expert_mlp_forward(const ExpertMlpForward<BFloat16, BFloat16>&, const Context&);
template void expert_mlp_forward(const ExpertMlpForward<BFloat16, float>&, const Context&);
template void expert_mlp_forward(const ExpertMlpForward<Half, Half>&, const Context&);
template void expert_mlp_forward(const ExpertMlpForward<Half, float>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<float, float>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<double, double>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<BFloat16, BFloat16>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<BFloat16, float>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<Half, Half>&, const Context&);
template void expert_mlp_backward(const ExpertMlpBackward<Half, float>&, const Context&);

}  // namespace peer::cuda
