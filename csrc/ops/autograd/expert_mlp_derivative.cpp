// Per pair of a token and an expert, let
//
//   z = <x, down>                       ż = <x', down> + <x, down'>
//   q = <x, gate>, or 1                 q̇ = <x', gate> + <x, gate'>
//   s = <grad_out, up>                  ṡ = <grad_out', up> + <grad_out, up'>
//
// be the values and their derivatives in the direction of the primed variables. A pair contributes
// w·a(z)·q·s to L. The partial derivatives of this term by w, z, q and s are the coefficients
// below. The derivatives by vectors are sums of coefficients times table rows; the derivative by
// the table is sums of coefficients times vectors. A dotted coefficient is its derivative in the
// direction.
//
// Everything is written in differentiable ATen operators, so derivatives of any order follow. This
// is the only place that gathers the retrieved rows, (T, P, parts, D).
#include "ops/autograd/expert_mlp_derivative.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/autograd/undefined_as_zero.h"
#include "ops/checks.h"
#include "ops/expert_mlp.h"

namespace peer::ops::autograd {

namespace {

struct ActivationValues {
  Tensor value, first, second;  // a(z), a'(z), a''(z)
};

ActivationValues differentiate(Activation activation, const Tensor& z) {
  switch (activation) {
    case Activation::gelu: {
      const Tensor cdf = 0.5 * (1 + at::erf(z * 0.70710678118654752440));
      const Tensor pdf = 0.39894228040143267794 * at::exp(-0.5 * z * z);
      return {z * cdf, cdf + z * pdf, pdf * (2 - z * z)};
    }
    case Activation::gelu_tanh: {
      const double root = 0.79788456080286535588;
      const Tensor t = at::tanh(root * (z + 0.044715 * z * z * z));
      const Tensor inner_first = root * (1 + 0.134145 * z * z);
      const Tensor inner_second = root * 0.26829 * z;
      const Tensor t_first = (1 - t * t) * inner_first;
      const Tensor t_second = (1 - t * t) * (inner_second - 2 * t * inner_first * inner_first);
      return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * t_first, t_first + 0.5 * z * t_second};
    }
    case Activation::relu: {
      const Tensor is_positive = (z > 0).to(z.scalar_type());
      return {at::relu(z), is_positive, Tensor()};
    }
    case Activation::silu: {
      const Tensor s = at::sigmoid(z);
      const Tensor s_first = s * (1 - s);
      return {z * s, s + z * s_first, s_first * (2 + z * (1 - 2 * s))};
    }
    case Activation::identity:
      return {z, at::ones_like(z), Tensor()};
    case Activation::relu2: {
      const Tensor positive = at::relu(z);
      return {positive * positive, 2 * positive, 2 * (z > 0).to(z.scalar_type())};
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The pairs of tokens and experts, and the products of vectors and table rows over them. A product
// with an undefined tensor is undefined.
class Pairs {
 public:
  Pairs(const Tensor& indices, const Tensor& frozen, at::ScalarType type)
      : tokens_(indices.sym_size(0)),
        experts_(indices.sym_size(1)),
        flat_(indices.reshape(-1)),
        frozen_(frozen.defined() ? frozen.index_select(0, flat_).view({-1, 1, 1}) : Tensor()),
        type_(type) {}

  // The rows of the table: (N, parts, D) -> (T, P, D) for each part. Those of frozen experts are
  // constants.
  ExpertParts rows(const Tensor& table) const {
    const Tensor rows = table.index_select(0, flat_);
    return parts_of(frozen_.defined() ? at::where(frozen_, rows.detach(), rows) : rows);
  }

  // The same for a direction of the table, which is zero in frozen rows.
  ExpertParts direction_rows(const Tensor& direction) const {
    return direction.defined() ? parts_of(without_frozen(direction.index_select(0, flat_)))
                               : ExpertParts();
  }

  // (T, D) with (T, P, D) -> (T, P)
  Tensor dot(const Tensor& vectors, const Tensor& rows) const {
    return vectors.defined() && rows.defined() ? (rows * vectors.to(type_).unsqueeze(1)).sum(-1)
                                               : Tensor();
  }

  // (T, P) with (T, P, D) -> (T, D)
  Tensor combine(const Tensor& coefficients, const Tensor& rows) const {
    return coefficients.defined() && rows.defined() ? (coefficients.unsqueeze(-1) * rows).sum(1)
                                                    : Tensor();
  }

  // (T, P) with (T, D) -> (T, P, D)
  Tensor outer(const Tensor& coefficients, const Tensor& vectors) const {
    return coefficients.defined() && vectors.defined()
               ? coefficients.unsqueeze(-1) * vectors.to(type_).unsqueeze(1)
               : Tensor();
  }

  // (T, P, D) for each part -> (N, parts, D), zero in frozen rows
  Tensor scatter(std::vector<Tensor> parts, const Tensor& table) const {
    const auto known =
        std::find_if(parts.begin(), parts.end(), [](const Tensor& part) { return part.defined(); });
    if (known == parts.end()) {
      return Tensor();
    }
    const Tensor zero = at::zeros_like(*known);
    for (Tensor& part : parts) {
      part = part.defined() ? part : zero;
    }
    const Tensor rows = without_frozen(at::stack(parts, 2).flatten(0, 1));
    return at::zeros_symint(table.sym_sizes(), table.options().dtype(type_))
        .index_add(0, flat_, rows);
  }

 private:
  // (T·P, parts, D) -> (T, P, D) for each part
  ExpertParts parts_of(const Tensor& rows) const {
    return ExpertParts(
        rows.reshape_symint({tokens_, experts_, rows.sym_size(1), rows.sym_size(2)}).to(type_));
  }

  // Rows (T·P, parts, D), with zeros for frozen experts.
  Tensor without_frozen(const Tensor& rows) const {
    return frozen_.defined() ? rows.masked_fill(frozen_, 0) : rows;
  }

  c10::SymInt tokens_, experts_;
  Tensor flat_;
  Tensor frozen_;  // (T·P, 1, 1), or undefined
  at::ScalarType type_;
};

}  // namespace

std::array<Tensor, 4> differentiate_expert_mlp(const ExpertMlpVariables& point,
                                               const ExpertMlpVariables& direction,
                                               const Tensor& indices,
                                               std::string_view activation,
                                               const Tensor& frozen,
                                               std::array<bool, 4> wanted) {
  const Activation parsed = check_expert_mlp(ExpertMlpArguments{
      point.x, point.weights, indices, point.table, activation, /*sparse_grad=*/false, frozen});
  const at::ScalarType type = accumulation_type(point.table.scalar_type());
  const Pairs pairs(indices, frozen, type);
  const auto [down, up, gate] = pairs.rows(point.table);
  const auto [down_dot, up_dot, gate_dot] = pairs.direction_rows(direction.table);

  const Tensor w = point.weights.to(type), w_dot = to_type(direction.weights, type);
  const Tensor z = pairs.dot(point.x, down);
  const Tensor z_dot = sum(pairs.dot(direction.x, down), pairs.dot(point.x, down_dot));
  const Tensor q = gate.defined() ? pairs.dot(point.x, gate) : at::ones_like(z);
  const Tensor q_dot = sum(pairs.dot(direction.x, gate), pairs.dot(point.x, gate_dot));
  const Tensor s = pairs.dot(point.grad_out, up);
  const Tensor s_dot = sum(pairs.dot(direction.grad_out, up), pairs.dot(point.grad_out, up_dot));
  const auto [a, a1, a2] = differentiate(parsed, z);

  std::array<Tensor, 4> derivative;
  Tensor of_s, of_s_dot, of_z, of_z_dot, of_q, of_q_dot;
  if (wanted[kOut] || wanted[kOfTable]) {
    of_s = w * a * q;
    of_s_dot = sum(product(a * q, w_dot), product(w * a1 * q, z_dot), product(w * a, q_dot));
  }
  if (wanted[kOfX] || wanted[kOfTable]) {
    of_z = product(w * a1 * q, s);
    of_z_dot = sum(product(a1 * q, s, w_dot), product(w * q, a2, s, z_dot),
                   product(w * a1, s, q_dot), product(w * a1 * q, s_dot));
    of_q = product(w * a, s);
    of_q_dot = sum(product(a, s, w_dot), product(w * a1, s, z_dot), product(w * a, s_dot));
  }
  if (wanted[kOut]) {
    derivative[kOut] = sum(pairs.combine(of_s_dot, up), pairs.combine(of_s, up_dot));
  }
  if (wanted[kOfX]) {
    derivative[kOfX] = sum(pairs.combine(of_z_dot, down), pairs.combine(of_z, down_dot),
                           pairs.combine(of_q_dot, gate), pairs.combine(of_q, gate_dot));
  }
  if (wanted[kOfWeights]) {
    derivative[kOfWeights] =
        sum(product(a1 * q, s, z_dot), product(a, s, q_dot), product(a * q, s_dot));
  }
  if (wanted[kOfTable]) {
    const auto scatter = [&](const Tensor& by_z, const Tensor& by_q, const Tensor& by_s,
                             const ExpertMlpVariables& vectors) {
      std::vector<Tensor> parts = {pairs.outer(by_z, vectors.x)};
      if (has_gate(point.table)) {
        parts.push_back(pairs.outer(by_q, vectors.x));
      }
      parts.push_back(pairs.outer(by_s, vectors.grad_out));
      return pairs.scatter(parts, point.table);
    };
    derivative[kOfTable] =
        sum(scatter(of_z_dot, of_q_dot, of_s_dot, point), scatter(of_z, of_q, of_s, direction));
  }

  const Tensor variables[] = {point.grad_out.defined() ? point.grad_out : point.x, point.x,
                              point.weights, point.table};
  for (size_t i = 0; i < derivative.size(); ++i) {
    if (derivative[i].defined()) {
      derivative[i] = derivative[i].to(variables[i].scalar_type());
    }
  }
  return derivative;
}

}  // namespace peer::ops::autograd
