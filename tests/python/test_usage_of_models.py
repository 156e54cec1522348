"""The usage tracker on whole models: layers by name, histories, co-activation, copies, exports."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peer

SIZES = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(**options):
    return peer.PEER(10, **{**SIZES, **options}).eval()


def make_model():
    """Two layers with pools of different sizes."""
    return nn.Sequential(
        nn.Linear(10, 10), make_layer(), nn.Sequential(make_layer(num_experts=(5, 6)))
    ).eval()


def retrieved(model, x):
    """Weights and ids of both layers of a model, by name."""
    inner = model[0](x)
    first = model[1].router(inner)
    return {"1": first, "2.0": model[2][0].router(model[1](inner))}


def sums(size, weights, indices):
    """The definition, computed one retrieval at a time."""
    mass, counts = [0.0] * size, [0] * size
    for weight, index in zip(weights.flatten().tolist(), indices.flatten().tolist(), strict=True):
        mass[index] += weight
        counts[index] += 1
    return torch.tensor(mass, dtype=torch.float64), torch.tensor(counts)


def counted(tracker):
    return {
        name: [getattr(usage, part).tolist() for part in ("mass", "counts", "together")]
        for name, usage in tracker.layers.items()
    }


def test_each_layer_of_a_model_is_tracked_under_its_name():
    model, x = make_model(), torch.randn(2, 7, 10)
    with peer.UsageTracker(model) as tracker:
        model(x)
    assert list(tracker.layers) == ["1", "2.0"]
    for name, (weights, indices) in retrieved(model, x).items():
        usage = tracker.layers[name]
        mass, counts = sums(usage.num_experts, weights, indices)
        torch.testing.assert_close(usage.mass, mass)
        assert torch.equal(usage.counts, counts)
        assert usage.dead().tolist() == [e for e, count in enumerate(counts) if count == 0]
        assert usage.dead(1).tolist() == [e for e, count in enumerate(counts) if count <= 1]


def test_a_model_with_one_pool_has_a_total_and_one_with_several_has_none():
    first = make_layer()
    model = nn.Sequential(first, make_layer(num_experts=(5, 6), experts=first.experts))
    with peer.UsageTracker(model) as tracker:
        model(torch.randn(20, 10))
    assert len(tracker.counts) == 48
    assert tracker.counts.sum() == 2 * 20 * 12
    assert torch.equal(
        tracker.counts[:30],
        tracker.layers["0"].counts[:30] + tracker.layers["1"].counts,
    )
    with pytest.raises(ValueError, match=r"read tracker\.layers\[name\]\.counts, .*'1', '2.0'"):
        _ = peer.UsageTracker(make_model()).counts


def test_a_router_that_layers_share_has_the_name_of_the_first():
    first = make_layer()
    model = nn.Sequential(first, peer.PEER(10, router=first.router, num_experts=(8, 6)).eval())
    with peer.UsageTracker(model) as tracker:
        model(torch.randn(20, 10))
    assert list(tracker.layers) == ["0"]
    assert tracker.layers["0"].counts.sum() == 2 * 20 * 12


def test_a_router_without_a_layer_is_tracked_under_its_own_name():
    model = nn.ModuleDict({"route": make_layer().router})
    with peer.UsageTracker(model) as tracker:
        model["route"](torch.randn(20, 10))
    assert tracker.layers["route"].counts.sum() == 20 * 12


def test_the_numbers_are_a_plain_dict():
    model = make_model()
    with peer.UsageTracker(model) as tracker:
        model(torch.randn(20, 10))
    numbers = tracker.as_dict()
    usage = tracker.layers["2.0"]
    assert {type(value) for value in numbers.values()} <= {int, float}
    assert {key: value for key, value in numbers.items() if key.startswith("2.0/")} == {
        "2.0/experts": 30,
        "2.0/retrievals": 240,
        "2.0/usage": usage.usage(),
        "2.0/unevenness": usage.unevenness(),
        "2.0/dead": len(usage.dead()),
    }
    assert usage.as_dict()["dead"] == len(usage.dead())


def test_a_snapshot_is_of_what_passed_since_the_last_one():
    model, batches = make_model(), [torch.randn(n, 10) for n in (20, 5, 9)]
    alone = []
    for x in batches:
        with peer.UsageTracker(model) as tracker:
            model(x)
        alone.append(tracker.as_dict())
    with peer.UsageTracker(model) as tracker:
        for step, x in enumerate(batches):
            model(x)
            tracker.snapshot(10 * step)
    assert tracker.history == [{"step": 10 * s, **row} for s, row in enumerate(alone)]
    assert tracker.layers["1"].counts.sum() == 0


def test_a_snapshot_can_go_on_counting():
    model = make_model()
    with peer.UsageTracker(model) as tracker:
        for _ in range(2):
            model(torch.randn(5, 10))
            tracker.snapshot(reset=False)
    assert [row["1/retrievals"] for row in tracker.history] == [60, 120]
    assert [row["step"] for row in tracker.history] == [None, None]


def tokens_with_both(indices, ids):
    """The definition, computed one token at a time."""
    rows = [set(row) for row in indices.flatten(-2).flatten(0, -2).tolist()]
    return [[sum(a in row and b in row for row in rows) for b in ids] for a in ids]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_coactivation_counts_the_tokens_that_retrieve_two_experts(compiled):
    model, x = make_model(), torch.randn(6, 7, 10)
    with peer.UsageTracker(model, coactivation={"1": [40, 3, 7, 3], "2.0": [0]}) as tracker:
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for part in x.split(3):
            run(part)
    found = retrieved(model, x)
    assert tracker.layers["1"].chosen.tolist() == [3, 7, 40]
    assert tracker.layers["1"].together.tolist() == tokens_with_both(found["1"][1], [3, 7, 40])
    assert tracker.layers["2.0"].together.tolist() == tokens_with_both(found["2.0"][1], [0])
    assert tracker.layers["1"].together.sum() > 0


def test_coactivation_leaves_out_padding():
    layer, x = make_layer(), torch.randn(4, 7, 10)
    mask = torch.arange(7) >= torch.tensor([[7], [3], [0], [5]])
    x[mask] = float("nan")
    with peer.UsageTracker(layer, coactivation=range(48)) as tracker:
        layer(x, mask)
    _, indices = layer.router(x, mask)
    expected = tokens_with_both(indices[~mask], list(range(48)))
    assert tracker.layers[""].together.tolist() == expected


def test_wrong_coactivation_is_an_error():
    model = make_model()
    with pytest.raises(ValueError, match=r"several layers: \['1', '2.0'\]"):
        peer.UsageTracker(model, coactivation=[1])
    with pytest.raises(ValueError, match=r"names \['3'\]"):
        peer.UsageTracker(model, coactivation={"3": [1]})
    with pytest.raises(IndexError, match=r"ids in \[0, 30\), got 30"):
        peer.UsageTracker(model, coactivation={"2.0": [30]})
    assert not model[1].router.observers


class NoWaiting(TorchDispatchMode):
    """Raises if something reads a value of a tensor, which waits for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "bincount")
        name = function.__name__.split(".")[0]
        if name in reads or ("mask" in name and "fill" not in name):
            raise AssertionError(f"{name} waits for the device")
        return function(*arguments, **(keywords or {}))


