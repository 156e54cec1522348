"""Who is measured: peer, the ways to write the layer without it, and the layers it replaces."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import peer
from peer.bench import traffic
from peer.bench.cases import Case
from peer.bench.layers import DenseLayer, OurLayer, PlainLayer, PublishedLayer
from peer.bench.shared import Shared
from peer.bench.spellings import EXPERTS, OF_ROWS, project, retrieve, route, select
from peer.bench.works import (
    ExpertsWork,
    FusedExpertsWork,
    GraphWork,
    LayerWork,
    OptimizerWork,
    RetrievalWork,
    RoutingWork,
    SelectionWork,
    Stepper,
    Work,
    compile_whole,
)

__all__ = ["LEARNING_RATE", "PROVIDERS", "TABLE_LEARNING_RATE", "Provider"]

LEARNING_RATE = 1e-4
TABLE_LEARNING_RATE = 1e-3

LAYER = ("forward", "backward", "step")
EXPERTS_ALONE = ("experts-forward", "experts-backward")
CHOICE = ("routing", "retrieval", "selection")  # no expert is read


def _nothing() -> None:
    """There is nothing to undo."""


class Provider:
    """Builds the calls of one contestant.

    Attributes:
        name: as on the command line.
        modes: those that it can run.
        gradients: of the tables, "sparse", "dense" or "fused", which says what it has to write.
    """

    name: ClassVar[str]
    modes: ClassVar[tuple[str, ...]]
    gradients: str = "dense"
    normalises = True

    def missing(self, case: Case, mode: str) -> str | None:
        """Why it cannot run, or None."""
        if self.normalises and case.tokens == 1 and mode in ("backward", "step", "optimizer"):
            return "batch normalisation learns from two tokens or more"
        return None

    def spellings(self, mode: str) -> tuple[str, ...]:
        """The ways in which it does the same; each is a row."""
        return ("",)

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """The calls of a mode."""
        raise NotImplementedError

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """An estimate, on the high side, of what it allocates beyond parameters and inputs."""
        raise NotImplementedError

    def algorithmic_bytes(self, case: Case, mode: str, spelling: str, distinct: float) -> int:
        """Bytes by the formulas of `peer.bench.traffic`."""
        gradients = self._gradients(spelling)
        if mode in CHOICE:
            return traffic.retrieval_bytes(case, mode)
        if mode in LAYER:
            return traffic.layer_bytes(case, mode, distinct, gradients)
        return traffic.experts_bytes(case, mode, distinct, gradients)

    def _gradients(self, spelling: str) -> str:
        return "sparse" if "sparse" in spelling else self.gradients


def _gradient_bytes(case: Case, gradients: str) -> int:
    """Table gradients: dense, or the rows that may occur, once more while they are sorted."""
    if gradients == "dense":
        return case.table_bytes
    rows = min(case.num_experts, case.tokens * case.per_token)
    return 2 * rows * 2 * case.dim * case.itemsize


def _routing_temporary_bytes(case: Case) -> int:
    """Queries before and after normalisation, with gradients, and the router's optimizer."""
    queries = 6 * case.tokens * case.heads * case.dim_key * max(4, case.itemsize)
    return queries + 5 * traffic.router_bytes(case) + case.tokens * (40 * case.per_token)


