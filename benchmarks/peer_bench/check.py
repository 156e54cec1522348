"""Compares the results of a provider for a few tokens with float64, before it is timed.

The incoming gradient is zero except for these tokens. So the rows of the table that they retrieve
get a gradient from them alone. A router's choice is judged by the exact scores of the experts: they
must be as good as the best ones, and distinct. The weights are then those of its own choice, since
rounding may decide a near tie either way.

A check raises `WrongResultError` if a result differs by more than rounding. It leaves the problem's
parameters as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import peer
from peer_bench.layers import TABLE_LEARNING_RATE, DenseLayer, exact_queries_of, score_keys
from peer_bench.problem import Problem

# Norm of the difference over the norm of the reference, by the table's dtype. With activations in
# 16 bits, plain providers round each intermediate result, such as scores before the softmax.
TOLERANCES = {torch.float32: 3e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The same for the exact scores of the chosen experts against the best ones, by the activations'
# dtype. A choice by rounded queries and scores loses this much at near ties; the next best experts
# lose more.
CHOICE_TOLERANCES = {torch.float32: 3e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Factors for the steps of row-wise Adagrad. In 16 bits, rounding would hide most of a usual step.
STEP_SCALES = {torch.float32: 1.0, torch.float16: 64.0, torch.bfloat16: 64.0}
TOKENS = 8

Keys = tuple[Tensor, Tensor]  # of the rows and of the columns


class WrongResultError(RuntimeError):
    """A provider computes something else than the reference."""


def check_experts(
    problem: Problem,
    experts: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    optimizers: Sequence[Optimizer],
    learns: bool,
) -> None:
    """Compares the output of experts; if they learn, the gradients and the table's update."""
    tokens = _choose_tokens(problem)
    x, weights, ids, table = inputs
    with torch.set_grad_enabled(learns):
        out = experts(x, weights, ids, table)
    exact = _ExactExperts(ids[tokens], problem)
    exact_x, exact_weights = (value.detach().double().requires_grad_() for value in (x, weights))
    expected = exact(exact_x[tokens], exact_weights[tokens])
    leaves = {"x": (x, exact_x), "weights": (weights, exact_weights)} if learns else {}
    _check_results(exact, tokens, out, expected, leaves, optimizers)


def check_layer(
    problem: Problem,
    layer: Any,
    call: Callable[..., tuple[Tensor, Tensor]],
    ids: Tensor | None,
    optimizers: Sequence[Optimizer],
    learns: bool,
) -> None:
    """Compares the choice of experts and the output; if it learns, gradients and the update.

    Args:
        problem: of the layer.
        layer: a `PeerLayer`, `PlainLayer` or `PublishedLayer`.
        call: the layer as it is timed, for example compiled.
        ids: that replace those of the router, or None.
        optimizers: of the turn.
        learns: whether it is called in training.
    """
    tokens = _choose_tokens(problem)
    x = problem.get_x(0).detach().clone().requires_grad_(learns)
    exact_x = x.detach().double().requires_grad_(learns)
    keys = layer.row_keys, layer.col_keys
    query = layer.exact_queries(exact_x)[tokens]
    with torch.set_grad_enabled(learns):
        out, chosen = call(x, ids)
    _check_choice(problem, query.detach(), keys, chosen[tokens])
    weights = _exact_scores(query, keys, chosen[tokens]).softmax(-1)
    exact = _ExactExperts((chosen if ids is None else ids)[tokens], problem)
    expected = exact(exact_x[tokens], weights)
    leaves = {"x": (x, exact_x)} if learns else {}
    _check_results(exact, tokens, out, expected, leaves, optimizers)


def check_retrieval(
    problem: Problem,
    out: tuple[Tensor, Tensor],
    make_queries: Callable[[Tensor], Tensor],
    keys: Keys,
) -> None:
    """Compares scores and ids (T, H, K). Exact queries (S, H, 2, d) are made for given tokens."""
    tokens = _choose_tokens(problem)
    scores, ids = (part[tokens] for part in out)
    query = make_queries(tokens)
    _check_choice(problem, query, keys, ids)
    _compare(problem, "scores", scores, _exact_scores(query, keys, ids))