def test_forward_passes_and_snapshots_do_not_wait():
    model, x = make_model(), torch.randn(6, 7, 10)
    mask = torch.zeros(6, 7, dtype=torch.bool)
    with peer.UsageTracker(model, coactivation={"1": [3, 7]}) as tracker, NoWaiting():
        model(x)
        model[1](x, mask)
        tracker.snapshot(1)
    assert tracker.history[0]["1/retrievals"] == 2 * 42 * 12


# ---- Recomputation.


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_a_checkpoint_computes_again_is_not_counted_again(use_reentrant, compiled):
    torch._dynamo.reset()
    layer = make_layer(query_norm="rms").train()
    x = torch.randn(5, 10, requires_grad=True)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    calls = []
    with peer.UsageTracker(layer, coactivation=[1, 2]) as tracker:
        layer.router.observers += (Caller(calls),) if not compiled else ()
        checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
        once = counted(tracker)
        tracker.reset()
        run(x)
    assert compiled or len(calls) == 3  # the checkpoint did compute it again
    assert counted(tracker) == once
    assert tracker.counts.sum() == 5 * 12


class Caller:
    def __init__(self, calls):
        self.calls = calls

    def observe(self, *arguments):
        self.calls.append(1)


def test_a_checkpoint_in_a_compiled_function_is_counted_once():
    torch._dynamo.reset()
    layer, x = make_layer(query_norm="rms").train(), torch.randn(5, 10, requires_grad=True)

    def block(x):
        return x + checkpoint(layer, x, use_reentrant=False)

    with peer.UsageTracker(layer) as tracker:
        torch.compile(block, backend="aot_eager")(x).sum().backward()
    assert tracker.counts.sum() == 5 * 12


