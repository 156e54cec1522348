"""Forward FLOPs per token, computed from the sizes of a model.

A multiply-add counts as two FLOPs. The count includes:

* projections, feed-forward layers and logits;
* attention over the context: position i attends to i + 1 positions, (context + 1) / 2 on average;
* for PEER, the query projection, the sub-scores of both halves, a comparison per sub-score, an
  addition and a comparison per candidate pair, and the experts.

It excludes element-wise operations in both models.
"""

from __future__ import annotations

from .config import ModelConfig, PeerConfig

WIDTH_STEP = 32  # hidden widths are multiples of it, for the kernels of dense layers


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
    parts = {
        "attention": config.blocks * count_attention(config),
        "feed-forward": sum(
            count_feed_forward(config.dim, hidden) for hidden in feed_forward_widths(config)
        ),
        "logits": 2.0 * config.dim * config.vocabulary,
    }
    if config.peer:
        layers = len(config.peer.blocks)
        parts |= {
            name: layers * count for name, count in count_peer(config.dim, config.peer).items()
        }
    return parts


def feed_forward_widths(config: ModelConfig) -> list[int]:
    """The hidden width of the feed-forward layer of each block."""
    widths = [config.hidden] * config.blocks
    if config.peer:
        hidden = match_hidden(config) if config.peer.hidden is None else config.peer.hidden
        for block in config.peer.blocks:
            widths[block] = hidden
    return widths


def match_hidden(config: ModelConfig) -> int:
    """The hidden width beside a PEER layer that makes a model no dearer than its dense twin.

    Args:
        config: a model with PEER layers.

    Returns:
        The largest multiple of `WIDTH_STEP`, at least one step.

    Raises:
        ValueError: the PEER layer alone needs more FLOPs than the dense feed-forward layer.
    """
    assert config.peer is not None
    layer = sum(count_peer(config.dim, config.peer).values())
    left = count_feed_forward(config.dim, config.hidden) - layer
    hidden = int(left / count_feed_forward(config.dim, 1)) // WIDTH_STEP * WIDTH_STEP
    if hidden < WIDTH_STEP:
        raise ValueError(
            f"expected a PEER layer with fewer FLOPs per token than a feed-forward layer of hidden "
            f"width {config.hidden - WIDTH_STEP}, got {layer:,.0f}"
        )
    return hidden