def check_router(problem: Problem, router: peer.ProductKeyRouter, grad_weights: Tensor) -> None:
    """Compares the choice, the weights and the gradient of x of a router in training."""
    tokens = _choose_tokens(problem)
    x = problem.get_x(0).detach().clone().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    query = exact_queries_of(router, exact_x)[tokens]
    keys = router.row_keys, router.col_keys
    weights, ids = router(x)
    _check_choice(problem, query.detach(), keys, ids[tokens])
    expected = _exact_scores(query, keys, ids[tokens]).softmax(-1)
    _compare(problem, "weights", weights[tokens], expected)
    masked = torch.zeros_like(grad_weights)
    masked[tokens] = grad_weights[tokens]
    weights.backward(masked)
    expected.backward(grad_weights[tokens].double())
    assert x.grad is not None
    assert exact_x.grad is not None
    _compare(problem, "gradient of x", x.grad, exact_x.grad)


def check_scores(
    problem: Problem, query_weight: Tensor, row_keys: Tensor, col_keys: Tensor
) -> None:
    """Compares the scores of all keys by `score_keys`."""
    weights = query_weight, row_keys, col_keys
    x = problem.get_x(0)[:TOKENS]
    with torch.no_grad():
        got = score_keys(x, *weights)
        expected = score_keys(x.double(), *(weight.double() for weight in weights))
    for part, reference in zip(got, expected, strict=True):
        _compare(problem, "scores", part, reference)


def check_dense(problem: Problem, layer: DenseLayer) -> None:
    """Compares the output of a feed-forward layer."""
    x = problem.get_x(0)[:TOKENS]
    with torch.no_grad():
        got = layer(x)[0]
    weights = [parameter.detach().double() for parameter in layer.parameters()]
    hidden = F.gelu(F.linear(x.double(), weights[0], weights[1]))
    _compare(problem, "output", got, F.linear(hidden, weights[2], weights[3]))


def _compare(
    problem: Problem, what: str, got: Tensor, expected: Tensor, tolerance: float | None = None
) -> None:
    if got.shape != expected.shape:
        raise WrongResultError(f"{what}: expected shape {expected.shape}, got {got.shape}")
    got, expected = got.detach().double(), expected.detach()
    difference = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    if not difference <= (tolerance or TOLERANCES[problem.table_dtype]):
        raise WrongResultError(f"{what} differs from the float64 reference by {difference:.2g}")


def _choose_tokens(problem: Problem) -> Tensor:
    tokens = problem.case.tokens
    chosen = torch.linspace(0, tokens - 1, min(tokens, TOKENS)).round().long().unique()
    return chosen.to(problem.device)


class _ExactExperts:
    """The experts of some tokens in float64, and the gradients of their rows."""

    def __init__(self, ids: Tensor, problem: Problem) -> None:
        self.rows, self.places = ids.unique(return_inverse=True)
        self.problem = problem
        self.table = self.read_rows().double().requires_grad_()
        self.frozen = None if problem.frozen is None else problem.frozen[self.rows]

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        return peer.reference.expert_mlp(
            x, weights, self.places, self.table, "gelu", frozen=self.frozen
        )

    def read_rows(self) -> Tensor:
        """The current rows of the problem's table."""
        return self.problem.weight.detach()[self.rows]

    def read_gradients(self) -> tuple[Tensor, ...]:
        """The provider's gradients of w_down and w_up, in the form that it has them."""
        problem = self.problem
        if problem.weight.grad is not None:
            return _select_rows(problem.weight.grad, self.rows, self.frozen).unbind(1)
        if problem.rows.grad is not None:
            return tuple(_select_rows(problem.rows.grad, 2 * self.rows + i) for i in (0, 1))
        if problem.w_down.grad is None or problem.w_up.grad is None:
            raise WrongResultError("there is no gradient of the table")
        return tuple(_select_rows(p.grad, self.rows) for p in (problem.w_down, problem.w_up))


def _select_rows(gradient: Any, rows: Tensor, frozen: Tensor | None = None) -> Tensor:
    """Some rows of a dense or sparse gradient, which lacks those of frozen experts."""
    if not gradient.is_sparse:
        return gradient[rows]
    gradient = gradient.coalesce()
    ids, values = gradient.indices()[0], gradient.values()
    places = torch.searchsorted(ids, rows)
    has_row = torch.isin(rows, ids)
    if not torch.equal(has_row, torch.ones_like(has_row) if frozen is None else ~frozen):
        raise WrongResultError("the sparse gradient has other rows than the trained ones retrieved")
    selected = values.new_zeros(len(rows), *values.shape[1:])
    selected[has_row] = values[places[has_row]]
    return selected


