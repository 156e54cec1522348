"""The benchmark: right providers pass, wrong ones do not; rows, formulas, what is skipped."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import math
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peer

pytest.importorskip("rich")

from peer_bench import entries, machine, report, results, runner, workloads
from peer_bench.__main__ import main, parse
from peer_bench.cases import DTYPES, MODES, PRESETS, PROVIDERS, Case, Entry, Plan, list_plans
from peer_bench.check import WrongResultError
from peer_bench.entries import bytes_moved, experts_bytes, list_entries, list_variants
from peer_bench.layers import VARIANTS, gather_and_einsum, project, route
from peer_bench.machine import CPU, Gpu, Machine, Timer
from peer_bench.problem import Problem, draw_ids, parse_exponent, zipf_probabilities
from peer_bench.results import Row, evaluate, evaluate_runs
from peer_bench.runner import Failure, Measurement, Run, Settings, count_turns, measure_rounds
from peer_bench.workloads import SETUPS, Workload
from rich.console import Console

MIB = 2**20
SMALL = Case(num_experts=16**2, tokens=12, dim=8, heads=2, k=4, dim_key=8)
FAST = Settings(rounds=2, min_time=0.0)
SMALL_ON_GPU = replace(SMALL, device="cuda", dtype="bfloat16")
TINY_SIZES = [f"--{name}=8" for name in ("tokens", "dim", "dim-key")]
TINY_SIZES += ["--num-experts=256", "--heads=2", "--k=4"]
TINY_RUN = ["--rounds=1", "--min-time=0", "--bandwidth-mib=1"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Timeline:
    """A GPU's queue on which every piece of work takes as long as it says.

    Args:
        tick: milliseconds that pass with each event.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 0.0
        self.waits = 0
        self.events = 0
        self.tick = tick

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds

    def make_timer(self) -> Timer:
        return Timer(self.make_event, self.wait)

    def wait(self) -> None:
        self.waits += 1

    def make_event(self) -> TimelineEvent:
        self.events += 1
        return TimelineEvent(self)


class TimelineEvent:
    """As `torch.cuda.Event`."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.time: float | None = None

    def record(self) -> None:
        assert self.time is None, "recorded twice"
        self.time = self.timeline.now
        self.timeline.work(self.timeline.tick)

    def elapsed_time(self, end: TimelineEvent) -> float:
        assert self.timeline.waits
        assert self.time is not None
        assert end.time is not None
        return end.time - self.time


class PretendedGpu(Machine):
    """A GPU's dtypes on the CPU, with its events on a timeline."""

    kind = "cuda"
    warm_up_calls = 3

    def __init__(self, tick: float = 1.0) -> None:
        self.timeline = Timeline(tick)

    def make_timer(self) -> Timer:
        return self.timeline.make_timer()


def raise_failure(what: str, failure: Failure) -> None:
    raise AssertionError(f"{what}: {failure}")


def measure(*plans: Plan, **options: Any) -> list[Row]:
    """Runs plans; an unexpected failure is an error."""
    usual = {"settings": FAST, "transfer_size": MIB, "on_failure": raise_failure}
    return Run(**{**usual, **options}).measure(list(plans))


def measure_on_gpu(*plans: Plan, **options: Any) -> list[Row]:
    return measure(*plans, **{"machine": PretendedGpu(), **options})


def set_up(
    provider: str, problem: Problem, mode: str, distribution: str = "uniform"
) -> list[Workload]:
    """A provider's workloads in a mode, one for each variant."""
    if reason := entries.unsupported_reason(provider, problem.case, mode):
        pytest.skip(reason)
    listed = [
        Entry(problem.case, mode, provider, variant, distribution)
        for variant in list_variants(provider, mode)
    ]
    return [SETUPS[provider][mode](problem, entry) for entry in listed]


def check(workload: Workload) -> None:
    with workload.turn():
        workload.check()


def copy_parameters(problem: Problem) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in problem.parameters()]


def measure_once(workload: Workload, settings: Settings = FAST, **options: Any) -> Measurement:
    """Two measurements of a workload: the first call, and rounds."""
    measured = Measurement(workload, **options)
    measured.measure_first()
    listed = {Entry(workload.problem.case, "forward", "peer"): measured}
    measure_rounds(listed, settings, machine.make_read(MIB), workload.problem.machine)
    assert measured.calls > 0
    return measured


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Every measured entry collects garbage. What the tests imported is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def problem() -> Problem:
    """The tensors of a small case."""
    return Problem(SMALL, ("uniform",))


@pytest.fixture
def failures() -> list[tuple[str, Failure]]:
    return []


@pytest.fixture
def collect(failures: list[tuple[str, Failure]]) -> Callable[[str, Failure], None]:
    return lambda what, failure: failures.append((what, failure))


