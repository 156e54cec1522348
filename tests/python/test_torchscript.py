"""TorchScript: compile, save, load in a new process, and run forward and backward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from layers import OPTIONS, differing, draw, make_layer, step
from torch import Tensor, nn

import peer
from peer.functional import ACTIVATIONS, SCORES
from peer.modules.norms import QUERY_NORMS


class Layer(nn.Module):
    """A model that calls the operators for retrieval and experts."""

    def __init__(self, activation: str, glu: bool, sparse_grad: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.activation = activation
        self.sparse_grad = sparse_grad
        self.row_keys, self.col_keys = parameter(7, 4), parameter(6, 4)
        self.table = parameter(42, 3 if glu else 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores, indices = torch.ops.peer.product_key_topk(
            x.unsqueeze(1), self.row_keys, self.col_keys, 4
        )
        out, _, _ = torch.ops.peer.expert_mlp(
            x,
            scores.softmax(-1).flatten(1),
            indices.flatten(1),
            self.table,
            self.activation,
            self.sparse_grad,
        )
        return out


class FunctionalLayer(Layer):
    """The same model with peer.functional and leading dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        scores, indices = peer.functional.product_key_topk(
            x.flatten(0, -2).unsqueeze(1), self.row_keys, self.col_keys, 4
        )
        pairs = list(x.shape[:-1])
        pairs.append(4)
        return peer.functional.expert_mlp(
            x,
            scores.softmax(-1).view(pairs),
            indices.view(pairs),
            self.table,
            self.activation,
            self.sparse_grad,
        )


IN_A_NEW_PROCESS = """
import json, sys, torch
import peer
layer = torch.jit.load(sys.argv[1])
case = torch.load(sys.argv[2])
same = []
for _ in range(4):  # the profiling executor specialises after some runs
    layer.zero_grad()
    x = case["x"].clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    gradients = {name: p.grad.to_dense() for name, p in layer.named_parameters()}
    same.append(torch.equal(out, case["out"]) and torch.equal(x.grad, case["grad_x"])
                and all(torch.equal(g, case["gradients"][name]) for name, g in gradients.items())
                and gradients.keys() == case["gradients"].keys())
print(json.dumps(same))
"""


def inputs(tokens: int = 9) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))


def results(layer: nn.Module, x: Tensor) -> dict:
    """Output and gradients of one step in this process."""
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.square().sum().backward()
    gradients = {name: p.grad.to_dense() for name, p in layer.named_parameters()}
    return {"x": x, "out": out.detach(), "grad_x": leaf.grad, "gradients": gradients}


def test_a_saved_layer_trains_the_same_in_a_new_process(tmp_path, run_python, glu):
    layer = Layer("silu", glu, sparse_grad=False)
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    torch.save(results(layer, inputs()), tmp_path / "case.pt")
    same = run_python(IN_A_NEW_PROCESS, tmp_path / "layer.pt", tmp_path / "case.pt")
    assert same == [True] * 4


@pytest.mark.long
def test_a_saved_layer_with_sparse_gradients_trains_the_same_in_a_new_process(tmp_path, run_python):
    layer = Layer("gelu", glu=True, sparse_grad=True)
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    torch.save(results(layer, inputs()), tmp_path / "case.pt")
    same = run_python(IN_A_NEW_PROCESS, tmp_path / "layer.pt", tmp_path / "case.pt")
    assert same == [True] * 4


def test_scripting_gives_the_results_of_eager(activation, glu):
    layer = Layer(activation, glu, sparse_grad=False)
    scripted = torch.jit.script(layer)
    for tokens in (9, 9, 9, 0, 3):
        torch.testing.assert_close(scripted(inputs(tokens)), layer(inputs(tokens)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(9, 8), (3, 3, 8)], ids=str)
def test_the_functional_form_can_be_scripted(shape, glu):
    layer = FunctionalLayer("gelu", glu, sparse_grad=False)
    x = inputs().view(shape)
    expected = Layer("gelu", glu, sparse_grad=False)(inputs()).view(shape)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected, rtol=0, atol=0)


def test_a_traced_layer_gives_the_results_of_eager_for_another_number_of_tokens():
    layer = Layer("gelu", glu=True, sparse_grad=False)
    traced = torch.jit.trace(layer, inputs(4))
    torch.testing.assert_close(traced(inputs(9)), layer(inputs(9)), rtol=0, atol=0)


def test_a_bad_argument_keeps_its_sentence():
    layer = torch.jit.script(Layer("tanh", glu=False, sparse_grad=False))
    with pytest.raises(Exception, match=r"peer::expert_mlp: expected activation gelu.* got 'tanh'"):
        layer(inputs())


# --- the whole layer -----------------------------------------------------------------------------


def test_the_layers_here_have_every_option_between_them():
    layers = [make_layer(name) for name in OPTIONS]
    assert {layer.experts.activation for layer in layers} == set(ACTIVATIONS)
    assert {layer.router.scores for layer in layers} == set(SCORES)
    assert {layer.router.query_norm for layer in layers} == set(QUERY_NORMS)
    for part, option in (
        ("router", "query_bias"),
        ("router", "share_keys"),
        ("router", "key_norm"),
        ("experts", "glu"),
        ("experts", "sparse_grad"),
        ("experts", "zero_init_out"),
    ):
        assert {getattr(getattr(layer, part), option) for layer in layers} == {False, True}
    assert any(layer.dropout for layer in layers)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_scripted_layer_steps_as_in_eager(name, training):
    layer = make_layer(name).train(training)
    scripted = torch.jit.script(copy.deepcopy(layer))
    # The profiling executor specialises after a few runs, also for the mask.
    for length, masked in (7, True), (7, True), (7, False), (2, False), (11, True):
        inputs = draw(layer, length, masked)
        assert differing(step(scripted, *inputs), step(layer, *inputs)) == []


