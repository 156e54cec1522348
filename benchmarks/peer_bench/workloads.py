"""The workloads. `SETUPS` has a function for each provider and mode that makes one.

A workload is two functions: `prepare` makes the arguments of a call, and `run` is the call. Only
`run` is timed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import peer
from peer_bench import check, layers
from peer_bench.cases import EXPERTS, LAYER, Entry
from peer_bench.problem import Problem

NO_LEARNING_RATE = 1e-12

Arguments = tuple[Any, ...]
# Begins a turn and returns its optimizers. The end of the turn closes the stack.
Open = Callable[[ExitStack], Sequence[Optimizer]]


@dataclass
class Workload:
    """The call of a provider in one mode.

    Attributes:
        problem: the tensors of the case.
        prepare: makes the arguments of the call with an index.
        run: the call. What it returns is freed after the timer stops.
        check: compares a call with float64.
        open: begins a turn.
        modules: lose their gradients after each call.
        optimizers: of the current turn.
        is_back_to_back: whether the calls of a turn are timed together.
    """

    problem: Problem
    prepare: Callable[[int], Arguments]
    run: Callable[..., object]
    check: Callable[[], None]
    open: Open = lambda _: ()
    modules: Sequence[nn.Module] = ()
    optimizers: list[Optimizer] = field(default_factory=list)
    is_back_to_back: bool = False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Optimizers live for one turn, so that providers fit into memory one after the other."""
        with ExitStack() as stack:
            try:
                self.optimizers[:] = self.open(stack)
                yield
            finally:
                self.optimizers.clear()
                self.drop_gradients()

    def freeze_parameters(self) -> None:
        """Makes steps too small to change a parameter, though they do all their work.

        Otherwise the steps of one provider would train the parameters that the next ones are
        checked with, until hidden values are so large that their GELU in float32 is zero.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = NO_LEARNING_RATE

    def drop_gradients(self) -> None:
        for module in self.modules:
            module.zero_grad(set_to_none=True)
        for parameter in self.problem.parameters():
            parameter.grad = None


Setup = Callable[[Problem, Entry], Workload]


def compile_whole(function: Any) -> Any:
    """Compiles all of a function for the shapes it gets; an error if a part would run eagerly."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _run_forward(call: Any, *inputs: Any) -> Any:
    with torch.no_grad():
        return call(*inputs)


def set_up_layer(
    problem: Problem,
    entry: Entry,
    make_layer: Callable[..., Any],
    make_optimizers: Callable[[nn.Module, ExitStack], Sequence[Optimizer]],
) -> Workload:
    """Whole layers, one for each router. In training x requires a gradient, as inside a network."""
    made = [make_layer(problem, router, entry.variant) for router in problem.routers]
    calls = [compile_whole(layer) for layer in made] if entry.provider == "compiled" else made
    learns = entry.mode != "forward"
    optimizers: list[Optimizer] = []

    def open_turn(stack: ExitStack) -> Sequence[Optimizer]:
        for layer in made:
            layer.train(learns)
        return make_optimizers(made[0], stack) if entry.mode in ("step", "optimizer") else ()

    def prepare(index: int) -> Arguments:
        call, x = calls[index % len(calls)], problem.get_x(index)
        ids = problem.get_ids(entry.distribution, index)
        if learns:
            return call, x.detach().requires_grad_(), ids
        if ids is None and isinstance(call, layers.PeerLayer):
            return call.peer, x  # for one token, the wrapper is no small part
        return call, x, ids

    def backward(call: Any, *inputs: Any) -> None:
        call(*inputs)[0].backward(problem.grad_out)

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def step(*arguments: Any) -> None:
        backward(*arguments)
        update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def prepare_update(index: int) -> Arguments:
        _, *inputs = prepare(index)
        backward(made[0], *inputs)
        return ()

    def check_all() -> None:
        ids = problem.get_ids(entry.distribution, 0)
        for layer, call in zip(made, calls, strict=True):
            if isinstance(layer, layers.DenseLayer):
                check.check_dense(problem, layer)
            else:
                check.check_layer(problem, layer, call, ids, optimizers, learns)

    run: dict[str, Callable[..., object]] = {
        "forward": _run_forward,
        "backward": backward,
        "step": step,
        "optimizer": update,
    }
    make_arguments = prepare_update if entry.mode == "optimizer" else prepare
    return Workload(
        problem, make_arguments, run[entry.mode], check_all, open_turn, made, optimizers
    )


