"""What is timed: for each kind of mode a class that prepares a call, runs it and cleans up.

Only `run` is timed. `open` makes what lives for a provider's turn, such as optimizer state, and
`close` drops it, so that providers fit in memory one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import peer
from peer.bench.layers import OurLayer
from peer.bench.shared import Shared
from peer.bench.spellings import Experts

__all__ = [
    "ExpertsWork",
    "FusedExpertsWork",
    "GraphWork",
    "LayerWork",
    "OptimizerWork",
    "Optimizers",
    "RetrievalWork",
    "RoutingWork",
    "SelectionWork",
    "Stepper",
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
    """A provider's call in one mode; the index says which of the inputs it takes.

    Attributes:
        runs_back_to_back: whether nothing prepares a call. The clock then starts before the first
            call of a turn and stops after the last one.
    """

    runs_back_to_back: ClassVar[bool] = False

    def __init__(self, shared: Shared, distribution: str) -> None:
        self.shared = shared
        self.distribution = distribution
        self.optimizers: Sequence[Stepper] = ()
        self._undo: Callable[[], None] | None = None

    def ids(self, index: int) -> Tensor | None:
        """The ids of an input, None where the router's own are used."""
        sets = self.shared.ids.get(self.distribution)
        return sets[index % len(sets)] if sets else None

    def open(self) -> None:
        """Begins a turn."""

    def keep_parameters(self) -> None:
        """From here on, calls leave the parameters as they are.

        Steps do all their work, but are too small to change a parameter. Otherwise those of one
        provider would train the parameters that the next ones are checked with, until hidden values
        are so large that their GELU in float32 is zero.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = NO_LEARNING_RATE

    def prepare(self, index: int) -> None:
        """Makes the input of a call."""

    def run(self, index: int) -> None:
        """The call."""
        raise NotImplementedError

    def finish(self) -> None:
        """Drops what the call left."""
        self.shared.drop_gradients()

    def close(self) -> None:
        """Ends a turn, and drops the optimizers."""
        if self._undo is not None:
            self._undo()
        self.optimizers, self._undo = (), None
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
        self._x: Tensor | None = None
        self._ids: Tensor | None = None
        self._out: Any = None
        for layer in layers:
            layer.train(mode != "forward")

    def open(self) -> None:
        """Makes the optimizers; their state comes with the first call."""
        if self.mode == "step":
            self.optimizers, self._undo = self.make_optimizers(self.layers[0])

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


class Graph:
    """A layer's forward pass for inputs of one shape, captured in a CUDA graph.

    Args:
        layer: with parameters on the current GPU.
        x: an input, which replays read.
        ids: instead of the router's, likewise, or None.
    """

    def __init__(self, layer: nn.Module, x: Tensor, ids: Tensor | None) -> None:
        self.x = x.clone()
        self.ids = None if ids is None else ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            # Libraries set themselves up in their first calls, which cannot be captured.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    layer(self.x, self.ids)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self.graph):
                self.out, self.chosen = layer(self.x, self.ids)

    def __call__(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Replaces the input; the output and the ids that the router chose, until a replay."""
        self.x.copy_(x)
        if self.ids is not None and ids is not None:
            self.ids.copy_(ids)
        self.graph.replay()
        return self.out, self.chosen


class GraphWork(LayerWork):
    """Layers' forward passes, replayed from CUDA graphs in turn.

    Each graph keeps the input with which it was captured, so nothing happens between two replays:
    the events of a clock around a single one would take about as long as it does.
    """

    runs_back_to_back = True

    def open(self) -> None:
        """Captures each layer with an input of its own."""
        x = self.shared.x
        self.calls = [
            Graph(layer, x[index % len(x)], self.ids(index))
            for index, layer in enumerate(self.layers)
        ]

    def run(self, index: int) -> None:
        """Replays."""
        self.calls[index % len(self.calls)].graph.replay()

    def close(self) -> None:
        """Drops the graphs."""
        self.calls = []
        super().close()