# The run.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Row], str]]:
    """Rows of the quick preset but for what is compiled, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "rows.csv"
    providers = ",".join(name for name in PROVIDERS if name != "compiled")
    torch.set_num_threads(2)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["--csv", str(path), "--providers", providers, *TINY_SIZES, *TINY_RUN])
    assert status == 0, printed.getvalue()
    return results.read(path), printed.getvalue()


def test_quick_writes_rows_whose_fields_parse(quick: tuple[list[Row], str]) -> None:
    found, printed = quick
    measured = [row for row in found if not row.skipped]
    assert {row.mode for row in measured} == set(MODES)
    assert {row.provider for row in found} == set(PROVIDERS) - {"compiled"}
    for row in measured:
        assert row.median_s is not None
        assert row.min_s is not None
        assert row.max_s is not None
        assert 0 < row.min_s <= row.median_s <= row.max_s
        assert row.rounds == 1
        assert row.calls >= row.rounds
        assert row.bytes > 0
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9, rel=1e-4)
        assert row.bandwidth_gb_per_s is not None
        share = row.gb_per_s / row.bandwidth_gb_per_s
        assert row.bandwidth_share == pytest.approx(share, rel=1e-4)
        assert row.bandwidth_formula.startswith("read")
        assert (row.peer, row.torch) == (peer.__version__, str(torch.__version__))
        assert row.capability
        assert row.processor
        assert row.threads == 2
        assert row.provider in printed
    assert all(row.median_s is None for row in found if row.skipped)


def test_rows_are_appended_under_one_head_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.csv"
    for _ in range(2):
        measure(Plan(SMALL, ("selection",), ("peer",)), preset="test", csv=path)
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][0] == "date"
    assert len(lines) == 3
    assert len(results.read(path)) == 2


def test_turns_add_up_to_what_the_progress_bar_expects() -> None:
    plans = [
        Plan(SMALL, ("experts-forward", "selection"), ("peer", "eager"), ("uniform", "zipf:1")),
        Plan(replace(SMALL, dim=64, num_experts=256**2), ("forward",), ("peer",)),
    ]
    turns: list[int] = []
    measure(*plans, memory=8 * MIB, on_progress=lambda _, count: turns.append(count))
    listed = [entry for plan in plans for entry in list_entries(plan, 8 * MIB)]
    assert any(entry.skipped for entry in listed)
    assert sum(turns) == count_turns(listed, FAST.rounds)


def test_importing_peer_imports_no_benchmark(run_python: Any) -> None:
    snippet = (
        "import json, sys, peer; "
        "names = ('rich', 'PEER_pytorch', 'peer_bench', 'matplotlib'); "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in names or 'bench' in m]))"
    )
    assert [name for name in run_python(snippet) if not name.startswith("torch.")] == []


def test_without_rich_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["--dry-run"]) == 2
    assert capsys.readouterr().err == "peer_bench: rich is not installed: pip install rich\n"


# Wrong providers.


@pytest.mark.parametrize("mode", ["experts-forward", "experts-backward"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_of_the_experts_is_right(problem: Problem, mode: str, variant: str) -> None:
    check(SETUPS["eager"][mode](problem, Entry(SMALL, mode, "eager", variant)))


def wrong_up(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table.unbind(1)
    return gather_and_einsum(x, w, ids, torch.stack([down, up.roll(1, 0)], dim=1))


def no_activation(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table[ids].unbind(-2)
    return torch.einsum("tp,tpd->td", w * torch.einsum("td,tpd->tp", x, down), up)


def half_a_gradient_of_up(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table.unbind(1)
    scaled = 0.5 * up + 0.5 * up.detach()
    return gather_and_einsum(x, w, ids, torch.stack([down, scaled], dim=1))


def half_a_gradient_of_x(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return gather_and_einsum(0.5 * (x + x.detach()), w, ids, table)


@pytest.mark.parametrize("experts", [wrong_up, no_activation])
@pytest.mark.parametrize("mode", ["experts-forward", "experts-backward"])
def test_experts_with_a_wrong_output_are_caught(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, mode: str, experts: Any
) -> None:
    monkeypatch.setitem(VARIANTS, "einsum", experts)
    with pytest.raises(WrongResultError, match="output"):
        check(*set_up("eager", problem, mode))


@pytest.mark.parametrize(
    ("experts", "what"), [(half_a_gradient_of_up, "w_up"), (half_a_gradient_of_x, "gradient of x")]
)
@pytest.mark.parametrize("mode", ["experts-backward", "backward", "step"])
def test_a_wrong_gradient_is_caught(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, experts: Any, what: str, mode: str
) -> None:
    monkeypatch.setitem(VARIANTS, "einsum", experts)
    check(*set_up("eager", problem, "experts-forward"))
    with pytest.raises(WrongResultError, match=what):
        check(*set_up("eager", problem, mode))


@pytest.mark.parametrize(
    ("provider", "mode"),
    [
        (name, mode)
        for name in PROVIDERS
        for mode in ("forward", "backward", "step")
        if mode in SETUPS[name] and name not in ("compiled", "peer-graph")
    ],
)
def test_a_layer_is_right_and_is_caught_once_it_is_not(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, provider: str, mode: str
) -> None:
    for workload in set_up(provider, problem, mode):
        before = copy_parameters(problem)
        check(workload)
        assert all(map(torch.equal, problem.parameters(), before))
        layer = workload.modules[0]
        forward = layer.forward

        def scaled(
            x: Tensor, ids: Tensor | None = None, forward: Callable[..., Any] = forward
        ) -> Any:
            out, chosen = forward(x, ids)
            return 1.01 * out, chosen

        monkeypatch.setattr(layer, "forward", scaled)
        with pytest.raises(WrongResultError, match="output"):
            check(workload)


@pytest.mark.parametrize(
    ("provider", "mode"),
    [(name, "step") for name in ("peer", "peer-fused", "eager", "embedding_bag")]
    + [("peer-fused", "experts-backward")],
)
def test_timed_steps_leave_the_parameters_as_they_were(
    problem: Problem, provider: str, mode: str
) -> None:
    before = copy_parameters(problem)
    for workload in set_up(provider, problem, mode):
        measure_once(workload, warm=mode == "step")
    for parameter, value in zip(problem.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("provider", "mode"),
    [("peer", "step"), ("peer-fused", "step"), ("peer-fused", "experts-backward")],
)
def test_a_wrong_step_is_caught_and_leaves_no_trace_in_the_parameters(
    provider: str, mode: str, dtype: str
) -> None:
    problem = Problem(replace(SMALL, dtype=dtype), ("uniform",))
    (workload,) = set_up(provider, problem, mode)
    before = copy_parameters(problem)
    check(workload)
    with workload.turn():
        workload.optimizers[0].param_groups[0]["lr"] *= 1.01 if dtype == "float32" else 1.5
        with pytest.raises(WrongResultError, match="step of w_down"):
            workload.check()
    assert all(map(torch.equal, problem.parameters(), before))


def test_the_update_of_a_pool_is_fused_for_one_turn(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, make_pool = problem.make_pool(), problem.make_pool
    monkeypatch.setattr(problem, "make_pool", lambda: pool)
    (workload,) = set_up("peer-fused", problem, "experts-backward")
    with workload.turn():
        assert pool.fused_update is not None
    assert pool.fused_update is None
    assert make_pool().fused_update is None


def second_best(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> Any:
    scores, ids = peer.functional.product_key_topk(query, row_keys, col_keys, k + 1)
    return scores[..., 1:], ids[..., 1:]


def doubled(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> Any:
    scores, ids = peer.functional.product_key_topk(query, row_keys, col_keys, k)
    return 2 * scores, ids


@pytest.mark.parametrize("dim_key", [SMALL.dim_key, 4])
def test_second_best_experts_and_wrong_scores_are_caught(problem: Problem, dim_key: int) -> None:
    entry = Entry(SMALL, "retrieval", "peer")

    def check_function(function: Any) -> None:
        check(workloads.set_up_retrieval(problem, entry, function, dim_key))

    check_function(peer.functional.product_key_topk)
    with pytest.raises(WrongResultError, match="scores of the retrieved experts"):
        check_function(second_best)
    with pytest.raises(WrongResultError, match="scores"):
        check_function(doubled)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_wrong_choice_is_caught_in_every_dtype_of_a_gpu(dtype: str) -> None:
    case = Case(num_experts=64**2, tokens=16, dim=32, heads=2, k=8, dim_key=32, device="cuda")
    problem = Problem(replace(case, dtype=dtype), ("uniform",), machine=PretendedGpu())

    def check_route(function: Any) -> None:
        check(workloads.set_up_routing(problem, Entry(case, "routing", "peer"), function))

    def skip_best(*arguments: Any) -> Any:
        scores, ids = route(*arguments[:-1], arguments[-1] + 1)
        return scores[..., 1:], ids[..., 1:]

    def ours(x: Tensor, query_weight: Tensor, rows: Tensor, columns: Tensor, k: int) -> Any:
        return peer.functional.product_key_topk(project(x, query_weight, 32), rows, columns, k)

    def roll_weights(x: Tensor, query_weight: Tensor, *others: Any) -> Any:
        return route(x, query_weight.roll(1, 0), *others)

    check_route(route)
    check_route(ours)
    for wrong in (skip_best, roll_weights):
        with pytest.raises(WrongResultError, match="scores of the retrieved experts"):
            check_route(wrong)


def test_drawn_ids_replace_those_of_the_router(problem: Problem) -> None:
    for name in ("peer", "eager", "PEER-pytorch"):
        (workload,) = set_up(name, problem, "forward")
        layer, x = workload.modules[0].eval(), problem.x[0]
        own, _ = layer(x, None)
        replaced, _ = layer(x, problem.ids["uniform"][0])
        again, _ = layer(x, None)
        assert not torch.allclose(own, replaced)
        torch.testing.assert_close(own, again)


# Machines.


def test_the_cpu_says_what_it_is() -> None:
    assert CPU.device == torch.device("cpu")
    assert CPU.kind == "cpu"
    assert CPU.processor
    assert CPU.capability == torch.ops.peer.cpu_capability()
    assert CPU.last_level_cache == machine.last_level_cache() >= 2**15
    assert 0 < CPU.available() < 2**60
    assert CPU.make_bandwidth(MIB).formula.startswith("read")


def test_a_timer_of_the_host_adds_up_calls_alone() -> None:
    timer = CPU.make_timer()
    assert timer.total() == 0.0
    for _ in range(2):
        timer.start()
        time.sleep(0.01)
        timer.stop()
        time.sleep(0.2)
    assert 0.02 <= timer.total() < 0.2


def test_a_timer_of_events_adds_up_what_lies_between_them_and_waits_once() -> None:
    timeline = Timeline()
    timer = timeline.make_timer()
    for milliseconds in (2.0, 3.0):
        timeline.work(100.0)  # prepares the call
        timer.start()
        timeline.work(milliseconds)
        timer.stop()
        timeline.work(10.0)
    assert timeline.waits == 0
    assert timer.total() == pytest.approx(5e-3)
    assert timeline.waits == 1


def test_neither_preparation_nor_warm_up_is_timed() -> None:
    gpu = PretendedGpu(tick=0.0)
    indices: list[int] = []

    def prepare(index: int) -> tuple[int]:
        gpu.timeline.work(50.0)
        return (index,)

    def run(index: int) -> None:
        indices.append(index)
        is_warm = len(indices) not in (4, 5, 6)  # the calls at the start of the round
        gpu.timeline.work(2.0 if is_warm else 1000.0)

    problem = Problem(SMALL_ON_GPU, ("uniform",), machine=gpu)
    workload = Workload(problem, prepare, run, check=lambda: None)
    measured = measure_once(workload, Settings(1, 0.0))
    assert measured.first == pytest.approx(2e-3)
    assert measured.seconds == [pytest.approx(2e-3)]
    assert measured.calls == gpu.warm_up_calls + 1
    assert indices == [0, 1, 2, 0, 1, 2, 3]


def test_calls_back_to_back_are_timed_between_one_pair_of_events() -> None:
    gpu = PretendedGpu(tick=5.0)  # an event takes longer than a call
    called: list[int] = []

    def prepare(index: int) -> tuple[int]:
        gpu.timeline.work(1000.0)
        return (index,)

    def run(index: int) -> None:
        called.append(index)
        gpu.timeline.work(0.02)

    problem = Problem(SMALL_ON_GPU, ("router",), machine=gpu)
    workload = Workload(problem, prepare, run, check=lambda: None, is_back_to_back=True)
    measured = Measurement(workload, first=0.05e-3)
    seconds = measured.measure_turn(Settings(rounds=1, min_time=0.05))
    assert gpu.timeline.events == 4, "a pair to warm up, and one for the turn"
    assert called == list(range(3 + 1000)), "the first calls warm up"
    assert seconds == pytest.approx((5.0 + 1000 * 0.02) / 1000 / 1e3)


def test_bandwidth_is_bytes_over_seconds() -> None:
    assert machine.gigabytes_per_second(3 * 10**9, 2.0) == 1.5
    read = machine.make_read(4 * MIB)
    assert read.size == 4 * MIB
    assert read.formula in ("read, torch.sum", "read, torch.mv")
    assert read.measure() > 0


def test_a_copy_counts_its_bytes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    copy = machine.make_copy(torch.device("cpu"), timeline.make_timer, 10**6)
    (source,) = copy.transfer.args
    assert source.float().std() > 50, "the bytes are random"
    monkeypatch.setattr(copy, "transfer", lambda: timeline.work(4.0))
    assert copy.measure() == pytest.approx(2 * 10**6 / 4e-3 / 1e9)
    assert "copy" in copy.formula


def test_a_case_is_measured_on_its_own_device() -> None:
    with pytest.raises(ValueError, match="the case is for cuda, the machine is cpu"):
        Problem(SMALL_ON_GPU, ("uniform",))
    with pytest.raises(ValueError, match="expected device"):
        replace(SMALL, device="tpu")


def test_activations_have_the_dtype_of_the_tables_on_a_gpu_alone() -> None:
    case = replace(SMALL, dtype="bfloat16")
    assert case.activation_dtype == torch.float32
    assert Problem(case, ()).x[0].dtype == torch.float32
    problem = Problem(SMALL_ON_GPU, (), machine=PretendedGpu())
    assert {p.dtype for p in problem.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in (*problem.x, problem.grad_out)} == {torch.bfloat16}
    half = replace(SMALL_ON_GPU, dtype="float16")
    assert half.activation_dtype == torch.float16
    assert replace(half, dtype="float32").activation_dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.long
def test_every_provider_is_right_in_the_dtypes_of_a_gpu(dtype: str) -> None:
    case = replace(SMALL_ON_GPU, dtype=dtype)
    left_out = {"compiled", "peer-graph"}
    if dtype == "float16":
        left_out.add("embedding_bag")  # torch adds no sparse gradients in float16 on a CPU
    names = tuple(name for name in PROVIDERS if name not in left_out)
    found = measure_on_gpu(
        Plan(case, MODES, names),
        Plan(case, ("forward", "backward"), ("peer", "eager"), ("router",)),
        Plan(replace(case, tokens=1, routers=2), ("forward",), ("peer", "eager"), ("router",)),
        settings=Settings(1, 0.0),
    )
    assert {row.device for row in found} == {"cuda"}
    assert {row.mode for row in found if not row.skipped} == set(MODES)
    skipped = {row.provider for row in found if row.skipped}
    assert skipped <= {"PEER-pytorch"}, "it may be missing"


def test_a_graph_is_captured_for_each_layer_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that only counts: its output stays that of the capture."""
    replayed: list[object] = []
    captured: list[workloads.Graph] = []

    class CountingGraph:
        def replay(self) -> None:
            replayed.append(self)

    class Stream:
        def wait_stream(self, _: object) -> None:
            pass

    class RecordedGraph(workloads.Graph):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            captured.append(self)

    monkeypatch.setattr(workloads, "Graph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CountingGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    case = replace(SMALL_ON_GPU, tokens=1, routers=2)
    problem = Problem(case, ("router",), machine=PretendedGpu())
    (workload,) = set_up("peer-graph", problem, "forward", "router")
    second, problem.x[1] = problem.x[1], problem.x[0]
    check(workload)
    assert replayed == [graph.graph for graph in captured]
    assert len(set(replayed)) == 2
    problem.x[1] = second
    first = weakref.ref(captured[0])
    replayed.clear()
    captured.clear()
    gc.collect()
    assert first() is None, "the graphs of a turn are dropped at its end"
    with workload.turn():
        for graph, x in zip(captured, problem.x[:2], strict=True):
            assert torch.equal(graph.x, x), "each graph reads an input of its own"
        workload.run(*workload.prepare(2))
        workload.run(*workload.prepare(3))
    assert replayed == [graph.graph for graph in captured]


@pytest.mark.parametrize("percent", [50, 100])
def test_frozen_experts_are_measured_for_providers_that_freeze_them(percent: int) -> None:
    providers = ("peer", "peer-fused", "peer-dense-grad", "eager")
    case = replace(SMALL, frozen=percent)
    rows = measure(Plan(case, ("experts-backward", "step"), providers))
    assert {(row.provider, row.skipped) for row in rows if row.skipped} == {
        ("eager", "it freezes no experts")
    }
    assert {row.frozen for row in rows} == {percent}


def test_frozen_experts_that_learn_are_caught() -> None:
    problem = Problem(replace(SMALL, frozen=50), ("uniform",))
    for workload in set_up("peer", problem, "experts-backward"):
        check(workload)
    problem.frozen = None
    workloads = set_up("peer", problem, "experts-backward")  # freezes nothing
    problem.frozen = torch.ones(SMALL.num_experts, dtype=torch.bool)
    for workload in workloads:
        with pytest.raises(WrongResultError, match="other rows than the trained ones"):
            check(workload)


def test_a_single_router_is_captured_for_each_input() -> None:
    problem = Problem(SMALL_ON_GPU, ("router",), machine=PretendedGpu())
    (workload,) = set_up("peer-graph", problem, "forward", "router")
    assert len(workload.modules) == problem.inputs > 1


def test_a_graph_on_the_cpu_is_skipped_with_the_reason() -> None:
    (entry,) = list_entries(Plan(SMALL, ("forward",), ("peer-graph",)), 2**50)
    assert entry.skipped == "a CUDA graph needs --device cuda"
    (entry,) = list_entries(Plan(SMALL_ON_GPU, ("forward",), ("peer-graph",)), 2**50)
    assert entry.skipped == ""


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_that_refuses_to_synchronize_is_lost(
    monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    done: list[str] = []

    def synchronize(_: object) -> None:
        if not works:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    gpu = object.__new__(Gpu)
    gpu.device = torch.device("cuda", 0)
    gpu.recover()
    assert gpu.is_lost is not works
    assert bool(done) is works


# Providers that fail.


class Failing:
    """A variant of the experts that fails from some call on.

    Args:
        make_error: what it raises.
        call: the first that fails.
    """

    def __init__(self, make_error: Callable[[], BaseException], call: int = 1) -> None:
        self.make_error = make_error
        self.call = call
        self.calls = 0

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= self.call:
            raise self.make_error()
        return gather_and_einsum(*arguments)


# Calls before: a check, three for the peak and the first time, and in round 1 three to warm up and
# a timed one.
IN_ROUND_2 = 9
ON_GPU = Plan(SMALL_ON_GPU, ("experts-forward",), ("eager", "peer"))
TURNS_ON_GPU = count_turns(list(list_entries(ON_GPU, 2**50)), FAST.rounds)


def exhaust_gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")


def exhaust_host() -> Exception:
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error.with_traceback(None)
    raise AssertionError


def test_a_wrong_provider_gets_a_row_that_says_so_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, failures: list[tuple[str, Failure]], collect: Any
) -> None:
    monkeypatch.setitem(VARIANTS, "einsum", no_activation)
    plan = Plan(SMALL, ("experts-forward", "routing"), ("eager", "peer"))
    found = measure(plan, on_failure=collect)
    assert len(found) == 4
    (wrong,) = (row for row in found if row.median_s is None)
    assert (wrong.mode, wrong.provider) == ("experts-forward", "eager")
    assert re.fullmatch(
        r"wrong result: output differs from the float64 reference by 0?\.\d+", wrong.skipped
    )
    ((what, failure),) = failures
    assert what.startswith("eager einsum experts-forward, uniform, N=16²")
    assert failure == Failure(wrong.skipped)


@pytest.mark.parametrize("make_error", [exhaust_gpu, exhaust_host])
@pytest.mark.parametrize(
    ("call", "when"),
    [(1, "when it was tried"), (3, "when it was tried"), (IN_ROUND_2, "in round 2")],
)
def test_a_provider_that_exhausts_memory_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, make_error: Any, call: int, when: str
) -> None:
    monkeypatch.setitem(VARIANTS, "einsum", Failing(make_error, call))
    turns: list[int] = []
    found = measure_on_gpu(ON_GPU, on_progress=lambda _, count: turns.append(count))
    assert {row.provider: (row.skipped, row.median_s is None) for row in found} == {
        "eager": (f"does not fit: out of memory {when}", True),
        "peer": ("", False),
    }
    assert sum(turns) == TURNS_ON_GPU


