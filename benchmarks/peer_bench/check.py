"""Is a provider right? Compared with float64 on a few tokens before anything is timed.

The gradient that flows in is zero but for these tokens, so the rows of the tables that they name
get a gradient from them alone. Which experts a router chose is judged by their scores: they must be
as good as the best there are, and distinct; the weights are then those of its own choice, so that
near ties, which rounding may decide either way, are not errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peer
from peer.bench.layers import DenseLayer, Layer
from peer.bench.providers import TABLE_LEARNING_RATE
from peer.bench.shared import Shared
from peer.bench.works import ExpertsWork, LayerWork, RetrievalWork, RoutingWork, Stepper, Work

__all__ = ["WrongResultError", "check"]

# Norm of the difference over the norm of the reference, by the tables' dtype. Where activations are
# in 16 bits, plain providers round each intermediate result, such as scores before the softmax.
TOLERANCES = {torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of the best scores and those of the experts that were chosen, both exact: what a choice by rounded
# queries and scores loses at near ties. By the activations' dtype. The next best experts lose more.
CHOICE_TOLERANCES = {torch.float32: 3e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Steps of row-wise Adagrad are so much larger than usual, or most of one is lost in rounding.
STEP_SCALES = {torch.float32: 1.0, torch.float16: 64.0, torch.bfloat16: 64.0}
TOKENS = 8


class WrongResultError(RuntimeError):
    """A provider computes something else than the reference."""


def check(work: Work) -> None:
    """Compares a provider with its reference in float64.

    Args:
        work: the provider's, opened. Parameters are as before afterwards.

    Raises:
        WrongResultError: something differs, by more than rounding.
    """
    with _scaled_steps(work):
        if isinstance(work, ExpertsWork):
            _check_experts(work)
        elif isinstance(work, (RetrievalWork, RoutingWork)):
            _check_retrieval(work)
        elif isinstance(work, LayerWork):
            for layer, call in zip(work.layers, work.calls, strict=True):
                if isinstance(layer, DenseLayer):
                    _check_dense(work, layer)
                else:
                    assert isinstance(layer, Layer)
                    _check_layer(work, layer, call)
    work.shared.drop_gradients()


@contextlib.contextmanager
def _scaled_steps(work: Work) -> Iterator[None]:
    groups = [
        group
        for optimizer in work.optimizers
        if _is_row_wise(optimizer)
        for group in optimizer.param_groups
    ]
    before = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= STEP_SCALES[work.shared.table_dtype]
    try:
        yield
    finally:
        for group, lr in zip(groups, before, strict=True):
            group["lr"] = lr


def _is_row_wise(optimizer: Stepper) -> bool:
    return type(optimizer).__module__.startswith("peer.")


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise WrongResultError(f"{what}: expected shape {expected.shape}, got {got.shape}")
    got, expected = got.detach().double(), expected.detach()
    difference = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    if not difference <= tolerance:
        raise WrongResultError(f"{what} differs from the float64 reference by {difference:.2g}")


def _some_tokens(shared: Shared) -> Tensor:
    tokens = shared.case.tokens
    some = torch.linspace(0, tokens - 1, min(tokens, TOKENS)).round().long().unique()
    return some.to(shared.device)


def _masked(grad_out: Tensor, tokens: Tensor) -> Tensor:
    masked = torch.zeros_like(grad_out)
    masked[tokens] = grad_out[tokens]
    return masked


def _rows_of(gradient: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a dense or sparse gradient."""
    if not gradient.is_sparse:
        return gradient[rows]
    gradient = gradient.coalesce()
    ids, values = gradient.indices()[0], gradient.values()
    places = torch.searchsorted(ids, rows).clamp(max=len(ids) - 1)
    if not torch.equal(ids[places], rows):
        raise WrongResultError("the sparse gradient lacks a row that was retrieved")
    return values[places]


