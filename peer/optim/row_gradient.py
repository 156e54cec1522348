"""The gradient of a table in the forms that the update operators take."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["RowGradient", "TableGradient", "accumulation_dtype"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients and updates are computed: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class TableGradient(Protocol):
    """What an optimizer needs of the gradient of a table."""

    def update(self, rule: str, table: Tensor, *state: Tensor | None, **options: Any) -> None:
        """Updates the table by this gradient.

        Args:
            rule: "rowwise_adagrad", "sgd" or "rowwise_adam".
            table: (N, D) or (N, parts, D), updated in place.
            state: the state that the rule's operator takes after the table, updated in place.
            options: the operator's numbers.
        """
        ...


class RowGradient(NamedTuple):
    """The gradient of a table (N, D) or (N, parts, D), as rows of a source.

    * Without indices, row r of the source is the gradient of table row r.
    * With indices, the gradient of table row r is the sum of `source[s]` over all s with
      `indices[s] == r`.

    Attributes:
        indices: (S,), int64; None for a dense gradient.
        source: (S, D) or (S, parts, D), like the table.
    """

    indices: Tensor | None
    source: Tensor

    @classmethod
    def from_tensor(cls, gradient: Tensor) -> RowGradient:
        """Views a dense gradient, or a sparse one, as rows.

        Raises:
            ValueError: the gradient is neither dense nor sparse by rows.
        """
        if gradient.layout == torch.strided:
            return cls(None, gradient)
        if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1:
            # Accumulation clears the coalesced flag. The operators find out whether the ids are
            # distinct and ascending, and otherwise sum the rows of equal ids.
            return cls(gradient._indices()[0], gradient._values())
        raise ValueError(
            "expected a dense gradient, or a sparse COO gradient with one sparse dimension, got "
            + (
                f"{gradient.sparse_dim()} sparse dimensions"
                if gradient.layout == torch.sparse_coo
                else str(gradient.layout)
            )
        )

    def update(self, rule: str, table: Tensor, *state: Tensor | None, **options: Any) -> None:
        """Updates the table by this gradient: see `TableGradient`."""
        operator = getattr(torch.ops.peer, f"{rule}_")
        operator(table, *state, self.indices, self.source, None, **options)
