"""`torch.export` and AOTInductor: a dynamic number of tokens, saved and run in a new process."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from layers import OPTIONS, differing, draw, make_layer, step
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import peer


class Layer(nn.Module):
    """A model that calls the functions for retrieval and experts."""

    def __init__(self, glu: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))

        self.row_keys, self.col_keys = parameter(7, 4), parameter(6, 4)
        self.table = parameter(42, 3 if glu else 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores, indices = peer.functional.product_key_topk(
            x.unsqueeze(1), self.row_keys, self.col_keys, 4
        )
        return peer.functional.expert_mlp(x, scores.softmax(-1), indices, self.table, "gelu")


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def exported(layer: nn.Module, x: Tensor, smallest: int = 1) -> ExportedProgram:
    return export(layer, (x,), dynamic_shapes=({0: Dim("tokens", min=smallest)},))


def test_an_exported_layer_takes_zero_tokens():
    layer = Layer(glu=True)
    module = exported(layer, inputs(5), smallest=0).module()
    assert module(inputs(0)).shape == (0, 8)


def test_an_exported_layer_holds_the_operators_themselves():
    graph = exported(Layer(glu=False), inputs(5)).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.ops.peer.product_key_topk.default in targets
    assert torch.ops.peer.expert_mlp.default in targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_of_every_dtype_export(dtype, glu):
    layer = Layer(glu, dtype)
    module = exported(layer, inputs(5, dtype)).module()
    assert torch.equal(module(inputs(9, dtype)), layer(inputs(9, dtype)))


# --- the whole layer -----------------------------------------------------------------------------


def exported_layer(
    layer: peer.PEER, masked: bool = True, smallest: int = 1, strict: bool = False
) -> ExportedProgram:
    """The layer with a dynamic number of sequences and a dynamic length."""
    sizes = {0: Dim("sequences", min=smallest), 1: Dim("length", min=smallest)}
    shapes = (sizes, sizes if masked else None)
    return export(layer, draw(layer, 7, masked), dynamic_shapes=shapes, strict=strict)


def in_mode(name: str, training: bool) -> peer.PEER:
    return make_layer(name).train(training)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("training", "masked"),
    [(True, True), (True, False), (False, True)],
    ids=["training-padded", "training", "evaluation-padded"],
)
def test_an_exported_layer_steps_as_in_eager(name, training, masked):
    layer = in_mode(name, training)
    module = exported_layer(copy.deepcopy(layer), masked).module()
    for length in 7, 3, 12:
        inputs = draw(layer, length, masked)
        assert differing(step(module, *inputs), step(layer, *inputs)) == []


def test_a_strict_export_steps_as_in_eager():
    layer = in_mode("gated", training=True)
    module = exported_layer(copy.deepcopy(layer), strict=True).module()
    for length in 7, 3, 12:
        inputs = draw(layer, length)
        assert differing(step(module, *inputs), step(layer, *inputs)) == []


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_decomposed_program_gives_the_results_of_eager(training):
    layer = in_mode("gated", training)
    module = exported_layer(copy.deepcopy(layer)).run_decompositions().module()
    for length in 7, 3, 12:
        inputs = draw(layer, length)
        torch.testing.assert_close(module(*inputs), layer(*inputs))
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, layer.get_buffer(name))


def test_an_exported_layer_stays_in_its_mode():
    layer = in_mode("paper", training=True)
    module = exported_layer(copy.deepcopy(layer)).module()
    with pytest.raises(NotImplementedError, match="eval"):
        module.eval()


LAYERS_IN_A_NEW_PROCESS = """
import json, pathlib, sys, torch
sys.path.insert(0, sys.argv[1])
from layers import differing, step
wrong = {}
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.pt2")):
    module = torch.export.load(path).module()
    wrong[path.stem] = []
    for inputs, expected in torch.load(path.with_suffix(".pt")):
        wrong[path.stem] += differing(step(module, *inputs), expected)
print(json.dumps(wrong))
"""

COMPILED_IN_A_NEW_PROCESS = """
import json, sys, torch
import peer
module = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(module(*inputs), expected)
print(json.dumps("close"))
"""


@pytest.mark.long
def test_saved_programs_step_the_same_in_a_new_process(tmp_path, run_python):
    names = []
    for name in OPTIONS:
        training = name in ("paper", "keys_per_head", "sparse")
        layer = in_mode(name, training)
        torch.export.save(exported_layer(layer), tmp_path / f"{name}.pt2")
        inputs = [draw(layer, length) for length in (1, 7, 33)]
        cases = [(each, step(layer, *each)) for each in inputs]
        torch.save(cases, tmp_path / f"{name}.pt")
        names.append(name)
    wrong = run_python(LAYERS_IN_A_NEW_PROCESS, Path(__file__).parent, tmp_path)
    assert wrong == {name: [] for name in names}


def test_a_package_compiled_ahead_of_time_runs_in_a_new_process(tmp_path, run_python):
    layer = peer.fold_query_norm_(make_layer("gated", key_norm=True).eval())
    with torch.no_grad():
        program = exported_layer(layer, masked=False)
        inputs = [draw(layer, length, masked=False) for length in (1, 7, 33)]
        cases = [(each, layer(*each)) for each in inputs]
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    torch.save(cases, tmp_path / "cases.pt")
    assert run_python(COMPILED_IN_A_NEW_PROCESS, package, tmp_path / "cases.pt") == "close"


def test_layers_that_share_a_pool_share_its_memory_in_a_loaded_program(tmp_path):
    first = in_mode("paper", training=False)
    second = peer.PEER(10, num_experts=(6, 5), heads=2, dim_key=4, experts=first.experts).eval()
    model = nn.Sequential(first, second)
    x, _ = draw(first, 7)
    torch.export.save(export(model, (x,)), tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(module(x), model(x))
    tables = [module.get_parameter(f"{layer}.experts.weight") for layer in (0, 1)]
    assert tables[0].data_ptr() == tables[1].data_ptr()


def test_a_folded_norm_leaves_no_trace_in_a_program():
    layer = peer.fold_query_norm_(in_mode("paper", training=False))
    program = exported_layer(layer)
    assert not list(program.named_buffers())
    assert "batch_norm" not in str(program.graph)


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
def test_a_program_takes_no_tokens(masked):
    layer = in_mode("paper", training=False)
    module = exported_layer(layer, masked, smallest=0).module()
    assert module(*draw(layer, 0, masked)).shape == (4, 0, 10)
