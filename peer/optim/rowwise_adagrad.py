"""AdaGrad with one accumulator per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peer.optim.row_gradient import TableGradient, accumulation_dtype
from peer.optim.table_optimizer import TableOptimizer, require, row_state

__all__ = ["RowwiseAdagrad"]


class RowwiseAdagrad(TableOptimizer):
    r"""AdaGrad with one accumulator per row: the sum of the mean squares of its gradients.

    For every row with a nonzero gradient, and each of its parts, with the gradient g of width D,

    .. math:: s &\leftarrow s + \tfrac1D \lVert g \rVert^2 \\
              w &\leftarrow (1 - \eta\lambda)\, w - \frac{\eta}{\sqrt{s} + \epsilon}\, g .

    The learning rate of a row depends only on its own gradients, so rarely retrieved experts keep a
    high learning rate. The state of a million rows takes 4 MB.

    Args:
        params: tables (N, D) or (N, parts, D), or groups of them.
        lr: the learning rate :math:`\eta`.
        eps: :math:`\epsilon`, added to the root.
        weight_decay: :math:`\lambda`, decoupled from the gradient. Only updated rows decay.
        initial_accumulator_value: s before the first step.
        stochastic_rounding: whether 16-bit tables are rounded stochastically instead of to nearest.
        seed: seed of stochastic rounding, int64.

    Raises:
        ValueError: a parameter is neither 2-D nor 3-D, or an option is out of range.
        TypeError: a parameter has an unsupported dtype.

    Source: Duchi, Hazan and Singer, JMLR 12 (2011); row-wise as FBGEMM's `EXACT_ROWWISE_ADAGRAD`.

    Example:
        >>> import torch, peer
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = peer.optim.RowwiseAdagrad([table], lr=1.0)
        >>> table.grad = torch.sparse_coo_tensor([[1]], [[3.0, 3.0]], (3, 2), check_invariants=True)
        >>> optimizer.step()
        >>> table.tolist()
        [[0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for name in ("eps", "initial_accumulator_value"):
            require(self, name, options[name], options[name] >= 0, "not negative")

    def _state_dtypes(self, table: Tensor) -> dict[str, torch.dtype]:
        return {"sum_of_squares": accumulation_dtype(table.dtype)}

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        gradient: TableGradient,
        rounding: dict[str, int | None],
    ) -> None:
        if "sum_of_squares" not in state:
            state["sum_of_squares"] = row_state(table, group["initial_accumulator_value"])
        gradient.update(
            "rowwise_adagrad",
            table,
            state["sum_of_squares"],
            lr=float(group["lr"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            **rounding,
        )
