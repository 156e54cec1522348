// For every token: z = rows(A)·v, c = f(z), y = Σ c·rows(B), over the P experts that the token
// retrieved.
//
// Forward     A = w_down, w_gate    v = x          f = weights·act(z)·gate    B = w_up
// Backward    A = w_up              v = grad_out   f = the chain rule         B = w_down, w_gate
//
// Shapes      v (T, D)   A, B (N, D)   indices, weights, z, c (T, P)   y (T, D)
// Work item   one token, from start to end, by one thread; with few tokens, one split of a token
// Traffic     2·P·D table elements a token, or 3·P·D with gates, each read once; nothing of size
//             P·D is written
// Exactness   accumulation in float (double for double), in an order fixed by p and by the vector
//             width of the capability
// Requires    indices in range; nothing of widths, strides and alignments
#include "kernels/cpu/expert_mlp.h"

#include <algorithm>

#include "kernels/cpu/gathered_rows.h"
#include "kernels/cpu/scratch.h"

namespace peer::cpu {

namespace PEER_CAPABILITY {

namespace {

// Experts [first, last) of a token's list.
struct ExpertRange {
  int64_t first, last;

  int64_t count() const { return last - first; }
};

template <class Table>
ExpertRange experts_of_split(const ExpertMlpForward<Table>& pass, int64_t split) {
  const int64_t first = split * kExpertsPerSplit;
  return {first, std::min(first + kExpertsPerSplit, pass.experts_per_token)};
}

// Rows of some of a token's experts.
template <class Pass, class Table>
RowList<Table> rows_of(const Pass& pass, Rows<const Table> table, int64_t t, ExpertRange experts) {
  return {table, pass.indices + t * pass.experts_per_token + experts.first, experts.count()};
}

// hidden, gate and coefficients = weights·act(hidden)·gate of some of a token's experts.
template <class Table, class Real>
void compute_coefficients(const ExpertMlpForward<Table>& pass,
                          int64_t t,
                          ExpertRange experts,
                          Real* coefficients) {
  const Real* x = pass.x + t * pass.dim;
  const int64_t pair = t * pass.experts_per_token + experts.first;
  const Real* weights = pass.weights + pair;
  Real* hidden = pass.hidden + pair;
  const RowList<Table> down = rows_of(pass, pass.w_down, t, experts);
  const RowList<Table> gates = rows_of(pass, pass.w_gate, t, experts);
  const RowList<Table> up = rows_of(pass, pass.w_up, t, experts);
  dot_with_rows(x, pass.dim, down, pass.w_gate ? gates : up, hidden);
  with_activation(pass.activation, [&]<Activation activation>() {
    for (int64_t p = 0; p < experts.count(); ++p) {
      coefficients[p] = weights[p] * activate<activation>(hidden[p]);
    }
  });
  if (pass.w_gate) {
    Real* gate = pass.gate + pair;
    dot_with_rows(x, pass.dim, gates, up, gate);
    for (int64_t p = 0; p < experts.count(); ++p) {
      coefficients[p] *= gate[p];
    }
  }
}

template <class Real>
void add(const Real* source, int64_t count, Real* target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] += source[i];
  }
}

template <class Table>
void expert_mlp_forward(const ExpertMlpForward<Table>& pass, int64_t first, int64_t last) {
  using Real = accumulation_t<Table>;
  const ExpertRange all = {0, pass.experts_per_token};
  const int64_t splits = splits_per_token(all.count());
  Scratch<Real> coefficients(all.count());
  Scratch<Real> partial_sum(pass.dim);
  for (int64_t t = first; t < last; ++t) {
    Real* out = pass.out + t * pass.dim;
    compute_coefficients(pass, t, all, coefficients.data());
    const auto sum_split = [&](int64_t split, Real* sum) {
      const ExpertRange experts = experts_of_split(pass, split);
      RowList<Table> then;
      if (split + 1 < splits) {
        then = rows_of(pass, pass.w_up, t, experts_of_split(pass, split + 1));
      } else if (t + 1 < last) {
        then = rows_of(pass, pass.w_down, t + 1, all);
      }
      sum_weighted_rows(coefficients.data() + experts.first, pass.dim,
                        rows_of(pass, pass.w_up, t, experts), then, sum);
    };
    sum_split(0, out);
    for (int64_t split = 1; split < splits; ++split) {
      sum_split(split, partial_sum.data());
      add(partial_sum.data(), pass.dim, out);
    }
  }
}

template <class Table>
void expert_mlp_forward_splits(const ExpertMlpForward<Table>& pass,
                               accumulation_t<Table>* partial_sums,
                               int64_t first,
                               int64_t last) {
  const int64_t splits = splits_per_token(pass.experts_per_token);
  Scratch<accumulation_t<Table>> coefficients(kExpertsPerSplit);
  for (int64_t i = first; i < last; ++i) {
    const ExpertRange experts = experts_of_split(pass, i % splits);
    compute_coefficients(pass, i / splits, experts, coefficients.data());
    sum_weighted_rows(coefficients.data(), pass.dim, rows_of(pass, pass.w_up, i / splits, experts),
                      {}, partial_sums + i * pass.dim);
  }
}

template <class Table>
void add_splits(const ExpertMlpForward<Table>& pass,
                const accumulation_t<Table>* partial_sums,
                int64_t first,
                int64_t last) {
  const int64_t splits = splits_per_token(pass.experts_per_token);
  for (int64_t t = first; t < last; ++t) {
    const auto* partial_sum = partial_sums + t * splits * pass.dim;
    auto* out = pass.out + t * pass.dim;
    std::memcpy(out, partial_sum, pass.dim * sizeof(*out));
    for (int64_t split = 1; split < splits; ++split) {
      add(partial_sum + split * pass.dim, pass.dim, out);
    }
  }
}

// The gradient of some of a token's weights, and the coefficients of the tables' gradients.
template <class Table, class Real>
void compute_gradient_coefficients(const ExpertMlpBackward<Table>& pass,
                                   int64_t t,
                                   ExpertRange experts,
                                   const Real* upstream) {
  const int64_t pair = t * pass.experts_per_token + experts.first;
  const Real* weights = pass.weights + pair;
  const Real* hidden = pass.hidden + pair;
  Real* grad_weights = pass.grad_weights + pair;
  Real* down = pass.down_coefficients + pair;
  Real* up = pass.up_coefficients + pair;
  with_activation(pass.activation, [&]<Activation activation>() {
    for (int64_t p = 0; p < experts.count(); ++p) {
      const Real value = activate<activation>(hidden[p]);
      grad_weights[p] = upstream[p] * value;
      up[p] = weights[p] * value;
      down[p] = upstream[p] * weights[p] * activate_derivative<activation>(hidden[p]);
    }
  });
  if (pass.w_gate) {
    const Real* gate = pass.gate + pair;
    Real* gate_coefficients = pass.gate_coefficients + pair;
    for (int64_t p = 0; p < experts.count(); ++p) {
      gate_coefficients[p] = upstream[p] * up[p];
      grad_weights[p] *= gate[p];
      up[p] *= gate[p];
      down[p] *= gate[p];
    }
  }
}

// The experts of a token are taken in blocks, each from its first read to its last, so that what
// follows finds the block's rows in the second-level cache. With gates there is one block: the sum
// of all gate vectors follows that of all down vectors.
template <class Table>
void expert_mlp_backward(const ExpertMlpBackward<Table>& pass,
                         AfterPairs after_pairs,
                         int64_t first,
                         int64_t last) {
  using Real = accumulation_t<Table>;
  const int64_t total = pass.experts_per_token;
  const int64_t block = pass.w_gate ? total : std::min<int64_t>(kRowsInFlight, total);
  Scratch<Real> upstream(block);
  for (int64_t t = first; t < last; ++t) {
    const Real* grad_out = pass.grad_out + t * pass.dim;
    Real* grad_x = pass.grad_x ? pass.grad_x + t * pass.dim : nullptr;
    if (grad_x) {
      std::memset(grad_x, 0, pass.dim * sizeof(Real));
    }
    for (int64_t begin = 0; begin < total; begin += block) {
      const ExpertRange experts = {begin, std::min(begin + block, total)};
      const int64_t pair = t * total + begin;
      const RowList<Table> up_rows = rows_of(pass, pass.w_up, t, experts);
      const RowList<Table> down_rows = rows_of(pass, pass.w_down, t, experts);
      const RowList<Table> gate_rows = rows_of(pass, pass.w_gate, t, experts);
      RowList<Table> next_block;
      if (experts.last < total) {
        next_block = rows_of(pass, pass.w_up, t, {experts.last, total});
      } else if (t + 1 < last) {
        next_block = rows_of(pass, pass.w_up, t + 1, {0, total});
      }
      dot_with_rows(grad_out, pass.dim, up_rows, grad_x ? down_rows : next_block, upstream.data());
      compute_gradient_coefficients(pass, t, experts, upstream.data());
      if (grad_x) {
        add_weighted_rows(pass.down_coefficients + pair, pass.dim, down_rows,
                          pass.w_gate ? gate_rows : next_block, grad_x);
        if (pass.w_gate) {
          add_weighted_rows(pass.gate_coefficients + pair, pass.dim, gate_rows, next_block, grad_x);
        }
      }
      if (after_pairs.call) {
        after_pairs.call(after_pairs.context, pair, pair + experts.count());
      }
    }
  }
}

template <class Table>
constexpr ExpertMlpFunctions<Table> kFunctions = {
    .forward = expert_mlp_forward<Table>,
    .forward_splits = expert_mlp_forward_splits<Table>,
    .add_splits = add_splits<Table>,
    .backward = expert_mlp_backward<Table>,
};

}  // namespace

}  // namespace PEER_CAPABILITY

constinit const ExpertMlpKernels ExpertMlpKernels::PEER_CAPABILITY = {
    PEER_CAPABILITY::kFunctions<float>,
    PEER_CAPABILITY::kFunctions<double>,
    PEER_CAPABILITY::kFunctions<BFloat16>,
    PEER_CAPABILITY::kFunctions<Half>,
};

}  // namespace peer::cpu