def test_a_provider_that_cannot_be_set_up_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> Any:
        raise exhaust_gpu()

    monkeypatch.setitem(SETUPS["eager"], "experts-forward", fail)
    assert {row.provider: row.skipped for row in measure_on_gpu(ON_GPU)} == {
        "eager": "does not fit: out of memory when it was tried",
        "peer": "",
    }


@pytest.mark.parametrize(
    ("owner", "attribute", "when"),
    [
        (runner, "Problem", "the tensors of the case were made"),
        (PretendedGpu, "make_bandwidth", "bandwidth was measured"),
    ],
)
def test_a_case_whose_own_tensors_exhaust_memory_leaves_the_other_cases(
    monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, when: str
) -> None:
    tries = []
    function = getattr(owner, attribute)

    def fail_first(*arguments: Any, **options: Any) -> Any:
        tries.append(function)
        if len(tries) == 1:
            raise exhaust_gpu()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, attribute, fail_first)
    turns: list[int] = []
    found = measure_on_gpu(
        ON_GPU,
        replace(ON_GPU, case=replace(SMALL_ON_GPU, tokens=13)),
        on_progress=lambda _, count: turns.append(count),
    )
    expected = [(tokens, name) for tokens in (12, 13) for name in ("eager", "peer")]
    assert [(row.tokens, row.provider) for row in found] == expected
    assert all(when in row.skipped for row in found[:2])
    assert not any(row.skipped for row in found[2:])
    assert sum(turns) == 2 * TURNS_ON_GPU