def test_a_second_pass_outside_the_backward_pass_is_counted():
    layer, x = make_layer().train(), torch.randn(5, 10)
    with peer.UsageTracker(layer) as tracker:
        for _ in range(2):
            layer(x).sum().backward()
    assert tracker.counts.sum() == 2 * 5 * 12


# ---- Copies, files, scripts and exports.


def save_and_load(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_tracked_layer_is_not_tracked(duplicate):
    layer, x = make_layer(), torch.randn(5, 10)
    with peer.UsageTracker(layer) as tracker:
        other = duplicate(layer)
        assert torch.equal(other(x), layer(x))
    assert tracker.counts.sum() == 5 * 12
    assert other.router.observers == ()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in other.modules())


def test_a_file_of_a_tracked_layer_is_that_of_the_layer():
    layer = make_layer()
    plain = pickle.dumps(layer)
    with peer.UsageTracker(layer):
        layer(torch.randn(5, 10))
        assert len(pickle.dumps(layer)) == len(plain)
        assert list(layer.state_dict()) == list(make_layer().state_dict())


def test_a_tracked_layer_exports_as_an_untracked_one():
    layer, x = make_layer(), torch.randn(5, 10)
    for strict in (False, True):
        expected = torch.export.export(layer, (x,), strict=strict)
        with peer.UsageTracker(layer, coactivation=[3]) as tracker:
            program = torch.export.export(layer, (x,), strict=strict)
        assert str(program.graph) == str(expected.graph)
        assert not program.constants
        assert program.state_dict.keys() == expected.state_dict.keys()
        assert tracker.counts.sum() == 0
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.long
def test_a_tracked_layer_compiles_ahead_of_time(tmp_path):
    layer, x = make_layer(), torch.randn(5, 10)
    with peer.UsageTracker(layer) as tracker, torch.no_grad():
        program = torch.export.export(layer, (x,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found, layer(x))
    assert tracker.counts.sum() == 0


def test_a_tracked_layer_scripts_and_traces_without_its_tracker():
    layer, x = make_layer(), torch.randn(5, 10)
    with peer.UsageTracker(layer) as tracker:
        scripted = torch.jit.script(layer)
        traced = torch.jit.trace(layer, (x,))
        tracker.reset()
        assert torch.equal(scripted(x), layer(x))
        assert torch.equal(traced(x), scripted(x))
    assert tracker.counts.sum() == 5 * 12


def test_a_compiled_layer_follows_the_tracker_on_and_off():
    torch._dynamo.reset()
    layer, x = make_layer(), torch.randn(5, 10)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    trackers = []
    for _ in range(2):
        with peer.UsageTracker(layer) as tracker:
            compiled(x)
            compiled(x)
        trackers.append(tracker)
        compiled(x)
    assert [int(tracker.counts.sum()) for tracker in trackers] == [120, 120]


def test_a_compiled_layer_is_tracked_while_it_grows():
    torch._dynamo.reset()
    layer, x = make_layer(), torch.randn(50, 10)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with peer.UsageTracker(layer) as tracker:
        compiled(x)
        layer.grow(3)
        compiled(x)
    assert len(tracker.counts) == 66
    assert tracker.counts.sum() == 2 * 50 * 12
    assert (tracker.counts[48:] > 0).any()


class OwnForward(peer.ProductKeyRouter):
    """A router that doubles its weights."""

    def forward(self, x, padding_mask=None, disabled=None):
        weights, indices = super().forward(x, padding_mask, disabled)
        return 2 * weights, indices


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_router_with_a_forward_of_its_own_is_tracked_by_what_it_returns(compiled):
    torch._dynamo.reset()
    layer = peer.PEER(10, router=OwnForward(10, **SIZES)).eval()
    x, mask = torch.randn(4, 7, 10), torch.arange(28).view(4, 7) > 20
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with peer.UsageTracker(layer, coactivation=[3, 5]) as tracker:
        run(x, mask)
        other = pickle.loads(pickle.dumps(layer))
        program = torch.export.export(layer, (x,))
    weights, indices = (result[~mask] for result in layer.router(x, mask))
    mass, counts = sums(48, weights, indices)
    torch.testing.assert_close(tracker.mass, mass)
    assert torch.equal(tracker.counts, counts)
    assert tracker.layers[""].together.tolist() == tokens_with_both(indices, [3, 5])
    assert not other.router._forward_hooks
    assert not other.router._forward_hooks_with_kwargs
    assert not layer.router._forward_hooks
    assert str(program.graph) == str(torch.export.export(layer, (x,)).graph)


def test_hooks_of_others_are_copied_with_the_router():
    layer, calls = peer.PEER(10, router=OwnForward(10, **SIZES)).eval(), []
    layer.router.register_forward_hook(lambda *arguments: calls.append(1))
    with peer.UsageTracker(layer):
        other = copy.deepcopy(layer)
    other(torch.randn(5, 10))
    assert calls == [1]


def test_two_trackers_of_a_layer_do_not_disturb_each_other():
    layer, x = make_layer(), torch.randn(5, 10)
    with peer.UsageTracker(layer) as outer:
        with peer.UsageTracker(nn.Sequential(layer)) as inner:
            layer(x)
        layer(x)
    assert (int(outer.counts.sum()), int(inner.counts.sum())) == (120, 60)


def test_a_tracker_is_not_copied():
    tracker = peer.UsageTracker(make_layer())
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save tracker\.state_dict"):
            duplicate(tracker)


# ---- State.


def test_a_tracker_resumes_from_its_state():
    model, batches = make_model(), [torch.randn(n, 10) for n in (20, 5, 9)]
    options = {"coactivation": {"1": [3, 7]}}
    with peer.UsageTracker(model, **options) as whole:
        for step, x in enumerate(batches):
            model(x)
            if step == 0:
                whole.snapshot(step)
    with peer.UsageTracker(model, **options) as first:
        model(batches[0])
        first.snapshot(0)
        model(batches[1])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
    with peer.UsageTracker(model, **options) as second:
        second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        model(batches[2])
    assert counted(second) == counted(whole)
    assert second.history == whole.history


def test_a_state_is_a_copy_and_loads_into_a_layer_that_has_grown():
    layer = make_layer()
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(20, 10))
        state = tracker.state_dict()
        layer(torch.randn(20, 10))
    assert state["layers"][""]["counts"].sum() == 240
    layer.grow(2)
    with peer.UsageTracker(layer) as tracker:
        tracker.load_state_dict(state)
        assert len(tracker.counts) == len(tracker.mass) == 60
        layer(torch.randn(5, 10))
    assert len(tracker.counts) == 60
    assert tracker.counts.sum() == 240 + 60