class _ExactExperts:
    """The experts of some tokens in float64, and the gradients of their rows."""

    def __init__(self, ids: Tensor, shared: Shared) -> None:
        self.rows, self.places = ids.unique(return_inverse=True)
        self.shared = shared
        self.table = self.rows_of_table().double().requires_grad_()

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        return peer.reference.expert_mlp(x, weights, self.places, self.table)

    def rows_of_table(self) -> Tensor:
        """As they are now."""
        return self.shared.weight.detach()[self.rows]

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Of the parts, which must have been computed."""
        assert self.table.grad is not None
        return list(zip(("w_down", "w_up"), self.table.grad.unbind(1), strict=True))

    def compare(self, tolerance: float) -> None:
        """The gradient of the shared table, in whichever of its forms it has one."""
        shared = self.shared
        if shared.weight.grad is not None:
            parts = _rows_of(shared.weight.grad, self.rows).unbind(1)
        elif shared.rows.grad is not None:
            parts = tuple(_rows_of(shared.rows.grad, 2 * self.rows + part) for part in (0, 1))
        elif shared.w_down.grad is not None and shared.w_up.grad is not None:
            down, up = shared.w_down.grad, shared.w_up.grad
            parts = _rows_of(down, self.rows), _rows_of(up, self.rows)
        else:
            raise WrongResultError("there is no gradient of the table")
        for (name, exact), got in zip(self.gradients(), parts, strict=True):
            _compare(f"gradient of {name}", got, exact, tolerance)


def _check_experts(work: ExpertsWork) -> None:
    shared, tolerance = work.shared, TOLERANCES[work.shared.table_dtype]
    some = _some_tokens(shared)
    x, weights, ids, table = work.arguments(0)
    exact = _ExactExperts(ids[some], shared)
    exact_x, exact_weights = (
        value.detach()[some].double().requires_grad_() for value in (x, weights)
    )
    expected = exact(exact_x, exact_weights)
    with torch.set_grad_enabled(work.mode == "experts-backward"):
        out = work.experts(x, weights, ids, table)
    _compare("output", out.detach()[some], expected.detach(), tolerance)
    if work.mode == "experts-forward":
        return
    with _restored(work, exact) as before:
        out.backward(_masked(shared.grad_out, some))
        expected.backward(shared.grad_out[some].double())
        for name, leaf, exact_leaf in (("x", x, exact_x), ("weights", weights, exact_weights)):
            assert leaf.grad is not None
            assert exact_leaf.grad is not None
            _compare(f"gradient of {name}", leaf.grad[some], exact_leaf.grad, tolerance)
        _check_table(work, exact, before, tolerance)


def _exact_pairs(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> Tensor:
    """The k highest scores of (S, H, 2, d) queries in float64, in descending order."""
    halves = [
        (query[:, :, half].unsqueeze(-2) @ keys.double().mT).squeeze(-2).topk(k).values
        for half, keys in enumerate((row_keys, col_keys))
    ]
    sums = halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)
    return sums.flatten(-2).topk(k).values


def _exact_scores(query: Tensor, row_keys: Tensor, col_keys: Tensor, ids: Tensor) -> Tensor:
    """The scores (S, H, K) of given experts in float64."""
    columns = col_keys.shape[-2]
    places = (ids // columns, ids % columns)
    heads = torch.arange(query.shape[1], device=query.device).view(1, -1, 1)
    total: Any = 0
    for half, (keys, place) in enumerate(zip((row_keys, col_keys), places, strict=True)):
        rows = keys.detach()[place] if keys.dim() == 2 else keys.detach()[heads, place]
        total = total + (query[:, :, half].unsqueeze(-2) * rows.double()).sum(-1)
    return total


def _check_choice(
    shared: Shared, query: Tensor, row_keys: Tensor, col_keys: Tensor, ids: Tensor
) -> None:
    tolerance = CHOICE_TOLERANCES[shared.dtype]
    best = _exact_pairs(query, row_keys, col_keys, ids.shape[-1])
    chosen = _exact_scores(query, row_keys, col_keys, ids)
    _compare(
        "scores of the retrieved experts", chosen.sort(descending=True).values, best, tolerance
    )
    if (ids.sort().values.diff() == 0).any():
        raise WrongResultError("a head retrieved an expert twice")


def _check_retrieval(work: RetrievalWork | RoutingWork) -> None:
    tolerance = TOLERANCES[work.shared.table_dtype]
    some = _some_tokens(work.shared)
    work.prepare(0)
    work.run(0)
    assert work.out is not None
    scores, ids = (part[some] for part in work.out)
    query = work.exact_queries(some)
    _check_choice(work.shared, query, work.row_keys, work.col_keys, ids)
    exact = _exact_scores(query, work.row_keys, work.col_keys, ids)
    _compare("scores", scores, exact, tolerance)
    work.finish()


def _check_layer(work: LayerWork, layer: Layer, call: Any) -> None:
    shared, tolerance = work.shared, TOLERANCES[work.shared.table_dtype]
    some = _some_tokens(shared)
    ids = work.ids(0)
    learns = work.mode != "forward"
    x = shared.x[0].detach().clone().requires_grad_(learns)
    exact_x = x.detach().double().requires_grad_(learns)
    query = layer.exact_queries(exact_x)[some]
    with torch.set_grad_enabled(learns):
        out, chosen = call(x, ids)
    _check_choice(shared, query.detach(), layer.row_keys, layer.col_keys, chosen[some])
    weights = _exact_scores(query, layer.row_keys, layer.col_keys, chosen[some]).softmax(-1)
    used = (chosen if ids is None else ids)[some]
    exact = _ExactExperts(used, shared)
    expected = exact(exact_x[some], weights)
    _compare("output", out.detach()[some], expected.detach(), tolerance)
    if not learns:
        return
    with _restored(work, exact) as before:
        out.backward(_masked(shared.grad_out, some))
        expected.backward(shared.grad_out[some].double())
        assert x.grad is not None
        assert exact_x.grad is not None
        _compare("gradient of x", x.grad, exact_x.grad, tolerance)
        _check_table(work, exact, before, tolerance)


@contextlib.contextmanager
def _restored(work: Work, exact: _ExactExperts) -> Iterator[Tensor]:
    """Puts the routers and some rows of the table back, also after a wrong step.

    The providers that come next share them. Yields the rows.
    """
    shared = work.shared
    before = exact.rows_of_table()
    kept = {p: p.detach().clone() for router in shared.routers for p in router.parameters()}
    try:
        yield before
    finally:
        with torch.no_grad():
            shared.weight[exact.rows] = before
            for parameter, value in kept.items():
                parameter.copy_(value)


def _check_table(work: Work, exact: _ExactExperts, before: Tensor, tolerance: float) -> None:
    """After a backward pass: the table's gradient or its update."""
    # Torch's optimizers are taken on trust, after the right gradients.
    is_row_wise = any(_is_row_wise(optimizer) for optimizer in work.optimizers)
    if not is_row_wise or work.shared.weight.grad is not None:
        exact.compare(tolerance)
    if is_row_wise:
        _check_step(work, exact, before, tolerance)


