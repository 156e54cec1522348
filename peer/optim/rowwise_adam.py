"""Adam with one second moment and one step count per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peer.memory import zeros_huge
from peer.optim.row_gradient import TableGradient, accumulation_dtype
from peer.optim.table_optimizer import TableOptimizer, require, row_state

__all__ = ["RowwiseAdam"]


class RowwiseAdam(TableOptimizer):
    r"""Adam with one second moment and one step count per row.

    For every row with a nonzero gradient, and each of its parts, with the gradient g of width D,

    .. math:: t &\leftarrow t + 1 \\
              m &\leftarrow \beta_1 m + (1 - \beta_1)\, g \\
              v &\leftarrow \beta_2 v + (1 - \beta_2)\, \tfrac1D \lVert g \rVert^2 \\
              w &\leftarrow (1 - \eta\lambda)\, w - \eta\, \frac{m / (1 - \beta_1^t)}
                           {\sqrt{v / (1 - \beta_2^t)} + \epsilon} .

    t, m and v belong to the row. A row is updated like in a run without the steps in which its
    gradient is zero. In these steps, the moments of dense Adam decay and its momentum keeps moving
    the row. `torch.optim.SparseAdam` does not change the moments of rows without a
    gradient, but it corrects their bias by the total number of steps. A row with a late first
    gradient then moves by :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` times the correct step, 3.2
    times with the default betas.

    The second moment is one scalar per row, or part of a row, as in FBGEMM's
    `PARTIAL_ROWWISE_ADAM`. The state is therefore one table, in the table's dtype, and not two.

    Args:
        params: tables (N, D) or (N, parts, D), or groups of them.
        lr: the learning rate :math:`\eta`.
        betas: :math:`\beta_1` and :math:`\beta_2`.
        eps: :math:`\epsilon`, added to the root.
        weight_decay: :math:`\lambda`, decoupled from the gradient. Only updated rows decay.
        stochastic_rounding: whether 16-bit tables and their momentum are rounded stochastically
            instead of to nearest.
        seed: seed of stochastic rounding, int64.

    Raises:
        ValueError: a parameter is neither 2-D nor 3-D, or an option is out of range.
        TypeError: a parameter has an unsupported dtype.

    Source: Kingma and Ba, arXiv 1412.6980; decoupled decay from Loshchilov and Hutter, arXiv
    1711.05101.

    Example:
        >>> import torch, peer
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = peer.optim.RowwiseAdam([table], lr=0.5)
        >>> table.grad = torch.sparse_coo_tensor([[1]], [[3.0, 3.0]], (3, 2), check_invariants=True)
        >>> optimizer.step()
        >>> table.tolist()
        [[0.0, 0.0], [-0.5, -0.5], [0.0, 0.0]]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require(self, "eps", options["eps"], options["eps"] >= 0, "not negative")
        betas = options["betas"]
        are_valid = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        require(self, "betas", betas, are_valid, "two numbers in [0, 1)")

    def _state_dtypes(self, table: Tensor) -> dict[str, torch.dtype]:
        return {
            "first_moment": table.dtype,
            "second_moment": accumulation_dtype(table.dtype),
            "row_steps": torch.int32,
        }

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        gradient: TableGradient,
        rounding: dict[str, int | None],
    ) -> None:
        if "first_moment" not in state:
            state["first_moment"] = zeros_huge(*table.shape, dtype=table.dtype, device=table.device)
            state["second_moment"] = row_state(table, 0.0)
            state["row_steps"] = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        beta1, beta2 = group["betas"]
        gradient.update(
            "rowwise_adam",
            table,
            state["first_moment"],
            state["second_moment"],
            state["row_steps"],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            **rounding,
        )
