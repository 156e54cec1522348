"""Finds the feed-forward blocks of a model, by their structure and their names.

A block is a place where a PEER layer can stand: it maps (..., dim) to (..., dim), and what follows
adds its output to the residual stream. There are three kinds:

* A dense block is one module that holds all projections, such as the MLP of GPT-2, of Llama or of a
  vision transformer.
* A mixture is one module with a router and experts. It may return more than its output.
* A split block has no module of its own: the projections and the activation between them are parts
  of a larger layer, as in `torch.nn.TransformerEncoderLayer` or in BERT. The PEER layer takes the
  place of the first projection. What follows it up to the last projection becomes the identity, so
  dropout, residual and normalisation behind the last projection stay as they were.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from peer._counts import Counts, count_dense
from peer.modules import PEER
from peer.swap.layers import BesidePEER, Function, WithMoreOutputs

__all__ = ["Block", "block_at", "find_blocks"]

# Names of classes and attributes of dense blocks. Two projections between the same widths may also
# be something else, such as the parts of an adapter.
_BLOCK_NAME = re.compile(
    r"mlp|ffn|feed_?forward|^ff$|ffw|dense_?relu|dense_?(gated_?)?act|glu", re.I
)

# The parts of split blocks: first projection, last projection, activation, and what drops hidden
# features, a module or a probability.
_SPLITS = (
    ("linear1", "linear2", "activation", "dropout"),  # torch.nn.Transformer{En,De}coderLayer
    ("fc1", "fc2", "activation_fn", "activation_dropout"),  # BART, OPT, Whisper
    ("ffn", "ffn_output", "activation", None),  # ALBERT
)


class Block(ABC):
    """A feed-forward block in a model.

    Args:
        name: where the PEER layer will stand.
        module: the module that a filter sees.
        first: the module at `name`.
        dim: the width of the block.
        counts: what it costs.
        description: how a table describes it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        first: nn.Module,
        dim: int,
        counts: Counts,
        description: str,
    ) -> None:
        self.name = name
        self.module = module
        self.parameters = dict(first.named_parameters())
        self.dim = dim
        self.counts = counts
        self.description = description

    @abstractmethod
    def wrap(self, layer: PEER, keep_dense: bool) -> nn.Module:
        """The module that will stand at `name`.

        Args:
            layer: the new layer.
            keep_dense: whether the dense block stays and the layer is added to it.
        """

    @abstractmethod
    def install(self, module: nn.Module) -> None:
        """Puts a module of `wrap` into the model."""


class _Place(NamedTuple):
    parent: nn.Module
    attribute: str


