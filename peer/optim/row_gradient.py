"""The gradient of a table in the form that the update operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowGradient", "accumulation_dtype"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients and updates are computed: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class RowGradient(NamedTuple):
    """The gradient of a table (N, D) or (N, parts, D), as rows of a source.

    * Without indices, row r of the source is the gradient of table row r.
    * With indices (S,) or (S, P), the gradient of table row r is the sum of `source[s]` over all
      pairs (s, p) with `indices[s, p] == r`.
    * With coefficients, the pair (s, p) adds `coefficients[j, s, p] * source[s, j]` to part j.
    * With `frozen`, the gradient of the marked rows is zero.

    Attributes:
        indices: (S,) or (S, P), int64; None for a dense gradient.
        source: (S, D) or (S, parts, D), like the table.
        coefficients: indices' shape, with a leading `parts` for a table with parts; None for ones.
        frozen: (N,) bool; None if no row is frozen.
    """

    indices: Tensor | None
    source: Tensor
    coefficients: Tensor | None = None
    frozen: Tensor | None = None

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
