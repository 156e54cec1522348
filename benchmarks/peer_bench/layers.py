"""The code that is compared: the parts in plain PyTorch, the layers, and their optimizers.

A layer is made for a problem, a router and a variant of the experts. It maps x (T, D), and
optionally ids (T, H, K) that replace those it retrieves, to its output and the ids that its router
chose. The router runs in full either way. `exact_queries` computes in float64 what the router
computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import peer
from peer_bench.cases import Case
from peer_bench.problem import Problem

LEARNING_RATE = 1e-4
TABLE_LEARNING_RATE = 1e-3

# The parts in plain PyTorch.


def select(row_scores: Tensor, col_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best pairs from scores (..., R) and (..., C): k of each half, k² sums, k of those."""
    rows, row_ids = row_scores.topk(k, dim=-1)
    columns, col_ids = col_scores.topk(k, dim=-1)
    sums = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)
    pairs = (row_ids.unsqueeze(-1) * col_scores.shape[-1] + col_ids.unsqueeze(-2)).flatten(-2)
    scores, places = sums.topk(k, dim=-1)
    return scores, pairs.gather(-1, places)


def retrieve(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`peer.functional.product_key_topk` for shared keys, by einsum and `select`."""
    row_query, col_query = query.chunk(2, dim=-1)
    row_scores = torch.einsum("thd,nd->thn", row_query, row_keys)
    col_scores = torch.einsum("thd,nd->thn", col_query, col_keys)
    return select(row_scores, col_scores, k)


def project(x: Tensor, query_weight: Tensor, dim_key: int) -> Tensor:
    """Queries (T, H, dim_key) of inputs (T, D)."""
    return F.linear(x, query_weight).view(len(x), -1, dim_key)


def route(
    x: Tensor,
    query_weight: Tensor,
    row_keys: Tensor,
    col_keys: Tensor,
    k: int,
    retrieve: Callable[..., tuple[Tensor, Tensor]] = retrieve,
) -> tuple[Tensor, Tensor]:
    """`project` and `retrieve`."""
    query = project(x, query_weight, 2 * row_keys.shape[-1])
    return retrieve(query, row_keys, col_keys, k)


def score_keys(
    x: Tensor, query_weight: Tensor, row_keys: Tensor, col_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """`project`, and the scores of all rows and of all columns: three matrix products."""
    row_query, col_query = project(x, query_weight, 2 * row_keys.shape[-1]).chunk(2, dim=-1)
    return row_query @ row_keys.T, col_query @ col_keys.T


def gather_and_einsum(x: Tensor, weights: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Gathers the rows of the table and contracts them."""
    down, up = table[ids].to(x.dtype).unbind(-2)
    hidden = F.gelu(torch.einsum("td,tpd->tp", x, down))
    return torch.einsum("tp,tpd->td", weights * hidden, up)


def multiply_and_sum(x: Tensor, weights: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Products and sums, which a compiler can fuse with the gather."""
    down, up = table[ids].unbind(-2)
    hidden = F.gelu((x.unsqueeze(1) * down).sum(-1))
    return ((weights * hidden).unsqueeze(-1) * up).sum(1)


def bags(x: Tensor, weights: Tensor, ids: Tensor, rows: Tensor, *, sparse: bool = False) -> Tensor:
    """Gathers rows 2e for a batched product; `embedding_bag` sums rows 2e + 1."""
    down = F.embedding(2 * ids, rows, sparse=sparse).to(x.dtype)
    hidden = F.gelu(torch.bmm(down, x.unsqueeze(-1)).squeeze(-1))
    scaled = (weights * hidden).to(rows.dtype)
    out = F.embedding_bag(2 * ids + 1, rows, per_sample_weights=scaled, mode="sum", sparse=sparse)
    return out.to(x.dtype)


# The experts: x (T, D), weights and ids (T, P), and the table (N, 2, D) -> (T, D).
VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "einsum": gather_and_einsum,
    "sum": multiply_and_sum,
    "bags": bags,
    "bags, sparse": functools.partial(bags, sparse=True),
}

# Variants that take the table as its rows (2N, D).
VARIANTS_OF_ROWS = ("bags", "bags, sparse")


# The layers.


class PeerLayer(nn.Module):
    """`peer.PEER` on a router and the table of a problem."""

    def __init__(
        self, problem: Problem, router: peer.ProductKeyRouter, _: str, *, sparse_grad: bool = True
    ) -> None:
        super().__init__()
        pool = problem.make_pool(sparse_grad=sparse_grad)
        pool.weight = problem.weight
        self.peer = peer.PEER(problem.case.dim, router=router, experts=pool)
        self.row_keys, self.col_keys = router.row_keys, router.col_keys
        self.exact_queries = functools.partial(exact_queries_of, router)
        self._ids: Tensor | None = None
        self._chosen: Tensor | None = None

    def _replace(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> Any:
        self._chosen = output[1]
        return None if self._ids is None else (output[0], self._ids)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer. The hook exists for this call alone: users have no hook in `peer`."""
        self._ids = ids
        with self.peer.router.register_forward_hook(self._replace):
            out = self.peer(x)
        chosen, self._chosen = self._chosen, None
        return out, cast(Tensor, chosen)


class PlainLayer(nn.Module):
    """The same layer in plain PyTorch, with one of the variants of its experts."""

    def __init__(self, problem: Problem, router: peer.ProductKeyRouter, variant: str) -> None:
        super().__init__()
        self.query_weight, self.norm = router.query.weight, router.norm
        self.row_keys, self.col_keys = router.row_keys, router.col_keys
        self.heads, self.dim_key, self.k = problem.case.heads, problem.case.dim_key, problem.case.k
        self.experts = VARIANTS[variant]
        self.table = problem.rows if variant in VARIANTS_OF_ROWS else problem.weight
        self.exact_queries = functools.partial(exact_queries_of, router)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer."""
        query = self.norm(F.linear(x, self.query_weight)).view(-1, self.heads, self.dim_key)
        scores, chosen = retrieve(query, self.row_keys, self.col_keys, self.k)
        weights = scores.softmax(-1).flatten(-2)
        used = (chosen if ids is None else ids).flatten(-2)
        return self.experts(x, weights, used, self.table), chosen


def exact_queries_of(router: peer.ProductKeyRouter, x: Tensor) -> Tensor:
    """Queries (T, H, 2, dim_key / 2) of float64 inputs: linear, batch normalisation, heads."""
    norm: Any = router.norm
    query = x @ router.query.weight.detach().double().T
    if norm.training:
        mean, variance = query.mean(0), query.var(0, unbiased=False)
    else:
        mean, variance = norm.running_mean.double(), norm.running_var.double()
    query = (query - mean) * (variance + norm.eps).rsqrt()
    query = query * norm.weight.detach().double() + norm.bias.detach().double()
    return query.unflatten(-1, (router.heads, 2, -1))


class PublishedLayer(nn.Module):
    """`PEER_pytorch.PEER` with competing scores.

    It does not normalise queries and orders their features (half, head, feature). Every head has
    keys of its own, here copies of the shared ones.
    """

    def __init__(self, problem: Problem, router: peer.ProductKeyRouter, _: str) -> None:
        super().__init__()
        from PEER_pytorch import PEER as PublishedPEER

        case = problem.case
        with torch.device("meta"):
            layer = PublishedPEER(
                case.dim,
                heads=case.heads,
                num_experts=case.num_experts,
                num_experts_per_head=case.k,
                dim_key=case.dim_key // 2,
                non_competing_scores=False,
            )
        layer.weight_down_embed.weight, layer.weight_up_embed.weight = problem.w_down, problem.w_up
        layer.to_queries[0].weight = router.query.weight
        keys = torch.stack([router.row_keys.detach(), router.col_keys.detach()], dim=1)
        layer.keys = nn.Parameter(keys.expand(case.heads, -1, -1, -1).contiguous())
        self.layer = layer
        self.row_keys, self.col_keys = layer.keys.detach().unbind(2)
        self._ids: Tensor | None = None
        self._chosen: Tensor | None = None
        for table in (layer.weight_down_embed, layer.weight_up_embed):
            table.register_forward_pre_hook(self._replace)

    def _replace(self, _: nn.Module, arguments: tuple[Tensor]) -> Any:
        self._chosen = arguments[0][0]
        return None if self._ids is None else (self._ids.unsqueeze(0),)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer."""
        self._ids = ids
        out = self.layer(x.unsqueeze(0)).squeeze(0)
        chosen, self._chosen = self._chosen, None
        return out, cast(Tensor, chosen)

    def exact_queries(self, x: Tensor) -> Tensor:
        """Queries (T, H, 2, dim_key / 2) of float64 inputs."""
        query = x @ self.layer.to_queries[0].weight.detach().double().T
        return query.unflatten(-1, (2, len(self.layer.keys), -1)).transpose(1, 2)


class DenseLayer(nn.Module):
    """The feed-forward layer that PEER replaces: linear, GELU, linear."""

    def __init__(
        self, problem: Problem, _: object, __: str, *, get_hidden: Callable[[Case], int]
    ) -> None:
        super().__init__()
        dim, hidden = problem.case.dim, get_hidden(problem.case)
        device, dtype = problem.device, problem.dtype
        self.up = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, None]:
        """Applies the layer; it retrieves nothing."""
        return self.down(F.gelu(self.up(x))), None


# The optimizers of a turn. The end of the turn closes the stack.


def row_wise(
    layer: nn.Module, _: ExitStack, *, stochastic_rounding: bool = True
) -> Sequence[Optimizer]:
    """Row-wise Adagrad for the table, fused AdamW for the rest."""
    dense, experts = peer.param_groups(layer, lr=LEARNING_RATE, expert_lr=TABLE_LEARNING_RATE)
    rows = peer.optim.RowwiseAdagrad(
        [experts], lr=TABLE_LEARNING_RATE, stochastic_rounding=stochastic_rounding
    )
    others = [torch.optim.AdamW([dense], lr=LEARNING_RATE, fused=True)] if dense["params"] else []
    return [rows, *others]


def fused_row_wise(
    layer: nn.Module, stack: ExitStack, *, stochastic_rounding: bool = True
) -> Sequence[Optimizer]:
    """The same with the update of the table fused into the backward pass."""
    optimizers = row_wise(layer, stack, stochastic_rounding=stochastic_rounding)
    stack.enter_context(cast(Any, optimizers[0]).fuse_into_backward(layer))
    return optimizers


def dense_adam(layer: nn.Module, _: ExitStack) -> Sequence[Optimizer]:
    """Adam for everything; fused for contiguous parameters only: torch's is wrong for others."""
    parameters = list(layer.parameters())
    fused = all(parameter.is_contiguous() for parameter in parameters)
    eps = 1e-8 if fused else _get_eps(parameters)
    return [torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=eps, fused=fused)]


def sparse_adam(layer: nn.Module, _: ExitStack) -> Sequence[Optimizer]:
    """SparseAdam for the table of a `PlainLayer`, fused AdamW for the rest."""
    table = cast(PlainLayer, layer).table
    others = [parameter for parameter in layer.parameters() if parameter is not table]
    return [
        torch.optim.SparseAdam([table], lr=LEARNING_RATE, eps=_get_eps([table])),
        torch.optim.AdamW(others, lr=LEARNING_RATE, fused=True),
    ]


def dense_adamw(layer: nn.Module, _: ExitStack) -> Sequence[Optimizer]:
    """Fused AdamW for everything."""
    return [torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, fused=True)]


def _get_eps(parameters: Sequence[nn.Parameter]) -> float:
    """The eps of an Adam that computes in the parameters' dtype: 1e-8 is 0 in float16."""
    return 1e-4 if any(p.dtype == torch.float16 for p in parameters) else 1e-8
