"""The layer in plain PyTorch: slow, obvious and differentiable.

The functions have the arguments of their counterparts in `peer.functional` and `peer.PEER`. They
score every expert and gather every retrieved row, so they allocate tensors of T * H * N and
T * P * D elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer.functional import router_weights
from peer.modules import PEER, BatchQueryNorm

__all__ = ["ACTIVATIONS", "expert_mlp", "peer", "product_key_topk"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda z: z,
    "relu2": lambda z: F.relu(z).square(),
}


def product_key_topk(
    query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int, disabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `peer.functional.product_key_topk` by scoring and sorting all experts.

    Args:
        query: (..., H, dim_key).
        row_keys: (R, dim_key / 2) or (H, R, dim_key / 2).
        col_keys: (C, dim_key / 2) or (H, C, dim_key / 2).
        k: experts per head.
        disabled: (R * C,) bool, True for experts that are never retrieved.

    Returns:
        Scores (..., H, k) and indices (..., H, k).

    Raises:
        ValueError: k is not in [1, R * C], or fewer than k experts are enabled.

    Source: arXiv 2407.04153, equations 1, 4 and 5.

    Example:
        >>> import torch, peer
        >>> query, keys = torch.randn(5, 2, 8), torch.randn(6, 4)
        >>> ours = peer.functional.product_key_topk(query, keys, keys, 10)
        >>> expected = peer.reference.product_key_topk(query, keys, keys, 10)
        >>> torch.testing.assert_close(ours[0], expected[0])
    """
    num_experts = row_keys.shape[-2] * col_keys.shape[-2]
    if not 1 <= k <= num_experts:
        raise ValueError(f"expected k between 1 and the number of experts {num_experts}, got {k}")
    if disabled is not None and (enabled := int((~disabled).sum())) < k:
        raise ValueError(f"expected at least k = {k} enabled experts, got {enabled}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, row_keys, col_keys = query.to(dtype), row_keys.to(dtype), col_keys.to(dtype)
    row_query, col_query = query.chunk(2, dim=-1)
    row_scores = _clamp_to_finite((row_query.unsqueeze(-2) @ row_keys.mT).squeeze(-2))
    col_scores = _clamp_to_finite((col_query.unsqueeze(-2) @ col_keys.mT).squeeze(-2))

    # A stable sort puts NaN highest and, of equal scores, the smaller id first. With the keys in
    # that order, the flat position of a pair is its place among pairs of equal score.
    row_scores, row_ids = row_scores.sort(dim=-1, descending=True, stable=True)
    col_scores, col_ids = col_scores.sort(dim=-1, descending=True, stable=True)
    pair_scores = (row_scores.unsqueeze(-1) + col_scores.unsqueeze(-2)).flatten(-2)
    pair_ids = (row_ids.unsqueeze(-1) * col_keys.shape[-2] + col_ids.unsqueeze(-2)).flatten(-2)
    scores, order = pair_scores.sort(dim=-1, descending=True, stable=True)
    ids = pair_ids.gather(-1, order)
    if disabled is not None:
        enabled_first = disabled[ids].to(torch.uint8).argsort(dim=-1, stable=True)
        scores, ids = scores.gather(-1, enabled_first), ids.gather(-1, enabled_first)
    return scores[..., :k], ids[..., :k]


def _clamp_to_finite(sub_scores: Tensor) -> Tensor:
    """Replaces an infinity by the largest finite number of its sign; NaN stays NaN."""
    limits = torch.finfo(sub_scores.dtype)
    return sub_scores.clamp(limits.min, limits.max)


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    activation: str = "gelu",
    frozen: Tensor | None = None,
) -> Tensor:
    """Computes `peer.functional.expert_mlp` by gathering the rows of all retrieved experts.

    Args:
        x: (..., D).
        weights: (..., H, K) or (..., P).
        indices: weights' shape, int64, in [0, N).
        table: (N, 2, D), or (N, 3, D) with gates.
        activation: a key of `ACTIVATIONS`.
        frozen: (N,) bool, True for rows that are constants.

    Returns:
        (..., D), x's dtype.

    Source: arXiv 2407.04153, equations 3, 6 and 7.

    Example:
        >>> import torch, peer
        >>> arguments = (
        ...     torch.randn(5, 8), torch.rand(5, 6), torch.randint(9, (5, 6)), torch.randn(9, 2, 8)
        ... )
        >>> torch.testing.assert_close(
        ...     peer.functional.expert_mlp(*arguments), peer.reference.expert_mlp(*arguments)
        ... )
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if frozen is not None:
        table = torch.where(frozen[:, None, None], table.detach(), table)
    if weights.dim() == x.dim() + 1:
        weights, indices = weights.flatten(-2), indices.flatten(-2)
    down, *gate, up = table[indices].to(dtype).unbind(-2)
    hidden = ACTIVATIONS[activation](torch.einsum("...d,...pd->...p", x.to(dtype), down))
    if gate:
        hidden = hidden * torch.einsum("...d,...pd->...p", x.to(dtype), gate[0])
    return torch.einsum("...p,...p,...pd->...d", weights.to(dtype), hidden, up).to(x.dtype)


def peer(layer: PEER, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Computes `layer(x, padding_mask)` without updating running statistics.

    Args:
        layer: a layer with `dropout=0` or in evaluation mode.
        x: (..., dim).
        padding_mask: (...) bool, True for tokens that are padding. Their outputs are zeros.

    Returns:
        (..., dim).

    Raises:
        ValueError: the layer is in training mode with dropout.

    Source: arXiv 2407.04153, algorithm 1.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> x = torch.randn(6, 8)
        >>> torch.testing.assert_close(layer(x), peer.reference.peer(layer, x))
    """
    if layer.training and layer.dropout > 0:
        raise ValueError("expected a layer in evaluation mode, or without dropout")
    router, experts = layer.router, layer.experts
    if padding_mask is not None:
        x = x.masked_fill(padding_mask[..., None], 0.0)
    query = _normalise(router.norm, router.query(x), padding_mask)
    query = query.unflatten(-1, (router.heads, router.dim_key))
    k = router.num_experts_per_head
    disabled = experts.disabled
    if disabled is not None:
        disabled = disabled[: router.num_experts]
    scores, indices = product_key_topk(query, *router.effective_keys(), k, disabled)
    weights = router_weights(scores, router.scores)
    out = expert_mlp(x, weights, indices, experts.weight, experts.activation, experts.frozen)
    return out if padding_mask is None else out.masked_fill(padding_mask[..., None], 0.0)


def _normalise(norm: nn.Module, query: Tensor, padding_mask: Tensor | None) -> Tensor:
    if not isinstance(norm, BatchQueryNorm):
        return norm(query.reshape(-1, query.shape[-1])).view_as(query)
    values = query.to(torch.promote_types(query.dtype, torch.float32))
    if norm.training and not norm.are_statistics_frozen:
        tokens = values.flatten(0, -2) if padding_mask is None else values[~padding_mask]
        mean, variance = tokens.mean(0), tokens.var(0, correction=0)
    else:
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    normed = (values - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
    return normed.to(query.dtype)
