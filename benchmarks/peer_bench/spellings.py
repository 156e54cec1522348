"""The layer's two parts in plain PyTorch, each in the ways that one would write it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "EXPERTS",
    "OF_ROWS",
    "Experts",
    "gather_and_einsum",
    "project",
    "retrieve",
    "route",
    "select",
]

# x (T, D), weights and ids (T, P), and the table, (N, 2, D) or its rows (2N, D) -> (T, D).
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
    x: Tensor, query_weight: Tensor, row_keys: Tensor, col_keys: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`project` and `retrieve`."""
    query = project(x, query_weight, 2 * row_keys.shape[-1])
    return retrieve(query, row_keys, col_keys, k)


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
    """Gather and batched product downwards, weighted bags upwards, by rows 2e and 2e + 1."""
    down = F.embedding(2 * ids, rows, sparse=sparse).to(x.dtype)
    hidden = F.gelu(torch.bmm(down, x.unsqueeze(-1)).squeeze(-1))
    scaled = (weights * hidden).to(rows.dtype)
    out = F.embedding_bag(2 * ids + 1, rows, per_sample_weights=scaled, mode="sum", sparse=sparse)
    return out.to(x.dtype)


EXPERTS: dict[str, Experts] = {
    "einsum": gather_and_einsum,
    "sum": multiply_and_sum,
    "bags": bags,
    "bags, sparse": functools.partial(bags, sparse=True),
}

# Those that take the table's rows.
OF_ROWS = ("bags", "bags, sparse")
