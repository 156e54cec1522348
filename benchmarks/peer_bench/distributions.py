"""Which experts the tokens name: uniform, Zipf, or what a router retrieves."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_ids", "parse_exponent", "zipf_probabilities"]


def parse_exponent(distribution: str) -> float | None:
    """The exponent of "zipf:1.0"; 0 for "uniform", None for "router".

    Raises:
        ValueError: it is none of these.
    """
    if distribution == "router":
        return None
    if distribution == "uniform":
        return 0.0
    kind, _, exponent = distribution.partition(":")
    try:
        value = float(exponent)
    except ValueError:
        value = -1.0
    if kind != "zipf" or not 0.0 <= value < float("inf"):
        raise ValueError(
            f"expected a distribution such as uniform, zipf:1.0 or router, got {distribution!r}"
        )
    return value


def zipf_probabilities(num_experts: int, exponent: float) -> Tensor:
    """P(rank r) = r^-exponent / Σ r^-exponent for the ranks 1 to N, in float64."""
    weights = torch.arange(1, num_experts + 1, dtype=torch.float64).pow_(-exponent)
    return weights / weights.sum()


def draw_ids(
    shape: tuple[int, ...], num_experts: int, exponent: float, generator: torch.Generator
) -> Tensor:
    """Independent ids whose popularity is Zipf's, uniform for exponent 0.

    The expert of each rank is drawn from the generator too, so that popular experts are spread over
    the table.

    Returns:
        int64 ids of the given shape in [0, N).
    """
    if exponent == 0.0:
        return torch.randint(num_experts, shape, generator=generator)
    order = torch.randperm(num_experts, generator=generator)
    cumulative = zipf_probabilities(num_experts, exponent).cumsum(0)
    places = torch.rand(shape, generator=generator, dtype=torch.float64)
    ranks = torch.searchsorted(cumulative, places, right=True).clamp_(max=num_experts - 1)
    return order[ranks]