LAYERS_IN_A_NEW_PROCESS = """
import json, pathlib, sys, torch
sys.path.insert(0, sys.argv[1])
from layers import differing, step
wrong = {}
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.pt")):
    layer, case = torch.jit.load(path), torch.load(path.with_suffix(".case"))
    if case["frozen"]:
        found = [] if not list(layer.parameters()) else ["parameters"]
        with torch.no_grad():
            for inputs, expected in case["steps"]:
                torch.testing.assert_close(layer(*inputs), expected["out"])
    else:
        found = [] if layer.training == case["training"] else ["training"]
        for inputs, expected in case["steps"]:
            found += differing(step(layer, *inputs), expected)
    wrong[path.stem] = found
print(json.dumps(wrong))
"""


@pytest.mark.long
def test_saved_layers_step_the_same_in_a_new_process(tmp_path, run_python):
    expected = {}
    for name in OPTIONS:
        for training in True, False:
            layer = make_layer(name).train(training)
            kind = "training" if training else "evaluation"
            torch.jit.script(layer).save(str(tmp_path / f"{name} in {kind}.pt"))
            cases = {f"{name} in {kind}": False}
            if not training:
                frozen = torch.jit.freeze(torch.jit.script(layer))
                frozen.save(str(tmp_path / f"{name} frozen.pt"))
                cases[f"{name} frozen"] = True
            drawn = [draw(layer, length, masked) for length, masked in ((7, True), (5, False))]
            steps = [(inputs, step(layer, *inputs)) for inputs in drawn]
            for case, is_frozen in cases.items():
                record = {"frozen": is_frozen, "training": training, "steps": steps}
                torch.save(record, tmp_path / f"{case}.case")
            expected |= {case: [] for case in cases}
    wrong = run_python(LAYERS_IN_A_NEW_PROCESS, Path(__file__).parent, tmp_path)
    assert wrong == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_a_frozen_layer_gives_the_results_of_eager(name):
    layer = make_layer(name).eval()
    frozen = torch.jit.freeze(torch.jit.script(layer))
    assert not list(frozen.parameters())
    with torch.no_grad():
        for length, masked in (7, True), (7, True), (7, False), (1, False), (0, False):
            inputs = draw(layer, length, masked)
            torch.testing.assert_close(frozen(*inputs), layer(*inputs))


def test_a_layer_with_folded_norms_scripts_and_freezes():
    layer = make_layer("key_norm").eval()
    inputs = draw(layer, 7)
    expected = layer(*inputs)
    scripted = torch.jit.script(peer.fold_key_norm_(peer.fold_query_norm_(layer)))
    torch.testing.assert_close(scripted(*inputs), expected)
    frozen = torch.jit.freeze(scripted)
    torch.testing.assert_close(frozen(*inputs), expected)
    assert "batch_norm" not in str(scripted.inlined_graph)
    assert "rsqrt" not in str(frozen.inlined_graph)


class Stack(nn.Module):
    """One layer after the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_saved_pool_has_its_table_and_no_views(tmp_path):
    layer = make_layer("gated")
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    experts = torch.jit.load(str(tmp_path / "layer.pt")).experts
    assert [name for name, _ in experts.named_parameters()] == ["weight"]
    assert torch.equal(experts.weight, layer.experts.weight)
    assert not any(hasattr(experts, name) for name in ("w_down", "w_gate", "w_up"))


def test_layers_that_share_a_pool_share_it_after_saving(tmp_path):
    first = make_layer()
    second = peer.PEER(10, num_experts=(6, 5), heads=2, dim_key=4, experts=first.experts)
    model = Stack(first, second)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    x, _ = draw(first, 7)
    for module in model, loaded:
        module(x).square().sum().backward()
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_traced_layer_takes_other_numbers_of_tokens(name, masked):
    layer = make_layer(name).eval()
    example = [tensor for tensor in draw(layer, 7, masked) if tensor is not None]
    traced = torch.jit.trace(layer, tuple(example))
    for length in 7, 12, 1:
        inputs = [tensor for tensor in draw(layer, length, masked) if tensor is not None]
        assert torch.equal(traced(*inputs), layer(*inputs))


def test_a_layer_whose_use_is_tracked_scripts_as_another():
    layer, tracked = make_layer(), make_layer()
    with peer.UsageTracker(tracked):
        scripted = torch.jit.script(tracked)
    inputs = draw(layer, 7)
    assert torch.equal(scripted(*inputs), layer(*inputs))
    assert scripted.router.code == torch.jit.script(layer).router.code


WITH_WARNINGS_AS_ERRORS = """
import warnings, torch
warnings.simplefilter("error")
import peer
layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
layer(torch.randn(3, 8)).sum().backward()
layer.eval()(torch.randn(3, 8))
print(1)
"""


def test_eager_use_touches_nothing_that_torch_deprecates(run_python):
    assert run_python(WITH_WARNINGS_AS_ERRORS) == 1
