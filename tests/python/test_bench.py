"""The benchmarks: right providers pass, wrong ones do not; rows, formulas, what is skipped."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peer
from peer.bench import rows, stream, traffic
from peer.bench.__main__ import count_turns, main, measure_as, parse
from peer.bench.cases import DTYPES, MODES, PRESETS, Case, Plan, list_plans
from peer.bench.check import WrongResultError, check
from peer.bench.clock import EventClock, WallClock
from peer.bench.distributions import draw_ids, parse_exponent, zipf_probabilities
from peer.bench.failures import Failure, is_out_of_memory
from peer.bench.machine import CPU, Cpu, Cuda
from peer.bench.memory import drop_kept_gradients, measure_peak
from peer.bench.providers import PROVIDERS
from peer.bench.rows import Row
from peer.bench.run import Options, estimate_case, list_entries, run_plans
from peer.bench.shared import Shared
from peer.bench.spellings import EXPERTS, OF_ROWS, gather_and_einsum, project, route
from peer.bench.targets import TARGET_PRESETS, evaluate, evaluate_runs
from peer.bench.timing import Entry, Settings, measure_first, measure_rounds, takes_part
from peer.bench.works import (
    ExpertsWork,
    GraphWork,
    LayerWork,
    RetrievalWork,
    RoutingWork,
    SelectionWork,
)

MIB = 2**20
PLOT = Path(__file__).resolve().parents[2] / "benchmarks" / "plot.py"
SMALL = Case(num_experts=16**2, tokens=12, dim=8, heads=2, k=4, dim_key=8)
FAST = Settings(rounds=2, min_time=0.0)
SMALL_ON_GPU = replace(SMALL, device="cuda", dtype="bfloat16")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Timeline:
    """A GPU's queue on which every piece of work takes as long as it says.

    Args:
        tick: milliseconds that pass with each event, where no work says anything.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 0.0
        self.waits = 0
        self.events = 0
        self.tick = tick

    def work(self, milliseconds: float) -> None:
        self.now += milliseconds

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

    def elapsed_time(self, end_event: TimelineEvent) -> float:
        assert self.timeline.waits
        assert self.time is not None
        assert end_event.time is not None
        return end_event.time - self.time


class PretendedGpu(Cpu):
    """What is asked of a GPU, on the CPU: its dtypes, and its events on a timeline."""

    kind = "cuda"
    warm_up_calls = 3

    def __init__(self, tick: float = 1.0) -> None:
        super().__init__()
        self.timeline = Timeline(tick)

    def start_clock(self) -> EventClock:
        return EventClock(self.timeline.make_event, self.timeline.wait)


def run_bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "peer.bench", *map(str, arguments)],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def unexpected(what: str, failure: Failure) -> None:
    raise AssertionError(f"{what}: {failure}")


def measure(
    plans: list[Plan],
    options: Options,
    on_progress: Callable[[str, int], None] = lambda *_: None,
    on_failure: Callable[[str, Failure], None] = unexpected,
) -> list[Row]:
    """Runs plans; a failure that nobody expects is an error."""
    return run_plans(plans, options, lambda _: None, on_progress, on_failure)


@pytest.fixture
def shared() -> Shared:
    """The tensors of a small case."""
    return Shared(SMALL, ("uniform",))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Rows of the quick preset without what has to be compiled, and what was printed."""
    pytest.importorskip("rich")
    path = tmp_path_factory.mktemp("bench") / "rows.csv"
    providers = ",".join(name for name in PROVIDERS if name != "compiled")
    sizes = ("--num-experts", 32**2, "--tokens", 16, "--dim", 16, "--heads", 2, "--dim-key", 16)
    timing = ("--rounds", 2, "--min-time", 0, "--stream-mib", 8)
    result = run_bench("--csv", path, "--providers", providers, *sizes, *timing)
    assert result.returncode == 0, result.stdout + result.stderr
    return path, result.stdout


# The run.


def test_quick_writes_rows_whose_fields_parse(quick: tuple[Path, str]) -> None:
    found = rows.read(quick[0])
    measured = [row for row in found if not row.skipped]
    assert {row.mode for row in measured} == set(MODES)
    wanted = set(PROVIDERS) - {"compiled"}
    assert {row.provider for row in found} == wanted
    for row in measured:
        assert row.median_s is not None
        assert row.min_s is not None
        assert row.max_s is not None
        assert 0 < row.min_s <= row.median_s <= row.max_s
        assert row.rounds == 2
        assert row.calls >= row.rounds
        assert row.bytes > 0
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9, rel=1e-4)
        assert row.stream_gb_per_s is not None
        assert row.stream_share == pytest.approx(row.gb_per_s / row.stream_gb_per_s, rel=1e-4)
        assert row.stream_formula.startswith("read")
        assert (row.peer, row.torch) == (peer.__version__, str(torch.__version__))
        assert row.capability
        assert row.processor
        assert row.threads == 2
    assert all(row.median_s is None for row in found if row.skipped)


def test_what_is_printed_names_every_provider(quick: tuple[Path, str]) -> None:
    for name in set(PROVIDERS) - {"compiled"}:
        assert name in quick[1]


def test_rows_are_appended_under_one_head_line(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.csv"
    plan = Plan(SMALL, ("selection",), ("peer",))
    for _ in range(2):
        measure([plan], Options("test", path, FAST, MIB))
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][0] == "date"
    assert len(lines) == 3
    assert len(rows.read(path)) == 2


def test_turns_add_up_to_what_the_progress_bar_expects() -> None:
    plans = [
        Plan(SMALL, ("experts-forward", "selection"), ("peer", "eager"), ("uniform", "zipf:1")),
        Plan(replace(SMALL, dim=64, num_experts=256**2), ("forward",), ("peer",)),
    ]
    turns = []
    options = Options(settings=FAST, stream_size=MIB, memory=8 * MIB)
    measure(plans, options, lambda _, count: turns.append(count))
    listed = [entry for plan in plans for entry in list_entries(plan, 8 * MIB)]
    assert any(entry.skipped for entry in listed)
    assert sum(turns) == count_turns(listed, FAST.rounds)


def test_importing_peer_imports_nothing_of_the_benchmarks(run_python: Any) -> None:
    snippet = (
        "import json, sys, peer; "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('rich', 'PEER_pytorch')"
        " or m.startswith('peer.bench')]))"
    )
    assert run_python(snippet) == []


def test_without_rich_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-m", "peer.bench", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "peer.bench needs rich: pip install 'peer[bench]'"


def test_another_capability_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.chdir(Path(__file__).parent)
    sizes = ["--num-experts", "256", "--tokens", "8", "--dim", "8", "--dim-key", "8"]
    timing = ["--rounds", "1", "--min-time", "0", "--stream-mib", "1"]
    path = tmp_path / "rows.csv"
    command = ["--preset", "targets", "--modes", "selection", "--csv", str(path), *sizes, *timing]
    (row,), status = measure_as("default", parse(command))
    assert status == 0
    assert (row.capability, row.preset, row.dim) == ("default", "capability", 8)
    assert len(rows.read(path)) == 1


# Wrong providers.


@pytest.mark.parametrize("mode", ["experts-forward", "experts-backward"])
@pytest.mark.parametrize("spelling", list(EXPERTS))
def test_every_spelling_of_the_experts_is_right(shared: Shared, mode: str, spelling: str) -> None:
    table = shared.rows if spelling in OF_ROWS else shared.weight
    check(ExpertsWork(shared, "uniform", mode, EXPERTS[spelling], table))


def wrong_up(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table.unbind(1)
    return EXPERTS["einsum"](x, w, ids, torch.stack([down, up.roll(1, 0)], dim=1))


def no_activation(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table[ids].unbind(-2)
    return torch.einsum("tp,tpd->td", w * torch.einsum("td,tpd->tp", x, down), up)


def half_a_gradient_of_up(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    down, up = table.unbind(1)
    scaled = 0.5 * up + 0.5 * up.detach()
    return EXPERTS["einsum"](x, w, ids, torch.stack([down, scaled], dim=1))


def half_a_gradient_of_x(x: Tensor, w: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return EXPERTS["einsum"](0.5 * (x + x.detach()), w, ids, table)


@pytest.mark.parametrize("experts", [wrong_up, no_activation])
@pytest.mark.parametrize("mode", ["experts-forward", "experts-backward"])
def test_experts_with_a_wrong_output_are_caught(shared: Shared, mode: str, experts: Any) -> None:
    with pytest.raises(WrongResultError, match="output"):
        check(ExpertsWork(shared, "uniform", mode, experts, shared.weight))


@pytest.mark.parametrize(
    ("experts", "what"), [(half_a_gradient_of_up, "w_up"), (half_a_gradient_of_x, "gradient of x")]
)
def test_experts_with_a_wrong_gradient_are_caught(shared: Shared, experts: Any, what: str) -> None:
    check(ExpertsWork(shared, "uniform", "experts-forward", experts, shared.weight))
    with pytest.raises(WrongResultError, match=what):
        check(ExpertsWork(shared, "uniform", "experts-backward", experts, shared.weight))


def built(provider: str, shared: Shared, mode: str) -> list[Any]:
    """A provider's calls in a mode, one a spelling."""
    contestant = PROVIDERS[provider]
    if reason := contestant.missing(shared.case, mode):
        pytest.skip(reason)
    return [contestant.build(shared, "uniform", mode, s) for s in contestant.spellings(mode)]