class WholeBlock(Block):
    """A block that is one module."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        places: list[_Place],
        dim: int,
        counts: Counts,
        outputs: int = 1,
        details: str = "",
    ) -> None:
        super().__init__(name, module, module, dim, counts, type(module).__name__ + details)
        self.places = places
        self.outputs = outputs

    def wrap(self, layer: PEER, keep_dense: bool) -> nn.Module:
        """See `Block`."""
        if keep_dense:
            return BesidePEER(self.module, layer)
        return layer if self.outputs == 1 else WithMoreOutputs(layer, self.outputs)

    def install(self, module: nn.Module) -> None:
        """See `Block`."""
        for place in self.places:
            setattr(place.parent, place.attribute, module)


class SplitBlock(Block):
    """A block whose parts are attributes of a larger layer.

    Args:
        prefix: the name of the layer and a dot, or nothing if the layer is the model.
        layer: the layer.
        first: the attribute of the first part, a projection or a module with an activation, too.
        last: the place of the last projection.
        dim: the width of the block.
        activation: the attribute of the activation, if the first part does not contain it.
        dropout: the attribute of what drops hidden features, a module or a probability.
    """

    def __init__(
        self,
        prefix: str,
        layer: nn.Module,
        first: str,
        last: _Place,
        dim: int,
        activation: str | None = None,
        dropout: str | None = None,
    ) -> None:
        self.first = layer.get_submodule(first)
        self.last = last.parent.get_submodule(last.attribute)
        last_name = last.attribute if last.parent is layer else f"output.{last.attribute}"
        super().__init__(
            f"{prefix}{first}",
            layer,
            self.first,
            dim,
            count_dense(self.first, self.last),
            f"{type(layer).__name__}: {first}, {last_name}",
        )
        self.first_place = _Place(layer, first)
        self.last_place = last
        self.activation = activation
        self.dropout = dropout

    def wrap(self, layer: PEER, keep_dense: bool) -> nn.Module:
        """See `Block`."""
        if not keep_dense:
            return layer
        parts = [self.first]
        for name in (self.activation, self.dropout):
            part = None if name is None else getattr(self.module, name)
            if isinstance(part, nn.Module):
                parts.append(part)
            elif isinstance(part, float):
                parts.append(nn.Dropout(part).train(self.module.training))
            elif part is not None:
                parts.append(Function(part, self.module.training))
        dense = nn.Sequential(*parts, self.last)
        dense.training = self.module.training
        return BesidePEER(dense, layer)

    def install(self, module: nn.Module) -> None:
        """See `Block`."""
        layer = self.module
        setattr(*self.first_place, module)
        identity = nn.Identity().train(layer.training)
        setattr(*self.last_place, identity)
        if self.activation is not None:
            setattr(layer, self.activation, identity)
        if self.dropout is not None:
            drops_by_number = isinstance(getattr(layer, self.dropout), float)
            setattr(layer, self.dropout, 0.0 if drops_by_number else identity)
        if isinstance(layer, nn.TransformerEncoderLayer):
            # The fused forward pass of evaluation reads the weights of two Linear. Zero says that
            # the activation is one without such a pass.
            layer.activation_relu_or_gelu = 0


def find_blocks(model: nn.Module) -> list[Block]:
    """The feed-forward blocks of a model, in the order of its modules.

    A block is listed once, even if the model uses it several times. Blocks inside a block, such as
    the experts of a mixture, are not listed, nor are PEER layers.

    Raises:
        TypeError: the source of a mixture is not available, so its outputs are unknown.
    """
    blocks: list[Block] = []
    found: dict[int, WholeBlock] = {}
    visited: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        visited.add(id(module))
        split = _split_block(module, prefix)
        if split is not None:
            blocks.append(split)
        for name, child in module._modules.items():
            if child is None or isinstance(child, (PEER, BesidePEER, WithMoreOutputs)):
                continue
            place = _Place(module, name)
            if id(child) in found:
                found[id(child)].places.append(place)
            elif id(child) not in visited:
                full = f"{prefix}{name}"
                block = _mixture(child, full, place) or _dense_block(child, full, place)
                if block is None:
                    visit(child, f"{full}.")
                else:
                    found[id(child)] = block
                    blocks.append(block)

    visit(model, "")
    return blocks


def block_at(model: nn.Module, name: str, dim: int) -> Block:
    """A block of unknown structure, of which the caller knows that it maps (..., dim) to itself.

    Args:
        model: the model.
        name: the name of the block in the model, not empty.
        dim: its width.
    """
    module = model.get_submodule(name)
    places = [
        _Place(parent, attribute)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if child is module
    ]
    return WholeBlock(name, module, places, dim, count_dense(module))


def _dense_block(module: nn.Module, name: str, place: _Place) -> WholeBlock | None:
    names = f"{type(module).__name__} {place.attribute}"
    if not any(_BLOCK_NAME.search(each) for each in names.split()):
        return None
    projections = [part for part in module.children() if _is_projection(part)]
    width = _width(projections)
    if width is None or not _has_one_argument(module):
        return None
    dim, hidden = width
    others = list(module.parameters(recurse=False))
    for part in module.children():
        if part not in projections:
            others += part.parameters()
    # What else has parameters is a normalisation or a scale of the hidden features. The replacement
    # must not drop one of the input or of the output.
    if any(p.shape != (hidden,) for p in others) or (others and hidden == dim):
        return None
    return WholeBlock(name, module, [place], dim, count_dense(module))


def _width(projections: list[nn.Module]) -> tuple[int, int] | None:
    """The width and the hidden width of a dense block, if its projections are those of one."""
    sizes = [_sizes(projection) for projection in projections]
    # Of two plain projections, either may be the last by its sizes. Modules list them in order.
    for number in range(len(sizes) - 1, 0, -1):
        hidden, dim = sizes[number]
        inputs = sizes[:number] + sizes[number + 1 :]
        outputs = [output for _, output in inputs]
        # A gate has a projection of its own, or is the other half of a common one.
        fits = outputs in ([hidden], [2 * hidden], [hidden, hidden])
        if fits and all(size == dim for size, _ in inputs):
            return dim, hidden
    return None


def _mixture(module: nn.Module, name: str, place: _Place) -> WholeBlock | None:
    experts = module._modules.get("experts")
    router = module._modules.get("gate") or module._modules.get("router")
    if experts is None or router is None:
        return None
    gates = [p for p in router.parameters() if p.dim() == 2]
    sizes = [p.numel() for p in experts.parameters()]
    if len(gates) != 1 or not sizes or not _has_one_argument(module):
        return None
    number, dim = gates[0].shape
    chosen = _chosen_experts(module, router)
    total = count_dense(module)
    inside = count_dense(experts)
    share = 1.0 if chosen is None else chosen / number
    idle = inside.flops // 2 - round(inside.flops // 2 * share)
    counts = Counts(
        total.parameters,
        total.active - inside.parameters + round(inside.parameters * share),
        total.flops - 2 * idle,
    )
    details = f": {number} experts" + ("" if chosen is None else f", {chosen} per token")
    return WholeBlock(name, module, [place], dim, counts, _count_outputs(module), details)


def _chosen_experts(module: nn.Module, router: nn.Module) -> int | None:
    for holder in (module, router, getattr(module, "config", None)):
        for name in ("top_k", "num_experts_per_tok", "num_experts_per_token"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _split_block(layer: nn.Module, prefix: str) -> SplitBlock | None:
    parts = layer._modules
    if not any(
        "attention" in f"{name}{type(part).__name__}".lower() for name, part in parts.items()
    ):
        return None
    for first, last, activation, dropout in _SPLITS:
        ends = parts.get(first), parts.get(last)
        if not _are_ends(*ends) or not hasattr(layer, activation):
            continue
        if dropout is not None and not hasattr(layer, dropout):
            dropout = None
        dim = _sizes(ends[0])[0]
        place = _Place(layer, last)
        return SplitBlock(prefix, layer, first, place, dim, activation, dropout)
    # BERT and its descendants: layer.intermediate has a projection and an activation, layer.output
    # a projection, dropout, the residual and often the normalisation.
    inner, output = parts.get("intermediate"), parts.get("output")
    if inner is None or output is None:
        return None
    projections = [name for name, part in inner.named_children() if _is_projection(part)]
    if len(projections) == 1 and _has_one_argument(inner):
        first_end = inner._modules[projections[0]]
        if _are_ends(first_end, output._modules.get("dense")):
            dim = _sizes(first_end)[0]
            place = _Place(output, "dense")
            return SplitBlock(prefix, layer, "intermediate", place, dim)
    return None


def _are_ends(first: nn.Module | None, last: nn.Module | None) -> bool:
    """Whether two modules are the first and the last projection of a block."""
    if first is None or last is None or not _is_projection(first) or not _is_projection(last):
        return False
    return _sizes(first) == _sizes(last)[::-1]


def _is_projection(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear projection with a transposed weight.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(projection: Any) -> tuple[int, int]:
    """The input and output width of a projection."""
    if isinstance(projection, nn.Linear):
        return projection.in_features, projection.out_features
    size, output = projection.weight.shape
    return size, output


def _has_one_argument(module: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    named = [kind for kind in kinds if kind is not inspect.Parameter.VAR_KEYWORD]
    return len(named) == 1


def _count_outputs(module: nn.Module) -> int:
    """How many things the forward method of a module returns, according to its source.

    Calling the module would not do: it may be on the meta device, and mixtures look at their data.
    """
    forward = inspect.unwrap(type(module).forward)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise TypeError(
            f"expected the source of {type(module).__name__}.forward, which shows what it returns"
        ) from error
    returned = {
        len(value.elts) if isinstance(value, ast.Tuple) else 1
        for value in _returned_values(tree.body[0])
    }
    if len(returned) != 1:
        raise TypeError(
            f"expected {type(module).__name__}.forward to return the same number of things "
            f"everywhere, got {sorted(returned)}"
        )
    return returned.pop()


def _returned_values(function: ast.AST) -> Iterator[ast.expr | None]:
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Return):
            yield node.value
        elif not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
        ):
            yield from _returned_values(node)
