"""Predicted costs against real layers, their optimizers, and measured steps."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peer

ROWS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu-avx512.csv"
SIZES = {"num_experts": (24, 32), "heads": 2, "num_experts_per_head": 4, "dim_key": 8}

OPTIMIZERS = {
    "peer RowwiseAdagrad": peer.optim.RowwiseAdagrad,
    "peer RowwiseAdam": peer.optim.RowwiseAdam,
    "peer SGD": lambda tables: peer.optim.SGD(tables, lr=0.1),
    "torch AdamW": torch.optim.AdamW,
}


def size_of(tensors) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


@pytest.fixture(params=[{}, {"glu": True}, {"share_keys": False}], ids=["plain", "glu", "per head"])
def options(request):
    return {**SIZES, **request.param}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["peer RowwiseAdagrad, sparse gradients",
                                  "peer RowwiseAdam, sparse gradients",
                                  "torch AdamW, dense gradients"])  # fmt: skip
def test_memory_is_that_of_a_layer_and_its_optimizer(options, dtype, name):
    tokens = 512
    kind, gradients = name.split(", ")
    costs = peer.estimate(peer.PEERConfig(dim=16, **options), tokens=tokens, dtype=dtype)
    layer = peer.PEER(16, **options, dtype=dtype, sparse_grad=gradients.startswith("sparse"))
    table = layer.experts.weight
    optimizer = OPTIMIZERS[kind]([table])
    router = torch.optim.AdamW(layer.router.parameters())
    x = torch.randn(tokens, 16, dtype=dtype)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    out.float().square().sum().backward()
    gradient = table.grad.coalesce().values() if table.grad.is_sparse else table.grad
    distinct = len(gradient)
    optimizer.step()
    router.step()
    state = [
        value
        for each in (optimizer, router)
        for entries in each.state.values()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    parts = [*layer.parameters(), *(p.grad for p in layer.router.parameters()), gradient, *state]
    # Uniform retrieval would meet more experts than this layer does.
    row = table[0].numel() * table.dtype.itemsize
    missing = 0 if not table.grad.is_sparse else (costs.distinct_experts - distinct) * row
    expected = size_of(parts) + missing + size_of([out])
    activations = costs.memory[name] - expected
    assert 0 < activations <= 1.5 * size_of(kept.values())
    assert activations >= 0.5 * size_of(kept.values())


def test_counts_are_those_of_the_layer(options):
    layer = peer.PEER(16, **options)
    costs = peer.estimate(layer, tokens=10)
    assert costs == peer.estimate(peer.PEERConfig(dim=16, **options), tokens=10)
    assert costs.parameters == sum(p.numel() for p in layer.parameters())
    rows = 2 * 4 * layer.experts.weight[0].numel()
    router = sum(p.numel() for p in layer.router.parameters())
    assert costs.active_parameters == router + rows
    assert costs.bytes_per_token == 4 * rows


def test_uniform_retrieval_meets_as_many_experts_as_predicted():
    torch.manual_seed(0)
    layer = peer.PEER(16, **SIZES)
    costs = peer.estimate(layer, tokens=100)
    draws = torch.rand(100, 2, layer.num_experts).argsort(-1)[..., :4]
    assert abs(len(draws.unique()) - costs.distinct_experts) < 25
    everything = peer.estimate(peer.PEER(16, **{**SIZES, "num_experts": (2, 2)}), tokens=1)
    assert everything.distinct_experts == 4


def test_gradients_cost_what_they_are():
    costs = peer.estimate(peer.PEERConfig(dim=1024), tokens=1024)
    row, updated = 2 * 1024 * 4, costs.distinct_experts
    moved, memory = costs.bytes_per_step, costs.memory
    stored, fused = "peer RowwiseAdagrad, sparse gradients", "peer RowwiseAdagrad, fused"
    # A gradient written and read, and the parameters read again.
    assert moved[stored] - moved[fused] == pytest.approx(3 * updated * row, rel=1e-4)
    assert memory[stored] - memory[fused] == pytest.approx(updated * row, rel=1e-4)
    assert memory["torch AdamW, dense gradients"] > 3.9 * memory[fused]


def read_steps() -> list[dict[str, str]]:
    with ROWS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "step" and row["median_s"]]
    return [row for row in rows if row["provider"] == "peer"]


@pytest.mark.skipif(not ROWS.exists(), reason="not in a checkout")
def test_predictions_are_near_measured_steps():
    rows = read_steps()
    assert len(rows) >= 10
    ratios: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        config = peer.PEERConfig(dim=int(row["dim"]), num_experts=int(row["num_experts"]))
        device = peer.Device(1e9 * float(row["bandwidth_gb_per_s"]), 1.75e11)
        dtype = getattr(torch, row["dtype"])
        costs = peer.estimate(config, tokens=int(row["tokens"]), device=device, dtype=dtype)
        name = "peer RowwiseAdagrad, sparse gradients"
        assert costs.bytes_per_step[name] == pytest.approx(int(row["bytes"]), rel=0.02), row
        sizes = (row["dtype"], row["dim"], row["num_experts"])
        ratio = costs.seconds_per_step[name] / float(row["median_s"])
        ratios.setdefault(sizes, []).append(ratio)
        table = 2 * int(row["num_experts"]) * config.dim * dtype.itemsize
        more = int(row["peak_bytes"]) - (costs.memory[name] - table)
        assert 0 < more < 70 * 2**20, row
    for (dtype, dim, *_), values in ratios.items():
        is_wide = dtype == "float32" and int(dim) >= 512
        lowest, highest = (0.9, 1.1) if is_wide else (0.7, 0.9)
        assert lowest < statistics.median(values) < highest, (dtype, dim)


# --- devices -------------------------------------------------------------------------------------


def test_times_are_bytes_over_bandwidth_plus_products_over_their_rate():
    config = peer.PEERConfig(dim=64, **SIZES)
    rates = {"slow memory": (1e6, 1e30), "slow products": (1e30, 1e6)}
    costs = {
        name: peer.estimate(config, tokens=100, device=peer.Device(*rate))
        for name, rate in rates.items()
    }
    for name, seconds in costs["slow memory"].seconds_per_step.items():
        assert seconds == pytest.approx(costs["slow memory"].bytes_per_step[name] / 1e6)
    projection, sub_scores = 2 * 100 * 64 * 16, 100 * 2 * (24 + 32) * 8
    slow = costs["slow products"]
    assert slow.seconds_per_forward == pytest.approx((projection + sub_scores) / 1e6)
    for seconds in slow.seconds_per_step.values():
        assert seconds == pytest.approx((3 * projection + sub_scores) / 1e6)
    assert peer.estimate(config, tokens=100).seconds_per_step == {}


def test_known_devices_and_this_one_give_times():
    config = peer.PEERConfig(dim=64, **SIZES)
    h200 = peer.estimate(config, tokens=100, device="H200").seconds_per_forward
    h100 = peer.estimate(config, tokens=100, device="H100").seconds_per_forward
    assert 0 < h200 < h100
    assert peer.estimate(config, tokens=100, device="cpu").seconds_per_forward > 0


BAD = {
    "width": (lambda: peer.estimate(peer.PEERConfig(), tokens=1), "with a width"),
    "tokens": (lambda: peer.estimate(peer.PEERConfig(dim=8), tokens=0), "tokens to be positive"),
    "device": (
        lambda: peer.estimate(peer.PEERConfig(dim=8), tokens=1, device="abacus"),
        "'H100', 'H200'.*'abacus'",
    ),
    "bandwidth": (lambda: peer.Device(0.0, 1.0), "bandwidth to be positive"),
    "flops": (lambda: peer.Device(1.0, -1.0), "flops to be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# --- the program ---------------------------------------------------------------------------------

RUN = """
import contextlib, io, json, runpy, sys
sys.argv[0] = "peer.estimate"
text = io.StringIO()
with contextlib.redirect_stdout(text):
    runpy.run_module("peer.estimate", run_name="__main__")
