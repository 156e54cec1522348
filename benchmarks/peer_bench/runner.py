"""Runs plans: makes the tensors of a case, checks its providers, lets them take turns, writes rows.

What keeps a provider from being measured becomes the reason in its row, and the run goes on.
"""

from __future__ import annotations

import datetime
import functools
import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from peer_bench import results
from peer_bench.cases import Case, Entry, Plan
from peer_bench.check import WrongResultError
from peer_bench.entries import bytes_moved, list_entries
from peer_bench.machine import CPU, HEADROOM, Bandwidth, Machine, gigabytes_per_second
from peer_bench.problem import Problem
from peer_bench.results import Row
from peer_bench.workloads import SETUPS, Workload

T = TypeVar("T")

SLOW = 0.5  # seconds; a provider whose call takes longer runs in three rounds only
MIN_ROUNDS = 3
LARGE = 256 * 2**20  # bytes; a turn that needs more returns its memory at once
# Of torch's allocator for the CPU, of CUDA outside of torch's allocator, and of cuBLAS.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Failure:
    """Why there is no time. Too little memory is not an error."""

    reason: str
    is_error: bool = True
    traceback: str = ""


LOST = Failure("not run: the GPU failed before", is_error=False)  # the error was reported then


def attempt(
    machine: Machine,
    call: Callable[[], T],
    when: str = "when it was tried",
    drop: Callable[[], None] = lambda: None,
) -> T | Failure:
    """What a call returns, or why it failed. On a lost machine the call does not happen.

    An exception keeps the tensors of all frames that it passed. It is gone before the machine frees
    memory; `drop` frees what the call left outside of its frames.
    """
    if machine.is_lost:
        return LOST
    try:
        return call()
    except Exception as error:
        failure = _describe(error, when)
    drop()
    machine.recover()
    return failure


def _describe(error: Exception, when: str) -> Failure:
    if isinstance(error, WrongResultError):
        return Failure(f"wrong result: {error}")
    if is_out_of_memory(error):
        return Failure(f"does not fit: out of memory {when}", is_error=False)
    lines = str(error).strip().splitlines()
    reason = ": ".join(["failed", type(error).__name__, *lines[:1]])
    return Failure(reason, traceback="".join(traceback.format_exception(error)))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there is too little memory, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 7  # turns of each provider; slow ones take three
    min_time: float = 0.2  # seconds of a turn, in as many calls as fit


# By device. On a GPU calls take about a hundredth of the time, and vary less.
SETTINGS = {"cpu": Settings(), "cuda": Settings(rounds=5, min_time=0.1)}


@dataclass
class Measurement:
    """The workload of an entry, and what was measured of it."""

    workload: Workload | None  # None after it failed
    warm: bool = False  # even slow turns start with calls that are not timed
    bytes: int = 0  # that a call moves, by the formulas
    first: float = 0.0  # seconds of a call before the rounds
    peak: int | None = None  # bytes
    calls: int = 0  # in all rounds
    seconds: list[float] = field(default_factory=list)  # of a call, by round
    failure: Failure | None = None  # in a round, after which it takes no part

    def drop(self) -> None:
        """Frees what the workload holds."""
        self.workload = None

    def measure_first(self) -> None:
        """Measures the peak memory of one turn, and the time of a call for planning the rounds."""
        assert self.workload is not None
        workload = self.workload

        def turn() -> None:
            with workload.turn():
                workload.freeze_parameters()
                cold = time_calls(workload, 0)  # a first step also makes the optimizer's state
                counts = 2 if cold < SLOW else int(self.warm)
                warm = [time_calls(workload, 1 + index) for index in range(counts)]
                self.first = min(warm, default=cold)

        self.peak = workload.problem.machine.measure_peak(turn)

    def measure_turn(self, settings: Settings) -> float:
        """Seconds of a call in one turn."""
        assert self.workload is not None
        workload, machine = self.workload, self.workload.problem.machine
        count = max(1, min(10_000, round(settings.min_time / max(self.first, 1e-7))))
        with workload.turn():
            workload.freeze_parameters()
            if self.warm or self.first < SLOW:
                time_calls(workload, self.calls, machine.warm_up_calls)
                self.calls += machine.warm_up_calls
            total = time_calls(workload, self.calls, count)
            self.calls += count
        if self.peak is None or self.peak > LARGE:
            machine.release()  # room for the next provider
        return total / count