@pytest.mark.parametrize("call", [1, IN_ROUND_2])
def test_nothing_of_a_provider_that_failed_stays_behind(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    failing = Failing(exhaust_gpu, call)
    monkeypatch.setitem(VARIANTS, "einsum", failing)
    right, made = SETUPS["eager"]["experts-forward"], []

    def watch(*arguments: Any) -> Workload:
        workload = right(*arguments)
        made.append(weakref.ref(workload))
        return workload

    monkeypatch.setitem(SETUPS["eager"], "experts-forward", watch)
    is_alive = []

    def look(*_: object) -> None:
        if failing.calls >= call:
            is_alive.append(made[0]() is not None)

    measure_on_gpu(ON_GPU, on_progress=look)
    assert is_alive
    assert not any(is_alive)


def test_errors_that_say_that_memory_is_short() -> None:
    for error in (exhaust_gpu(), exhaust_host(), MemoryError()):
        assert runner.is_out_of_memory(error)
    assert runner.is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors"))
    assert not runner.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not runner.is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("call", [1, IN_ROUND_2])
def test_a_provider_that_raises_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, call: int, failures: list[tuple[str, Failure]], collect: Any
) -> None:
    failing = Failing(lambda: NotImplementedError("no kernel for this\nand more"), call)
    monkeypatch.setitem(VARIANTS, "einsum", failing)
    found = measure_on_gpu(ON_GPU, on_failure=collect)
    assert {row.provider: row.skipped for row in found} == {
        "eager": "failed: NotImplementedError: no kernel for this",
        "peer": "",
    }
    ((_, failure),) = failures
    assert "and more" in failure.traceback
    assert "in __call__" in failure.traceback