class Ours(Provider):
    """peer with sparse gradients."""

    name = "peer"
    modes: ClassVar[tuple[str, ...]] = (*LAYER, *EXPERTS_ALONE, *CHOICE, "optimizer")
    gradients = "sparse"

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """Operators by `peer.functional`, the layer by `peer.PEER`."""
        sparse = self.gradients != "dense"
        if mode == "routing":
            return RoutingWork(shared, distribution, _route)
        if mode == "retrieval":
            return RetrievalWork(shared, distribution, peer.functional.product_key_topk)
        if mode == "selection":
            function = peer.functional.product_key_topk
            return SelectionWork(shared, distribution, function, from_scores=False)
        if mode in EXPERTS_ALONE:
            experts = functools.partial(peer.functional.expert_mlp, sparse_grad=sparse)
            return ExpertsWork(
                shared,
                distribution,
                mode,
                experts,
                shared.weight,
                weights_dtype=shared.weights.dtype,
            )
        layers = [OurLayer(shared, router, sparse_grad=sparse) for router in shared.routers]
        if mode == "optimizer":
            return OptimizerWork(shared, distribution, mode, layers, self.make_optimizers)
        return LayerWork(shared, distribution, mode, layers, self.make_optimizers)

    def make_optimizers(self, layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
        """Row-wise Adagrad for the table, fused AdamW for the rest."""
        optimizers = _row_wise(layer)
        return optimizers, _nothing

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """Gradients if there are some, and the router's."""
        total = _routing_temporary_bytes(case)
        if mode in ("backward", "step", "experts-backward", "optimizer"):
            total += _gradient_bytes(case, self.gradients) if self.gradients != "fused" else 0
            total += 8 * case.num_experts
        return total


def _route(
    x: Tensor, query_weight: Tensor, row_keys: Tensor, col_keys: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The projection of torch, and the retrieval of peer."""
    query = project(x, query_weight, 2 * row_keys.shape[-1])
    return peer.functional.product_key_topk(query, row_keys, col_keys, k)


def _row_wise(layer: nn.Module) -> list[Any]:
    assert isinstance(layer, OurLayer)
    dense, experts = peer.param_groups(layer.peer, lr=LEARNING_RATE, expert_lr=TABLE_LEARNING_RATE)
    return [
        peer.optim.RowwiseAdagrad([experts], lr=TABLE_LEARNING_RATE),
        torch.optim.AdamW([dense], lr=LEARNING_RATE, fused=True),
    ]


class OursDense(Ours):
    """peer with dense gradients, and dense Adam for them."""

    name = "peer-dense-grad"
    modes: ClassVar[tuple[str, ...]] = ("backward", "step", "experts-backward", "optimizer")
    gradients = "dense"

    def make_optimizers(self, layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
        """Fused Adam for everything."""
        return _dense_adam(layer)

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """Dense gradients, for steps the moments too."""
        moments = 2 * case.table_bytes if mode in ("step", "optimizer") else 0
        return super().temporary_bytes(case, mode) + moments


class OursFused(Ours):
    """peer with the table's update fused into the backward pass."""

    name = "peer-fused"
    modes: ClassVar[tuple[str, ...]] = ("step", "experts-backward")
    gradients = "fused"

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """For the experts alone a pool, in whose backward pass the update is."""
        if mode == "experts-backward":
            return FusedExpertsWork(shared, distribution, _pool(shared), _fuse_into_pool)
        return super().build(shared, distribution, mode, spelling)

    def make_optimizers(self, layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
        """Row-wise Adagrad during backward, fused AdamW for the rest."""
        optimizers = _row_wise(layer)
        handle = optimizers[0].fuse_into_backward(layer)
        return optimizers, handle.remove

    def algorithmic_bytes(self, case: Case, mode: str, spelling: str, distinct: float) -> int:
        """The backward pass of the experts includes the update of their rows."""
        total = super().algorithmic_bytes(case, mode, spelling, distinct)
        if mode == "experts-backward":
            total += traffic.experts_bytes(case, "optimizer", distinct, self.gradients)
        return total


def _pool(shared: Shared) -> peer.ExpertPool:
    """A pool that holds the shared table."""
    pool = peer.ExpertPool(
        shared.case.dim,
        num_experts=shared.case.num_experts,
        num_experts_per_token=shared.case.per_token,
        sparse_grad=True,
        device="meta",
        dtype=shared.table_dtype,
    )
    pool.weight = shared.weight
    return pool


def _fuse_into_pool(pool: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
    """Row-wise Adagrad during backward."""
    optimizer = peer.optim.RowwiseAdagrad(pool.parameters(), lr=TABLE_LEARNING_RATE)
    return [optimizer], optimizer.fuse_into_backward(pool).remove


class OursInGraph(Ours):
    """peer replayed from a CUDA graph, which leaves out what the host does for each kernel."""

    name = "peer-graph"
    modes: ClassVar[tuple[str, ...]] = ("forward",)

    def missing(self, case: Case, mode: str) -> str | None:
        """Graphs are of GPUs."""
        return None if case.device == "cuda" else "a CUDA graph needs --device cuda"

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """The layers of `Ours`; a single router gets a graph for each input."""
        routers = shared.routers
        if len(routers) == 1:
            routers = routers * shared.inputs
        layers = [OurLayer(shared, router, sparse_grad=True) for router in routers]
        return GraphWork(shared, distribution, mode, layers, self.make_optimizers)

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """Each graph has memory of its own. With many tokens and one router, there are four."""
        return max(case.routers, 4) * super().temporary_bytes(case, mode)


def _eps(parameters: Sequence[nn.Parameter]) -> float:
    """Of an Adam that computes in the parameters' dtype: 1e-8 is 0 in float16."""
    return 1e-4 if any(p.dtype == torch.float16 for p in parameters) else 1e-8


def _dense_adam(layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
    parameters = list(layer.parameters())
    # Where memory is not contiguous, Torch's fused Adam computes something else.
    fused = all(parameter.is_contiguous() for parameter in parameters)
    eps = 1e-8 if fused else _eps(parameters)
    return [torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=eps, fused=fused)], _nothing


def _sparse_adam(layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
    assert isinstance(layer, PlainLayer)
    others = [p for p in layer.parameters() if p is not layer.table]
    optimizers: list[Stepper] = [
        torch.optim.SparseAdam([layer.table], lr=LEARNING_RATE, eps=_eps([layer.table])),
        torch.optim.AdamW(others, lr=LEARNING_RATE, fused=True),
    ]
    return optimizers, _nothing


class Plain(Provider):
    """Plain PyTorch: gather and einsum, eagerly."""

    name = "eager"
    modes: ClassVar[tuple[str, ...]] = (*LAYER, *EXPERTS_ALONE, *CHOICE, "optimizer")
    compiled = False

    def spellings(self, mode: str) -> tuple[str, ...]:
        """Of the experts."""
        return ("einsum",)

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """Routing and experts of `peer.bench.spellings`."""
        if mode == "routing":
            return RoutingWork(
                shared, distribution, compile_whole(route) if self.compiled else route
            )
        if mode == "retrieval":
            function = compile_whole(retrieve) if self.compiled else retrieve
            return RetrievalWork(shared, distribution, function)
        if mode == "selection":
            chosen = compile_whole(select) if self.compiled else select
            return SelectionWork(shared, distribution, chosen, from_scores=True)
        experts = EXPERTS[spelling]
        table = shared.rows if spelling in OF_ROWS else shared.weight
        if mode in EXPERTS_ALONE:
            return ExpertsWork(shared, distribution, mode, experts, table, self.compiled)
        layers = [PlainLayer(shared, router, experts, table) for router in shared.routers]
        optimizers = _sparse_adam if "sparse" in spelling else _dense_adam
        kind = OptimizerWork if mode == "optimizer" else LayerWork
        return kind(shared, distribution, mode, layers, optimizers, self.compiled)

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """Gathered rows of the table, their gradients, the table's gradient and moments."""
        gathered = case.tokens * case.per_token * case.dim * case.itemsize
        scores = 2 * case.root + 3 * case.k**2
        total = _routing_temporary_bytes(case) + 12 * case.tokens * case.heads * scores
        if mode in CHOICE:
            return total
        if mode in ("forward", "experts-forward"):
            return total + 2 * gathered
        gradients = self._gradients(spelling)
        total += 3 * gathered + _gradient_bytes(case, gradients)
        if case.device == "cuda":  # a gradient's partial sums, in float32
            total += 4 * case.tokens * case.per_token * case.dim
        if mode in ("step", "optimizer"):
            total += 2 * case.table_bytes
        return total


class Bags(Plain):
    """Plain PyTorch with `embedding_bag` for the upper table."""

    name = "embedding_bag"
    modes: ClassVar[tuple[str, ...]] = (*LAYER, *EXPERTS_ALONE, "optimizer")

    def missing(self, case: Case, mode: str) -> str | None:
        """The gradients of the two uses of the rows are added."""
        if (case.device, case.dtype) == ("cpu", "float16") and "forward" not in mode:
            return "torch does not add sparse float16 gradients on a CPU"
        return super().missing(case, mode)

    def spellings(self, mode: str) -> tuple[str, ...]:
        """With sparse gradients: of dense ones, each of the two uses of the rows would make one."""
        return ("bags",) if "forward" in mode else ("bags, sparse",)


class Compiled(Plain):
    """Plain PyTorch under `torch.compile`; time to compile is not counted."""

    name = "compiled"
    modes: ClassVar[tuple[str, ...]] = (*LAYER, *EXPERTS_ALONE, *CHOICE)
    compiled = True

    def missing(self, case: Case, mode: str) -> str | None:
        """Many routers would be compiled one by one; that measures nothing new."""
        if case.routers > 1:
            return "not run with several routers in turn"
        return super().missing(case, mode)

    def spellings(self, mode: str) -> tuple[str, ...]:
        """Of the experts; bags are of use forward."""
        if mode in CHOICE:
            return ("einsum",)
        return ("einsum", "sum", "bags") if "forward" in mode else ("einsum", "sum")


class Published(Plain):
    """The package PEER-pytorch with `non_competing_scores=False`."""

    name = "PEER-pytorch"
    normalises = False
    modes: ClassVar[tuple[str, ...]] = LAYER

    def missing(self, case: Case, mode: str) -> str | None:
        """It is an optional dependency, and has one dtype for all."""
        if case.activation_dtype.itemsize != case.itemsize:
            return "its tables have the dtype of its inputs"
        if any(importlib.util.find_spec(name) is None for name in ("PEER_pytorch", "einx")):
            return "not installed: pip install PEER-pytorch"
        return super().missing(case, mode)

    def spellings(self, mode: str) -> tuple[str, ...]:
        """It has one."""
        return ("",)

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """Its layer, on the parts of the shared table."""
        layers = [PublishedLayer(shared, router) for router in shared.routers]
        return LayerWork(shared, distribution, mode, layers, _dense_adam)


class Dense(Provider):
    """A feed-forward layer, four times as wide inside as outside."""

    name = "dense-4d"
    normalises = False
    modes: ClassVar[tuple[str, ...]] = LAYER

    def hidden(self, case: Case) -> int:
        """Its inner width."""
        return 4 * case.dim

    def build(self, shared: Shared, distribution: str, mode: str, spelling: str) -> Work:
        """The layer with fused AdamW."""

        def optimizers(layer: nn.Module) -> tuple[Sequence[Stepper], Callable[[], None]]:
            return [torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, fused=True)], _nothing

        layers = [DenseLayer(shared, self.hidden(shared.case)) for _ in shared.routers]
        return LayerWork(shared, distribution, mode, layers, optimizers)

    def temporary_bytes(self, case: Case, mode: str, spelling: str = "") -> int:
        """Its parameters, gradients and moments, and its hidden layer."""
        weights = 8 * case.dim * self.hidden(case) * case.itemsize
        return weights + 6 * case.tokens * self.hidden(case) * case.itemsize

    def algorithmic_bytes(self, case: Case, mode: str, spelling: str, distinct: float) -> int:
        """Of its weights."""
        return traffic.dense_bytes(case, mode, self.hidden(case))


class DenseActive(Dense):
    """A feed-forward layer with as many hidden neurons as a token retrieves experts."""

    name = "dense-active"

    def hidden(self, case: Case) -> int:
        """H · K."""
        return case.per_token


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        OursDense(),
        OursFused(),
        OursInGraph(),
        Plain(),
        Bags(),
        Compiled(),
        Published(),
        Dense(),
        DenseActive(),
    )
}