class Graph:
    """A layer's forward pass for inputs of one shape, captured in a CUDA graph.

    Replays read copies of the input and of the ids, which may be None for the router's own.
    """

    def __init__(self, layer: nn.Module, x: Tensor, ids: Tensor | None) -> None:
        self.x = x.clone()
        self.ids = None if ids is None else ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            # Libraries set themselves up in their first calls, which cannot be captured.
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                for _ in range(3):
                    layer(self.x, self.ids)
            torch.cuda.current_stream().wait_stream(warm_up)
            with torch.cuda.graph(self.graph):
                self.out, self.chosen = layer(self.x, self.ids)

    def __call__(self, x: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        self.x.copy_(x)
        if self.ids is not None and ids is not None:
            self.ids.copy_(ids)
        self.graph.replay()
        return self.out, self.chosen


def set_up_graph(problem: Problem, entry: Entry) -> Workload:
    """Forward passes replayed from CUDA graphs in turn: one for each router, or for each input.

    A graph reads the input that it was captured with, so nothing happens between two replays.
    Events around a single replay would take about as long as the replay.
    """
    routers = problem.routers if len(problem.routers) > 1 else problem.routers * problem.inputs
    made = [layers.PeerLayer(problem, router, entry.variant) for router in routers]
    graphs: list[Graph] = []

    def open_turn(stack: ExitStack) -> Sequence[Optimizer]:
        stack.callback(graphs.clear)
        for index, layer in enumerate(made):
            ids = problem.get_ids(entry.distribution, index)
            graphs.append(Graph(layer.eval(), problem.get_x(index), ids))
        return ()

    def prepare(index: int) -> Arguments:
        return (graphs[index % len(graphs)].graph,)

    def check_all() -> None:
        ids = problem.get_ids(entry.distribution, 0)
        for layer, graph in zip(made, graphs, strict=True):
            check.check_layer(problem, layer, graph, ids, (), learns=False)

    def replay(graph: Any) -> None:
        graph.replay()

    return Workload(problem, prepare, replay, check_all, open_turn, made, is_back_to_back=True)


def set_up_experts(
    problem: Problem,
    entry: Entry,
    experts: Any,
    table: Tensor,
    weights_dtype: torch.dtype = torch.float32,
    open_turn: Open = lambda _: (),
) -> Workload:
    """The experts alone: "experts-forward", or "experts-backward", the backward pass alone."""
    learns = entry.mode == "experts-backward"
    weights = problem.weights.flatten(-2).to(weights_dtype)
    optimizers: list[Optimizer] = []

    def make_inputs(index: int) -> Any:
        ids = problem.get_ids(entry.distribution, index)
        ids = problem.retrieve(index) if ids is None else ids
        leaves = (t.detach().requires_grad_(learns) for t in (problem.get_x(index), weights))
        return *leaves, ids.flatten(-2), table

    def prepare(index: int) -> Arguments:
        inputs = make_inputs(index)
        return (experts(*inputs), inputs) if learns else (experts, *inputs)

    def backward(out: Tensor, _: object) -> None:
        out.backward(problem.grad_out)

    def check_one() -> None:
        check.check_experts(problem, experts, make_inputs(0), optimizers, learns)

    run = backward if learns else _run_forward
    return Workload(problem, prepare, run, check_one, open_turn, (), optimizers)


def _set_up_peer_experts(problem: Problem, entry: Entry, *, sparse_grad: bool = True) -> Workload:
    experts = functools.partial(
        peer.functional.expert_mlp, sparse_grad=sparse_grad, frozen=problem.frozen
    )
    return set_up_experts(problem, entry, experts, problem.weight)


def _set_up_fused_experts(
    problem: Problem, entry: Entry, *, stochastic_rounding: bool = True
) -> Workload:
    """A pool in whose backward pass row-wise Adagrad updates the table."""
    pool = problem.make_pool()
    pool.weight = problem.weight

    def experts(x: Tensor, weights: Tensor, ids: Tensor, _: Tensor) -> Any:
        return pool(x, weights, ids)

    open_turn = functools.partial(
        layers.fused_row_wise, pool, stochastic_rounding=stochastic_rounding
    )
    return set_up_experts(problem, entry, experts, pool.weight, open_turn=open_turn)


def _set_up_plain_experts(problem: Problem, entry: Entry) -> Workload:
    experts: Any = layers.VARIANTS[entry.variant]
    if entry.provider == "compiled":
        experts = compile_whole(experts)
    table = problem.rows if entry.variant in layers.VARIANTS_OF_ROWS else problem.weight
    return set_up_experts(problem, entry, experts, table, problem.dtype)


def _set_up_choice(
    entry: Entry,
    problem: Problem,
    function: Any,
    make_inputs: Callable[[int], Arguments],
    make_queries: Callable[[Tensor], Tensor],
    keys: tuple[Tensor, Tensor],
) -> Workload:
    function = compile_whole(function) if entry.provider == "compiled" else function

    def prepare(index: int) -> Arguments:
        return function, *make_inputs(index), problem.case.k

    def check_one() -> None:
        check.check_retrieval(problem, _run_forward(*prepare(0)), make_queries, keys)

    return Workload(problem, prepare, _run_forward, check_one)


def set_up_routing(problem: Problem, entry: Entry, function: Any) -> Workload:
    """From inputs to ids: the product with the query weights, then retrieval.

    There is no normalisation, because it can be folded into the weights after training.
    """
    first = problem.routers[0]

    def make_inputs(index: int) -> Arguments:
        router = problem.routers[index % len(problem.routers)]
        return problem.get_x(index), router.query.weight, router.row_keys, router.col_keys

    def make_queries(tokens: Tensor) -> Tensor:
        query = problem.get_x(0)[tokens].double() @ first.query.weight.detach().double().T
        return query.unflatten(-1, (first.heads, 2, -1))

    keys = first.row_keys, first.col_keys
    return _set_up_choice(entry, problem, function, make_inputs, make_queries, keys)


def set_up_router(problem: Problem, entry: Entry) -> Workload:
    """The router in training: weights and ids forward, and all gradients backward.

    "products" does the matrix products alone: the queries, and the scores of all keys.
    """
    router = problem.routers[0]
    weights = router.query.weight, router.row_keys, router.col_keys
    grad_weights = problem.weights.flip(-1) - problem.weights
    grad_scores = torch.randn(2, problem.case.tokens, problem.case.heads, problem.case.root)
    grad_scores = grad_scores.to(problem.device, problem.dtype)

    def run_router(x: Tensor) -> None:
        router(x)[0].backward(grad_weights)

    def run_products(x: Tensor) -> None:
        torch.autograd.backward(layers.score_keys(x, *weights), grad_scores.unbind(0))

    def prepare(index: int) -> Arguments:
        router.train()
        return (problem.get_x(index).detach().requires_grad_(),)

    def check_one() -> None:
        if entry.provider == "products":
            check.check_scores(problem, *weights)
        else:
            router.train()
            check.check_router(problem, router, grad_weights)

    run = run_products if entry.provider == "products" else run_router
    return Workload(problem, prepare, run, check_one, modules=(router,))


def set_up_retrieval(
    problem: Problem, entry: Entry, function: Any, dim_key: int = 0, from_scores: bool = False
) -> Workload:
    """From queries to ids, products with the keys included; or from the scores of both halves."""
    case, width = problem.case, dim_key or problem.case.dim_key
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(problem.device, problem.dtype)

    keys = draw(case.root, width // 2), draw(case.root, width // 2)
    queries = [draw(case.tokens, case.heads, width) for _ in range(4)]

    def make_inputs(index: int) -> Arguments:
        query = queries[index % len(queries)]
        if not from_scores:
            return query, *keys
        halves = query.chunk(2, dim=-1)
        return tuple(half @ part.T for half, part in zip(halves, keys, strict=True))

    def make_queries(tokens: Tensor) -> Tensor:
        return queries[0][tokens].double().unflatten(-1, (2, -1))

    return _set_up_choice(entry, problem, function, make_inputs, make_queries, keys)


def _layers(
    modes: Sequence[str], make_layer: Callable[..., nn.Module], make_optimizers: Any
) -> dict[str, Setup]:
    options = {"make_layer": make_layer, "make_optimizers": make_optimizers}
    return dict.fromkeys(modes, functools.partial(set_up_layer, **options))


def _choices(retrieve: Any, select: Setup) -> dict[str, Setup]:
    route = functools.partial(layers.route, retrieve=retrieve)
    return {
        "routing": functools.partial(set_up_routing, function=route),
        "retrieval": functools.partial(set_up_retrieval, function=retrieve),
        "selection": select,
    }


# peer has no operator for selection alone. Its workload is retrieval with queries of 4 features:
# the products are then small, and count against it. Plain PyTorch starts from the same scores.
_topk: Any = peer.functional.product_key_topk
_peer_selection = functools.partial(set_up_retrieval, function=_topk, dim_key=4)
_plain_selection = functools.partial(
    set_up_retrieval, function=layers.select, dim_key=4, from_scores=True
)
_plain: dict[str, Setup] = {
    **_layers(LAYER, layers.PlainLayer, layers.dense_adam),
    **dict.fromkeys(EXPERTS, _set_up_plain_experts),
    **_choices(layers.retrieve, _plain_selection),
}
_with_optimizer = (*LAYER, "optimizer")
_dense_grad = functools.partial(layers.PeerLayer, sparse_grad=False)
_fused_to_nearest = functools.partial(layers.fused_row_wise, stochastic_rounding=False)
_dense_4d = functools.partial(layers.DenseLayer, get_hidden=lambda case: 4 * case.dim)
_dense_active = functools.partial(layers.DenseLayer, get_hidden=lambda case: case.per_token)

SETUPS: dict[str, dict[str, Setup]] = {
    "peer": {
        **_layers(_with_optimizer, layers.PeerLayer, layers.row_wise),
        **dict.fromkeys(EXPERTS, _set_up_peer_experts),
        **_choices(_topk, _peer_selection),
        "router": set_up_router,
    },
    "peer-dense-grad": {
        **_layers(("backward", "step", "optimizer"), _dense_grad, layers.dense_adam),
        "experts-backward": functools.partial(_set_up_peer_experts, sparse_grad=False),
    },
    "peer-fused": {
        **_layers(("step",), layers.PeerLayer, layers.fused_row_wise),
        "experts-backward": _set_up_fused_experts,
    },
    "peer-fused-nearest": {
        **_layers(("step",), layers.PeerLayer, _fused_to_nearest),
        "experts-backward": functools.partial(_set_up_fused_experts, stochastic_rounding=False),
    },
    "peer-graph": {"forward": set_up_graph},
    "eager": {**_plain, **_layers(("optimizer",), layers.PlainLayer, layers.dense_adam)},
    "embedding_bag": {
        **_layers(_with_optimizer, layers.PlainLayer, layers.sparse_adam),
        **dict.fromkeys(EXPERTS, _set_up_plain_experts),
    },
    "compiled": _plain,
    "PEER-pytorch": _layers(LAYER, layers.PublishedLayer, layers.dense_adam),
    "dense-4d": _layers(LAYER, _dense_4d, layers.dense_adamw),
    "dense-active": _layers(LAYER, _dense_active, layers.dense_adamw),
    "products": {"router": set_up_router},
}
