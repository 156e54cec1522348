// Token pass: for every token, z = rows(A)·v, c = f(z), y = Σ c·rows(B), over the P experts that
// the token retrieved.
//
// Forward     A = w_down, w_gate    v = x          f = weights·act(z)·gate    B = w_up
// Backward    A = w_up              v = grad_out   f = the chain rule         B = w_down, w_gate
//
// Work item   one token, start to end, by one thread; where there are few, a part of one
// Traffic     2·P·D table elements a token, or 3 with gates, each read once; nothing of size P·D is
//             written
// Exactness   accumulation in float (double for double), in an order fixed by p and by the vector
//             width of the capability
#include "kernels/cpu/expert_mlp.h"

#include <algorithm>

#include "kernels/cpu/capability_kernels.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

// y = Σ_p c[p]·table[indices[p]]
template <class Table, class Real>
void sum_weighted_rows(const Real* c,
                       Rows<const Table> table,
                       const int64_t* indices,
                       int64_t count,
                       int64_t width,
                       Real* y) {
  std::memset(y, 0, width * sizeof(Real));
  add_weighted_rows(c, table, indices, count, width, y);
}

// Experts [first, last) of a token's list.
struct ExpertRange {
  int64_t first, last;

  int64_t count() const { return last - first; }
};

template <class Table>
ExpertRange part_of_token(const ExpertMlpForward<Table>& pass, int64_t part) {
  const int64_t first = part * kExpertsPerPart;
  return {first, std::min(first + kExpertsPerPart, pass.experts_per_token)};
}

// hidden, gate and coefficients = weights·act(hidden)·gate of some of a token's experts.
template <class Table, class Real>
void compute_coefficients(const ExpertMlpForward<Table>& pass,
                          int64_t t,
                          ExpertRange experts,
                          Real* coefficients) {
  const Real* x = pass.x + t * pass.dim;
  const int64_t pair = t * pass.experts_per_token + experts.first;
  const int64_t* indices = pass.indices + pair;
  const Real* weights = pass.weights + pair;
  Real* hidden = pass.hidden + pair;
  dot_with_rows(x, pass.dim, pass.w_down, indices, experts.count(), hidden);
  with_activation(pass.activation, [&]<Activation activation>() {
    for (int64_t p = 0; p < experts.count(); ++p) {
      coefficients[p] = weights[p] * activate<activation>(hidden[p]);
    }
  });
  if (pass.w_gate) {
    Real* gate = pass.gate + pair;
    dot_with_rows(x, pass.dim, pass.w_gate, indices, experts.count(), gate);
    for (int64_t p = 0; p < experts.count(); ++p) {
      coefficients[p] *= gate[p];
    }
  }
}

template <class Table, class Real>
void sum_part(const ExpertMlpForward<Table>& pass,
              int64_t t,
              ExpertRange experts,
              const Real* coefficients,
              Real* out) {
  sum_weighted_rows(coefficients, pass.w_up,
                    pass.indices + t * pass.experts_per_token + experts.first, experts.count(),
                    pass.dim, out);
}

template <class Real>
void add(const Real* source, int64_t count, Real* target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] += source[i];
  }
}

}  // namespace

template <class Table>
void token_forward(const ExpertMlpForward<Table>& pass, int64_t first, int64_t last) {
  using Real = accumulation_t<Table>;
  const ExpertRange all = {0, pass.experts_per_token};
  Scratch<Real> coefficients(all.count());
  Scratch<Real> part_out(pass.dim);
  for (int64_t t = first; t < last; ++t) {
    Real* out = pass.out + t * pass.dim;
    compute_coefficients(pass, t, all, coefficients.data());
    sum_part(pass, t, part_of_token(pass, 0), coefficients.data(), out);
    for (int64_t part = 1; part < parts_per_token(all.count()); ++part) {
      const ExpertRange experts = part_of_token(pass, part);
      sum_part(pass, t, experts, coefficients.data() + experts.first, part_out.data());
      add(part_out.data(), pass.dim, out);
    }
  }
}

