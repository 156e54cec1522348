"""Parameters and FLOPs of feed-forward layers.

A multiply-add counts as two FLOPs. Element-wise operations are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from peer.modules import PEER

__all__ = ["Counts", "count_peer"]


class Counts(NamedTuple):
    """What a layer costs.

    Attributes:
        parameters: the number of all parameters.
        active: the number of parameters that a token uses.
        flops: forward FLOPs per token.
    """

    parameters: int
    active: int
    flops: int

    def __add__(self, other: tuple[int, ...]) -> Counts:  # type: ignore[override]
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def count_peer(layer: PEER) -> Counts:
    """Counts for a PEER layer.

    A token uses the whole router, because each head scores all keys, and H * K rows of the table.
    FLOPs are those of the query projection, of the sub-scores of both halves with one comparison
    each, of one addition and one comparison per candidate pair, and of the experts.
    """
    router, pool = layer.router, layer.experts
    routing = sum(parameter.numel() for parameter in router.parameters())
    parts, dim = pool.weight.shape[1:]
    rows_read = router.heads * router.num_experts_per_head * parts * dim
    sub_scores = router.rows + router.columns
    candidates = min(router.num_experts_per_head, router.rows) * min(
        router.num_experts_per_head, router.columns
    )
    flops = (
        2 * router.query.weight.numel()
        + router.heads * sub_scores * (router.dim_key + 1)
        + router.heads * 2 * candidates
        + 2 * rows_read
    )
    return Counts(routing + pool.weight.numel(), routing + rows_read, flops)


def count_dense(*modules: nn.Module) -> Counts:
    """Counts for modules that use every matrix once per token."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    matrices = sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
    return Counts(total, total, 2 * matrices)