def test_a_stop_by_the_keyboard_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "einsum", Failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure_on_gpu(ON_GPU)


@pytest.mark.parametrize(
    ("call", "complete"), [(1, False), (IN_ROUND_2 - 4, False), (IN_ROUND_2, True)]
)
def test_after_the_gpu_is_lost_nothing_more_is_tried(
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    complete: bool,
    failures: list[tuple[str, Failure]],
    collect: Any,
) -> None:
    class LostGpu(PretendedGpu):
        def recover(self) -> None:
            self.is_lost = True

        def release(self) -> None:
            assert not self.is_lost

        def make_bandwidth(self, size: int | None = None) -> machine.Bandwidth:
            bandwidth = super().make_bandwidth(size)
            transfer = bandwidth.transfer

            def transfer_unless_lost() -> object:
                assert not self.is_lost
                return transfer()

            return replace(bandwidth, transfer=transfer_unless_lost)

    failing = Failing(lambda: RuntimeError("CUDA error: an illegal memory access"), call)
    monkeypatch.setitem(VARIANTS, "einsum", failing)
    plans = [
        Plan(SMALL_ON_GPU, ("experts-forward",), ("peer", "eager", "peer-graph")),
        Plan(SMALL_ON_GPU, ("routing", "step"), ("peer", "dense-4d")),
    ]
    turns: list[int] = []
    found = measure(
        *plans,
        machine=LostGpu(),
        on_progress=lambda _, count: turns.append(count),
        on_failure=collect,
    )
    never = "not run: the GPU failed before"
    assert {(row.mode, row.provider): row.skipped for row in found} == {
        # Its last round was over.
        ("experts-forward", "peer"): "" if complete else never,
        ("experts-forward", "eager"): "failed: RuntimeError: CUDA error: an illegal memory access",
        ("routing", "peer"): never,
        ("step", "peer"): never,
        ("step", "dense-4d"): never,
    }
    assert failing.calls == call
    assert len(failures) == 1
    listed = [entry for plan in plans for entry in list_entries(plan, 2**50)]
    assert sum(turns) == count_turns(listed, FAST.rounds)


def test_the_exit_status_and_the_last_lines_tell_of_wrong_and_failed_providers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY_SIZES, *TINY_RUN, "--modes", "experts-forward", "--distribution", "uniform"]
    command += ["--providers", "eager,embedding_bag,peer"]
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(VARIANTS, "einsum", no_activation)
    monkeypatch.setitem(VARIANTS, "bags", Failing(lambda: ValueError("no bags")))
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "wrong result: output differs" in out
    assert "experts-forward peer uniform N=16²" in out
    wrong, failed = err.splitlines()[-2:]
    assert wrong.startswith("eager einsum experts-forward, uniform, N=16²")
    assert "wrong result: output differs" in wrong
    assert failed.endswith("failed: ValueError: no bags")
    assert err.count("Traceback") == 1


# Memory.


def test_a_dry_run_allocates_nothing_and_lists_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "randn", "ones"):
            patch.setattr(torch, name, None)
        assert main(["--preset", "targets", "--dry-run", "--max-memory", "20"]) == 0
    out = capsys.readouterr().out
    for plan in list_plans("targets"):
        assert plan.case.describe()[:30] in out
    assert "does not fit" in out


def test_a_case_that_does_not_fit_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("tensors were made")

    monkeypatch.setattr(runner, "Problem", refuse)
    path = tmp_path / "rows.csv"
    plan = Plan(Case(num_experts=2**40, dim=4096), ("forward",), ("peer", "eager"))
    found = measure(plan, csv=path)
    assert len(found) == 2
    assert all(row.skipped.startswith("does not fit: needs about 3") for row in found)
    assert [row.skipped for row in results.read(path)] == [row.skipped for row in found]


def test_a_provider_that_does_not_fit_leaves_the_others() -> None:
    case = replace(SMALL, num_experts=256**2, dim=16)
    assert case.table_bytes == 8 * MIB
    found = measure(
        Plan(case, ("step",), ("dense-active", "eager")),
        memory=entries.estimate_case(case) + 12 * MIB,
    )
    assert {row.provider: bool(row.skipped) for row in found} == {
        "dense-active": False,
        "eager": True,
    }


