"""Selects experts by how often they are used.

The functions take the counts of one pool, (N,), or those of a model by the name of the pool, as
`peer.count_usage` returns them. They return masks in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["specific", "unused"]

Counts = TypeVar("Counts", Tensor, Mapping[str, Tensor])


def unused(counts: Counts, at_most: int = 0) -> Counts:
    """Selects the experts that are retrieved at most a number of times.

    Args:
        counts: retrievals by expert, (N,), or a mapping of such tensors.
        at_most: the largest number of retrievals of a selected expert.

    Returns:
        (N,) bool, or a dict of such tensors, True for selected experts.

    Raises:
        ValueError: at_most is negative, or counts are not 1-D.
        TypeError: counts are neither a tensor nor a mapping.

    Example:
        >>> import torch, peer
        >>> peer.select_rows.unused(torch.tensor([0, 7, 1]), at_most=1)
        tensor([ True, False,  True])
    """
    if at_most < 0:
        raise ValueError(f"expected at_most to be at least 0, got {at_most}")
    return _map(lambda count: count <= at_most, counts)


def specific(old: Counts, new: Counts, ratio: float) -> Counts:
    r"""Selects the experts that new data uses and old data seldom uses.

    With the shares :math:`o_e` and :math:`n_e` of expert e in all retrievals of its pool by old and
    by new data, e is selected if :math:`o_e < \mathrm{ratio} \cdot n_e`. The amounts of old and
    new data may differ. Shares are zero in a pool without retrievals.

    Args:
        old: retrievals by expert for old data, (N,), or a mapping of such tensors.
        new: the same for new data.
        ratio: how often old data may use a selected expert, relative to new data.

    Returns:
        (N,) bool, or a dict of such tensors, True for selected experts.

    Raises:
        ValueError: ratio is not positive, or old and new have different names or shapes.
        TypeError: old or new is neither a tensor nor a mapping, or only one is a tensor.

    Example:
        >>> import torch, peer
        >>> peer.select_rows.specific(torch.tensor([0, 90, 10]), torch.tensor([5, 5, 0]), ratio=0.5)
        tensor([ True, False, False])
    """
    if not ratio > 0:
        raise ValueError(f"expected a positive ratio, got {ratio}")

    def select(old_count: Tensor, new_count: Tensor) -> Tensor:
        if old_count.shape != new_count.shape:
            raise ValueError(
                f"expected old and new counts of the same shape, got {list(old_count.shape)} and "
                f"{list(new_count.shape)}"
            )
        # Without a division, float64 is exact while the products are below 2^53.
        old_total, new_total = (count.sum().clamp(min=1) for count in (old_count, new_count))
        return old_count.double() * new_total < ratio * (new_count.double() * old_total)

    return _map(select, old, new)


def _map(select: Callable[..., Tensor], *counts: Any) -> Any:
    """Applies a function to the counts of each pool, after a check of their form."""
    first = counts[0]
    if all(isinstance(count, Tensor) for count in counts):
        for count in counts:
            if count.dim() != 1:
                raise ValueError(f"expected counts of shape (N,), got {list(count.shape)}")
        return select(*counts)
    for count in counts:
        if not isinstance(count, Mapping):
            raise TypeError(
                "expected counts as a tensor, or all as mappings from names to tensors, got "
                f"{type(count).__name__}"
            )
        if count.keys() != first.keys():
            raise ValueError(
                f"expected counts of the same pools, got {sorted(first)} and {sorted(count)}"
            )
    return {name: _map(select, *(count[name] for count in counts)) for name in first}
