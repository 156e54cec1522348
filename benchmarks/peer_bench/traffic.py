"""Algorithmic bytes: what must move between memory and processor, whatever the implementation.

With T tokens, P = H · K experts per token, U distinct experts among them, N experts, s bytes per
element (of the tables; elsewhere of the activations, see `Case.activation_dtype`), R = C = √N keys
per half, and experts of width D:

    experts-forward   T·P·2D·s                         the rows of the table, read
    experts-backward  T·P·2D·s + G·2D·s                read again; G rows of gradients written,
                                                       U if they are sparse, N if dense, 0 if fused,
                                                       where the optimizer's bytes come in
    router            D·H·dim_key·s + (R + C)·dim_key/2·s          query weights and keys, read
    forward           router + experts-forward + 2·T·D·s           and x read, the output written
    backward          forward + experts-backward + 2·router + 2·T·D·s
    optimizer         2·U·2D·s + G·2D·s                touched rows read and written, gradients
                                                       read; dense Adam: 7·N·2D·s, of parameter,
                                                       gradient and two moments 4 read, 3 written
    step              backward + optimizer
    routing           router + T·D·s + 12·T·P                      x read, scores and ids written
    retrieval         T·H·dim_key·s + (R + C)·dim_key/2·s + 12·T·P
    selection         4·T·H·(R + C) + 12·T·P           scores read, scores and ids written
    feed-forward      2·D·F·s for forward, thrice that with backward, ten times with a step
"""

from __future__ import annotations

from peer.bench.cases import Case

__all__ = ["dense_bytes", "experts_bytes", "layer_bytes", "retrieval_bytes", "router_bytes"]


def _itemsize(case: Case) -> int:
    """Of everything but the tables."""
    return case.activation_dtype.itemsize


def _rows(case: Case, count: float) -> int:
    return round(count * 2 * case.dim * case.itemsize)


def experts_bytes(case: Case, mode: str, distinct: float, gradients: str) -> int:
    """Bytes of "experts-forward", "experts-backward" and "optimizer".

    Args:
        case: the sizes.
        mode: of the three.
        distinct: U.
        gradients: "sparse", "dense" or "fused".
    """
    written = {"sparse": distinct, "dense": case.num_experts, "fused": 0}[gradients]
    if mode == "experts-forward":
        return _rows(case, case.tokens * case.per_token)
    if mode == "experts-backward":
        return _rows(case, case.tokens * case.per_token + written)
    if gradients == "dense":
        return _rows(case, 7 * case.num_experts)
    return _rows(case, 2 * distinct + written)


def router_bytes(case: Case) -> int:
    """Bytes of the query weights and the keys."""
    keys = case.root * case.dim_key
    return (case.dim * case.heads * case.dim_key + keys) * _itemsize(case)


def layer_bytes(case: Case, mode: str, distinct: float, gradients: str) -> int:
    """Bytes of "forward", "backward" and "step"."""
    activations = 2 * case.tokens * case.dim * _itemsize(case)
    total = router_bytes(case) + activations
    total += experts_bytes(case, "experts-forward", distinct, gradients)
    if mode == "forward":
        return total
    total += experts_bytes(case, "experts-backward", distinct, gradients)
    total += 2 * router_bytes(case) + activations
    if mode == "step":
        total += experts_bytes(case, "optimizer", distinct, gradients)
    return total


def retrieval_bytes(case: Case, mode: str) -> int:
    """Bytes of "routing", "retrieval" and "selection"."""
    written = 12 * case.tokens * case.per_token
    if mode == "routing":
        return router_bytes(case) + case.tokens * case.dim * _itemsize(case) + written
    if mode == "selection":
        return 4 * case.tokens * case.heads * 2 * case.root + written
    queries = case.tokens * case.heads * case.dim_key
    return (queries + case.root * case.dim_key) * _itemsize(case) + written


def dense_bytes(case: Case, mode: str, hidden: int) -> int:
    """Bytes of a feed-forward layer's weights in a mode."""
    times = {"forward": 1, "backward": 3, "step": 10}[mode]
    return times * 2 * case.dim * hidden * _itemsize(case)
