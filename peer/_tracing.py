"""What traces a call."""

from __future__ import annotations

import torch

__all__ = ["is_exporting"]


def is_exporting() -> bool:
    """Whether `torch.export` traces the call.

    `torch.compiler.is_exporting()` is true in all code that torch 2.11 compiles.
    """
    return bool(torch.compiler._is_exporting_flag)
