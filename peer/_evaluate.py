"""Runs data through a model for what its hooks see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["padding_mask", "run_batches"]


@torch.no_grad()
def run_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Calls a model in evaluation mode and without gradients, and restores every module's mode.

    Args:
        model: the model. Compiled parts run eagerly.
        batches: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list
            of positional arguments, or any other object as the only argument.
    """
    with ExitStack() as stack:
        for module in model.modules():
            # Not by train(), which a module may override, and which would not restore its parts.
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)


def padding_mask(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """The mask in a call of a layer or a router."""
    mask: Tensor | None = arguments[1] if len(arguments) > 1 else keywords.get("padding_mask")
    return mask
