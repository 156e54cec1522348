"""Stochastic gradient descent on the rows that have a nonzero gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peer.memory import zeros_huge
from peer.optim.row_gradient import TableGradient
from peer.optim.table_optimizer import TableOptimizer, require

__all__ = ["SGD"]


class SGD(TableOptimizer):
    r"""Stochastic gradient descent; momentum moves only rows that have a nonzero gradient.

    For every row with a nonzero gradient g,

    .. math:: m &\leftarrow \mu m + g \\
              w &\leftarrow (1 - \eta\lambda)\, w - \eta\, m ,

    or, with `nesterov`, :math:`w \leftarrow (1 - \eta\lambda)\, w - \eta\, (g + \mu m)`. Apart from
    weight decay, this is the update of `torch.optim.SGD` in a run without the steps in which the
    gradient of the row is zero. Weight decay is decoupled from the gradient and does not enter the
    momentum. Without momentum there is no state.

    Args:
        params: tables (N, D) or (N, parts, D), or groups of them.
        lr: the learning rate :math:`\eta`.
        momentum: :math:`\mu`.
        nesterov: whether to use Nesterov momentum.
        weight_decay: :math:`\lambda`, decoupled from the gradient. Only updated rows decay.
        stochastic_rounding: whether 16-bit tables and their momentum are rounded stochastically
            instead of to nearest.
        seed: seed of stochastic rounding, int64.

    Raises:
        ValueError: a parameter is neither 2-D nor 3-D, an option is out of range, or `nesterov` is
            set without momentum.
        TypeError: a parameter has an unsupported dtype.

    Source: Sutskever, Martens, Dahl and Hinton, ICML 2013, in the form of `torch.optim.SGD`.

    Example:
        >>> import torch, peer
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = peer.optim.SGD([table], lr=0.5)
        >>> table.grad = torch.sparse_coo_tensor(
        ...     [[1, 1]], [[3.0, 3.0], [1.0, 1.0]], (3, 2), check_invariants=True
        ... )
        >>> optimizer.step()
        >>> table.tolist()
        [[0.0, 0.0], [-2.0, -2.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        momentum = options["momentum"]
        require(self, "momentum", momentum, momentum >= 0, "not negative")
        require(
            self,
            "momentum",
            momentum,
            momentum > 0 or not options["nesterov"],
            "positive with nesterov",
        )

    def _state_dtypes(self, table: Tensor) -> dict[str, torch.dtype]:
        return {"momentum_buffer": table.dtype}

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        gradient: TableGradient,
        rounding: dict[str, int | None],
    ) -> None:
        if group["momentum"] != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_huge(
                *table.shape, dtype=table.dtype, device=table.device
            )
        gradient.update(
            "sgd",
            table,
            state.get("momentum_buffer"),
            lr=float(group["lr"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            **rounding,
        )