def _check_choice(problem: Problem, query: Tensor, keys: Keys, ids: Tensor) -> None:
    best = _exact_best(query, keys, ids.shape[-1])
    chosen = _exact_scores(query, keys, ids).sort(descending=True).values
    tolerance = CHOICE_TOLERANCES[problem.dtype]
    _compare(problem, "scores of the retrieved experts", chosen, best, tolerance)
    if (ids.sort().values.diff() == 0).any():
        raise WrongResultError("a head retrieved an expert twice")


def _exact_best(query: Tensor, keys: Keys, k: int) -> Tensor:
    """The k highest scores of (S, H, 2, d) queries in float64, in descending order."""
    rows, columns = (
        (query[:, :, half].unsqueeze(-2) @ part.double().mT).squeeze(-2).topk(k).values
        for half, part in enumerate(keys)
    )
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2).topk(k).values


def _exact_scores(query: Tensor, keys: Keys, ids: Tensor) -> Tensor:
    """The scores (S, H, K) of given experts in float64."""
    columns = keys[1].shape[-2]
    heads = torch.arange(query.shape[1], device=query.device).view(1, -1, 1)
    total: Any = 0
    for half, (part, place) in enumerate(zip(keys, (ids // columns, ids % columns), strict=True)):
        chosen = part.detach()[place] if part.dim() == 2 else part.detach()[heads, place]
        total = total + (query[:, :, half].unsqueeze(-2) * chosen.double()).sum(-1)
    return total


def _check_results(
    exact: _ExactExperts,
    tokens: Tensor,
    out: Tensor,
    expected: Tensor,
    leaves: dict[str, tuple[Tensor, Tensor]],
    optimizers: Sequence[Optimizer],
) -> None:
    """The output; if there are leaves, pairs of a tensor and its double, the backward pass too."""
    problem = exact.problem
    _compare(problem, "output", out[tokens], expected)
    if not leaves:
        return
    masked = torch.zeros_like(problem.grad_out)
    masked[tokens] = problem.grad_out[tokens]
    with _restored(exact, optimizers) as before:
        out.backward(masked)
        expected.backward(masked[tokens].double())
        for name, (leaf, exact_leaf) in leaves.items():
            assert leaf.grad is not None
            assert exact_leaf.grad is not None
            _compare(problem, f"gradient of {name}", leaf.grad, exact_leaf.grad)
        # Torch's own optimizers are trusted once their gradients are right.
        is_row_wise = any(_is_row_wise(optimizer) for optimizer in optimizers)
        assert exact.table.grad is not None
        gradients = exact.table.grad.unbind(1)
        if not is_row_wise or problem.weight.grad is not None:
            for part, got, gradient in zip(PARTS, exact.read_gradients(), gradients, strict=True):
                _compare(problem, f"gradient of {part}", got, gradient)
        if is_row_wise:
            _check_step(exact, optimizers, before, gradients)


PARTS = ("w_down", "w_up")


def _check_step(
    exact: _ExactExperts,
    optimizers: Sequence[Optimizer],
    before: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Row-wise Adagrad from zero: w - lr · g / sqrt(mean(g²))."""
    for optimizer in optimizers:
        optimizer.step()
    changes = (exact.read_rows().double() - before.double()).unbind(1)
    for part, gradient, old, got in zip(PARTS, gradients, before.unbind(1), changes, strict=True):
        scale = gradient.square().mean(-1, keepdim=True).sqrt() + 1e-10
        expected = -TABLE_LEARNING_RATE * STEP_SCALES[old.dtype] * gradient / scale
        # Row plus change rounds to one of two neighbours, at random in 16 bits. The root mean
        # square of that error is at most half their distance.
        spacing = 0.5 * torch.finfo(old.dtype).eps * float(old.double().norm() / expected.norm())
        tolerance = TOLERANCES[old.dtype] + spacing
        _compare(exact.problem, f"step of {part}", got, expected, tolerance)


@contextlib.contextmanager
def _restored(exact: _ExactExperts, optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """Scales the steps of row-wise Adagrad, and yields the rows of the table.

    Routers, rows and learning rates are put back, even after a wrong step: the next providers read
    them.
    """
    problem, before = exact.problem, exact.read_rows()
    saved = {p: p.detach().clone() for router in problem.routers for p in router.parameters()}
    groups = [group for o in optimizers if _is_row_wise(o) for group in o.param_groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= STEP_SCALES[problem.table_dtype]
    try:
        yield before
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            problem.weight[exact.rows] = before
            for parameter, value in saved.items():
                parameter.copy_(value)


def _is_row_wise(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, peer.optim.RowwiseAdagrad)
