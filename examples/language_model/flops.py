"""Forward FLOPs per token, computed from the sizes of a model.

A multiply-add counts as two FLOPs. The count includes:

* projections, feed-forward layers and logits;
* attention over the context: position i attends to i + 1 positions, (context + 1) / 2 on average;
* for PEER, the query projection, the sub-scores of both halves, a comparison per sub-score, an
  addition and a comparison per candidate pair, and the experts.

It excludes element-wise operations in both models.
"""

from __future__ import annotations

from .model import ModelConfig, PeerConfig


def count_attention(config: ModelConfig) -> float:
    """One attention layer: the four projections, scores and weighted values."""
    projections = 2 * 4 * config.dim**2
    context = 2 * 2 * config.dim * (config.context + 1) / 2
    return projections + context


def count_feed_forward(dim: int, hidden: int) -> float:
    """One dense feed-forward layer."""
    return 2 * 2 * dim * hidden


def count_peer(dim: int, settings: PeerConfig) -> dict[str, float]:
    """One PEER layer, by part."""
    rows, columns = settings.grid
    heads, experts = settings.heads, settings.experts_per_head
    candidates = min(experts, rows) * min(experts, columns)
    return {
        "query projection": 2 * dim * heads * settings.dim_key,
        "sub-scores": 2 * heads * (settings.dim_key // 2) * (rows + columns),
        "selection": heads * (rows + columns + 2 * candidates),
        "experts": 2 * 2 * heads * experts * dim,
    }


def count_model(config: ModelConfig) -> dict[str, float]:
    """A whole model, by part; the sum of the values is its forward FLOPs per token."""
    full = config.blocks - (config.peer is not None)
    parts = {
        "attention": config.blocks * count_attention(config),
        "feed-forward": full * count_feed_forward(config.dim, config.hidden),
        "logits": 2.0 * config.dim * config.vocabulary,
    }
    if config.peer:
        parts["feed-forward"] += count_feed_forward(config.dim, config.peer.hidden)
        parts |= count_peer(config.dim, config.peer)
    return parts
