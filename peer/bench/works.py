"""What is timed: for each kind of mode a class that prepares a call, runs it and cleans up.

Only `run` is timed. `open` makes what lives for a provider's turn, such as optimizer state, and
`close` drops it, so that providers fit in memory one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peer.bench.layers import OurLayer
from peer.bench.shared import Shared
from peer.bench.spellings import Experts

__all__ = [
    "ExpertsWork",
    "LayerWork",
    "OptimizerWork",
    "Optimizers",
    "RetrievalWork",
    "SelectionWork",
    "Work",
    "compile_whole",
]


NO_LEARNING_RATE = 1e-12


class Stepper(Protocol):
    """What is used of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Updates the parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""


# From a layer to its optimizers and what must be undone when its turn ends.
Optimizers = Callable[[nn.Module], "tuple[Sequence[Stepper], Callable[[], None]]"]


def compile_whole(function: Any) -> Any:
    """Compiles all of a function for the shapes it gets; an error if a part would run eagerly."""
    return torch.compile(function, dynamic=False, fullgraph=True)


class Work:
    """A provider's call in one mode; the index says which of the inputs it takes."""

    def __init__(self, shared: Shared, distribution: str) -> None:
        self.shared = shared
        self.distribution = distribution

    def ids(self, index: int) -> Tensor | None:
        """The ids of an input, None where the router's own are used."""
        sets = self.shared.ids.get(self.distribution)
        return sets[index % len(sets)] if sets else None

    def open(self) -> None:
        """Begins a turn."""

    def keep_parameters(self) -> None:
        """From here on, calls leave the parameters as they are."""

    def prepare(self, index: int) -> None:
        """Makes the input of a call."""

    def run(self, index: int) -> None:
        """The call."""
        raise NotImplementedError

    def finish(self) -> None:
        """Drops what the call left."""
        self.shared.drop_gradients()

    def close(self) -> None:
        """Ends a turn."""
        self.shared.drop_gradients()


