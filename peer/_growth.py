"""Parameters that get more rows and keep their identity.

A larger tensor is assigned to the parameter's `data`. Optimizers, parameter groups, hooks and
modules that share the parameter therefore go on holding it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from peer._row_state import append_rows, row_entries

__all__ = ["Growth", "append_rows_", "growth_of", "require_current_state", "require_growable"]


class Growth(NamedTuple):
    """How a parameter has grown.

    Attributes:
        dim: the dimension of the rows.
        earlier: the numbers of rows that the parameter had before.
    """

    dim: int
    earlier: tuple[int, ...]


def growth_of(parameter: Tensor) -> Growth | None:
    """How a parameter has grown since it was made, or None if it has not."""
    attributes = getattr(parameter, "_peer_growth", None)
    return None if attributes is None else Growth(*attributes)


def require_growable(parameters: Mapping[str, Tensor]) -> None:
    """Checks that parameters can get more rows.

    Args:
        parameters: the parameters by their names in messages.

    Raises:
        RuntimeError: a parameter is sharded or no plain parameter, is in shared memory, has a
            gradient, or is part of a graph of autograd.
    """
    for name, parameter in parameters.items():
        if (
            not isinstance(parameter, nn.Parameter)
            or type(parameter.data) is not Tensor
            or getattr(parameter, "_fsdp_flattened", False)
        ):
            raise RuntimeError(
                f"cannot grow {name}: expected a torch.nn.Parameter that holds a plain tensor, got "
                f"a {type(parameter).__name__} that is sharded, wrapped or computed; grow before "
                f"sharding, quantising or parametrising"
            )
        if parameter.device.type == "cpu" and parameter.is_shared():
            raise RuntimeError(
                f"cannot grow {name}: it is in shared memory, and other processes would keep the "
                f"old rows; grow before share_memory()"
            )
        if parameter.grad is not None:
            raise RuntimeError(
                f"cannot grow {name}: its gradient has the old shape; call "
                f"zero_grad(set_to_none=True) first"
            )
        if _is_in_graph(parameter):
            raise RuntimeError(
                f"cannot grow {name}: a graph of autograd holds it at the old shape; delete old "
                f"losses and outputs, such as a loss kept for logging, and wrap the model in "
                f"DistributedDataParallel after growing"
            )


def _is_in_graph(parameter: nn.Parameter) -> bool:
    if not _has_accumulator(parameter):
        return False
    gc.collect()  # of a graph in a reference cycle, such as that of a caught exception
    return _has_accumulator(parameter)


class _Mark:
    """An object whose end can be observed."""


def _has_accumulator(parameter: nn.Parameter) -> bool:
    # A parameter holds its accumulator weakly, and makes one if it has none. A mark on the
    # accumulator outlives this block only if something else holds the accumulator.
    mark = _Mark()
    observer = weakref.ref(mark)
    requires_grad = parameter.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        parameter.requires_grad_(True)
        try:
            accumulator: Any = torch.autograd.graph.get_gradient_edge(parameter).node
            accumulator.metadata["peer"] = mark
        finally:
            parameter.requires_grad_(requires_grad)
    del accumulator, mark
    return observer() is not None


@torch.no_grad()
def append_rows_(parameter: Tensor, dim: int, rows: Tensor | int) -> None:
    """Appends rows to a parameter that `require_growable` has checked.

    Args:
        parameter: the parameter.
        dim: the dimension of the rows.
        rows: the rows, or how many rows of zeros.
    """
    old = parameter.shape[dim]
    count = rows if isinstance(rows, int) else rows.shape[dim]
    larger = append_rows(parameter.data, dim, count)
    if isinstance(rows, Tensor):
        larger.narrow(dim, old, count).copy_(rows)
    parameter.data = larger
    # Assigning `data` keeps the version. With a new one, a graph that saved the parameter notices.
    torch.autograd.graph.increment_version(parameter)
    earlier = () if (growth := growth_of(parameter)) is None else growth.earlier
    # Pickles of a parameter have its attributes, and loading restricts their types.
    parameter._peer_growth = (dim, (*earlier, old))  # type: ignore[attr-defined]
    _check_before_steps()


@cache
def _check_before_steps() -> None:
    """Makes the steps of all optimizers check the state of parameters that have grown.

    Any optimizer may hold such a parameter. Some do not compare the shapes of state and parameter:
    torch's fused AdamW would read and write out of bounds.
    """
    register_optimizer_step_pre_hook(_check_before_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            require_current_state(optimizer, parameter)


def require_current_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Checks that the state of a parameter has grown with the parameter.

    Raises:
        RuntimeError: the parameter has grown, and its state has not.
    """
    growth = growth_of(parameter)
    if growth is None:
        return
    for name, entry in row_entries(optimizer, parameter, *growth, skip_unknown=True).items():
        if entry.shape[growth.dim] != parameter.shape[growth.dim]:
            raise RuntimeError(
                f"{type(optimizer).__name__}: a parameter has grown to the shape "
                f"{list(parameter.shape)}, and its state {name!r} has the shape "
                f"{list(entry.shape)}; call peer.optim.grow_(optimizer) after growing"
            )