def test_a_state_of_other_layers_is_an_error():
    tracker = peer.UsageTracker(make_layer(), coactivation=[1])
    before = counted(tracker)
    for other, message in (
        (peer.UsageTracker(make_model()), r"layers \[''\], got \['1', '2.0'\]"),
        (peer.UsageTracker(make_layer(num_experts=(9, 6)), coactivation=[1]), "at most 48 experts"),
        (peer.UsageTracker(make_layer(), coactivation=[2]), r"experts \[1\] of .*, got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.load_state_dict(other.state_dict())
    assert counted(tracker) == before


# ---- Several processes.


def half(rank):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 20, 10, generator=generator)[rank]


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make_model()
    with peer.UsageTracker(model, coactivation={"1": [3, 7]}) as tracker:
        model(half(rank))
        total = tracker.all_reduce()
        again = tracker.all_reduce()
        tracker.snapshot(5, reduce=True, reset=False)
        own, history = tracker.state_dict(), tracker.history
        model[1].grow(2)  # A process may be called for the first time after growth.
        grown = tracker.all_reduce()["1"].counts
    torch.save(
        {
            "grown": grown,
            "total": {name: vars(usage) for name, usage in total.items()},
            "again": {name: vars(usage) for name, usage in again.items()},
            "own": own,
            "history": history,
        },
        f"{folder}/{rank}",
    )
    dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_processes_add_what_they_counted(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    model = make_model()
    with peer.UsageTracker(model, coactivation={"1": [3, 7]}) as tracker:
        for rank in range(2):
            model(half(rank))
    tracker.snapshot(5, reset=False)
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        for (name, usage), part in itertools.product(
            tracker.layers.items(), ("mass", "counts", "chosen", "together")
        ):
            torch.testing.assert_close(found["total"][name][part], getattr(usage, part))
            assert torch.equal(found["total"][name][part], found["again"][name][part])
        assert found["own"]["layers"]["1"]["counts"].sum() == 20 * 12
        assert len(found["grown"]) == len(tracker.layers["1"].counts) + 2 * model[1].router.columns
        for key, value in tracker.history[0].items():
            assert math.isclose(found["history"][0][key], value, rel_tol=1e-12)
