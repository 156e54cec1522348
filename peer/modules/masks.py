"""Masks of experts and keys: how they are given, and what they do to a gradient that exists."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "POOL_MASKS",
    "ROUTER_MASKS",
    "Experts",
    "as_ids",
    "as_mask",
    "clear_gradient_",
    "describe",
    "union",
    "without",
]

# The buffers that are None, and not in the state, while nothing is frozen or disabled.
POOL_MASKS = ("frozen", "disabled")
ROUTER_MASKS = ("frozen_rows", "frozen_columns", "kept_row_keys", "kept_col_keys", "frozen")

# Experts as a method takes them: their ids, or a mask over all experts.
Experts = int | Sequence[int] | Tensor


def as_mask(experts: Experts, size: int, device: torch.device) -> Tensor:
    """Turns ids or a mask into a new mask.

    Args:
        experts: an id, ids of any shape, or a bool mask (size,).
        size: the number of experts.
        device: device of the result.

    Returns:
        (size,) bool, True for the given experts.

    Raises:
        ValueError: a mask has another shape.
        TypeError: ids are not integers.
        IndexError: an id is outside [0, size).
    """
    given = _checked(experts, size, device)
    if given.dtype == torch.bool:
        return given.clone()
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[given] = True
    return mask


def as_ids(experts: Experts, size: int, device: torch.device) -> Tensor:
    """Turns ids or a mask into distinct ids, ascending. Ids need no memory for all experts.

    Args:
        experts: an id, ids of any shape, or a bool mask (size,).
        size: the number of experts.
        device: device of the result.

    Returns:
        (E,) int64.

    Raises:
        ValueError, TypeError, IndexError: as `as_mask`.
    """
    given = _checked(experts, size, device)
    return given.nonzero()[:, 0] if given.dtype == torch.bool else given.unique()


def _checked(experts: Experts, size: int, device: torch.device) -> Tensor:
    """A mask (size,) bool, or ids (E,) int64 in [0, size)."""
    given = torch.as_tensor(experts, device=device)
    if given.dtype == torch.bool:
        if given.shape != (size,):
            raise ValueError(f"expected a mask of shape [{size}], got {list(given.shape)}")
        return given
    if given.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"expected integer ids or a bool mask, got {given.dtype}")
    ids = given.flatten().long()
    smallest, largest = ids.min().item(), ids.max().item()
    if smallest < 0 or largest >= size:
        wrong = smallest if smallest < 0 else largest
        raise IndexError(f"expected ids in [0, {size}), got {wrong}")
    return ids


def _none_if_empty(mask: Tensor) -> Tensor | None:
    """The mask, or None if it marks nothing."""
    return mask if bool(mask.any()) else None


def union(mask: Tensor | None, more: Tensor) -> Tensor | None:
    """The union of two masks, as a new tensor, or None if it is empty."""
    return _none_if_empty(more.clone() if mask is None else mask | more)


def without(mask: Tensor | None, fewer: Tensor) -> Tensor | None:
    """The first mask without what the second one marks, or None if nothing is left."""
    return None if mask is None else _none_if_empty(mask & ~fewer)


def describe(**masks: Tensor | None) -> str:
    """How many things each mask marks, for `repr`, without those that are None or on "meta"."""
    return "".join(
        f", {name}={int(mask.sum())}"
        for name, mask in masks.items()
        if mask is not None and not mask.is_meta
    )


@torch.no_grad()
def clear_gradient_(parameter: Tensor, mask: Tensor, dim: int = 0) -> None:
    """Sets the marked rows of a gradient to zero, or drops them from a sparse gradient.

    Args:
        parameter: a parameter; nothing happens if it has no gradient.
        mask: which of the parameter's rows are cleared, (parameter.shape[dim],).
        dim: the dimension of the rows; 0 for a sparse gradient.
    """
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        ids = gradient.indices()[0]
        kept = ~mask[ids]
        parameter.grad = torch.sparse_coo_tensor(
            ids[kept].unsqueeze(0),
            gradient.values()[kept],
            gradient.shape,
            is_coalesced=True,
            check_invariants=False,
        )
    else:
        gradient.index_fill_(dim, mask.nonzero().squeeze(1), 0)