def test_peak_memory_is_that_of_the_call_alone() -> None:
    held = torch.ones(64 * MIB // 4)

    def allocate() -> None:
        torch.ones(32 * MIB // 4)
        torch.ones(32 * MIB // 4)

    peak = CPU.measure_peak(allocate)
    assert peak is None or 31 * MIB < peak < 48 * MIB
    assert held.numel()


def test_memory_that_is_kept_of_freed_gradients_counts_again() -> None:
    ids, table = torch.arange(2**14).view(128, 128), torch.ones(2**14, 2, 256, requires_grad=True)

    def train() -> None:
        x, weights = torch.ones(128, 256), torch.ones(128, 128)
        out = peer.functional.expert_mlp(x, weights, ids, table, sparse_grad=True)
        torch.autograd.grad(out.sum(), table)

    for _ in range(2):
        peak = CPU.measure_peak(train)
        assert peak is None or peak >= 31 * MIB


def test_nothing_of_a_case_stays_behind() -> None:
    before = {id(tensor) for tensor in list_large_tensors()}
    measure(Plan(replace(SMALL, num_experts=128**2), ("backward", "step"), ("peer", "eager")))
    assert [tuple(t.shape) for t in list_large_tensors() if id(t) not in before] == []


def list_large_tensors() -> list[Tensor]:
    gc.collect()
    objects = (obj for obj in gc.get_objects() if type(obj) in (Tensor, torch.nn.Parameter))
    return [obj for obj in objects if obj.layout == torch.strided and obj.numel() >= 128**2]


# Formulas.


def test_bytes_of_the_experts_are_rows_times_widths() -> None:
    case = Case(num_experts=1024**2, tokens=1000, dim=512, heads=8, k=16)
    rows_read = 1000 * 128
    row = 2 * 512 * 4
    assert experts_bytes(case, "experts-forward", 7, "sparse") == rows_read * row
    assert experts_bytes(case, "experts-backward", 7, "sparse") == (rows_read + 7) * row
    assert experts_bytes(case, "experts-backward", 7, "fused") == (rows_read + 7) * row
    dense = experts_bytes(case, "experts-backward", 7, "dense")
    assert dense == (rows_read + 1024**2) * row
    assert experts_bytes(case, "optimizer", 7, "sparse") == 3 * 7 * row
    assert experts_bytes(case, "optimizer", 7, "dense") == 7 * 1024**2 * row
    assert experts_bytes(case, "optimizer", 7, "fused") == 0
    half = replace(case, dtype="bfloat16")
    assert experts_bytes(half, "experts-forward", 7, "sparse") == rows_read * row // 2
    fused = bytes_moved(Entry(case, "experts-backward", "peer-fused"), 7.0)
    assert fused == (rows_read + 7) * row, "the rows that it reads, and those that it updates"


def test_bytes_of_routing_are_inputs_query_weights_keys_and_what_is_written() -> None:
    case = Case(tokens=1000, dim=512, heads=8, k=16, dim_key=256)
    read = 1000 * 512 + 512 * 8 * 256 + 2 * 1024 * 128
    on_cpu, on_gpu = replace(case, dtype="bfloat16"), replace(case, dtype="bfloat16", device="cuda")
    for sizes, itemsize in ((case, 4), (on_cpu, 4), (on_gpu, 2)):
        found = bytes_moved(Entry(sizes, "routing", "peer"), 7.0)
        assert found == itemsize * read + 12 * 1000 * 128


def test_bytes_of_one_token_are_query_weights_keys_and_rows() -> None:
    expected = 4 * (512 * 8 * 256 + 2 * 1024 * 128 + 128 * 2 * 512 + 2 * 512)
    assert bytes_moved(Entry(Case(tokens=1), "forward", "peer"), 128) == expected


def test_bytes_of_a_feed_forward_layer_are_its_weights() -> None:
    case = Case(dim=64)
    assert bytes_moved(Entry(case, "forward", "dense-4d"), 0) == 2 * 64 * 256 * 4
    assert bytes_moved(Entry(case, "step", "dense-4d"), 0) == 10 * 2 * 64 * 256 * 4


# Distributions.


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.5])
def test_ids_are_distributed_as_zipf_says(exponent: float) -> None:
    experts, draws = 50, 200_000
    probabilities = zipf_probabilities(experts, exponent)
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert (probabilities[0] / probabilities[9]).item() == pytest.approx(10**exponent)
    torch.manual_seed(0)
    counts = draw_ids((draws,), experts, exponent).bincount(minlength=experts)
    # Popularity in descending order, with the standard deviation of a binomial count. Sorting
    # moves counts of neighbours by less.
    sorted_counts = counts.sort(descending=True).values.double()
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((sorted_counts - draws * probabilities).abs() < 5 * deviation).all()
    assert counts.argmax() != 0, "the most popular expert is the first: ranks are not shuffled"


def test_uniform_ids_are_uniform() -> None:
    torch.manual_seed(0)
    counts = draw_ids((100, 1000), 20, 0.0).flatten().bincount(minlength=20)
    assert ((counts - 5000).abs() < 5 * math.sqrt(5000)).all()


def test_the_same_seed_makes_the_same_problem() -> None:
    one, other = (Problem(SMALL, ("zipf:1.0",), seed=3) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.ids["zipf:1.0"][0], other.ids["zipf:1.0"][0])
    assert not torch.equal(one.weight, Problem(SMALL, (), seed=4).weight)


def test_distributions_that_do_not_exist_are_refused() -> None:
    assert parse_exponent("uniform") == 0.0
    assert parse_exponent("zipf:0.5") == 0.5
    assert parse_exponent("router") is None
    for text in ("zipf", "zipf:", "zipf:-1", "zipf:inf", "normal:1"):
        with pytest.raises(ValueError, match="expected a distribution"):
            parse_exponent(text)


# Presets and the command line.


def test_the_table_has_set_up_functions_for_all_providers_and_modes() -> None:
    assert tuple(SETUPS) == PROVIDERS
    assert {mode for modes in SETUPS.values() for mode in modes} == set(MODES)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_something_to_measure(preset: str) -> None:
    plans = list_plans(preset)
    assert plans
    assert all(list(list_entries(plan, 2**50)) for plan in plans)


def test_options_replace_what_the_preset_says() -> None:
    options = parse(
        ["--preset", "quick", "--dim", "32,64", "--modes", "step,step", "--providers", "peer,peer"]
    )
    assert {plan.case.dim for plan in options.plans} == {32, 64}
    assert {plan.modes for plan in options.plans} == {("step",)}, "named twice, measured once"
    assert {plan.providers for plan in options.plans} == {("peer",)}
    assert options.single_sizes == {}


def test_a_gpu_has_a_preset_and_settings_of_its_own() -> None:
    options = parse([])
    assert (options.preset, options.rounds, options.min_time) == ("quick", 7, 0.2)
    options = parse(["--device", "cuda"])
    assert (options.preset, options.rounds, options.min_time) == ("cuda-targets", 5, 0.1)
    assert {plan.case.device for plan in options.plans} == {"cuda"}
    assert {plan.case.tokens for plan in options.plans} == {1, 8192}
    assert {plan.case.dtype for plan in options.plans} == {"bfloat16"}
    options = parse(["--device", "cuda", "--rounds", "2", "--min-time", "0"])
    assert (options.rounds, options.min_time) == (2, 0.0)
    options = parse(["--device", "cuda", "--preset", "stages", "--dtype", "bfloat16"])
    assert {plan.case.device for plan in options.plans} == {"cuda"}


def test_the_default_preset_of_a_gpu_compiles_nothing_and_has_few_entries() -> None:
    listed = [entry for plan in list_plans("cuda-targets") for entry in list_entries(plan, 2**50)]
    names = {"peer", "peer-fused", "peer-graph", "eager", "dense-4d"}
    assert {entry.provider for entry in listed} == names
    assert len(listed) <= 32, "benchmarks/README.md says how long they take"


def test_a_plan_for_one_token_keeps_it_when_the_others_have_other_sizes() -> None:
    options = parse(["--device", "cuda", "--tokens", "16", "--dim", "32"])
    sizes = {(plan.case.tokens, plan.case.dim, plan.case.routers) for plan in options.plans}
    assert sizes == {(16, 32, 1), (1, 32, 32)}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("--device cuda --threads 2", "--threads is for --device cpu"),
        ("--device cuda --huge-pages", "--huge-pages is for --device cpu"),
        ("--device cuda --preset targets", "targets is for --device cpu"),
        ("--device cuda --preset sweep-threads", "sweep-threads is for --device cpu"),
        ("--preset cuda-targets", "cuda-targets is for --device cuda"),
        ("--preset cuda-compiled", "cuda-compiled is for --device cuda"),
        ("--device tpu", "invalid choice"),
        ("--num-experts 1000", "expected num_experts to be a square, got 1000"),
        ("--providers nobody", "got nobody"),
        ("--modes sideways", "got sideways"),
        ("--dtype int8", "expected dtype to be one of"),
        ("--distribution zipf", "expected a distribution"),
        ("--k 0", "expected k"),
        ("--rounds 0", "--rounds"),
    ],
)
def test_nonsense_on_the_command_line_is_refused(
    arguments: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments.split())
    assert what in capsys.readouterr().err


@without_gpu
def test_without_a_gpu_the_error_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("peer_bench: --device cuda needs a GPU, but torch ")


@without_gpu
def test_a_dry_run_for_a_gpu_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The list assumes one with 80 GiB of memory and 50 MiB of L2 cache." in text
    for plan in list_plans("cuda-targets"):
        assert plan.case.describe() in text
    for name in ("peer-graph", "peer-fused", "eager einsum", "dense-4d", "zipf:1.0"):
        assert name in text
    assert "does not fit" not in text
    assert main(["--device", "cuda", "--dry-run", "--max-memory", "20"]) == 0
    assert "20.0 GiB may be used" in " ".join(capsys.readouterr().out.split())


