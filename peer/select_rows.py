"""Selects experts by how often they are used.

The functions take the counts of one pool, (N,), or those of a model by the name of the pool, as
`peer.count_usage` returns them. They return masks in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

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
        ValueError: at_most is negative, or a tensor is not 1-D.

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

    With the shares :math:`o_e` and :math:`n_e` of expert e in all retrievals by old and by new
    data, e is selected if :math:`o_e < \mathrm{ratio} \cdot n_e`. The amounts of old and new data
    may differ.

    Args:
        old: retrievals by expert for old data, (N,), or a mapping of such tensors.
        new: the same for new data.
        ratio: how often old data may use a selected expert, relative to new data.

    Returns:
        (N,) bool, or a dict of such tensors, True for selected experts.

    Raises:
        ValueError: ratio is not positive, old and new have different names or shapes, or one of
            them has no retrievals.

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
        old_total, new_total = old_count.sum(), new_count.sum()
        if old_total == 0 or new_total == 0:
            raise ValueError("expected counts of at least one retrieval by old and by new data")
        # In float64, products of counts and totals up to 2^26 each are exact.
        return old_count.double() * new_total < ratio * (new_count.double() * old_total)

    return _map(select, old, new)


def _map(select: Callable[..., Tensor], first: Counts, *others: Counts) -> Counts:
    """Applies a function to the counts of each pool, after a check of their form."""
    if isinstance(first, Tensor):
        every = (first, *others)
        for count in every:
            if not isinstance(count, Tensor) or count.dim() != 1:
                raise ValueError("expected counts of shape (N,), in the same form for old and new")
        return select(*every)
    for other in others:
        if isinstance(other, Tensor) or other.keys() != first.keys():
            raise ValueError(
                f"expected old and new counts of the same pools, got {sorted(first)} and "
                + ("a tensor" if isinstance(other, Tensor) else str(sorted(other)))
            )
    return {name: _map(select, first[name], *(other[name] for other in others)) for name in first}