template <class Table>
void token_parts_forward(const ExpertMlpForward<Table>& pass,
                         accumulation_t<Table>* parts_out,
                         int64_t first,
                         int64_t last) {
  const int64_t parts = parts_per_token(pass.experts_per_token);
  Scratch<accumulation_t<Table>> coefficients(kExpertsPerPart);
  for (int64_t i = first; i < last; ++i) {
    const ExpertRange experts = part_of_token(pass, i % parts);
    compute_coefficients(pass, i / parts, experts, coefficients.data());
    sum_part(pass, i / parts, experts, coefficients.data(), parts_out + i * pass.dim);
  }
}

template <class Table>
void add_token_parts(const ExpertMlpForward<Table>& pass,
                     const accumulation_t<Table>* parts_out,
                     int64_t first,
                     int64_t last) {
  const int64_t parts = parts_per_token(pass.experts_per_token);
  for (int64_t t = first; t < last; ++t) {
    const auto* part_out = parts_out + t * parts * pass.dim;
    auto* out = pass.out + t * pass.dim;
    std::memcpy(out, part_out, pass.dim * sizeof(*out));
    for (int64_t part = 1; part < parts; ++part) {
      add(part_out + part * pass.dim, pass.dim, out);
    }
  }
}

template <class Table>
void token_backward(const ExpertMlpBackward<Table>& pass, int64_t first, int64_t last) {
  using Real = accumulation_t<Table>;
  const int64_t experts = pass.experts_per_token;
  Scratch<Real> upstream(experts);
  for (int64_t t = first; t < last; ++t) {
    const int64_t* indices = pass.indices + t * experts;
    const Real* weights = pass.weights + t * experts;
    const Real* hidden = pass.hidden + t * experts;
    const Real* gate = pass.w_gate ? pass.gate + t * experts : nullptr;
    Real* grad_weights = pass.grad_weights + t * experts;
    Real* down = pass.down_coefficients + t * experts;
    Real* up = pass.up_coefficients + t * experts;

    dot_with_rows(pass.grad_out + t * pass.dim, pass.dim, pass.w_up, indices, experts,
                  upstream.data());
    with_activation(pass.activation, [&]<Activation activation>() {
      for (int64_t p = 0; p < experts; ++p) {
        const Real value = activate<activation>(hidden[p]);
        grad_weights[p] = upstream[p] * value;
        up[p] = weights[p] * value;
        down[p] = upstream[p] * weights[p] * activate_derivative<activation>(hidden[p]);
      }
    });
    if (gate) {
      Real* gate_coefficients = pass.gate_coefficients + t * experts;
      for (int64_t p = 0; p < experts; ++p) {
        gate_coefficients[p] = upstream[p] * up[p];
        grad_weights[p] *= gate[p];
        up[p] *= gate[p];
        down[p] *= gate[p];
      }
    }
    if (pass.grad_x) {
      Real* grad_x = pass.grad_x + t * pass.dim;
      sum_weighted_rows(down, pass.w_down, indices, experts, pass.dim, grad_x);
      if (gate) {
        add_weighted_rows(pass.gate_coefficients + t * experts, pass.w_gate, indices, experts,
                          pass.dim, grad_x);
      }
    }
  }
}

template <class Real>
void gather_sum(const GatherSum<Real>& pass, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    sum_weighted_rows(pass.coefficients + i * pass.terms, pass.table, pass.indices + i * pass.terms,
                      pass.terms, pass.width, pass.out.data + i * pass.out.stride);
  }
}

#define PEER_INSTANTIATE(Table)                                                               \
  template void token_forward(const ExpertMlpForward<Table>&, int64_t, int64_t);              \
  template void token_parts_forward(const ExpertMlpForward<Table>&, accumulation_t<Table>*,   \
                                    int64_t, int64_t);                                        \
  template void add_token_parts(const ExpertMlpForward<Table>&, const accumulation_t<Table>*, \
                                int64_t, int64_t);                                            \
  template void token_backward(const ExpertMlpBackward<Table>&, int64_t, int64_t);

PEER_INSTANTIATE(float)
PEER_INSTANTIATE(double)
PEER_INSTANTIATE(BFloat16)
PEER_INSTANTIATE(Half)

#undef PEER_INSTANTIATE

template void gather_sum(const GatherSum<float>&, int64_t, int64_t);
template void gather_sum(const GatherSum<double>&, int64_t, int64_t);

}  // namespace peer::cpu::PEER_CAPABILITY
