// expert_mlp and its backward. For every token: z = rows(A)·v, c = f(z), y = Σ c·rows(B), over the
// P experts that the token retrieved.
//
// Forward     A = w_down, w_gate    v = x          f = weights·act(z)·gate    B = w_up
// Backward    A = w_up              v = grad_out   f = the chain rule         B = w_down, w_gate
//
// Shapes      v (T, ·)   A, B (N, ·)   indices, weights, z, c (T, P)   y (T, ·)
// One block   one token. Up to 8 warps share its pairs, at least 16 consecutive pairs per warp.
//             With fewer tokens than SMs, one warp and one share of the pairs (see launch_with)
// One warp    dot products of its pairs' rows with v, 4 or 8 rows at once; c, one pair per lane;
//             the weighted sum of its pairs' rows. z and c pass between lanes through memory. Up to
//             16 loads of 16 bytes are in flight per lane
// Traffic     P·(A's width + B's width) table elements per token, each read once. v is read from
//             the L1 cache once per tile of rows. Nothing of size P·width is written
// Exactness   accumulation in float (double for double), in an order fixed by p and the widths; y
//             is rounded once. A token's bits do not depend on the number of tokens
// Requires    widths and P below 2^30; any strides and alignments, but rows are read in vectors
//             only if all arrays are aligned to 16 bytes
#include <algorithm>
#include <cstdio>

#include "kernels/cuda/expert_mlp.h"
#include "kernels/cuda/row_tiles.h"

namespace peer::cuda {

namespace {

constexpr int kMaxWarpsPerToken = 8;
constexpr int kMaxThreads = kMaxWarpsPerToken * kWarp;
constexpr int kMinPairsPerWarp = 16;  // before a token gets another warp

// Leaves 128 registers per thread. Half of them hold loads in flight.
constexpr int kBlocksPerSm = 2;

template <class Table, class Input>
struct DotProducts {
  const Input* v;
  int width;
  PairRows<Table, accumulation_t<Table>> rows;
};

template <class Table, class Input>
struct WeightedSums {
  Input* y;  // null if not wanted
  int width;
  PairRows<Table, const accumulation_t<Table>> rows;
};

// The value and the derivative of an activation at z, for with_activation.
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

// The coefficients of the weighted sums, pair by pair.
template <class Real>
struct ForwardCoefficients {
  Activation activation;
  const Real* weights;
  const Real* hidden;
  const Real* gate;  // or null
  Real* coefficients;

  __device__ void compute(int64_t pair) const {
    const Real value = weights[pair] * evaluate(activation, hidden[pair]).value;
    coefficients[pair] = gate ? value * gate[pair] : value;
  }
};

template <class Real>
struct BackwardCoefficients {
  Activation activation;
  const Real* weights;
  const Real* hidden;
  const Real* gate;    // or null
  Real* grad_weights;  // on entry <grad_out, w_up[e]>
  Real* down_coefficients;
  Real* gate_coefficients;  // if there is a gate
  Real* up_coefficients;

