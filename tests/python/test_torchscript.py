"""TorchScript: compile, save, load in a new process, forward and backward there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peer


class Layer(nn.Module):
    """Retrieval and experts, called as a model would that knows the operators only."""

    def __init__(self, activation: str, glu: bool, sparse_grad: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.activation = activation
        self.sparse_grad = sparse_grad
        self.row_keys, self.col_keys = parameter(7, 4), parameter(6, 4)
        self.w_down, self.w_up = parameter(42, 8), parameter(42, 5)
        self.w_gate = parameter(42, 8) if glu else None

    def forward(self, x: Tensor) -> Tensor:
        scores, indices = torch.ops.peer.product_key_topk(
            x.unsqueeze(1), self.row_keys, self.col_keys, 4
        )
        out, _, _ = torch.ops.peer.expert_mlp(
            x,
            scores.softmax(-1).flatten(1),
            indices.flatten(1),
            self.w_down,
            self.w_up,
            self.w_gate,
            self.activation,
            self.sparse_grad,
        )
        return out


class FunctionalLayer(Layer):
    """The same through peer.functional, with leading dimensions."""

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
            self.w_down,
            self.w_up,
            self.w_gate,
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
    expected = Layer("gelu", glu, sparse_grad=False)(inputs()).view(*shape[:-1], 5)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected, rtol=0, atol=0)


def test_a_traced_layer_gives_the_results_of_eager_for_another_number_of_tokens():
    layer = Layer("gelu", glu=True, sparse_grad=False)
    traced = torch.jit.trace(layer, inputs(4))
    torch.testing.assert_close(traced(inputs(9)), layer(inputs(9)), rtol=0, atol=0)


def test_a_bad_argument_keeps_its_sentence():
    layer = torch.jit.script(Layer("tanh", glu=False, sparse_grad=False))
    with pytest.raises(Exception, match=r"peer::expert_mlp: expected activation gelu.* got 'tanh'"):
        layer(inputs())