def time_calls(workload: Workload, first: int, count: int = 1) -> float:
    """Seconds of some calls together, without what prepares them."""
    timer = workload.problem.machine.make_timer()
    indices = range(first, first + count)
    if workload.is_back_to_back:
        prepared = [workload.prepare(index) for index in indices]
        timer.start()
        for inputs in prepared:
            workload.run(*inputs)
        timer.stop()
        return timer.total()
    for index in indices:
        inputs = workload.prepare(index)
        timer.start()
        out = workload.run(*inputs)
        timer.stop()
        del inputs, out
        workload.drop_gradients()
    return timer.total()


def takes_part(round_: int, rounds: int, seconds: float) -> bool:
    """Whether a provider runs in a round: always, or if slow in the first, middle and last."""
    if seconds < SLOW or rounds <= MIN_ROUNDS:
        return True
    return round_ in {0, rounds // 2, rounds - 1}


def measure_rounds(
    entries: dict[Entry, Measurement],
    settings: Settings,
    bandwidth: Bandwidth,
    machine: Machine,
    advance: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """Lets the entries take turns; one that fails drops out. Returns GB/s of the transfer by round.

    `advance` is called with the provider's name after each turn.
    """
    speeds = []
    for round_ in range(settings.rounds):
        if not machine.is_lost:
            speeds.append(bandwidth.measure())
        for entry, measured in entries.items():
            if not measured.failure and takes_part(round_, settings.rounds, measured.first):
                turn = functools.partial(measured.measure_turn, settings)
                seconds = attempt(machine, turn, f"in round {round_ + 1}", measured.drop)
                if isinstance(seconds, Failure):
                    measured.failure = seconds
                else:
                    measured.seconds.append(seconds)
            advance(entry.provider)
    return speeds


@dataclass
class Run:
    """A run of plans on one machine.

    `on_row` is called with each row once it is written, `on_progress` with what goes on and how
    many turns of `count_turns` are done, `on_failure` with what failed and why, unless memory was
    short.
    """

    preset: str = ""  # for the rows
    csv: Path | None = None  # file to append to
    settings: Settings = field(default_factory=Settings)
    transfer_size: int | None = None  # bytes; None for the default
    memory: int | None = None  # bytes that may be used, None for what the machine has left
    machine: Machine = CPU
    on_row: Callable[[Row], None] = lambda _: None
    on_progress: Callable[[str, int], None] = lambda *_: None
    on_failure: Callable[[str, Failure], None] = lambda *_: None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = _now()
        self.threads = torch.get_num_threads()
        self.processor, self.capability = self.machine.processor, self.machine.capability
        self.cache = self.machine.last_level_cache
        self.pending: list[Entry] = []  # of the current plan, without a row so far
        self.bandwidth: tuple[int, Bandwidth] | None = None  # with a number of threads

    def measure(self, plans: list[Plan]) -> list[Row]:
        """Measures the plans in order. Returns all rows.

        A provider that is wrong, that raises an exception or that needs too much memory gets a row
        without a time.
        """
        try:
            for plan in plans:
                self._measure_plan(plan)
        finally:
            torch.set_num_threads(self.threads)
        return self.rows

    def _measure_plan(self, plan: Plan) -> None:
        torch.set_num_threads(plan.case.threads or self.threads)
        make_bandwidth = functools.partial(self.make_bandwidth, torch.get_num_threads())
        bandwidth = attempt(self.machine, make_bandwidth, "when the bandwidth was measured")
        self.pending = list(list_entries(plan, self._limit(), self.cache))
        for entry in list(self.pending):
            if entry.skipped:
                self._skip(entry, Failure(entry.skipped, is_error=False))
        if not self.pending:
            return
        failure: Failure | None
        if isinstance(bandwidth, Failure):
            failure = bandwidth
        else:
            measure = functools.partial(self._measure_case, plan, bandwidth)
            failure = attempt(self.machine, measure, "when the tensors of the case were made")
        if failure:
            self._report(plan.case.describe(), failure)
            for entry in list(self.pending):
                self._skip(entry, replace(failure, is_error=False))
        if not self.machine.is_lost:
            self.machine.release()

    def make_bandwidth(self, threads: int) -> Bandwidth:
        """The transfer, made anew for another number of threads."""
        if self.bandwidth is None or self.bandwidth[0] != threads:
            self.bandwidth = None
            self.bandwidth = (threads, self.machine.make_bandwidth(self.transfer_size))
        return self.bandwidth[1]

    def _limit(self) -> int:
        """Bytes that a plan may use."""
        if self.machine.is_lost:
            return 2**63  # nothing runs: memory is no reason
        self.machine.release()
        return self.machine.available() - HEADROOM if self.memory is None else self.memory

    def _measure_case(self, plan: Plan, bandwidth: Bandwidth) -> None:
        self.on_progress(f"tables: {plan.case.describe()}", 0)
        problem = Problem(plan.case, plan.distributions, machine=self.machine)
        compiles = any(entry.provider == "compiled" for entry in self.pending)
        for mode in plan.modes:
            if compiles:
                torch.compiler.reset()  # so that no earlier mode counts against its limits
            listed = [entry for entry in self.pending if entry.mode == mode]
            self._measure_mode(listed, problem, bandwidth)

    def _measure_mode(self, listed: list[Entry], problem: Problem, bandwidth: Bandwidth) -> None:
        measurements: dict[Entry, Measurement] = {}
        for entry in listed:
            begun = attempt(self.machine, functools.partial(self._begin, entry, problem))
            if isinstance(begun, Failure):
                self._skip(entry, begun)
            else:
                measurements[entry] = begun
        if not measurements:
            return

        def advance(name: str) -> None:
            self.on_progress(f"{name} {listed[0].mode}, {problem.case.describe()}", 1)

        speeds = measure_rounds(measurements, self.settings, bandwidth, self.machine, advance)
        for entry, measured in measurements.items():
            if measured.failure is None:
                speed = gigabytes_per_second(measured.bytes, statistics.median(measured.seconds))
                available = sorted(speeds)[len(speeds) // 2]
                row = replace(
                    self._row(entry),
                    median_s=statistics.median(measured.seconds),
                    min_s=min(measured.seconds),
                    max_s=max(measured.seconds),
                    rounds=len(measured.seconds),
                    calls=measured.calls,
                    bytes=measured.bytes,
                    gb_per_s=speed,
                    bandwidth_gb_per_s=available,
                    bandwidth_formula=bandwidth.formula,
                    bandwidth_share=speed / available,
                    peak_bytes=measured.peak,
                )
                self._write(entry, row)
            else:
                self._report(entry.describe(), measured.failure)
                self._write(entry, replace(self._row(entry), skipped=measured.failure.reason))

    def _begin(self, entry: Entry, problem: Problem) -> Measurement:
        """Checks an entry and measures it once."""
        name = f"{entry.name} {entry.mode}"
        self.on_progress(f"checking {name}", 0)
        workload = SETUPS[entry.provider][entry.mode](problem, entry)
        with workload.turn():
            workload.check()
        self.on_progress(f"peak memory of {name}", 0)
        # Even slow steps are warm: the first step of a turn makes the optimizer's state.
        measurement = Measurement(workload, warm=entry.mode == "step")
        measurement.measure_first()
        measurement.bytes = bytes_moved(entry, problem.count_distinct(entry.distribution))
        self.on_progress(f"measured {name} once", 2)
        return measurement

    def _report(self, what: str, failure: Failure) -> None:
        if failure.is_error:
            self.on_failure(what, failure)

    def _skip(self, entry: Entry, failure: Failure) -> None:
        """A row without a time, for an entry that takes no turn."""
        self._report(entry.describe(), failure)
        self._write(entry, replace(self._row(entry), skipped=failure.reason))
        self.on_progress(f"{entry.provider} skipped", self.settings.rounds + 2)

    def _row(self, entry: Entry) -> Row:
        sizes = {f.name: getattr(entry.case, f.name) for f in fields(Case)}
        sizes["threads"] = entry.case.threads or self.threads
        return Row(
            date=_now(),
            run=self.start,
            preset=self.preset,
            mode=entry.mode,
            provider=entry.provider,
            variant=entry.variant,
            distribution=entry.distribution,
            huge_pages=int(results.uses_huge_pages()),
            capability=self.capability,
            processor=self.processor,
            **sizes,
        )

    def _write(self, entry: Entry, row: Row) -> None:
        self.pending.remove(entry)
        self.rows.append(row)
        if self.csv is not None:
            results.append([row], self.csv)
        self.on_row(row)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def count_turns(entries: list[Entry], rounds: int) -> int:
    """Turns of the progress bar: for each entry a check, a peak and its rounds."""
    return len(entries) * (rounds + 2)