class LayerWork(Work):
    """A whole layer: "forward", "backward" (with forward) or "step"."""

    def __init__(
        self,
        shared: Shared,
        distribution: str,
        mode: str,
        layers: Sequence[nn.Module],
        make_optimizers: Optimizers,
        compiled: bool = False,
    ) -> None:
        super().__init__(shared, distribution)
        self.mode = mode
        self.layers = layers
        self.calls: list[Any] = [compile_whole(layer) if compiled else layer for layer in layers]
        self.make_optimizers = make_optimizers
        self.optimizers: Sequence[Stepper] = ()
        self._undo: Callable[[], None] | None = None
        self._x: Tensor | None = None
        self._ids: Tensor | None = None
        self._out: Any = None
        for layer in layers:
            layer.train(mode != "forward")

    def open(self) -> None:
        """Makes the optimizers; their state comes with the first call."""
        if self.mode == "step":
            self.optimizers, self._undo = self.make_optimizers(self.layers[0])

    def keep_parameters(self) -> None:
        """Steps do all their work, but are too small to change a parameter.

        Otherwise those of one provider would train the parameters that the next ones are checked
        with, until hidden values are so large that their GELU in float32 is zero.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = NO_LEARNING_RATE

    def prepare(self, index: int) -> None:
        """In training x requires a gradient, as it does in the middle of a network."""
        x = self.shared.x[index % self.shared.inputs]
        self._x = x if self.mode == "forward" else x.detach().requires_grad_()
        self._ids = self.ids(index)

    def run(self, index: int) -> None:
        """Forward, then what the mode adds."""
        layer = self.calls[index % len(self.calls)]
        if self.mode == "forward":
            with torch.no_grad():
                if self._ids is None and isinstance(layer, OurLayer):
                    self._out = layer.peer(self._x)  # for one token, a wrapper is no small part
                else:
                    self._out = layer(self._x, self._ids)
            return
        layer(self._x, self._ids)[0].backward(self.shared.grad_out)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Drops output and gradients."""
        self._x = self._ids = self._out = None
        super().finish()
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Drops the optimizers."""
        if self._undo is not None:
            self._undo()
        self.optimizers, self._undo = (), None
        super().close()


class ExpertsWork(Work):
    """The experts alone: "experts-forward", or "experts-backward", which is the backward pass."""

    def __init__(
        self,
        shared: Shared,
        distribution: str,
        mode: str,
        experts: Experts,
        compiled: bool = False,
    ) -> None:
        super().__init__(shared, distribution)
        self.mode = mode
        self.experts: Any = compile_whole(experts) if compiled else experts
        self.weights = shared.weights.flatten(-2)
        self._inputs: tuple[Tensor, ...] = ()
        self._out: Tensor | None = None

    def arguments(self, index: int) -> tuple[Tensor, ...]:
        """x, weights, ids and tables, as leaves where gradients are wanted."""
        shared, ids = self.shared, self.ids(index)
        if ids is None:
            ids = shared.retrieve(index)
        x, weights = shared.x[index % shared.inputs], self.weights
        if self.mode == "experts-backward":
            x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        return x, weights, ids.flatten(-2), shared.w_down, shared.w_up

    def prepare(self, index: int) -> None:
        """For the backward pass, runs forward."""
        self._inputs = self.arguments(index)
        if self.mode == "experts-backward":
            self._out = self.experts(*self._inputs)

    def run(self, index: int) -> None:
        """One pass."""
        if self.mode == "experts-forward":
            with torch.no_grad():
                self._out = self.experts(*self._inputs)
        else:
            assert self._out is not None
            self._out.backward(self.shared.grad_out)

    def finish(self) -> None:
        """Drops output and gradients."""
        self._inputs, self._out = (), None
        super().finish()


# Queries, keys of both halves and k -> scores and ids (T, H, K).
Retrieve = Callable[[Tensor, Tensor, Tensor, int], "tuple[Tensor, Tensor]"]


class RetrievalWork(Work):
    """From queries to ids, products with the keys included.

    Args:
        shared: of the case.
        distribution: of no matter here.
        function: queries (T, H, dim_key) and keys to scores and ids.
        dim_key: another one than the case's, for `SelectionWork`.
    """

    def __init__(
        self,
        shared: Shared,
        distribution: str,
        function: Retrieve,
        dim_key: int | None = None,
    ) -> None:
        super().__init__(shared, distribution)
        self.function = function
        case, generator = shared.case, torch.Generator().manual_seed(1)
        width = case.dim_key if dim_key is None else dim_key

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(shared.dtype)

        self.row_keys, self.col_keys = (draw(case.root, width // 2) for _ in range(2))
        self.queries = [draw(case.tokens, case.heads, width) for _ in range(4)]
        self.out: tuple[Tensor, Tensor] | None = None

    def run(self, index: int) -> None:
        """Retrieves."""
        query = self.queries[index % len(self.queries)]
        with torch.no_grad():
            self.out = self.function(query, self.row_keys, self.col_keys, self.shared.case.k)

    def finish(self) -> None:
        """Drops scores and ids."""
        self.out = None


SELECTION_DIM_KEY = 4


class SelectionWork(RetrievalWork):
    """From scores of both halves to ids.

    peer has no operator for this part alone. Its turn is retrieval with queries of 4 features: the
    products are then small, and count against it. The scores of the others are the same values,
    made before the clock starts.

    Args:
        shared: of the case.
        distribution: of no matter here.
        function: queries and keys to scores and ids, or with `from_scores` scores of both halves
            (T, H, R) and (T, H, C) and k.
        from_scores: which.
    """

    def __init__(self, shared: Shared, distribution: str, function: Any, from_scores: bool) -> None:
        super().__init__(shared, distribution, function, SELECTION_DIM_KEY)
        self.select: Any = function
        self.from_scores = from_scores
        self._scores: tuple[Tensor, ...] = ()

    def prepare(self, index: int) -> None:
        """Makes the scores."""
        if self.from_scores:
            halves = self.queries[index % len(self.queries)].chunk(2, dim=-1)
            keys = self.row_keys, self.col_keys
            self._scores = tuple(q @ k.T for q, k in zip(halves, keys, strict=True))

    def run(self, index: int) -> None:
        """Selects."""
        if not self.from_scores:
            return super().run(index)
        with torch.no_grad():
            self.out = self.select(*self._scores, self.shared.case.k)


class OptimizerWork(LayerWork):
    """The optimizers alone, on the gradients of one training pass."""

    def open(self) -> None:
        """Makes the optimizers."""
        self.optimizers, self._undo = self.make_optimizers(self.layers[0])

    def prepare(self, index: int) -> None:
        """Makes the gradients."""
        super().prepare(index)
        self.layers[0](self._x, self._ids)[0].backward(self.shared.grad_out)

    def run(self, index: int) -> None:
        """Updates the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()
