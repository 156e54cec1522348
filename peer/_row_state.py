"""The rows of an optimizer's state, of a parameter that gets more rows or fresh ones.

A state entry belongs to the rows of a parameter if its shape is that of the parameter or of its
leading dimensions, except that dimensions other than the rows may be 1. Entries without rows, such
as a step count, serve all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from peer.memory import append_zero_rows

__all__ = ["extend", "inner_optimizer", "refresh", "row_entries"]

# Second moments that a shared step count corrects for their zero start. A zero start later would
# get no correction: with Adam's defaults, the first updates would be three times too long.
_CORRECTED_BY_STEP = {"exp_avg_sq", "max_exp_avg_sq", "row_var", "variance"}

_WITHOUT_ROWS = {"col_var"}  # of Adafactor: (1, columns), also for a parameter of one row

_BLOCK = 65536  # rows that are gathered at a time


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that hold it as `optimizer`, such as accelerate's.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def row_entries(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    dim: int,
    earlier: Collection[int] = (),
    skip_unknown: bool = False,
) -> dict[str, Tensor]:
    """The entries of a parameter's state that have rows.

    Args:
        optimizer: the optimizer.
        parameter: a parameter that the optimizer may hold.
        dim: the dimension of the rows.
        earlier: the numbers of rows that the parameter had before.
        skip_unknown: whether entries of other shapes are skipped.

    Returns:
        The entries by name. Their number of rows may differ from that of the parameter.

    Raises:
        ValueError: the shape of an entry does not show where its rows are.
    """
    state = optimizer.state.get(parameter, {})
    others = _without(parameter.shape, dim)
    # An entry with fewer dimensions, or with ones, may be anything. Its number of rows tells.
    counts = {parameter.shape[dim], *earlier}
    counts.update(
        entry.shape[dim]
        for entry in state.values()
        if isinstance(entry, Tensor)
        and entry.dim() == parameter.dim()
        and _without(entry.shape, dim) == others
    )
    entries = {}
    for name, entry in state.items():
        has_rows = _has_rows(name, entry, dim, others, counts)
        if has_rows:
            entries[name] = entry
        if has_rows is None and not skip_unknown:
            found = f"of shape {list(entry.shape)}" if isinstance(entry, Tensor) else "a collection"
            raise ValueError(
                f"{type(optimizer).__name__}: the state {name!r} of a parameter of shape "
                f"{list(parameter.shape)} is {found}, which does not show where the state of a row "
                f"is; make a new optimizer"
            )
    return entries


def _has_rows(
    name: str, entry: Any, dim: int, others: list[int], counts: Collection[int]
) -> bool | None:
    """Whether an entry has rows, or None if it does not show.

    Args:
        name: name of the entry.
        entry: the entry.
        dim: the dimension of the rows.
        others: the other dimensions of the parameter.
        counts: the possible numbers of rows.
    """
    if isinstance(entry, (dict, list, tuple)):
        values = entry.values() if isinstance(entry, dict) else entry
        return None if any(isinstance(value, Tensor) for value in values) else False
    if not isinstance(entry, Tensor) or entry.dim() == 0 or name in _WITHOUT_ROWS:
        return False
    sizes = _without(entry.shape, dim)
    fits = len(sizes) <= len(others) and all(
        size in (1, full) for size, full in zip(sizes, others, strict=False)
    )
    if not fits or entry.layout != torch.strided:
        return None
    if dim < entry.dim() and entry.shape[dim] in counts:
        return True
    return False if dim >= entry.dim() or entry.shape[dim] == 1 else None


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != dim]


@torch.no_grad()
def extend(
    optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, entries: dict[str, Tensor]
) -> None:
    """Appends the state of fresh rows to entries with fewer rows than the parameter."""
    for name, entry in entries.items():
        old, new = entry.shape[dim], parameter.shape[dim] - entry.shape[dim]
        larger = append_rows(entry, dim, new)
        fill = _fresh_value(optimizer, parameter, name)
        rows = larger.narrow(dim, old, new)
        if name in _CORRECTED_BY_STEP:
            rows.copy_(_mean(larger, dim, torch.arange(old, device=larger.device)))
        elif callable(fill):
            rows.copy_(fill(parameter).narrow(dim, old, new))
        elif fill != 0:
            rows.fill_(fill)
        optimizer.state[parameter][name] = larger


@torch.no_grad()
def refresh(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    ids: Tensor,
    entries: dict[str, Tensor],
) -> None:
    """Gives rows along the first dimension the state of fresh rows.

    Args:
        optimizer: the optimizer.
        parameter: its parameter.
        ids: the rows, int64, distinct.
        entries: the entries with rows.
    """
    for name, entry in entries.items():
        fill = _fresh_value(optimizer, parameter, name)
        if name in _CORRECTED_BY_STEP:
            is_kept = torch.ones(len(entry), dtype=torch.bool, device=entry.device)
            is_kept[ids] = False
            kept = is_kept.nonzero()[:, 0]
            mean = _mean(entry, 0, kept if len(kept) > 0 else ids)
            entry[ids] = mean.to(entry.dtype)
        elif callable(fill):
            entry[ids] = fill(parameter)[ids].to(entry.dtype)
        else:
            entry[ids] = fill


def append_rows(tensor: Tensor, dim: int, count: int) -> Tensor:
    """The tensor with rows of zeros appended along a dimension, in place of the old one if it can.

    Args:
        tensor: the tensor.
        dim: the dimension of the rows.
        count: how many rows are appended.
    """
    if dim == 0:
        return append_zero_rows(tensor, count)
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _fresh_value(
    optimizer: torch.optim.Optimizer, parameter: Tensor, name: str
) -> float | Callable[[Tensor], Tensor]:
    """What a fresh row has in an entry: a number, or a function of the parameter."""
    group = next(
        group
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
    )
    if name in ("sum", "sum_of_squares"):
        return float(group.get("initial_accumulator_value", 0.0))
    if name == "step_size" and isinstance(optimizer, torch.optim.Rprop):
        return float(group["lr"])
    if name == "ax" and isinstance(optimizer, torch.optim.ASGD):
        return Tensor.detach  # the average of the parameter so far
    return 0.0


def _mean(entry: Tensor, dim: int, ids: Tensor) -> Tensor:
    """The mean of rows, for each column, without a copy of all of them."""
    dtype = torch.promote_types(entry.dtype, torch.float32)
    total = torch.zeros_like(entry.narrow(dim, 0, 1), dtype=dtype)
    for block in ids.split(_BLOCK):
        total += entry.index_select(dim, block).sum(dim, keepdim=True, dtype=dtype)
    return total / max(len(ids), 1)