print(json.dumps(text.getvalue()))
"""


def test_the_program_prints_a_column_for_each_choice(run_python):
    text = run_python(
        RUN, "--dim", "64", "--num-experts", "1024,16x32", "--heads", "2", "--num-experts-per-head",
        "4", "--dim-key", "8", "--tokens", "100", "--bandwidth", "1e10", "--flops", "1e11",
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[0].split()[-2:] == ["num_experts=1024", "num_experts=16x32"]
    costs = peer.estimate(
        peer.PEERConfig(dim=64, **{**SIZES, "num_experts": 1024}),
        tokens=100,
        device=peer.Device(1e10, 1e11),
    )
    column = [line.split()[-2] for line in lines if line.startswith("experts that a step")]
    assert column == [str(costs.distinct_experts)]
    assert any(line.startswith("training step") for line in lines)


def test_the_program_measures_this_machine(run_python):
    text = run_python(RUN, "--dim", "64", "--num-experts", "1024", "--device", "cpu")
    assert text.startswith("measured on cpu: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "1e9"], "go together"),
        (["--bandwidth", "1e9", "--flops", "1e9", "--device", "H100"], "exclude each other"),
        (["--num-experts", "1000"], "perfect square"),
        (["--heads", "many"], "invalid"),
    ],
)
def test_a_bad_option_of_the_program_is_named(arguments, message):
    result = subprocess.run(
        [sys.executable, "-m", "peer.estimate", *arguments],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        env=environment(),
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr


def environment():
    paths = [str(Path(peer.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_an_import_of_the_module_leaves_a_function(run_python):
    snippet = """
import json, peer
config = peer.PEERConfig(dim=8, num_experts=16)
before = peer.estimate(config, tokens=3)
import peer.estimate
print(json.dumps(peer.estimate(config, tokens=3) == before))
"""
    assert run_python(snippet) is True