CAN_BE_WRONG = [
    (name, mode)
    for name, provider in PROVIDERS.items()
    for mode in ("forward", "backward", "step")
    if mode in provider.modes and name != "compiled"
]


@pytest.mark.parametrize(("provider", "mode"), CAN_BE_WRONG)
def test_a_layer_is_right_and_is_caught_once_it_is_not(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, provider: str, mode: str
) -> None:
    for work in built(provider, shared, mode):
        before = [parameter.detach().clone() for parameter in shared.parameters()]
        work.open()
        check(work)
        work.close()
        after = shared.parameters()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        layer = work.layers[0]
        forward = layer.forward

        def scaled(
            x: Tensor, ids: Tensor | None = None, forward: Callable[..., Any] = forward
        ) -> Any:
            out, chosen = forward(x, ids)
            return 1.01 * out, chosen

        monkeypatch.setattr(layer, "forward", scaled)
        work.open()
        with pytest.raises(WrongResultError, match="output"):
            check(work)
        work.close()


@pytest.mark.parametrize("mode", ["backward", "step"])
def test_a_layer_with_a_wrong_gradient_is_caught(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    (work,) = built("eager", shared, mode)
    layer = work.layers[0]
    right = layer.experts
    monkeypatch.setattr(layer, "experts", lambda x, *others: right(0.5 * (x + x.detach()), *others))
    with pytest.raises(WrongResultError, match="gradient of x"):
        check(work)


@pytest.mark.parametrize("provider", ["peer", "peer-fused", "eager", "embedding_bag"])
def test_timed_steps_leave_the_parameters_as_they_were(shared: Shared, provider: str) -> None:
    before = [parameter.detach().clone() for parameter in shared.parameters()]
    for spelling in PROVIDERS[provider].spellings("step"):
        work = PROVIDERS[provider].build(shared, "uniform", "step", spelling)
        entry = Entry(provider, spelling, "uniform", work)
        measure_first(entry, warm=True)
        measure_rounds([entry], Settings(2, 0.0), stream.Stream(2**20), CPU, True, lambda _: None)
        assert entry.calls > 0
    for parameter, value in zip(shared.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-7, atol=1e-9)


def test_a_wrong_step_is_caught(shared: Shared) -> None:
    (work,) = built("peer", shared, "step")
    work.open()
    work.optimizers[0].param_groups[0]["lr"] *= 1.01
    with pytest.raises(WrongResultError, match="step of w_down"):
        check(work)


def test_second_best_experts_are_caught(shared: Shared) -> None:
    def second_best(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> Any:
        scores, ids = peer.functional.product_key_topk(query, row_keys, col_keys, k + 1)
        return scores[..., 1:], ids[..., 1:]

    def doubled(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> Any:
        scores, ids = peer.functional.product_key_topk(query, row_keys, col_keys, k)
        return 2 * scores, ids

    check(RetrievalWork(shared, "uniform", peer.functional.product_key_topk))
    with pytest.raises(WrongResultError, match="scores of the retrieved experts"):
        check(RetrievalWork(shared, "uniform", second_best))
    with pytest.raises(WrongResultError, match="scores"):
        check(RetrievalWork(shared, "uniform", doubled))
    with pytest.raises(WrongResultError, match="scores of the retrieved experts"):
        check(SelectionWork(shared, "uniform", second_best, from_scores=False))


def test_a_wrong_provider_gets_a_row_that_says_so_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EXPERTS, "einsum", no_activation)
    plan = Plan(SMALL, ("experts-forward", "routing"), ("eager", "peer"))
    failures: list[tuple[str, Failure]] = []
    found = measure([plan], Options(settings=FAST, stream_size=MIB), on_failure=collect(failures))
    times = {(row.mode, row.provider): row.median_s for row in found}
    assert {key for key, seconds in times.items() if seconds is None} == {
        ("experts-forward", "eager")
    }
    assert len(times) == 4
    (wrong,) = (row for row in found if row.skipped)
    assert re.fullmatch(
        r"wrong result: output differs from the float64 reference by 0?\.\d+", wrong.skipped
    )
    ((what, failure),) = failures
    assert what.startswith("eager einsum experts-forward, uniform, N=16²")
    assert failure == Failure(wrong.skipped)


def collect(failures: list[tuple[str, Failure]]) -> Callable[[str, Failure], None]:
    return lambda what, failure: failures.append((what, failure))


@pytest.mark.parametrize(
    ("provider", "mode"),
    [("peer", "step"), ("peer-fused", "step"), ("peer-fused", "experts-backward")],
)
def test_a_wrong_step_leaves_no_trace_in_what_the_next_provider_shares(
    shared: Shared, provider: str, mode: str
) -> None:
    (work,) = built(provider, shared, mode)
    before = [parameter.detach().clone() for parameter in shared.parameters()]
    work.open()
    work.optimizers[0].param_groups[0]["lr"] *= 1.5
    with pytest.raises(WrongResultError, match="step of w_down"):
        check(work)
    work.close()
    for parameter, value in zip(shared.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_drawn_ids_replace_those_of_the_router(shared: Shared) -> None:
    for name in ("peer", "eager", "PEER-pytorch"):
        (work,) = built(name, shared, "forward")
        assert isinstance(work, LayerWork)
        x = shared.x[0]
        own, _ = work.layers[0](x, None)
        replaced, _ = work.layers[0](x, shared.ids["uniform"][0])
        again, _ = work.layers[0](x, None)
        assert not torch.allclose(own, replaced)
        torch.testing.assert_close(own, again)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_wrong_choice_is_caught_in_every_dtype_of_a_gpu(dtype: str) -> None:
    case = Case(num_experts=64**2, tokens=16, dim=32, heads=2, k=8, dim_key=32, device="cuda")
    shared = Shared(replace(case, dtype=dtype), ("uniform",), machine=PretendedGpu())

    def second_best(*arguments: Any) -> Any:
        scores, ids = route(*arguments[:-1], arguments[-1] + 1)
        return scores[..., 1:], ids[..., 1:]

    def ours(x: Tensor, query_weight: Tensor, rows: Tensor, columns: Tensor, k: int) -> Any:
        return peer.functional.product_key_topk(project(x, query_weight, 32), rows, columns, k)

    def unrouted(x: Tensor, query_weight: Tensor, rows: Tensor, columns: Tensor, k: int) -> Any:
        return route(x, query_weight.roll(1, 0), rows, columns, k)

    check(RoutingWork(shared, "uniform", route))
    check(RoutingWork(shared, "uniform", ours))
    for wrong in (second_best, unrouted):
        with pytest.raises(WrongResultError, match="scores of the retrieved experts"):
            check(RoutingWork(shared, "uniform", wrong))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_fused_into_the_experts_is_right_and_is_caught_once_it_is_not(
    dtype: str,
) -> None:
    shared = Shared(replace(SMALL, dtype=dtype), ("uniform",))
    (work,) = built("peer-fused", shared, "experts-backward")
    before = shared.weight.detach().clone()
    work.open()
    check(work)
    work.close()
    assert torch.equal(shared.weight, before)
    work.open()
    work.optimizers[0].param_groups[0]["lr"] *= 1.01 if dtype == "float32" else 1.5
    with pytest.raises(WrongResultError, match="step of w_down"):
        check(work)
    work.close()
    assert work.pool.fused_update is None


def test_timed_updates_fused_into_the_experts_leave_the_table_as_it_was(shared: Shared) -> None:
    (work,) = built("peer-fused", shared, "experts-backward")
    before = shared.weight.detach().clone()
    entry = Entry("peer-fused", "", "uniform", work)
    measure_first(entry, warm=False)
    measure_rounds([entry], FAST, stream.Stream(MIB), CPU, False, lambda _: None)
    assert entry.calls > 0
    torch.testing.assert_close(shared.weight.detach(), before, rtol=1e-7, atol=1e-9)


# Machines.


def test_the_cpu_says_what_it_is() -> None:
    assert CPU.device == torch.device("cpu")
    assert CPU.kind == "cpu"
    assert CPU.processor
    assert CPU.capability == torch.ops.peer.cpu_capability()
    assert CPU.sizes.last_level_cache == stream.last_level_cache()
    assert 0 < CPU.sizes.memory < 2**60
    assert isinstance(CPU.start_clock(), WallClock)
    assert CPU.make_stream(MIB).formula.startswith("read")
    peak = CPU.measure_peak(lambda: torch.ones(32 * MIB // 4))
    assert peak is None or 31 * MIB < peak < 48 * MIB


def test_a_clock_by_the_wall_adds_up_calls_alone() -> None:
    clock = WallClock()
    assert clock.total() == 0.0
    for _ in range(2):
        clock.start()
        time.sleep(0.01)
        clock.stop()
        time.sleep(0.2)
    assert 0.02 <= clock.total() < 0.2


def test_a_clock_by_events_adds_up_what_lies_between_them_and_waits_once() -> None:
    timeline = Timeline()
    clock = EventClock(timeline.make_event, timeline.wait)
    for milliseconds in (2.0, 3.0):
        timeline.work(100.0)  # prepares the call
        clock.start()
        timeline.work(milliseconds)
        clock.stop()
        timeline.work(10.0)
    assert timeline.waits == 0
    assert clock.total() == pytest.approx(5e-3)
    assert timeline.waits == 1


def test_what_prepares_a_call_and_what_warms_up_is_not_timed() -> None:
    machine = PretendedGpu(tick=0.0)
    shared = Shared(SMALL_ON_GPU, ("uniform",), machine=machine)
    indices: list[int] = []

    class Slowing(RetrievalWork):
        def prepare(self, index: int) -> None:
            machine.timeline.work(50.0)

        def run(self, index: int) -> None:
            indices.append(index)
            is_warm = len(indices) not in (4, 5, 6)  # the calls at the start of the round
            machine.timeline.work(2.0 if is_warm else 1000.0)

    entry = Entry("peer", "", "uniform", Slowing(shared, "uniform", route))
    measure_first(entry, warm=False)
    assert entry.first == pytest.approx(2e-3)
    measure_rounds([entry], Settings(1, 0.0), stream.Stream(MIB), machine, False, lambda _: None)
    assert entry.seconds == [pytest.approx(2e-3)]
    assert entry.calls == machine.warm_up_calls + 1
    assert indices == [0, 1, 2, 0, 1, 2, 3]


def test_replays_of_graphs_are_timed_between_one_pair_of_events() -> None:
    machine = PretendedGpu(tick=5.0)  # an event takes longer than a replay
    case = replace(SMALL_ON_GPU, tokens=1, routers=3)
    shared = Shared(case, ("router",), machine=machine)
    replayed: list[int] = []

    class Replaying(GraphWork):
        def open(self) -> None:
            replayed.clear()

        def prepare(self, index: int) -> None:
            machine.timeline.work(1000.0)

        def run(self, index: int) -> None:
            replayed.append(index)
            machine.timeline.work(0.02)

    work = PROVIDERS["peer"].build(shared, "router", "forward", "")
    entry = Entry("", "", "router", Replaying(shared, "router", "forward", work.layers, None))  # type: ignore[arg-type]
    entry.first = 0.05e-3
    settings = Settings(rounds=1, min_time=0.05)
    measure_rounds([entry], settings, stream.Stream(MIB), machine, False, lambda _: None)
    assert machine.timeline.events == 4, "a pair to warm up, and one for the turn"
    assert replayed == list(range(3 + 1000)), "graphs take turns, and warm up"
    assert entry.seconds == [pytest.approx((5.0 + 1000 * 0.02) / 1000 / 1e3)]


def test_a_copy_counts_its_bytes_twice() -> None:
    timeline = Timeline()

    class Copying(EventClock):
        def stop(self) -> None:
            timeline.work(4.0)
            super().stop()

    copy = stream.CopyStream(
        torch.device("cpu"), lambda: Copying(timeline.make_event, timeline.wait), 10**6
    )
    assert copy.measure() == pytest.approx(2 * 10**6 / 4e-3 / 1e9)
    assert "copy" in copy.formula
    assert copy._from.float().std() > 50


def test_a_case_is_measured_on_its_own_device() -> None:
    with pytest.raises(ValueError, match="the case is for cuda, the machine is cpu"):
        Shared(SMALL_ON_GPU, ("uniform",))
    with pytest.raises(ValueError, match="expected device"):
        replace(SMALL, device="tpu")


def test_activations_have_the_dtype_of_the_tables_on_a_gpu_alone() -> None:
    case = replace(SMALL, dtype="bfloat16")
    assert case.activation_dtype == torch.float32
    assert Shared(case, ()).x[0].dtype == torch.float32
    assert SMALL_ON_GPU.activation_dtype == torch.bfloat16
    shared = Shared(SMALL_ON_GPU, (), machine=PretendedGpu())
    assert {p.dtype for p in shared.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in (*shared.x, shared.grad_out)} == {torch.bfloat16}
    half = replace(SMALL, dtype="float16", device="cuda")
    assert half.activation_dtype == torch.float16
    assert replace(half, dtype="float32").activation_dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_provider_is_right_in_the_dtypes_of_a_gpu(dtype: str) -> None:
    case = replace(SMALL_ON_GPU, dtype=dtype)
    left_out = {"compiled", "peer-graph"}
    if dtype == "float16":
        left_out.add("embedding_bag")  # torch adds no sparse gradients in float16 on a CPU
    names = tuple(name for name in PROVIDERS if name not in left_out)
    plans = [
        Plan(case, MODES, names),
        Plan(case, ("forward", "backward"), ("peer", "eager"), ("router",)),
        Plan(replace(case, tokens=1, routers=2), ("forward",), ("peer", "eager"), ("router",)),
    ]
    options = Options(settings=FAST, stream_size=MIB, machine=PretendedGpu())
    found = measure(plans, options)
    assert {row.device for row in found} == {"cuda"}
    assert {row.mode for row in found if not row.skipped} == set(MODES)
    skipped = {row.provider for row in found if row.skipped}
    assert skipped <= {"PEER-pytorch"}, "it may be missing"


def test_a_graph_is_captured_for_each_layer_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that only counts: its output stays that of the capture."""
    done: list[object] = []

    class Graph:
        def replay(self) -> None:
            done.append(self)

    class Stream:
        def wait_stream(self, _: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    case = replace(SMALL_ON_GPU, tokens=1, routers=2)
    shared = Shared(case, ("router",), machine=PretendedGpu())
    work = PROVIDERS["peer-graph"].build(shared, "router", "forward", "")
    assert isinstance(work, GraphWork)
    second, shared.x[1] = shared.x[1], shared.x[0]
    work.open()
    check(work)
    graphs = [call.graph for call in work.calls]
    assert done == graphs
    assert len(set(graphs)) == 2
    shared.x[1] = second
    work.close()
    assert work.calls == []
    work.open()
    graphs = [call.graph for call in work.calls]
    for call, x in zip(work.calls, shared.x[:2], strict=True):
        assert torch.equal(call.x, x), "each graph reads an input of its own"
    del done[:]
    work.run(2)
    work.run(3)
    assert done == graphs


def test_a_single_router_is_captured_for_each_input() -> None:
    shared = Shared(SMALL_ON_GPU, ("router",), machine=PretendedGpu())
    work = PROVIDERS["peer-graph"].build(shared, "router", "forward", "")
    assert len(work.layers) == shared.inputs > 1


def test_a_graph_on_the_cpu_is_skipped_with_the_reason() -> None:
    (listing,) = list_entries(Plan(SMALL, ("forward",), ("peer-graph",)), 2**50)
    assert listing.skipped == "a CUDA graph needs --device cuda"
    (listing,) = list_entries(Plan(SMALL_ON_GPU, ("forward",), ("peer-graph",)), 2**50)
    assert listing.skipped == ""


# Providers that fail.


class Failing:
    """A spelling of the experts that fails from some call on.

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


def exhaust_gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")


def exhaust_host() -> Exception:
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error.with_traceback(None)
    raise AssertionError


def on_gpu(machine: PretendedGpu | None = None) -> Options:
    return Options(settings=FAST, stream_size=MIB, machine=machine or PretendedGpu())


@pytest.mark.parametrize("make_error", [exhaust_gpu, exhaust_host])
@pytest.mark.parametrize(
    ("call", "when"),
    [(1, "when it was tried"), (3, "when it was tried"), (IN_ROUND_2, "in round 2")],
)
def test_a_provider_that_exhausts_memory_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, make_error: Any, call: int, when: str
) -> None:
    monkeypatch.setitem(EXPERTS, "einsum", Failing(make_error, call))
    turns: list[int] = []
    found = measure([ON_GPU], on_gpu(), lambda _, count: turns.append(count))
    assert {row.provider: (row.skipped, row.median_s is None) for row in found} == {
        "eager": (f"does not fit: out of memory {when}", True),
        "peer": ("", False),
    }
    assert sum(turns) == count_turns(list(list_entries(ON_GPU, 2**50)), FAST.rounds)


def test_a_provider_that_cannot_be_built_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> Any:
        raise exhaust_gpu()

    monkeypatch.setattr(PROVIDERS["eager"], "build", build)
    found = measure([ON_GPU], on_gpu())
    assert {row.provider: row.skipped for row in found} == {
        "eager": "does not fit: out of memory when it was tried",
        "peer": "",
    }


@pytest.mark.parametrize(
    ("name", "when"),
    [("Shared", "the tensors of the case were made"), ("_Run._stream", "bandwidth was measured")],
)
def test_a_case_whose_own_tensors_exhaust_memory_leaves_the_other_cases(
    monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    tries = []

    def fail_first(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tries.append(function)
            if len(tries) == 1:
                raise exhaust_gpu()
            return function(*arguments, **options)

        return call

    owner: Any = peer.bench.run
    *owners, attribute = name.split(".")
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, attribute, fail_first(getattr(owner, attribute)))
    plans = [ON_GPU, replace(ON_GPU, case=replace(SMALL_ON_GPU, tokens=13))]
    turns: list[int] = []
    found = measure(plans, on_gpu(), lambda _, count: turns.append(count))
    assert [(row.tokens, row.provider) for row in found] == [
        (12, "eager"),
        (12, "peer"),
        (13, "eager"),
        (13, "peer"),
    ]
    assert all(when in row.skipped for row in found[:2])
    assert not any(row.skipped for row in found[2:])
    assert sum(turns) == 2 * count_turns(list(list_entries(ON_GPU, 2**50)), FAST.rounds)


@pytest.mark.parametrize("call", [1, IN_ROUND_2])
def test_nothing_of_a_provider_that_failed_stays_behind(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    failing = Failing(exhaust_gpu, call)
    monkeypatch.setitem(EXPERTS, "einsum", failing)
    build, works = PROVIDERS["eager"].build, []

    def watch(*arguments: Any) -> Any:
        work = build(*arguments)
        works.append(weakref.ref(work))
        return work

    monkeypatch.setattr(PROVIDERS["eager"], "build", watch)
    is_alive = []

    def look(*_: object) -> None:
        if failing.calls >= call:
            is_alive.append(works[0]() is not None)

    measure([ON_GPU], on_gpu(), look)
    assert is_alive
    assert not any(is_alive)


def test_what_says_that_memory_is_short() -> None:
    for error in (exhaust_gpu(), exhaust_host(), MemoryError()):
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("call", [1, IN_ROUND_2])
def test_a_provider_that_raises_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    failing = Failing(lambda: NotImplementedError("no kernel for this\nand more"), call)
    monkeypatch.setitem(EXPERTS, "einsum", failing)
    failures: list[tuple[str, Failure]] = []
    found = measure([ON_GPU], on_gpu(), on_failure=collect(failures))
    assert {row.provider: row.skipped for row in found} == {
        "eager": "failed: NotImplementedError: no kernel for this",
        "peer": "",
    }
    ((_, failure),) = failures
    assert "and more" in failure.traceback
    assert "in __call__" in failure.traceback


def test_a_stop_by_the_keyboard_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "einsum", Failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure([ON_GPU], on_gpu())


@pytest.mark.parametrize(
    ("call", "complete"), [(1, False), (IN_ROUND_2 - 4, False), (IN_ROUND_2, True)]
)
def test_after_the_gpu_is_lost_nothing_more_is_tried(
    monkeypatch: pytest.MonkeyPatch, call: int, complete: bool
) -> None:
    class Lost(PretendedGpu):
        def recover(self) -> None:
            self.is_lost = True

        def release(self) -> None:
            assert not self.is_lost

        def make_stream(self, size: int | None = None) -> stream.Bandwidth:
            made = super().make_stream(size)
            measure_stream = made.measure

            def measure_unless_lost() -> float:
                assert not self.is_lost
                return measure_stream()

            monkeypatch.setattr(made, "measure", measure_unless_lost)
            return made

    failing = Failing(lambda: RuntimeError("CUDA error: an illegal memory access"), call)
    monkeypatch.setitem(EXPERTS, "einsum", failing)
    failures: list[tuple[str, Failure]] = []
    before = Plan(SMALL_ON_GPU, ("experts-forward",), ("peer", "eager", "peer-graph"))
    plans = [before, Plan(SMALL_ON_GPU, ("routing", "step"), ("peer", "dense-4d"))]
    turns: list[int] = []
    found = measure(plans, on_gpu(Lost()), lambda _, n: turns.append(n), collect(failures))
    reasons = {(row.mode, row.provider): row.skipped for row in found}
    never = "not run: the GPU failed before"
    assert reasons == {
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
    machine = object.__new__(Cuda)
    machine.device = torch.device("cuda", 0)
    machine.recover()
    assert machine.is_lost is not works
    assert bool(done) is works


def test_the_exit_status_and_the_last_lines_tell_of_wrong_and_failed_providers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    sizes = ["--num-experts", "256", "--tokens", "8", "--dim", "8", "--heads", "2", "--k", "4"]
    command = [*sizes, "--modes", "experts-forward", "--distribution", "uniform", "--dim-key", "8"]
    command += ["--rounds", "1", "--min-time", "0", "--stream-mib", "1"]
    command += ["--providers", "eager,embedding_bag,peer"]
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(EXPERTS, "einsum", no_activation)
    monkeypatch.setitem(EXPERTS, "bags", Failing(lambda: ValueError("no bags")))
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


def test_a_dry_run_allocates_nothing_and_lists_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    code = (
        "import sys, resource, peer.bench.__main__ as m\n"
        "import torch; torch.empty_like = torch.empty = torch.randn = torch.ones = None\n"
        "sys.exit(m.main(['--preset', 'targets', '--dry-run', '--max-memory', '20']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for plan in list_plans("targets"):
        assert plan.case.describe()[:30] in result.stdout
    assert "does not fit" in result.stdout


def test_a_case_that_does_not_fit_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("tensors were made")

    monkeypatch.setattr("peer.bench.run.Shared", refuse)
    path = tmp_path / "rows.csv"
    plan = Plan(Case(num_experts=2**40, dim=4096), ("forward",), ("peer", "eager"))
    found = measure([plan], Options("x", path, FAST, MIB))
    assert len(found) == 2
    assert all(row.skipped.startswith("does not fit: needs about 3") for row in found)
    assert [row.skipped for row in rows.read(path)] == [row.skipped for row in found]


def test_a_provider_that_does_not_fit_leaves_the_others() -> None:
    case = replace(SMALL, num_experts=256**2, dim=16)
    limit = estimate_case(case) + 12 * MIB
    options = Options(settings=FAST, stream_size=MIB, memory=limit)
    assert case.table_bytes == 8 * MIB
    plan = Plan(case, ("step",), ("dense-active", "eager"))
    found = measure([plan], options)
    assert {row.provider: bool(row.skipped) for row in found} == {
        "dense-active": False,
        "eager": True,
    }


def test_peak_memory_is_that_of_the_call_alone() -> None:
    held = torch.ones(64 * MIB // 4)

    def allocate() -> None:
        torch.ones(32 * MIB // 4)
        torch.ones(32 * MIB // 4)

    peak = measure_peak(allocate)
    if peak is None:
        pytest.skip("the system does not reset the high-water mark")
    assert 31 * MIB < peak < 48 * MIB
    assert held.numel()


def test_memory_that_is_kept_of_freed_gradients_counts_again() -> None:
    ids, table = torch.arange(2**14).view(128, 128), torch.ones(2**14, 2, 256, requires_grad=True)

    def train() -> None:
        x, weights = torch.ones(128, 256), torch.ones(128, 128)
        out = peer.functional.expert_mlp(x, weights, ids, table, sparse_grad=True)
        torch.autograd.grad(out.sum(), table)

    for _ in range(2):
        drop_kept_gradients()
        peak = measure_peak(train)
        if peak is None:
            pytest.skip("the system does not reset the high-water mark")
        assert peak >= 31 * MIB


def test_nothing_of_a_case_stays_behind() -> None:
    before = {id(obj) for obj in _large_tensors()}
    plan = Plan(replace(SMALL, num_experts=128**2), ("backward", "step"), ("peer", "eager"))
    measure([plan], Options(settings=FAST, stream_size=MIB))
    assert [tuple(t.shape) for t in _large_tensors() if id(t) not in before] == []


def _large_tensors() -> list[Tensor]:
    import gc

    gc.collect()
    objects = (obj for obj in gc.get_objects() if type(obj) in (Tensor, torch.nn.Parameter))
    return [obj for obj in objects if obj.layout == torch.strided and obj.numel() >= 128**2]


# Formulas.


def test_bytes_of_the_experts_are_rows_times_widths() -> None:
    case = Case(num_experts=1024**2, tokens=1000, dim=512, heads=8, k=16)
    rows_read = 1000 * 128
    row = 2 * 512 * 4
    assert traffic.experts_bytes(case, "experts-forward", 7, "sparse") == rows_read * row
    assert traffic.experts_bytes(case, "experts-backward", 7, "sparse") == (rows_read + 7) * row
    assert traffic.experts_bytes(case, "experts-backward", 7, "fused") == rows_read * row
    dense = traffic.experts_bytes(case, "experts-backward", 7, "dense")
    assert dense == (rows_read + 1024**2) * row
    assert traffic.experts_bytes(case, "optimizer", 7, "sparse") == 3 * 7 * row
    assert traffic.experts_bytes(case, "optimizer", 7, "dense") == 7 * 1024**2 * row
    half = replace(case, dtype="bfloat16")
    assert traffic.experts_bytes(half, "experts-forward", 7, "sparse") == rows_read * row // 2


def test_bytes_of_routing_are_inputs_query_weights_keys_and_what_is_written() -> None:
    case = Case(tokens=1000, dim=512, heads=8, k=16, dim_key=256)
    read = 1000 * 512 + 512 * 8 * 256 + 2 * 1024 * 128
    assert traffic.retrieval_bytes(case, "routing") == 4 * read + 12 * 1000 * 128
    half = replace(case, dtype="bfloat16")
    assert traffic.retrieval_bytes(half, "routing") == 4 * read + 12 * 1000 * 128
    on_gpu = replace(half, device="cuda")
    assert traffic.retrieval_bytes(on_gpu, "routing") == 2 * read + 12 * 1000 * 128


def test_bytes_of_a_fused_update_are_those_of_the_backward_pass_and_the_rows() -> None:
    case = Case(num_experts=1024**2, tokens=1000, dim=512)
    found = PROVIDERS["peer-fused"].algorithmic_bytes(case, "experts-backward", "", 7.0)
    assert found == (1000 * 128 + 2 * 7) * 2 * 512 * 4


def test_bytes_of_one_token_are_query_weights_keys_and_rows() -> None:
    case = Case(tokens=1)
    expected = 4 * (512 * 8 * 256 + 2 * 1024 * 128 + 128 * 2 * 512 + 2 * 512)
    assert traffic.layer_bytes(case, "forward", 128, "sparse") == expected


def test_bytes_of_a_feed_forward_layer_are_its_weights() -> None:
    case = Case(dim=64)
    assert traffic.dense_bytes(case, "forward", 256) == 2 * 64 * 256 * 4
    assert traffic.dense_bytes(case, "step", 256) == 10 * 2 * 64 * 256 * 4


def test_bandwidth_is_bytes_over_seconds() -> None:
    assert stream.gigabytes_per_second(3 * 10**9, 2.0) == 1.5
    measured = stream.Stream(4 * MIB)
    assert measured.size == 4 * MIB
    assert measured.formula in ("read, torch.sum", "read, torch.mv")
    assert measured.measure() > 0
    assert stream.last_level_cache() >= 2**15


# Distributions.


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.5])
def test_ids_are_distributed_as_zipf_says(exponent: float) -> None:
    experts, draws = 50, 200_000
    probabilities = zipf_probabilities(experts, exponent)
    assert probabilities.sum().item() == pytest.approx(1.0)
    assert (probabilities[0] / probabilities[9]).item() == pytest.approx(10**exponent)
    generator = torch.Generator().manual_seed(0)
    counts = draw_ids((draws,), experts, exponent, generator).bincount(minlength=experts)
    # Popularity in descending order, with the standard deviation of a binomial count. Sorting
    # moves counts of neighbours by less.
    sorted_counts = counts.sort(descending=True).values.double()
    deviation = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((sorted_counts - draws * probabilities).abs() < 5 * deviation).all()
    assert counts.argmax() != 0, "the most popular expert is the first: ranks are not shuffled"


def test_uniform_ids_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = draw_ids((100, 1000), 20, 0.0, generator).flatten().bincount(minlength=20)
    assert ((counts - 5000).abs() < 5 * math.sqrt(5000)).all()


def test_the_same_seed_draws_the_same_ids() -> None:
    one, other = (draw_ids((5, 7), 99, 1.0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)


def test_distributions_that_do_not_exist_are_refused() -> None:
    assert parse_exponent("uniform") == 0.0
    assert parse_exponent("zipf:0.5") == 0.5
    assert parse_exponent("router") is None
    for text in ("zipf", "zipf:", "zipf:-1", "zipf:inf", "normal:1"):
        with pytest.raises(ValueError, match="expected a distribution"):
            parse_exponent(text)


# Presets, rounds and targets.


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_something_to_measure(preset: str) -> None:
    plans = list_plans(preset)
    assert plans
    assert all(list(list_entries(plan, 2**50)) for plan in plans)


def test_sizes_of_the_command_line_replace_those_of_the_preset() -> None:
    options = parse(
        ["--preset", "quick", "--dim", "32,64", "--modes", "step", "--providers", "peer"]
    )
    assert {plan.case.dim for plan in options.plans} == {32, 64}
    assert {plan.modes for plan in options.plans} == {("step",)}
    assert {plan.providers for plan in options.plans} == {("peer",)}


def test_what_is_named_twice_is_measured_once() -> None:
    options = parse(["--providers", "peer,peer", "--modes", "step,step"])
    assert {(plan.providers, plan.modes) for plan in options.plans} == {(("peer",), ("step",))}


def test_a_gpu_has_a_preset_of_its_own() -> None:
    assert parse([]).preset == "quick"
    options = parse(["--device", "cuda"])
    assert options.preset == "cuda-targets"
    assert {plan.case.device for plan in options.plans} == {"cuda"}
    assert {plan.case.tokens for plan in options.plans} == {1, 8192}
    assert {plan.case.dtype for plan in options.plans} == {"bfloat16"}
    options = parse(["--device", "cuda", "--preset", "stages", "--dtype", "bfloat16"])
    assert {plan.case.device for plan in options.plans} == {"cuda"}


def test_turns_are_shorter_and_fewer_on_a_gpu() -> None:
    assert (parse([]).rounds, parse([]).min_time) == (7, 0.2)
    options = parse(["--device", "cuda"])
    assert (options.rounds, options.min_time) == (5, 0.1)
    options = parse(["--device", "cuda", "--rounds", "2", "--min-time", "0"])
    assert (options.rounds, options.min_time) == (2, 0.0)


def test_the_default_preset_of_a_gpu_compiles_nothing_and_has_few_entries() -> None:
    listed = [entry for plan in list_plans("cuda-targets") for entry in list_entries(plan, 2**50)]
    assert {entry.provider for entry in listed} == {
        "peer",
        "peer-fused",
        "peer-graph",
        "eager",
        "dense-4d",
    }
    assert len(listed) <= 32, "benchmarks/README.md says how long they take"


def test_a_plan_for_one_token_keeps_it_when_the_others_have_other_sizes() -> None:
    options = parse(["--device", "cuda", "--tokens", "16", "--dim", "32"])
    sizes = {(plan.case.tokens, plan.case.dim, plan.case.routers) for plan in options.plans}
    assert sizes == {(16, 32, 1), (1, 32, 32)}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--device", "cuda", "--threads", "2"), "--threads is for --device cpu"),
        (("--device", "cuda", "--huge-pages"), "--huge-pages is for --device cpu"),
        (("--device", "cuda", "--preset", "targets"), "targets is for --device cpu"),
        (("--device", "cuda", "--preset", "sweep-threads"), "sweep-threads is for --device cpu"),
        (("--preset", "cuda-targets"), "cuda-targets is for --device cuda"),
        (("--preset", "cuda-compiled"), "cuda-compiled is for --device cuda"),
        (("--device", "tpu"), "invalid choice"),
    ],
)
def test_what_means_nothing_on_a_device_is_refused(
    arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(list(arguments))
    assert what in capsys.readouterr().err


@without_gpu
def test_without_a_gpu_a_sentence_says_so() -> None:
    pytest.importorskip("rich")
    result = run_bench("--device", "cuda")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("peer.bench: --device cuda needs a GPU, but torch ")


@without_gpu
def test_a_dry_run_for_a_gpu_needs_none() -> None:
    pytest.importorskip("rich")
    result = run_bench("--device", "cuda", "--dry-run")
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "The list is for one with 80 GiB and 50 MiB of last-level cache." in text
    for plan in list_plans("cuda-targets"):
        assert plan.case.describe() in text
    for name in ("peer-graph", "peer-fused", "eager einsum", "dense-4d", "zipf:1.0"):
        assert name in text
    assert "does not fit" not in text
    result = run_bench("--device", "cuda", "--dry-run", "--max-memory", 20)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "of which 20 GiB may be used" in text
    assert "does not fit" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--num-experts", "1000"),
        ("--providers", "nobody"),
        ("--modes", "sideways"),
        ("--dtype", "int8"),
        ("--distribution", "zipf"),
        ("--k", "0"),
        ("--rounds", "0"),
    ],
)
def test_nonsense_on_the_command_line_is_refused(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(list(arguments))
    assert "error" in capsys.readouterr().err


def test_slow_providers_take_part_in_three_rounds() -> None:
    assert [takes_part(r, 7, 0.001) for r in range(7)] == [True] * 7
    assert [r for r in range(7) if takes_part(r, 7, 2.0)] == [0, 3, 6]
    assert all(takes_part(r, 3, 2.0) for r in range(3))


def make_row(provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
    case = Case()
    fields = {f: getattr(case, f) for f in ("num_experts", "tokens", "dim", "heads", "k")}
    fields |= {"dim_key": 256, "dtype": "float32", "threads": 2, "routers": 1, "huge_pages": 0}
    texts = {"date": "", "run": "", "preset": "targets", "spelling": "", "device": "cpu"}
    known = {"distribution": "uniform", "mode": mode, "provider": provider, "median_s": seconds}
    return Row(**{**fields, **texts, **known, **changes})


def test_targets_compare_with_the_best_of_the_others() -> None:
    speed = {"gb_per_s": 30.0, "stream_gb_per_s": 50.0, "stream_share": 0.6}
    verdicts = evaluate(
        [
            make_row("peer", "experts-forward", 1.0, **speed),
            make_row("compiled", "experts-forward", 3.0, spelling="einsum"),
            make_row("compiled", "experts-forward", 2.0, spelling="sum"),
            make_row("peer", "step", 4.0, peak_bytes=2**30),
            make_row("peer-fused", "step", 2.0, peak_bytes=2**28),
            make_row("eager", "step", 50.0),
            make_row("dense-4d", "step", 1.0),
            # Measured once more beside Zipf: not what the others took turns with.
            make_row("peer", "experts-forward", 0.5),
            make_row("peer", "experts-forward", 0.4, distribution="zipf:1.0"),
        ]
    )
    found = {(v.target.text, v.target.dim): v for v in verdicts}
    compiled = found["experts forward / best compiled spelling", 512]
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
    missing = found["experts forward / best compiled spelling", 1024]
    assert missing.measured is None
    assert missing.is_met is None
    assert missing.note == "not measured"


def make_gpu_row(provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
    usual = {"device": "cuda", "tokens": 8192, "dim": 1024, "dtype": "bfloat16"}
    return make_row(provider, mode, seconds, **{**usual, **changes})


def test_targets_of_a_gpu_are_times_shares_and_ratios() -> None:
    speed = {"gb_per_s": 2700.0, "stream_gb_per_s": 3000.0, "stream_share": 0.9}
    verdicts = evaluate(
        [
            make_gpu_row("peer", "experts-forward", 1.5e-3, **speed),
            make_gpu_row("compiled", "experts-forward", 1.8e-3, spelling="sum"),
            make_gpu_row("compiled", "experts-forward", 9e-3, spelling="einsum"),
            make_gpu_row("peer", "routing", 0.2e-3),
            make_gpu_row("eager", "routing", 3e-3, spelling="einsum"),
            make_gpu_row("peer", "experts-backward", 2.1e-3),
            make_gpu_row("peer-fused", "experts-backward", 2.1e-3),
            make_gpu_row("peer", "step", 4e-3, peak_bytes=2**31),
            make_gpu_row("peer-fused", "step", 3e-3, peak_bytes=2**28),
            make_gpu_row("eager", "step", 30e-3, spelling="einsum", peak_bytes=2**34),
            make_gpu_row("embedding_bag", "step", 1e-3, spelling="bags"),
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
    found = {verdict.target.text: verdict for verdict in verdicts}
    share = found["experts forward, share of copy bandwidth"]
    assert share.measured == 0.9
    assert share.is_met
    assert "2700 of 3000 GB/s" in share.note
    expected = {
        "retrieval, projection included": (0.2e-3, True),
        "routing / the same with torch.topk": (15.0, True),
        "experts backward, sparse gradients": (2.1e-3, False),
        "experts backward, row-wise Adagrad fused into it": (2.1e-3, True),
        "training step": (3e-3, True),
        "training step / eager einsum with fused dense Adam": (10.0, True),
        "peak memory of that eager step over peer's": (64.0, True),
        "experts forward / best compiled spelling": (1.2, False),
        "layer forward + backward / best compiled spelling": (None, None),
        "Zipf(1.0) over uniform, peer experts-forward": (1.25 / 1.2, False),
        "one token, layer forward in a CUDA graph": (14e-6, True),
        "bfloat16 over float32, step": (3.0, None),
    }
    for text, (measured, is_met) in expected.items():
        assert found[text].measured == pytest.approx(measured), text
        assert found[text].is_met is is_met, text
    assert str(found["training step"].target) == "≤ 3.60 ms"
    assert str(found["one token, layer forward in a CUDA graph"].target) == "≤ 15 µs"


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
    found = {verdict.target.text: verdict for verdict in evaluate(measured, "cuda")}
    assert found["retrieval, projection included"].note == "not measured"
    share = found["experts forward, share of copy bandwidth"]
    assert (share.measured, share.is_met, share.note) == (None, None, f"peer: {wrong}")
    assert found["experts forward / best compiled spelling"].note == f"peer: {wrong}"
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
    found = {verdict.target.text: verdict for verdict in evaluate(small, "cuda", sizes)}
    for text in ("retrieval, projection included", "one token, layer forward in a CUDA graph"):
        assert found[text].measured == 1e-6
        assert found[text].is_met is None
        assert str(found[text].target) == "reported"
        assert found[text].target.dim == 32
    same = {"tokens": 8192, "dim": 1024, "heads": 8}
    (found_again,) = (
        v
        for v in evaluate([make_gpu_row("peer", "routing", 1e-6)], "cuda", same)
        if v.target.text == "retrieval, projection included"
    )
    assert found_again.is_met


def test_of_several_runs_the_last_that_tried_a_target_counts() -> None:
    def of(run: str, provider: str, mode: str, seconds: float | None, **changes: Any) -> Row:
        changes = {"preset": "cuda-targets", **changes}
        return make_gpu_row(provider, mode, seconds, run=run, **changes)

    found = {
        verdict.target.text: verdict
        for verdict in evaluate_runs(
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
    }
    assert found["retrieval, projection included"].measured == 0.2e-3
    assert found["retrieval, projection included"].note == "peer; run of 1"
    assert found["layer forward + backward / best compiled spelling"].measured == 4.0
    assert found["experts backward, sparse gradients"].measured is None
    assert found["experts backward, sparse gradients"].note == "peer: wrong result: zero; run of 2"
    assert found["training step"].measured == 4.0
    assert found["one token, layer forward in a CUDA graph"].note == "not measured"


def test_targets_of_files_are_printed_and_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("peer.bench.__main__.open_machine", None)
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    preset = {"preset": "cuda-targets"}
    rows.append([make_gpu_row("peer", "routing", 0.2e-3, run="1", **preset)], paths[0])
    rows.append(
        [
            make_gpu_row(
                "peer-graph", "forward", 20e-6, run="2", **preset, tokens=1, distribution="router"
            )
        ],
        paths[1],
    )
    assert main(["--targets", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"retrieval, projection included .* ≤ 0.25 ms +0.20 ms +yes +peer; run of 1", out
    )
    assert re.search(r"one token, .* ≤ 15 µs +20 µs +no +run of 2", out)
    assert main(["--targets", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_what_failed_is_never_the_best_of_several_spellings() -> None:
    report = pytest.importorskip("peer.bench.report")
    printed = io.StringIO()
    console = pytest.importorskip("rich.console").Console(file=printed, width=160)
    failed = [
        make_row("compiled", "step", None, spelling=spelling, skipped="failed: no triton")
        for spelling in ("einsum", "sum")
    ]
    console.print(report.make_rows_table(failed))
    assert "compiled sum" in printed.getvalue()
    assert "*" not in printed.getvalue()


def test_reasons_are_printed_as_they_are() -> None:
    report = pytest.importorskip("peer.bench.report")
    printed = io.StringIO()
    console = pytest.importorskip("rich.console").Console(file=printed, width=300)
    reason = "failed: RuntimeError: [enforce fail at alloc.cpp:1] [/usr/lib]"
    failed = make_gpu_row("peer", "routing", None, skipped=reason)
    console.print(report.make_rows_table([failed]))
    console.print(report.make_targets_table(evaluate([failed], "cuda")))
    assert printed.getvalue().count(reason) == 4, "one row, and three targets that need it"


@pytest.mark.parametrize(
    ("presets", "device"), [(("targets",), "cpu"), (("cuda-targets", "cuda-compiled"), "cuda")]
)
def test_every_target_is_measured_by_a_preset(presets: tuple[str, ...], device: str) -> None:
    measured = [
        make_row(
            entry.provider,
            entry.mode,
            1.0,
            run=preset,
            preset=preset,
            spelling=entry.spelling,
            distribution=entry.distribution,
            num_experts=entry.case.num_experts,
            tokens=entry.case.tokens,
            dim=entry.case.dim,
            dtype=entry.case.dtype,
            device=entry.case.device,
            gb_per_s=1.0,
            stream_gb_per_s=2.0,
            stream_share=0.5,
            peak_bytes=1,
        )
        for preset in presets
        for plan in list_plans(preset)
        for entry in list_entries(plan, 2**50)
    ]
    assert set(presets) <= set(TARGET_PRESETS)
    unmeasured = [v.target.text for v in evaluate_runs(measured, device) if v.measured is None]
    assert unmeasured == []


# Pictures.


def test_the_plot_script_draws_bars_and_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    if not PLOT.exists():
        pytest.skip("the checkout is not here")
    path = tmp_path / "rows.csv"
    timed = {"min_s": 0.5, "max_s": 2.0, "stream_share": 0.5, "processor": "one", "capability": "x"}
    on_gpu = {**timed, "capability": "sm_90", "stream_formula": "copy, 2 * bytes / seconds"}
    rows.append(
        [make_gpu_row(name, "experts-forward", 0.001, **on_gpu) for name in ("peer", "eager")],
        path,
    )
    rows.append(
        [
            make_row(provider, mode, 0.001 * dim * factor, dim=dim, **timed)
            for provider, factor in (("peer", 1), ("eager", 9), ("dense-4d", 2))
            for mode in ("experts-forward", "step")
            for dim in (128, 256, 512)
        ],
        path,
    )
    rows.append([make_row("eager", "step", None, skipped="does not fit")], path)  # type: ignore[arg-type]
    result = subprocess.run(
        [sys.executable, str(PLOT), str(path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    pictures = sorted((tmp_path / "out").iterdir())
    assert [picture.name.split("-")[0] for picture in pictures] == ["modes"] * 4 + ["sweep"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert [Path(line) for line in sorted(result.stdout.split())] == pictures