  __device__ void compute(int64_t pair) const {
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

// Forward or backward.
template <class Table, class Input, class Coefficients>
struct Direction {
  int64_t tokens;
  int64_t experts;
  int experts_per_token;
  DotProducts<Table, Input> dots;
  Coefficients coefficients;
  WeightedSums<Table, Input> sums;
};

// How warps share the pairs of a token: a warp takes one share. A share is a whole number of row
// groups; the last share may be shorter.
struct Shares {
  int pairs_per_token;
  int pairs_per_share;
  int shares_per_token;

  __device__ PairRange pairs_of_share(int64_t token, int share) const {
    const int first = share * pairs_per_share;
    const int remaining = pairs_per_token - first;
    return {token * pairs_per_token + first,
            remaining < pairs_per_share ? remaining : pairs_per_share};
  }
};

// A token without pairs has one share, which writes zeros.
Shares make_shares(int pairs_per_token, int pairs_per_share) {
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
  __syncwarp();  // no lane reads a row before all indices are checked
}

template <class Tile, class Table, class Input>
__device__ void dot_pairs(const DotProducts<Table, Input>& dots, int64_t token, PairRange pairs) {
  accumulation_t<Table> sums[Tile::kRows];
  for (int done = 0; done < pairs.count; done += Tile::kRows / dots.rows.rows_per_pair()) {
    const PairRange rest = pairs.without_first(done);
    dot_with_rows<Tile>(dots.v + token * dots.width, dots.width, dots.rows, rest, sums);
    const auto z = warp_reduce_sums(sums);
    if (lane() < Tile::kRows && lane() < dots.rows.count_rows(rest)) {
      dots.rows.source_of_row(lane()).scalars[dots.rows.pair_of_row(rest, lane())] = z;
    }
  }
}

// Block reduce: y = the sums of the block's warps, added in warp order, for the columns of one
// tile.
template <class Tile, class Table, class Input>
__device__ void block_reduce_columns(const ColumnSums<Tile, Table>& sums,
                                     int first_column,
                                     int width,
                                     Input* y) {
  using Real = accumulation_t<Table>;
  constexpr int kColumns = kTileColumns<Tile, Table>;
  Real* const warp_sums = reinterpret_cast<Real*>(peer_shared_memory);  // (warps, kColumns)
  for (int k = 0; k < Tile::kVecs; ++k) {
    store_columns<true>(sums.vecs[k], warp_sums + warp_in_block() * kColumns,
                        column_of_vec<Table>(0, k), kColumns);
  }
  __syncthreads();
  const int warps = int(blockDim.x) / kWarp;
  for (int column = int(threadIdx.x) * kVecSize<Input>; column < kColumns;
       column += int(blockDim.x) * kVecSize<Input>) {
    Vec<Real, kVecSize<Input>> total = {};
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp) {
      const auto part =
          load_columns<true, kVecSize<Input>>(warp_sums + warp * kColumns, column, kColumns);
      for (int i = 0; i < kVecSize<Input>; ++i) {
        total.values[i] += part.values[i];
      }
    }
    Vec<Input, kVecSize<Input>> rounded;
    for (int i = 0; i < kVecSize<Input>; ++i) {
      rounded.values[i] = narrow<Input>(total.values[i]);
    }
    store_columns<Tile::kIsVectorized>(rounded, y, first_column + column, width);
  }
  __syncthreads();  // the next tile overwrites warp_sums
}

// Without partial_y, one block takes all shares of a token. With partial_y, blocks of one warp take
// one share each and write its sum there.
template <class Tile, class Table, class Input, class Coefficients>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm)
    expert_mlp_kernel(Direction<Table, Input, Coefficients> direction,
                      Shares shares,
                      accumulation_t<Table>* partial_y,
                      int partial_width) {
  const WeightedSums<Table, Input>& sums = direction.sums;
  const int blocks_per_token = shares.shares_per_token / (int(blockDim.x) / kWarp);
  const int64_t token = int(blockIdx.x) / blocks_per_token;
  const int share = int(blockIdx.x) % blocks_per_token + warp_in_block();
  const PairRange pairs = shares.pairs_of_share(token, share);

  check_indices(sums.rows.indices, pairs, direction.experts);
  dot_pairs<Tile>(direction.dots, token, pairs);
  __syncwarp();  // the dot products are in memory
#pragma unroll 1
  for (int i = lane(); i < pairs.count; i += kWarp) {
    direction.coefficients.compute(pairs.first + i);
  }
  __syncwarp();  // the coefficients are in memory
  if (!sums.y) {
    return;
  }
  for (int first = 0; first < sums.width; first += kTileColumns<Tile, Table>) {
    const auto columns = sum_weighted_rows<Tile>(sums.rows, pairs, first, sums.width);
    if (partial_y) {
      auto* const row = partial_y + (token * shares.shares_per_token + share) * partial_width;
      for (int k = 0; k < Tile::kVecs; ++k) {
        store_columns<true>(columns.vecs[k], row, column_of_vec<Table>(first, k), partial_width);
      }
    } else {
      block_reduce_columns(columns, first, sums.width, sums.y + token * sums.width);
    }
  }
}

// Adds the sums of a token's shares in the order of a token's block: first the shares within each
// of its warps, then the warps.
//
// One thread    one column of a token; blocks_per_token blocks per token
// Traffic       shares_per_token elements of partial_y per column, read once
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
  const Real* partial = partial_y + token * shares.shares_per_token * partial_width + column;
  Real total = 0;
  for (int first = 0; first < shares.shares_per_token; first += shares_per_warp) {
    const int remaining = shares.shares_per_token - first;
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

// The shares of the warps of a token's block. They are equal, so that the warps end together.
Shares make_block_shares(int pairs_per_token) {
  const int equal = (pairs_per_token + kMaxWarpsPerToken - 1) / kMaxWarpsPerToken;
  const int whole_groups = (equal + kRowsPerGroup - 1) / kRowsPerGroup * kRowsPerGroup;
  return make_shares(pairs_per_token, std::max(whole_groups, kMinPairsPerWarp));
}

// Launch regimes, chosen so that every SM has work:
//
//   tokens >= SMs              one block per token, with one share per warp
//   tokens·warps >= SMs        one-warp blocks with the same shares; add_shares adds their sums
//   fewer                      one-warp blocks with shares of one row group; add_shares adds their
//                              sums
template <class Tile, class Table, class Input, class Coefficients>
void launch_with(const Direction<Table, Input, Coefficients>& direction, const Context& context) {
  using Real = accumulation_t<Table>;
  const auto kernel = expert_mlp_kernel<Tile, Table, Input, Coefficients>;
  const int64_t tokens = direction.tokens;
  const int64_t sms = sm_count();
  const Shares block_shares = make_block_shares(direction.experts_per_token);
  const int warps = block_shares.shares_per_token;
  if (tokens >= sms) {
    const int64_t shared_bytes = warps * kTileColumns<Tile, Table> * int64_t(sizeof(Real));
    launch(kernel, {tokens, warps * kWarp, shared_bytes}, context.stream, direction, block_shares,
           nullptr, 0);
    return;
  }
  const WeightedSums<Table, Input>& sums = direction.sums;
  const int pairs_per_group = kRowsPerGroup / sums.rows.rows_per_pair();
  const Shares shares = tokens * warps >= sms
                            ? block_shares
                            : make_shares(direction.experts_per_token, pairs_per_group);
  const int64_t blocks = tokens * shares.shares_per_token;
  const int partial_width = (sums.width + kVecSize<Table> - 1) / kVecSize<Table> * kVecSize<Table>;
  const auto partial_y = context.array<Real>(sums.y ? blocks * partial_width : 0);
  launch(kernel, {blocks, kWarp}, context.stream, direction, shares, partial_y.get(),
         partial_width);
  if (sums.y) {
    constexpr int kThreads = 128;
    const int blocks_per_token = (sums.width + kThreads - 1) / kThreads;
    launch(add_shares<Real, Input>, {tokens * blocks_per_token, kThreads}, context.stream, shares,
           block_shares.pairs_per_share / shares.pairs_per_share, sums.width, partial_y.get(),
           partial_width, sums.y, blocks_per_token);
  }
}

// Chooses the tile by the alignment and the width of the rows.
template <class Table, class Input, class Coefficients>
void launch_direction(const Direction<Table, Input, Coefficients>& direction,
                      const Context& context) {
  const auto& [v, dot_width, dot_rows] = direction.dots;
  const auto& [y, sum_width, sum_rows] = direction.sums;
  const bool are_dots_vectorizable =
      is_vectorizable(v, dot_width, dot_width) && are_vectorizable(dot_rows, dot_width);
  const bool are_sums_vectorizable =
      !y || (is_vectorizable(y, sum_width, sum_width) && are_vectorizable(sum_rows, sum_width));
  if (!are_dots_vectorizable || !are_sums_vectorizable) {
    launch_with<ScalarTile>(direction, context);
  } else if (std::max(dot_width, sum_width) <= kTileColumns<NarrowTile, Table>) {
    launch_with<NarrowTile>(direction, context);
  } else {
    launch_with<WideTile>(direction, context);
  }
}

}  // namespace

template <class Table, class Input>
void expert_mlp_forward(const ExpertMlpForward<Table, Input>& pass, const Context& context) {
  using Real = accumulation_t<Table>;
  const int64_t pairs = pass.tokens * pass.experts_per_token;
  const std::shared_ptr<Real> coefficients = context.array<Real>(pairs);
  Real* const gate = pass.w_gate ? pass.gate : nullptr;
  const PairRows<Table, Real> dot_rows = {
      .indices = pass.indices,
      .main = {.table = pass.w_down, .scalars = pass.hidden},
      .gate = {.table = pass.w_gate, .scalars = gate},
  };
  const PairRows<Table, const Real> sum_rows = {
      .indices = pass.indices,
      .main = {.table = pass.w_up, .scalars = coefficients.get()},
  };
  const Direction<Table, Input, ForwardCoefficients<Real>> forward = {
      .tokens = pass.tokens,
      .experts = pass.experts,
      .experts_per_token = int(pass.experts_per_token),
      .dots = {.v = pass.x, .width = int(pass.dim), .rows = dot_rows},
      .coefficients = {.activation = pass.activation,
                       .weights = pass.weights,
                       .hidden = pass.hidden,
                       .gate = gate,
                       .coefficients = coefficients.get()},
      .sums = {.y = pass.out, .width = int(pass.dim), .rows = sum_rows},
  };
  launch_direction(forward, context);
}

template <class Table, class Input>
void expert_mlp_backward(const ExpertMlpBackward<Table, Input>& pass, const Context& context) {
  using Real = accumulation_t<Table>;
  const PairRows<Table, Real> dot_rows = {
      .indices = pass.indices,
      .main = {.table = pass.w_up, .scalars = pass.grad_weights},
  };
  const PairRows<Table, const Real> sum_rows = {
      .indices = pass.indices,
      .main = {.table = pass.w_down, .scalars = pass.down_coefficients},
      .gate = {.table = pass.w_gate, .scalars = pass.gate_coefficients},
  };
  const Direction<Table, Input, BackwardCoefficients<Real>> backward = {
      .tokens = pass.tokens,
      .experts = pass.experts,
      .experts_per_token = int(pass.experts_per_token),
      .dots = {.v = pass.grad_out, .width = int(pass.dim), .rows = dot_rows},
      .coefficients = {.activation = pass.activation,
                       .weights = pass.weights,
                       .hidden = pass.hidden,
                       .gate = pass.w_gate ? pass.gate : nullptr,
                       .grad_weights = pass.grad_weights,
                       .down_coefficients = pass.down_coefficients,
                       .gate_coefficients = pass.gate_coefficients,
                       .up_coefficients = pass.up_coefficients},
      .sums = {.y = pass.grad_x, .width = int(pass.dim), .rows = sum_rows},
  };
  launch_direction(backward, context);
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