def _check_step(work: Work, exact: _ExactExperts, before: Tensor, tolerance: float) -> None:
    """Row-wise Adagrad from zero: w - lr · g / sqrt(mean(g²))."""
    for optimizer in work.optimizers:
        optimizer.step()
    changes = (exact.rows_of_table().double() - before.double()).unbind(1)
    for (name, gradient), old, got in zip(
        exact.gradients(), before.unbind(1), changes, strict=True
    ):
        scale = gradient.square().mean(-1, keepdim=True).sqrt() + 1e-10
        lr = TABLE_LEARNING_RATE * STEP_SCALES[old.dtype]
        change = -lr * gradient / scale
        # The sum of row and change becomes one of the two numbers beside it, by chance in 16 bits.
        # In the root mean square that is off by half their distance or less.
        spacing = 0.5 * torch.finfo(old.dtype).eps * float(old.double().norm() / change.norm())
        _compare(f"step of {name}", got, change, tolerance + spacing)


def _check_dense(work: LayerWork, layer: DenseLayer) -> None:
    x = work.shared.x[0][:TOKENS]
    with torch.no_grad():
        got = layer(x)[0]
    weights = [parameter.detach().double() for parameter in layer.parameters()]
    hidden = F.gelu(F.linear(x.double(), weights[0], weights[1]))
    expected = F.linear(hidden, weights[2], weights[3])
    _compare("output", got, expected, TOLERANCES[work.shared.table_dtype])
