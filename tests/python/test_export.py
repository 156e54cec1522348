"""`torch.export`: a dynamic number of tokens, saved and loaded in a new process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import peer


class Layer(nn.Module):
    """Retrieval and experts with any leading dimensions flattened by the caller."""

    def __init__(self, glu: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))

        self.row_keys, self.col_keys = parameter(7, 4), parameter(6, 4)
        self.w_down, self.w_up = parameter(42, 8), parameter(42, 5)
        self.w_gate = parameter(42, 8) if glu else None

    def forward(self, x: Tensor) -> Tensor:
        scores, indices = peer.functional.product_key_topk(
            x.unsqueeze(1), self.row_keys, self.col_keys, 4
        )
        return peer.functional.expert_mlp(
            x, scores.softmax(-1), indices, self.w_down, self.w_up, self.w_gate, "gelu"
        )


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def exported(layer: nn.Module, x: Tensor, smallest: int = 1) -> ExportedProgram:
    return export(layer, (x,), dynamic_shapes=({0: Dim("tokens", min=smallest)},))


IN_A_NEW_PROCESS = """
import json, sys, torch
import peer
module = torch.export.load(sys.argv[1]).module()
cases = torch.load(sys.argv[2])
print(json.dumps([torch.equal(module(x), out) for x, out in cases]))
"""

COMPILED_IN_A_NEW_PROCESS = """
import json, sys, torch
import peer
module = torch._inductor.aoti_load_package(sys.argv[1])
cases = torch.load(sys.argv[2])
print(json.dumps([torch.allclose(module(x), out, rtol=1e-5, atol=1e-5) for x, out in cases]))
"""


def test_an_exported_layer_gives_the_same_in_a_new_process(tmp_path, run_python, glu):
    layer = Layer(glu)
    torch.export.save(exported(layer, inputs(5)), tmp_path / "layer.pt2")
    cases = [(inputs(tokens), layer(inputs(tokens)).detach()) for tokens in (1, 5, 33)]
    torch.save(cases, tmp_path / "cases.pt")
    same = run_python(IN_A_NEW_PROCESS, tmp_path / "layer.pt2", tmp_path / "cases.pt")
    assert same == [True] * 3


def test_a_package_compiled_ahead_of_time_runs_in_a_new_process(tmp_path, run_python):
    layer = Layer(glu=True)
    with torch.no_grad():
        program = exported(layer, inputs(5))
        cases = [(inputs(tokens), layer(inputs(tokens))) for tokens in (1, 5, 33)]
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    torch.save(cases, tmp_path / "cases.pt")
    assert run_python(COMPILED_IN_A_NEW_PROCESS, package, tmp_path / "cases.pt") == [True] * 3


def test_an_exported_layer_takes_zero_tokens():
    layer = Layer(glu=True)
    module = exported(layer, inputs(5), smallest=0).module()
    assert module(inputs(0)).shape == (0, 5)


def test_an_exported_layer_holds_the_operators_themselves():
    graph = exported(Layer(glu=False), inputs(5)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.ops.peer.product_key_topk.default in targets
    assert torch.ops.peer.expert_mlp.default in targets


def test_an_exported_layer_keeps_its_gradients():
    layer = Layer(glu=True)
    module = exported(layer, inputs(5)).module()
    module(inputs(9)).square().sum().backward()
    layer(inputs(9)).square().sum().backward()
    expected = dict(layer.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_of_every_dtype_export(dtype):
    layer = Layer(glu=True, dtype=dtype)
    module = exported(layer, inputs(5, dtype)).module()
    assert torch.equal(module(inputs(9, dtype)), layer(inputs(9, dtype)))