class ExpertsWork(Work):
    """The experts alone: "experts-forward", or "experts-backward", which is the backward pass.

    Args:
        shared: of the case.
        distribution: of the ids.
        mode: of the two.
        experts: a spelling of them.
        table: in the form that it takes.
        compiled: whether to compile it.
        weights_dtype: as the provider's router gives them, by default the activations'.
    """

    def __init__(
        self,
        shared: Shared,
        distribution: str,
        mode: str,
        experts: Experts,
        table: Tensor,
        compiled: bool = False,
        weights_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shared, distribution)
        self.mode = mode
        self.table = table
        self.experts: Any = compile_whole(experts) if compiled else experts
        self.weights = shared.weights.flatten(-2).to(weights_dtype or shared.dtype)
        self._inputs: tuple[Tensor, ...] = ()
        self._out: Tensor | None = None

    def arguments(self, index: int) -> tuple[Tensor, ...]:
        """x, weights, ids and the table, as leaves where gradients are wanted."""
        shared, ids = self.shared, self.ids(index)
        if ids is None:
            ids = shared.retrieve(index)
        x, weights = shared.x[index % shared.inputs], self.weights
        if self.mode == "experts-backward":
            x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        return x, weights, ids.flatten(-2), self.table

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


class FusedExpertsWork(ExpertsWork):
    """The backward pass of a pool with the update of its table in it: "experts-backward".

    Args:
        shared: of the case.
        distribution: of the ids.
        pool: with the shared table.
        make_optimizers: fuses an update into the backward pass of the pool.
    """

    def __init__(
        self,
        shared: Shared,
        distribution: str,
        pool: peer.ExpertPool,
        make_optimizers: Optimizers,
    ) -> None:
        super().__init__(
            shared,
            distribution,
            "experts-backward",
            self._apply,
            shared.weight,
            weights_dtype=torch.float32,
        )
        self.pool = pool
        self.make_optimizers = make_optimizers

    def _apply(self, x: Tensor, weights: Tensor, ids: Tensor, table: Tensor) -> Any:
        assert table is self.pool.weight
        return self.pool(x, weights, ids)

    def open(self) -> None:
        """Makes the optimizer; its state comes with the first call."""
        self.optimizers, self._undo = self.make_optimizers(self.pool)


# Inputs, query weights, keys of both halves and k -> scores and ids (T, H, K).
Route = Callable[[Tensor, Tensor, Tensor, Tensor, int], "tuple[Tensor, Tensor]"]


class RoutingWork(Work):
    """From inputs to ids: the product with the query weights, then retrieval.

    There is no normalisation, which can be folded into the weights after training.

    Args:
        shared: of the case.
        distribution: of no matter here.
        function: inputs (T, D), query weights and keys to scores and ids.
    """

    def __init__(self, shared: Shared, distribution: str, function: Route) -> None:
        super().__init__(shared, distribution)
        self.function = function
        self.row_keys, self.col_keys = shared.routers[0].row_keys, shared.routers[0].col_keys
        self.out: tuple[Tensor, Tensor] | None = None

    def exact_queries(self, tokens: Tensor) -> Tensor:
        """Queries of some tokens of the first input in float64, (S, H, 2, dim_key / 2)."""
        x = self.shared.x[0][tokens].double()
        query = x @ self.shared.routers[0].query_weight.detach().double().T
        return query.unflatten(-1, (self.shared.case.heads, 2, -1))

    def run(self, index: int) -> None:
        """Projects and retrieves."""
        shared = self.shared
        router = shared.routers[index % len(shared.routers)]
        with torch.no_grad():
            self.out = self.function(
                shared.x[index % shared.inputs],
                router.query_weight,
                router.row_keys,
                router.col_keys,
                shared.case.k,
            )

    def finish(self) -> None:
        """Drops scores and ids."""
        self.out = None


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
            return torch.randn(*shape, generator=generator).to(shared.device, shared.dtype)

        self.row_keys, self.col_keys = (draw(case.root, width // 2) for _ in range(2))
        self.queries = [draw(case.tokens, case.heads, width) for _ in range(4)]
        self.out: tuple[Tensor, Tensor] | None = None

    def exact_queries(self, tokens: Tensor) -> Tensor:
        """Some of the first queries in float64, (S, H, 2, dim_key / 2)."""
        return self.queries[0][tokens].double().unflatten(-1, (2, -1))

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
