"""Runs plans: makes a case's tensors, checks its providers, lets them take turns, writes rows."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from peer.bench import rows
from peer.bench.cases import Case, Plan
from peer.bench.check import check
from peer.bench.failures import Failure, attempt
from peer.bench.machine import CPU, Machine
from peer.bench.memory import HEADROOM
from peer.bench.providers import CHOICE, PROVIDERS
from peer.bench.rows import Row
from peer.bench.shared import Shared, count_inputs
from peer.bench.stream import Bandwidth, gigabytes_per_second
from peer.bench.timing import Entry, Settings, measure_first, measure_rounds

__all__ = ["Listing", "Options", "estimate_case", "list_entries", "run_plans"]

GIB = 2**30


@dataclass(frozen=True)
class Options:
    """What a run is told beside its plans.

    Args:
        preset: the name that rows carry.
        csv: file to append to.
        settings: of timing.
        stream_size: bytes of the buffer that bandwidth is measured on, None for the default.
        memory: bytes that may be used, None for what the machine has left.
        machine: that is measured; of the cases' device.
    """

    preset: str = ""
    csv: Path | None = None
    settings: Settings = field(default_factory=Settings)
    stream_size: int | None = None
    memory: int | None = None
    machine: Machine = CPU


@dataclass(frozen=True)
class Listing:
    """One entry of a plan before it runs: what it needs, and why it would not run."""

    case: Case
    mode: str
    provider: str
    spelling: str
    distribution: str
    estimate: int
    skipped: str = ""


def describe(listing: Listing) -> str:
    """An entry in one line."""
    words = [listing.provider, listing.spelling, listing.mode]
    name = " ".join(filter(None, words))
    return f"{name}, {listing.distribution}, {listing.case.describe()}"


def is_warm(listing: Listing) -> bool:
    """Whether even slow turns start with calls that are not timed: those make optimizer states."""
    return listing.mode == "step"


def estimate_case(case: Case, cache: int | None = None) -> int:
    """Bytes of the tables, the routers, the inputs and their ids, and of filling 16-bit tables.

    Args:
        case: the sizes.
        cache: bytes of the last-level cache, None for this processor's.
    """
    tokens = count_inputs(case, cache or CPU.last_level_cache) * case.tokens
    inputs = tokens * (case.dim * case.itemsize + 8 * case.per_token)
    routers = case.routers * (case.dim * case.heads + case.root) * case.dim_key * case.itemsize
    return case.table_bytes + inputs + routers


def list_entries(plan: Plan, memory: int, cache: int | None = None) -> Iterator[Listing]:
    """The entries of a plan in the order in which they run.

    Args:
        plan: the plan.
        memory: bytes that the case and its providers may take, headroom excluded.
        cache: bytes of the last-level cache, None for this processor's.
    """
    base = estimate_case(plan.case, cache)
    for mode in plan.modes:
        for distribution in plan.distributions:
            for name in plan.providers:
                provider = PROVIDERS[name]
                if mode not in provider.modes:
                    continue
                if distribution != plan.distributions[0] and (
                    mode in CHOICE or name.startswith("dense")
                ):
                    continue  # these do not depend on it
                for spelling in provider.spellings(mode):
                    total = base + provider.temporary_bytes(plan.case, mode, spelling)
                    reason = provider.missing(plan.case, mode) or ""
                    if not reason and total > memory:
                        reason = (
                            f"does not fit: needs about {total / GIB:.1f} GiB, "
                            f"{max(memory, 0) / GIB:.1f} GiB may be used"
                        )
                    yield Listing(plan.case, mode, name, spelling, distribution, total, reason)


def run_plans(
    plans: list[Plan],
    options: Options,
    on_row: Callable[[Row], None],
    on_progress: Callable[[str, int], None],
    on_failure: Callable[[str, Failure], None],
) -> list[Row]:
    """Measures plans one after the other.

    A provider that is wrong, that raises an exception or that needs too much memory gets a row
    without a time, and the run goes on.

    Args:
        plans: the plans.
        options: of the run.
        on_row: called with each row once it is written.
        on_progress: called with what goes on and how many turns of `count_turns` are done.
        on_failure: called with what failed and why; not where only memory is short.

    Returns:
        All rows.
    """
    start = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = _Run(options, start, on_row, on_progress, on_failure)
    threads = torch.get_num_threads()
    try:
        for plan in plans:
            run.measure(plan)
    finally:
        torch.set_num_threads(threads)
    return run.rows


class _Run:
    def __init__(
        self,
        options: Options,
        start: str,
        on_row: Callable[[Row], None],
        on_progress: Callable[[str, int], None],
        on_failure: Callable[[str, Failure], None],
    ) -> None:
        self.options = options
        self.start = start
        self.on_row = on_row
        self.on_progress = on_progress
        self.on_failure = on_failure
        self.rows: list[Row] = []
        self.machine = options.machine
        self.processor = self.machine.processor
        self.capability = self.machine.capability
        self.cache = self.machine.last_level_cache
        self.threads = torch.get_num_threads()
        self.stream: tuple[int, Bandwidth] | None = None
        self.pending: list[Listing] = []  # of the current plan; without a row so far

    def measure(self, plan: Plan) -> None:
        """One case: its providers that fit, mode by mode."""
        torch.set_num_threads(plan.case.threads or self.threads)
        stream = attempt(
            self.machine,
            functools.partial(self._stream, plan.case.threads or self.threads),
            when="when the bandwidth was measured",
        )
        self.pending = list(list_entries(plan, self._limit(), self.cache))
        for listing in list(self.pending):
            if listing.skipped:
                self._skip(listing, listing.skipped)
        if not self.pending:
            return
        if isinstance(stream, Failure):
            self._give_up(plan, stream)
        else:
            measured = attempt(
                self.machine,
                functools.partial(self._measure_case, plan, stream),
                when="when the tensors of the case were made",
            )
            if isinstance(measured, Failure):
                self._give_up(plan, measured)
        if not self.machine.is_lost:
            self.machine.release()

    def _stream(self, threads: int) -> Bandwidth:
        if self.stream is None or self.stream[0] != threads:
            self.stream = None
            self.stream = (threads, self.machine.make_stream(self.options.stream_size))
        return self.stream[1]

    def _limit(self) -> int:
        """Bytes that a plan may use."""
        if self.machine.is_lost:
            return 2**63  # nothing runs: memory is no reason
        self.machine.release()
        if self.options.memory is not None:
            return self.options.memory
        return self.machine.available() - HEADROOM

    def _measure_case(self, plan: Plan, stream: Bandwidth) -> None:
        self.on_progress(f"tables: {plan.case.describe()}", 0)
        shared = Shared(plan.case, plan.distributions, machine=self.machine)
        compiles = any(listing.provider == "compiled" for listing in self.pending)
        for mode in plan.modes:
            if compiles:
                torch.compiler.reset()  # so that no earlier mode counts against its limits
            listed = [listing for listing in self.pending if listing.mode == mode]
            self._measure_mode(listed, shared, stream)

    def _measure_mode(self, listed: list[Listing], shared: Shared, stream: Bandwidth) -> None:
        entries: dict[Listing, Entry] = {}
        for listing in listed:
            entry = attempt(self.machine, functools.partial(self._begin, listing, shared))
            if isinstance(entry, Failure):
                self._report(describe(listing), entry)
                self._skip(listing, entry.reason)
            else:
                entries[listing] = entry
        if not entries:
            return

        def advance(name: str) -> None:
            self.on_progress(f"{name} {listed[0].mode}, {shared.case.describe()}", 1)

        speeds = measure_rounds(
            list(entries.values()),
            self.options.settings,
            stream,
            self.machine,
            is_warm(listed[0]),
            advance,
        )
        for listing, entry in entries.items():
            if entry.failure is None:
                bandwidth = sorted(speeds)[len(speeds) // 2]
                self._write(listing, self._timed_row(listing, entry, bandwidth, stream.formula))
            else:
                self._report(describe(listing), entry.failure)
                self._write(listing, replace(self._row(listing), skipped=entry.failure.reason))

    def _begin(self, listing: Listing, shared: Shared) -> Entry:
        """Checks an entry and measures it once."""
        name = " ".join(filter(None, (listing.provider, listing.spelling, listing.mode)))
        self.on_progress(f"checking {name}", 0)
        provider = PROVIDERS[listing.provider]
        work = provider.build(shared, listing.distribution, listing.mode, listing.spelling)
        entry = Entry(listing.provider, listing.spelling, listing.distribution, work)
        try:
            work.open()
            check(work)
            work.close()
            self.on_progress(f"peak memory of {name}", 0)
            measure_first(entry, is_warm(listing))
        finally:
            work.finish()
            work.close()
        entry.bytes = provider.algorithmic_bytes(
            listing.case,
            listing.mode,
            listing.spelling,
            shared.count_distinct(listing.distribution),
        )
        self.on_progress(f"measured {name} once", 2)
        return entry

    def _give_up(self, plan: Plan, failure: Failure) -> None:
        """Rows for all that have none so far."""
        self._report(plan.case.describe(), failure)
        for listing in list(self.pending):
            self._skip(listing, failure.reason)

    def _report(self, what: str, failure: Failure) -> None:
        if failure.is_error:
            self.on_failure(what, failure)

    def _skip(self, listing: Listing, reason: str) -> None:
        self._write(listing, replace(self._row(listing), skipped=reason))
        self.on_progress(f"{listing.provider} skipped", self.options.settings.rounds + 2)

    def _timed_row(
        self, listing: Listing, entry: Entry, bandwidth: float, stream_formula: str
    ) -> Row:
        speed = gigabytes_per_second(entry.bytes, entry.median)
        return replace(
            self._row(listing),
            median_s=entry.median,
            min_s=min(entry.seconds),
            max_s=max(entry.seconds),
            rounds=len(entry.seconds),
            calls=entry.calls,
            bytes=entry.bytes,
            gb_per_s=speed,
            stream_gb_per_s=bandwidth,
            stream_formula=stream_formula,
            stream_share=speed / bandwidth,
            peak_bytes=entry.peak,
        )

    def _row(self, listing: Listing) -> Row:
        sizes = {f.name: getattr(listing.case, f.name) for f in fields(Case)}
        sizes["threads"] = listing.case.threads or self.threads
        return Row(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            run=self.start,
            preset=self.options.preset,
            mode=listing.mode,
            provider=listing.provider,
            spelling=listing.spelling,
            distribution=listing.distribution,
            huge_pages=int(rows.uses_huge_pages()),
            capability=self.capability,
            processor=self.processor,
            **sizes,
        )

    def _write(self, listing: Listing, row: Row) -> None:
        self.pending.remove(listing)
        self.rows.append(row)
        if self.options.csv is not None:
            rows.append([row], self.options.csv)
        self.on_row(row)
