"""Rounding error analysis of `expert_mlp`.

A `Bounded` holds exact values and an error bound for a computation that rounds every operation. An
operation satisfies the standard model fl(a ∘ b) = (a ∘ b)(1 + δ) with |δ| ≤ u. The error of a sum
of n products in any order, with or without fused multiply-add, is at most g·Σ|a·b| with
g = n·u / (1 - n·u).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The oracle rounds to float64, so its unit roundoff is added to that of the operator.
_ORACLE_ROUNDOFF = 2.0**-53


class Bounded(NamedTuple):
    """Exact values (float64) and a bound on the absolute error of a computation."""

    value: Tensor
    error: Tensor

    @property
    def largest(self) -> Tensor:
        """A bound on the magnitude of the computed values."""
        return self.value.abs() + self.error


def exact(tensor: Tensor) -> Bounded:
    """An input without error: the accumulation dtype represents it exactly."""
    value = tensor.detach().double()
    return Bounded(value, torch.zeros_like(value))


class Arithmetic:
    """Operations on `Bounded` values in the accumulation dtype of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        self.unit = torch.finfo(accumulation).eps / 2 + _ORACLE_ROUNDOFF

    def multiply(self, a: Bounded, b: Bounded) -> Bounded:
        """a · b, elementwise."""
        propagated = a.largest * b.largest - a.value.abs() * b.value.abs()
        return Bounded(a.value * b.value, propagated + self.unit * a.largest * b.largest)

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        """a + b, elementwise."""
        return Bounded(a.value + b.value, a.error + b.error + self.unit * (a.largest + b.largest))

    def sum_of_products(self, equation: str, a: Bounded, b: Bounded, terms: int) -> Bounded:
        """An einsum whose outputs are sums of at most `terms` products, in any order."""
        magnitude = torch.einsum(equation, a.largest, b.largest)
        propagated = magnitude - torch.einsum(equation, a.value.abs(), b.value.abs())
        gamma = terms * self.unit / (1 - terms * self.unit)
        return Bounded(torch.einsum(equation, a.value, b.value), propagated + gamma * magnitude)

    def store(self, a: Bounded, dtype: torch.dtype) -> Bounded:
        """a, rounded once to `dtype`. Half of the smallest subnormal bounds underflow."""
        info = torch.finfo(dtype)
        rounding = info.eps / 2 * a.largest + info.smallest_normal * info.eps / 2
        return Bounded(a.value, a.error + rounding)

    def activate(self, name: str, z: Bounded) -> Bounded:
        """The activation. Its error is the slope times z's error, plus 16 roundoffs of z."""
        steepest = {
            "gelu": 1.13,
            "gelu_tanh": 1.13,
            "silu": 1.1,
            "relu": 1.0,
            "identity": 1.0,
        }
        slope = (
            2 * z.largest if name == "relu2" else torch.full_like(z.value, steepest.get(name, 0))
        )
        evaluation = 16 * self.unit * (z.largest**2 if name == "relu2" else z.largest)
        return Bounded(activations[name](z.value), slope * z.error + evaluation)

    def activate_derivative(self, name: str, z: Bounded) -> Bounded:
        """The derivative of the activation.

        At the kink of relu both values are valid if the sign of z is uncertain.
        """
        curvature = {
            "gelu": 0.8,
            "gelu_tanh": 0.9,
            "silu": 0.5,
            "relu": 0.0,
            "identity": 0.0,
            "relu2": 2.0,
        }
        # 1 - tanh² loses digits, and gelu_tanh multiplies it by z times a quadratic function of z.
        growth = z.largest**3 if name == "gelu_tanh" else z.largest
        error = curvature[name] * z.error + 16 * self.unit * (1 + growth)
        if name == "relu":
            error = ((z.value.abs() <= z.error) & (z.error > 0)).double()
        return Bounded(_derivative(name, z.value), error)


def _gelu(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z)


def _gelu_tanh(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


activations = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "identity": torch.clone,
    "relu2": lambda z: torch.relu(z) ** 2,
}


def _derivative(name: str, z: Tensor) -> Tensor:
    z = z.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(activations[name](z).sum(), z)
    return slope


