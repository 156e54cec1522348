"""Extends the state of optimizers after parameters grew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peer._growth import growth_of
from peer._row_state import extend, inner_optimizer, row_entries

__all__ = ["grow_"]


def grow_(optimizer: Any) -> None:
    r"""Extends the state of an optimizer to the parameters that have grown since.

    It works for every torch optimizer whose state has the shape of the parameter, or of its leading
    dimensions with 1 in place of others: those of `peer.optim`, and Adam, AdamW, SGD, Adagrad,
    RMSprop, Adafactor and others of torch. Call it after `layer.grow` or `peer.grow_`, for every
    optimizer that holds a grown parameter. Until then, every step of the optimizer raises
    RuntimeError. An optimizer that is made after growth, or has no state yet, needs no call. A
    second call changes nothing.

    New rows get the state of a fresh row: zero, or the initial value of the optimizer. Adam and
    others correct second moments for their zero start by a step count that all rows share. With
    zero second moments at a late step, the first update of a new row would be too long, by the
    factor :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}`, 3.2 with the usual constants. In these
    optimizers, the second moments of new rows are the mean of those of the old rows, for each
    column.

    State on huge pages, as that of `peer.optim`, grows in place. Other state is copied tensor by
    tensor.

    Args:
        optimizer: the optimizer, or a wrapper that holds it as `optimizer`, such as
            `accelerate`'s.

    Raises:
        TypeError: the argument is no optimizer.
        ValueError: the state of a grown parameter has a shape that does not show where the state of
            a row is, or more rows than the parameter. Nothing is changed.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.randn(5, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> layer.grow(2)
        >>> peer.optim.grow_(optimizer)
        >>> optimizer.state[layer.router.row_keys]["exp_avg"].shape
        torch.Size([6, 2])
    """
    inner = inner_optimizer(optimizer)
    smaller: list[tuple[Tensor, int, dict[str, Tensor]]] = []
    for parameter in [each for group in inner.param_groups for each in group["params"]]:
        growth = growth_of(parameter)
        if growth is None:
            continue
        dim, rows = growth.dim, parameter.shape[growth.dim]
        entries = row_entries(inner, parameter, *growth)
        for name, entry in entries.items():
            if entry.shape[dim] > rows:
                raise ValueError(
                    f"{type(inner).__name__}: the state {name!r} of shape {list(entry.shape)} has "
                    f"more rows than its parameter of shape {list(parameter.shape)}; grow the "
                    f"model before its optimizer's state is loaded"
                )
        stale = {name: entry for name, entry in entries.items() if entry.shape[dim] < rows}
        smaller.append((parameter, dim, stale))
    for parameter, dim, stale in smaller:
        extend(inner, parameter, dim, stale)
