"""Runs data through a model for what its hooks and observers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peer.modules import PEER

__all__ = ["Retrieval", "find_layers", "observe_layers", "padding_mask", "run_batches"]


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


class Retrieval(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: the layer.
        x: (..., dim), its input.
        weights: (..., H, K).
        indices: (..., H, K).
        padding_mask: (...) bool, True for padding, or None.
    """

    layer: PEER
    x: Tensor
    weights: Tensor
    indices: Tensor
    padding_mask: Tensor | None


def find_layers(model: nn.Module) -> dict[str, PEER]:
    """The `PEER` layers of a model by name.

    Raises:
        ValueError: there is none.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, PEER)}
    if not layers:
        raise ValueError(f"expected a model with a PEER layer, got {type(model).__name__}")
    return layers


class _CallObserver:
    """Joins what a router retrieves to the input of the layer that called it."""

    def __init__(self, inputs: list[tuple[str, PEER, Tensor]], see: Callable[..., None]) -> None:
        self.inputs, self.see = inputs, see

    def observe(
        self, num_experts: int, weights: Tensor, indices: Tensor, padding_mask: Tensor | None
    ) -> None:
        if self.inputs:  # the router can also be called alone
            name, layer, x = self.inputs[-1]
            self.see(name, Retrieval(layer, x, weights, indices, padding_mask))


@contextmanager
def observe_layers(
    layers: Mapping[str, PEER], see: Callable[[str, Retrieval], None]
) -> Iterator[None]:
    """Calls a function for every call of some layers.

    Args:
        layers: the layers by name.
        see: it gets the name of the layer and what the layer retrieved.
    """
    inputs: list[tuple[str, PEER, Tensor]] = []  # of the layers that are being called
    names = {layer: name for name, layer in layers.items()}

    def begin(layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["x"]
        inputs.append((names[layer], layer, x))

    def end(*_: object) -> None:
        if inputs:  # it is also called if the call ends before it begins
            inputs.pop()

    with ExitStack() as stack:
        for layer in names:
            before = layer.register_forward_pre_hook(begin, with_kwargs=True)
            after = layer.register_forward_hook(end, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        for router in {layer.router for layer in names}:
            stack.callback(router.add_observer(_CallObserver(inputs, see)))
        yield
