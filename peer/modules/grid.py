"""The rows and columns of the grid of experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

__all__ = ["parse_grid"]


def parse_grid(num_experts: int | Sequence[int]) -> tuple[int, int]:
    """Returns the rows and columns of the grid of experts.

    Args:
        num_experts: N, a perfect square, or the pair (rows, columns).

    Returns:
        Rows and columns.

    Raises:
        ValueError: N is not a perfect square, or a size is not positive.
        TypeError: `num_experts` is neither an int nor a pair of ints.

    Example:
        >>> from peer.modules.grid import parse_grid
        >>> parse_grid(1024**2), parse_grid((2, 8))
        ((1024, 1024), (2, 8))
    """
    if isinstance(num_experts, int) and not isinstance(num_experts, bool):
        if num_experts < 1:
            raise ValueError(f"expected num_experts to be positive, got {num_experts}")
        side = isqrt(num_experts)
        if side**2 == num_experts:
            return side, side
        raise ValueError(_describe_neighbours(num_experts, side))
    if (
        isinstance(num_experts, Sequence)
        and len(num_experts) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) for size in num_experts)
    ):
        rows, columns = num_experts
        if rows < 1 or columns < 1:
            raise ValueError(
                f"expected num_experts=(rows, columns) to be positive, got {(rows, columns)}"
            )
        return rows, columns
    raise TypeError(
        f"expected num_experts to be an int or a pair (rows, columns), got {num_experts!r}"
    )


def _describe_neighbours(num_experts: int, side: int) -> str:
    rows = next(size for size in range(side, 0, -1) if num_experts % size == 0)
    rectangle = f", or the grid ({rows}, {num_experts // rows})" if rows > 1 else ""
    return (
        f"expected num_experts to be a perfect square or a pair (rows, columns), got "
        f"{num_experts}; the nearest squares are {side}**2 = {side**2} and "
        f"{side + 1}**2 = {(side + 1) ** 2}{rectangle}"
    )