def test_slow_providers_take_part_in_three_rounds() -> None:
    assert [runner.takes_part(r, 7, 0.001) for r in range(7)] == [True] * 7
    assert [r for r in range(7) if runner.takes_part(r, 7, 2.0)] == [0, 3, 6]
    assert all(runner.takes_part(r, 3, 2.0) for r in range(3))


# Targets.


def make_row(provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
    case = Case(threads=2)
    sizes = {f: getattr(case, f) for f in Case.__dataclass_fields__}
    texts = {"date": "", "run": "", "preset": "targets", "variant": "", "huge_pages": 0}
    known = {"distribution": "uniform", "mode": mode, "provider": provider, "median_s": seconds}
    return Row(**{**sizes, **texts, **known, **changes})


def make_gpu_row(provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
    usual = {"device": "cuda", "tokens": 8192, "dim": 1024, "dtype": "bfloat16"}
    return make_row(provider, mode, seconds, **{**usual, **changes})


def test_targets_compare_with_the_best_of_the_others() -> None:
    speed = {"gb_per_s": 30.0, "bandwidth_gb_per_s": 50.0, "bandwidth_share": 0.6}
    one_token = {"tokens": 1, "distribution": "router", "bytes": 50_000}
    verdicts = evaluate(
        [
            make_row("peer", "experts-forward", 1.0, **speed),
            make_row("compiled", "experts-forward", 3.0, variant="einsum"),
            make_row("compiled", "experts-forward", 2.0, variant="sum"),
            make_row("peer", "step", 4.0, peak_bytes=2**30),
            make_row("peer-fused", "step", 2.0, peak_bytes=2**28),
            make_row("eager", "step", 50.0),
            make_row("dense-4d", "step", 1.0),
            # Measured once more beside Zipf: not what the others took turns with.
            make_row("peer", "experts-forward", 0.5),
            make_row("peer", "experts-forward", 0.4, distribution="zipf:1.0"),
            make_row("peer", "forward", 51e-6, bandwidth_gb_per_s=50.0, **one_token),
        ]
    )
    found = {(v.target.target, v.target.dim): v for v in verdicts}
    compiled = found["experts forward / best compiled variant", 512]
    assert compiled.measured == 2.0
    assert compiled.is_met
    assert "compiled sum" in compiled.note
    assert found["training step / plain with fused dense Adam", 512].measured == 25.0
    assert found["training step, time over the dense 4·D layer's", 512].is_met is False
    assert found["Zipf(1.0) over uniform, experts-forward", 512].measured == pytest.approx(0.8)
    sparse = found["peak memory of training beyond the tables, sparse gradients", 512]
    assert sparse.measured == 1.0
    assert sparse.is_met is False
    assert found["the same with the update fused into backward", 512].is_met
    missing = found["experts forward / best compiled variant", 1024]
    assert missing.measured is None
    assert missing.is_met is None
    assert missing.note == "not measured"
    latency = found[
        "one token, layer forward, time minus that of its bytes at measured bandwidth", 512
    ]
    assert latency.measured == pytest.approx(50e-6)
    assert latency.is_met


def test_targets_of_a_gpu_are_times_shares_and_ratios() -> None:
    speed = {"gb_per_s": 2700.0, "bandwidth_gb_per_s": 3000.0, "bandwidth_share": 0.9}
    verdicts = evaluate(
        [
            make_gpu_row("peer", "experts-forward", 1.5e-3, **speed),
            make_gpu_row("compiled", "experts-forward", 1.8e-3, variant="sum"),
            make_gpu_row("compiled", "experts-forward", 9e-3, variant="einsum"),
            make_gpu_row("peer", "routing", 0.2e-3),
            make_gpu_row("eager", "routing", 3e-3, variant="einsum"),
            make_gpu_row("peer", "experts-backward", 2.1e-3),
            make_gpu_row("peer-fused", "experts-backward", 2.1e-3),
            make_gpu_row("peer", "step", 4e-3, peak_bytes=2**31),
            make_gpu_row("peer-fused", "step", 3e-3, peak_bytes=2**28),
            make_gpu_row("eager", "step", 30e-3, variant="einsum", peak_bytes=2**34),
            make_gpu_row("embedding_bag", "step", 1e-3, variant="bags"),
            make_gpu_row("peer", "experts-forward", 1.2e-3),
            make_gpu_row("peer", "experts-forward", 1.25e-3, distribution="zipf:1.0"),
            make_gpu_row("peer-graph", "forward", 14e-6, tokens=1, distribution="router"),
            make_gpu_row("peer", "step", 9e-3, dtype="float32"),
            # Of the CPU, and of other sizes: none of these counts.
            make_row("peer", "routing", 1e-6, tokens=8192, dim=1024, dtype="bfloat16"),
            make_gpu_row("peer", "routing", 1e-6, dim=512),
        ],
        "cuda",
    )
    found = {verdict.target.target: verdict for verdict in verdicts}
    share = found["experts forward, share of copy bandwidth"]
    assert share.measured == 0.9
    assert share.is_met
    assert "2700 of 3000 GB/s" in share.note
    expected = {
        "retrieval, projection included": (0.2e-3, True),
        "routing / the same with torch.topk": (15.0, True),
        "experts backward, sparse gradients": (2.1e-3, False),
        "experts backward, fused row-wise Adagrad": (2.1e-3, True),
        "training step": (3e-3, True),
        "training step / eager einsum with fused dense Adam": (10.0, True),
        "peak memory of that eager step over peer's": (64.0, True),
        "experts forward / best compiled variant": (1.2, False),
        "layer forward + backward / best compiled variant": (None, None),
        "Zipf(1.0) over uniform, peer experts-forward": (1.25 / 1.2, False),
        "one token, layer forward in a CUDA graph": (14e-6, True),
        "bfloat16 over float32, step": (3.0, None),
    }
    for text, (measured, is_met) in expected.items():
        assert found[text].measured == pytest.approx(measured), text
        assert found[text].is_met is is_met, text
    assert str(found["training step"].target) == "≤ 4.00 ms"
    assert str(found["one token, layer forward in a CUDA graph"].target) == "≤ 20 µs"


def test_growth_with_the_number_of_experts_is_that_of_one_provider() -> None:
    rows = [
        make_row(name, "step", seconds, dim=256, num_experts=num_experts)
        for name, seconds, num_experts in (
            ("peer", 2.0, 2**22),
            ("peer-fused", 3.0, 2**22),
            ("peer", 1.6, 2**16),
            ("peer-fused", 1.0, 2**16),
        )
    ]
    found = {verdict.target.target: verdict for verdict in evaluate(rows)}
    assert found["training step, N = 2^22 over N = 2^16"].measured == 1.25


def test_rows_of_one_device_do_not_count_on_the_other() -> None:
    on_gpu = make_gpu_row("peer", "step", 1.0, tokens=1024, dtype="float32", dim=512)
    assert all(verdict.measured is None for verdict in evaluate([on_gpu]))
    assert all(v.measured is None for v in evaluate([make_row("peer", "step", 1.0)], "cuda"))


def test_a_target_says_why_its_own_row_has_no_time() -> None:
    wrong = "wrong result: output differs from the float64 reference by 0.5"
    measured = [
        make_gpu_row("peer", "routing", None, skipped=wrong, dtype="float32"),
        make_gpu_row("peer", "experts-forward", None, skipped=wrong),
        make_gpu_row("compiled", "experts-forward", 1.0),
        make_gpu_row("peer", "step", None, skipped=wrong),
        make_gpu_row("peer-fused", "step", 3e-3),
    ]
    found = {verdict.target.target: verdict for verdict in evaluate(measured, "cuda")}
    assert found["retrieval, projection included"].note == "not measured"
    share = found["experts forward, share of copy bandwidth"]
    assert (share.measured, share.is_met, share.note) == (None, None, f"peer: {wrong}")
    assert found["experts forward / best compiled variant"].note == f"peer: {wrong}"
    assert found["bfloat16 over float32, routing"].note == f"peer: {wrong}"
    assert found["training step"].measured == 3e-3


def test_a_bound_is_for_its_own_sizes_alone() -> None:
    for size in ({"num_experts": 512**2}, {"heads": 4}, {"k": 8}, {"dim_key": 128}):
        for verdict in evaluate([make_gpu_row("peer", "routing", 1e-6, **size)], "cuda"):
            assert verdict.measured is None


def test_at_other_sizes_numbers_are_reported_without_bounds() -> None:
    sizes = {"num_experts": 1024, "tokens": 16, "dim": 32}
    one_token = {**sizes, "tokens": 1, "distribution": "router"}
    small = [
        make_gpu_row("peer", "routing", 1e-6, **sizes),
        make_gpu_row("peer-graph", "forward", 1e-6, **one_token),
    ]
    found = {verdict.target.target: verdict for verdict in evaluate(small, "cuda", sizes)}
    for text in ("retrieval, projection included", "one token, layer forward in a CUDA graph"):
        assert found[text].measured == 1e-6
        assert found[text].is_met is None
        assert str(found[text].target) == "reported"
        assert found[text].target.dim == 32
    same = {"tokens": 8192, "dim": 1024, "heads": 8}
    verdicts = evaluate([make_gpu_row("peer", "routing", 1e-6)], "cuda", same)
    (again,) = (v for v in verdicts if v.target.target == "retrieval, projection included")
    assert again.is_met


def test_of_several_runs_the_last_that_tried_a_target_counts() -> None:
    def of(run: str, provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
        changes = {"preset": "cuda-targets", **changes}
        return make_gpu_row(provider, mode, seconds, run=run, **changes)

    verdicts = evaluate_runs(
        [
            of("2", "peer", "experts-backward", None, skipped="wrong result: zero"),
            of("2", "compiled", "backward", 8.0, preset="cuda-compiled"),
            of("2", "peer", "backward", 2.0, preset="cuda-compiled"),
            of("1", "peer", "routing", 0.2e-3),
            of("1", "peer", "backward", 4.0),
            of("1", "peer", "experts-backward", 1e-3),
            of("1", "peer", "step", 5.0),
            of("3", "peer", "step", 4.0),
            of("4", "peer", "step", 3.0, preset="stages"),
        ],
        "cuda",
    )
    found = {verdict.target.target: verdict for verdict in verdicts}
    assert found["retrieval, projection included"].measured == 0.2e-3
    assert found["retrieval, projection included"].note == "peer 0.2 ms; run of 1"
    assert found["layer forward + backward / best compiled variant"].measured == 4.0
    assert found["experts backward, sparse gradients"].measured is None
    assert found["experts backward, sparse gradients"].note == "peer: wrong result: zero; run of 2"
    assert found["training step"].measured == 4.0
    assert found["one token, layer forward in a CUDA graph"].note == "not measured"


def test_targets_of_files_are_printed_and_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "measure", None)
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    graph = {"run": "2", "preset": "cuda-targets", "tokens": 1, "distribution": "router"}
    routing = make_gpu_row("peer", "routing", 0.2e-3, run="1", preset="cuda-targets")
    results.append([routing], paths[0])
    results.append([make_gpu_row("peer-graph", "forward", 25e-6, **graph)], paths[1])
    assert main(["--targets", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"retrieval, projection included .* ≤ 0.30 ms +0.20 ms +yes +peer 0.2 ms; run of 1", out
    )
    assert re.search(r"one token, .* ≤ 20 µs +25 µs +no +peer-graph 0.025 ms; run of 2", out)
    assert main(["--targets", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("presets", "device"), [(("targets",), "cpu"), (("cuda-targets", "cuda-compiled"), "cuda")]
)
def test_every_target_is_measured_by_a_preset(presets: tuple[str, ...], device: str) -> None:
    numbers = {"gb_per_s": 1.0, "bandwidth_gb_per_s": 2.0, "bandwidth_share": 0.5, "peak_bytes": 1}
    measured = [
        make_row(
            entry.provider,
            entry.mode,
            1.0,
            run=preset,
            preset=preset,
            variant=entry.variant,
            distribution=entry.distribution,
            **{f: getattr(entry.case, f) for f in Case.__dataclass_fields__},
            **numbers,
        )
        for preset in presets
        for plan in list_plans(preset)
        for entry in list_entries(plan, 2**50)
    ]
    assert set(presets) <= set(results.TARGET_PRESETS)
    unmeasured = [v.target.target for v in evaluate_runs(measured, device) if v.measured is None]
    assert unmeasured == []


# Tables and pictures.


def print_tables(*tables: Any) -> str:
    printed = io.StringIO()
    console = Console(file=printed, width=300)
    for table in tables:
        console.print(table)
    return printed.getvalue()


def test_a_failed_variant_is_never_the_best_of_several() -> None:
    failed = [
        make_row("compiled", "step", None, variant=variant, skipped="failed: no triton")
        for variant in ("einsum", "sum")
    ]
    printed = print_tables(report.make_rows_table(failed))
    assert "compiled sum" in printed
    assert "*" not in printed


def test_reasons_are_printed_as_they_are() -> None:
    reason = "failed: RuntimeError: [enforce fail at alloc.cpp:1] [/usr/lib]"
    failed = make_gpu_row("peer", "routing", None, skipped=reason)
    tables = report.make_rows_table([failed]), report.make_targets_table(evaluate([failed], "cuda"))
    assert print_tables(*tables).count(reason) == 4, "one row, and three targets that need it"


def test_the_plot_script_draws_bars_and_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    import plot

    path = tmp_path / "rows.csv"
    numbers = {"min_s": 0.5, "max_s": 2.0, "bandwidth_share": 0.5}
    timed = {**numbers, "processor": "one", "capability": "x"}
    on_gpu = {**timed, "capability": "sm_90", "bandwidth_formula": "copy, 2 * bytes / seconds"}
    names = ("peer", "eager")
    results.append([make_gpu_row(n, "experts-forward", 0.001, **on_gpu) for n in names], path)
    results.append(
        [
            make_row(provider, mode, 0.001 * dim * factor, dim=dim, **timed)
            for provider, factor in (("peer", 1), ("eager", 9), ("dense-4d", 2))
            for mode in ("experts-forward", "step")
            for dim in (128, 256, 512)
        ],
        path,
    )
    results.append([make_row("eager", "step", None, skipped="does not fit")], path)
    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 0
    pictures = sorted((tmp_path / "out").iterdir())
    assert [picture.name.split("-")[0] for picture in pictures] == ["modes"] * 4 + ["sweep"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert [Path(line) for line in sorted(capsys.readouterr().out.split())] == pictures
