"""`torch.compile`: one graph for any number of tokens, and the gradients of eager."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from layers import OPTIONS, differing, draw, make_layer, step
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peer

# No two sizes are equal, because equal sizes in the first call would share one symbol.
SIZES = (10, 19, 23)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def experts(x, weights, indices, table):
    out = torch.ops.peer.expert_mlp(x, weights.softmax(-1), indices, table, "gelu", False)[0]
    return out.square().sum()


def retrieval(query, row_keys, col_keys):
    scores, indices = torch.ops.peer.product_key_topk(query * 2, row_keys, col_keys, 4)
    return scores.sigmoid().sum() + (indices % 2).sum()


def layer(x, query, row_keys, col_keys, table):
    scores, indices = torch.ops.peer.product_key_topk(query, row_keys, col_keys, 4)
    out = torch.ops.peer.expert_mlp(
        x, scores.softmax(-1).flatten(1), indices.flatten(1), table, "silu", False
    )[0]
    return out.square().sum()


def assert_one_graph_with_the_gradients_of_eager(function, make_arguments, backend) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for tokens in SIZES:
        ours, theirs = make_arguments(tokens), make_arguments(tokens)
        result, expected = compiled(*ours), function(*theirs)
        result.backward()
        expected.backward()
        torch.testing.assert_close(result, expected)
        for a, b in zip(ours, theirs, strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_experts_compile_to_one_graph_for_three_sizes(make_expert_inputs, backend, glu):
    def make(tokens):
        return make_expert_inputs(tokens=tokens, glu=glu).requiring_grad()

    assert_one_graph_with_the_gradients_of_eager(experts, make, backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_retrieval_compiles_to_one_graph_for_three_sizes(make_retrieval_inputs, backend):
    def make(tokens):
        return make_retrieval_inputs(tokens=tokens).requiring_grad()

    assert_one_graph_with_the_gradients_of_eager(retrieval, make, backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_retrieval_and_experts_compile_together(make_retrieval_inputs, make_expert_inputs, backend):
    def make(tokens):
        keys = make_retrieval_inputs(tokens=tokens).requiring_grad()
        pool = make_expert_inputs(tokens=tokens, experts=42).requiring_grad()
        return [pool.x, *keys, pool.table]

    assert_one_graph_with_the_gradients_of_eager(layer, make, backend)


@pytest.mark.parametrize("tokens", [0, 1])
def test_zero_tokens_and_one_compile(make_expert_inputs, tokens):
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    ours, theirs = (make_expert_inputs(tokens=tokens, glu=True).requiring_grad() for _ in range(2))
    compiled(*ours).backward()
    experts(*theirs).backward()
    for a, b in zip(ours.differentiable(), theirs.differentiable(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_frozen_table_compiles(make_expert_inputs):
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    ours, theirs = make_expert_inputs(glu=True), make_expert_inputs(glu=True)
    ours.x.requires_grad_()
    theirs.x.requires_grad_()
    compiled(*ours).backward()
    experts(*theirs).backward()
    torch.testing.assert_close(ours.x.grad, theirs.x.grad)
    assert ours.table.grad is None


def test_compiles_under_autocast(make_expert_inputs):
    def mixed(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return experts(*inputs)

    def make(tokens):
        return make_expert_inputs(tokens=tokens, glu=True).requiring_grad()

    assert_one_graph_with_the_gradients_of_eager(mixed, make, "aot_eager")


# Torch adds the traceback of the forward call as a separate warning.
@pytest.mark.filterwarnings("ignore:Error detected in Peer:UserWarning")
def test_sparse_gradients_are_refused_by_sentence(make_expert_inputs):
    def loss(*inputs):
        return torch.ops.peer.expert_mlp(*inputs, "gelu", True)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"peer::expert_mlp: sparse_grad=True .*eager"):
        compiled(*make_expert_inputs().requiring_grad()).backward()


def test_sparse_grad_compiles_where_the_table_is_frozen(make_expert_inputs):
    def loss(*inputs):
        return torch.ops.peer.expert_mlp(*inputs, "gelu", True)[0].sum()

    ours, theirs = make_expert_inputs(), make_expert_inputs()
    ours.x.requires_grad_()
    theirs.x.requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*ours).backward()
    loss(*theirs).backward()
    torch.testing.assert_close(ours.x.grad, theirs.x.grad)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_compiled_autograd_gives_the_gradients_of_eager(
    make_expert_inputs, make_retrieval_inputs, sparse_grad
):
    def run(keys, pool):
        scores, indices = torch.ops.peer.product_key_topk(*keys, 3)
        out = torch.ops.peer.expert_mlp(
            pool.x,
            scores.softmax(-1).flatten(1),
            indices.flatten(1),
            pool.table,
            "gelu",
            sparse_grad,
        )[0]
        out.square().sum().backward()
        return [*keys, pool.x, pool.table]

    def make():
        return (
            make_retrieval_inputs().requiring_grad(),
            make_expert_inputs(experts=42, glu=True).requiring_grad(),
        )

    theirs = run(*make())
    compiler = torch.compile(backend="eager", fullgraph=True)
    if sparse_grad:
        with (
            torch._dynamo.compiled_autograd._enable(compiler),
            pytest.raises(Exception, match=r"peer::expert_mlp: sparse_grad=True .*eager"),
        ):
            run(*make())
        return
    with torch._dynamo.compiled_autograd._enable(compiler):
        ours = run(*make())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# --- the whole layer -----------------------------------------------------------------------------

# No length equals a size of the layer, such as its heads, because that could add a graph.
LENGTHS = (7, 9, 13)
DENSE = [name for name in OPTIONS if name != "sparse"]


def compile_copy(layer, backend="aot_eager", **options):
    """A copy of the layer, a compiled call that marks the length as dynamic, and the graph counter.

    Without the mark, the first length would be a constant.
    """
    counter = CompileCounterWithBackend(backend)
    ours = copy.deepcopy(layer)
    compiled = torch.compile(ours, fullgraph=True, backend=counter, **options)

    def call(x, padding_mask):
        for tensor in (x,) if padding_mask is None else (x, padding_mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        return compiled(x, padding_mask)

    return ours, call, counter


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("training", [True, False], ids=["training-padded", "evaluation"])
def test_a_layer_is_one_graph_for_all_lengths(name, training):
    layer = make_layer(name).train(training)
    ours, call, counter = compile_copy(layer)
    for length in LENGTHS:
        inputs = draw(layer, length, masked=training)
        assert differing(step(ours, *inputs, call=call), step(layer, *inputs)) == []
    assert counter.frame_count == 1


def test_a_layer_trains_under_inductor():
    layer = make_layer("gated", key_norm=True)
    ours, call, counter = compile_copy(layer, "inductor")
    for length in LENGTHS:
        inputs = draw(layer, length)
        result, expected = step(ours, *inputs, call=call), step(layer, *inputs)
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_a_layer_with_folded_norms_infers_under_inductor():
    layer = make_layer("bfloat16_tables", key_norm=True).eval()
    layer = peer.fold_key_norm_(peer.fold_query_norm_(layer))
    _, call, counter = compile_copy(layer, "inductor")
    with torch.no_grad():
        for length in LENGTHS:
            inputs = draw(layer, length, masked=False)
            torch.testing.assert_close(call(*inputs), layer(*inputs))
    assert counter.frame_count == 1


def test_lengths_are_dynamic_from_the_first_call_where_dynamic_is_asked_for():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in LENGTHS:  # a second graph would be an error
        compiled(*draw(layer, length)).sum().backward()


def test_lengths_are_dynamic_from_the_second_on_where_nothing_is_said():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for length in LENGTHS[:2]:
            compiled(*draw(layer, length)).sum().backward()
    for length in *LENGTHS, 19, 23:
        compiled(*draw(layer, length)).sum().backward()


def test_each_mode_has_one_graph():
    layer = make_layer()
    ours, call, counter = compile_copy(layer)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for training in True, False, True, False:
            ours.train(training)
            layer.train(training)
            for length in LENGTHS[:2]:
                inputs = draw(layer, length)
                assert torch.equal(call(*inputs), layer(*inputs))
    assert counter.frame_count == 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["paper", "layer", "bfloat16_tables"])
def test_a_layer_compiles_under_autocast(name, training):
    layer = make_layer(name).train(training)
    ours, call, counter = compile_copy(layer)

    def mixed(function):
        def autocasting(x, padding_mask):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x, padding_mask)

        return autocasting

    for length in LENGTHS[:2]:
        inputs = draw(layer, length)
        result = step(ours, *inputs, call=mixed(call))
        assert result["out"].dtype == torch.bfloat16
        assert differing(result, step(layer, *inputs, call=mixed(layer))) == []
    assert counter.frame_count == 1


def checkpointed(function):
    """A call that recomputes its activations in the backward pass."""
    return lambda x, padding_mask: checkpoint(function, x, padding_mask, use_reentrant=False)


@pytest.mark.parametrize("name", ["paper", "layer", "bfloat16_tables"])
def test_a_checkpoint_compiles_with_the_layer(name):
    layer = make_layer(name)
    ours = copy.deepcopy(layer)
    call = torch.compile(checkpointed(ours), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in LENGTHS[:2]:
        inputs = draw(layer, length)
        assert differing(step(ours, *inputs, call=call), step(layer, *inputs)) == []


def assert_a_checkpoint_around_it_keeps_the_gradients(layer, call, ours):
    inputs = draw(layer, 7)
    found = differing(step(ours, *inputs, call=checkpointed(call)), step(layer, *inputs))
    # A checkpoint outside of a compiled graph runs the layer and its statistics twice.
    moved_twice = [f"router.norm.{name}" for name, _ in layer.router.norm.named_buffers()]
    assert found == sorted(moved_twice)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_around_the_layer_keeps_its_gradients(name):
    layer = make_layer(name)
    ours = copy.deepcopy(layer)
    assert_a_checkpoint_around_it_keeps_the_gradients(layer, ours, ours)


@pytest.mark.parametrize("name", ["paper", "layer", "bfloat16_tables"])
def test_a_checkpoint_around_the_compiled_layer_keeps_its_gradients(name):
    layer = make_layer(name)
    ours = copy.deepcopy(layer)
    call = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_a_checkpoint_around_it_keeps_the_gradients(layer, call, ours)


class Model(torch.nn.Module):
    """A layer between two modules that a compiler can optimise."""

    def __init__(self, layer: peer.PEER) -> None:
        super().__init__()
        self.before = torch.nn.Linear(layer.router.dim, layer.router.dim)
        self.layer = layer
        self.after = torch.nn.Linear(layer.router.dim, layer.router.dim)

    def forward(self, x, padding_mask=None):
        return self.after(self.layer(self.before(x).tanh(), padding_mask).tanh())


def make_model(name: str = "sparse", **options) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Model(make_layer(name, **options))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_pool_with_sparse_gradients_runs_eagerly_in_a_compiled_model(backend, training):
    model = make_model().train(training)
    ours, counter = copy.deepcopy(model), CompileCounterWithBackend(backend)
    compiled = torch.compile(ours, backend=counter, dynamic=True)
    graphs = []
    for length in LENGTHS:
        inputs = draw(model.layer, length)
        result, expected = step(ours, *inputs, call=compiled), step(model, *inputs)
        # Torch empties a graph that it starts anew, such as to compute with a number of Python.
        graphs.append(sum(len(module.graph.nodes) > 0 for module in counter.graphs))
        assert result["gradient of layer.experts.weight"].is_sparse
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=1e-4)
    # Before the layer, in it before and after the pool, and after the layer.
    assert 2 <= graphs[0] <= 4
    assert graphs == graphs[:1] * len(LENGTHS)


def test_functions_with_sparse_gradients_break_the_graph(make_expert_inputs):
    def loss(x, *rest):
        out = peer.functional.expert_mlp(x.tanh(), *rest, sparse_grad=True)
        return out.tanh().square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    ours, theirs = (make_expert_inputs().requiring_grad() for _ in range(2))
    torch.compile(loss, backend=counter)(*ours).backward()
    loss(*theirs).backward()
    assert counter.frame_count == 2
    for a, b in zip(ours.differentiable(), theirs.differentiable(), strict=True):
        assert a.grad.is_sparse == b.grad.is_sparse
        torch.testing.assert_close(a.grad.to_dense(), b.grad.to_dense())


def test_a_sparse_pool_under_autocast_runs_as_in_eager_mode():
    model = make_model(glu=False)
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend="aot_eager")

    def mixed(function):
        def autocasting(x, padding_mask):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x, padding_mask)

        return autocasting

    inputs = draw(model.layer, 7)
    result, expected = (
        step(ours, *inputs, call=mixed(compiled)),
        step(model, *inputs, call=mixed(model)),
    )
    assert result["out"].dtype == torch.bfloat16
    assert differing(result, expected) == []


@pytest.mark.parametrize("case", ["frozen table", "no grad mode"])
def test_where_no_sparse_gradient_is_recorded_the_model_is_one_graph(case):
    model = make_model()
    model.layer.experts.weight.requires_grad_(case != "frozen table")
    inputs = draw(model.layer, 7)
    with torch.set_grad_enabled(case != "no grad mode"):
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        assert out.requires_grad == (case == "frozen table")


def test_a_whole_graph_with_a_sparse_gradient_is_refused_by_its_reason():
    layer = make_layer("sparse")
    ours, call, _ = compile_copy(layer)
    with pytest.raises(
        Exception, match=r"peer::expert_mlp: .*sparse_grad=True .*use sparse_grad=F"
    ):
        step(ours, *draw(layer, 7), call=call)


def test_freezing_and_unfreezing_the_table_compiles_again():
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    inputs = draw(model.layer, 7)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for requires_grad in True, False, True:
            model.layer.experts.weight.requires_grad_(requires_grad)
            model.zero_grad()
            compiled(*inputs).sum().backward()
            assert (model.layer.experts.weight.grad is not None) == requires_grad


def test_a_checkpoint_compiles_around_a_sparse_pool():
    layer = make_layer("sparse", query_norm="layer")
    ours = copy.deepcopy(layer)
    call = torch.compile(checkpointed(ours), backend="aot_eager")
    inputs = draw(layer, 7)
    assert differing(step(ours, *inputs, call=call), step(layer, *inputs)) == []


def test_a_layer_with_sparse_gradients_compiles_for_inference():
    layer = make_layer("sparse").eval()
    _, call, counter = compile_copy(layer)
    with torch.no_grad():
        for length in LENGTHS[:2]:
            inputs = draw(layer, length)
            assert torch.equal(call(*inputs), layer(*inputs))
    assert counter.frame_count == 1