class ExpertMlpResults(NamedTuple):
    """The results of `expert_mlp` and its backward; gate is None if the experts have no gates."""

    out: Bounded
    hidden: Bounded
    gate: Bounded | None
    grad_x: Bounded
    grad_weights: Bounded
    grad_table: Bounded

    @property
    def gradients(self) -> list[Bounded]:
        """Gradients in the order of the operator's floating-point arguments."""
        return [self.grad_x, self.grad_weights, self.grad_table]


def analyse_expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    activation: str,
    grad_out: Tensor,
) -> ExpertMlpResults:
    """Exact results of the operator and its backward, with error bounds.

    The bounds assume only the documented behaviour: inputs are read exactly, sums and products are
    computed in the accumulation dtype in any order, and every result is rounded once to its dtype.
    """
    arithmetic = Arithmetic(table.dtype)
    multiply, store = arithmetic.multiply, arithmetic.store
    tokens, per_token = indices.shape
    experts, _, dim = table.shape

    def sum_by_expert(coefficients: Bounded, source: Bounded) -> Bounded:
        products = multiply(
            Bounded(*(part[:, :, None] for part in coefficients)),
            Bounded(*(part[:, None, :] for part in source)),
        )

        def gather(pairs: Tensor) -> Tensor:
            sums = torch.zeros(experts, dim, dtype=pairs.dtype)
            return sums.index_add(0, indices.flatten(), pairs.flatten(0, 1))

        terms = tokens * per_token
        gamma = terms * arithmetic.unit / (1 - terms * arithmetic.unit)
        return Bounded(
            gather(products.value), gather(products.error) + gamma * gather(products.largest)
        )

    source, upstream_rows = exact(x), exact(grad_out)
    pair_weights = exact(weights)
    down, *gate_rows, up = (exact(part[indices]) for part in table.detach().unbind(1))
    hidden = arithmetic.sum_of_products("td,tpd->tp", source, down, dim)
    activated = arithmetic.activate(activation, hidden)
    slope = arithmetic.activate_derivative(activation, hidden)
    upstream = arithmetic.sum_of_products("td,tpd->tp", upstream_rows, up, dim)

    up_coefficients = multiply(pair_weights, activated)
    grad_weights = multiply(upstream, activated)
    down_coefficients = multiply(multiply(upstream, pair_weights), slope)
    gate = None
    gate_coefficients = []
    if gate_rows:
        gate = arithmetic.sum_of_products("td,tpd->tp", source, gate_rows[0], dim)
        gate_coefficients = [multiply(upstream, up_coefficients)]
        up_coefficients = multiply(up_coefficients, gate)
        grad_weights = multiply(grad_weights, gate)
        down_coefficients = multiply(down_coefficients, gate)

    out = arithmetic.sum_of_products("tp,tpd->td", up_coefficients, up, per_token)
    terms = per_token * (1 + len(gate_rows))
    grad_x = arithmetic.sum_of_products("tp,tpd->td", down_coefficients, down, terms)
    for coefficients, rows in zip(gate_coefficients, gate_rows, strict=True):
        through_gate = arithmetic.sum_of_products("tp,tpd->td", coefficients, rows, terms)
        grad_x = arithmetic.add(grad_x, through_gate)
    parts = [
        *(sum_by_expert(each, source) for each in (down_coefficients, *gate_coefficients)),
        sum_by_expert(up_coefficients, upstream_rows),
    ]
    grad_table = Bounded(*(torch.stack(each, dim=1) for each in zip(*parts, strict=True)))
    return ExpertMlpResults(
        out=store(out, x.dtype),
        hidden=hidden,
        gate=gate,
        grad_x=store(grad_x, x.dtype),
        grad_weights=store(grad_weights, weights.dtype),
        grad_table=store(grad_table, table.dtype),
    )


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Asserts |actual - expected| <= error elementwise. The message names the first violation."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    distance = (actual.detach().double() - expected.detach()).abs()
    outside = ~(distance <= error)  # NaN is outside
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(outside.sum())} of {outside.numel()} elements are too far off; at {place}: got "
            f"{actual[place].item()}, expected {expected[place].item()} ± {error[place].item():.3e}"
        )
