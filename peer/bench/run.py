"""Runs plans: makes a case's tensors, checks its providers, lets them take turns, writes rows."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from peer.bench import rows
from peer.bench.cases import Case, Plan
from peer.bench.check import WrongResultError, check
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
) -> list[Row]:
    """Measures plans one after the other.

    Args:
        plans: the plans.
        options: of the run.
        on_row: called with each row once it is written.
        on_progress: called with what goes on and how many turns of `count_turns` are done.

    Returns:
        All rows.

    Raises:
        WrongResultError: a provider does not compute what it should.
    """
    start = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = _Run(options, start, on_row, on_progress)
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
    ) -> None:
        self.options = options
        self.start = start
        self.on_row = on_row
        self.on_progress = on_progress
        self.rows: list[Row] = []
        self.machine = options.machine
        self.processor = self.machine.processor
        self.capability = self.machine.capability
        self.threads = torch.get_num_threads()
        self.stream: tuple[int, Bandwidth] | None = None

    def measure(self, plan: Plan) -> None:
        """One case: its providers that fit, mode by mode."""
        torch.set_num_threads(plan.case.threads or self.threads)
        stream = self._stream(plan.case.threads or self.threads)
        self.machine.release()
        memory = self.options.memory
        if memory is None:
            memory = self.machine.available() - HEADROOM
        listed = list(list_entries(plan, memory, self.machine.last_level_cache))
        for listing in listed:
            if listing.skipped:
                self._write(self._row(listing))
                self.on_progress(f"{listing.provider} skipped", self.options.settings.rounds + 2)
        listed = [listing for listing in listed if not listing.skipped]
        if not listed:
            return
        self.on_progress(f"tables: {plan.case.describe()}", 0)
        shared = Shared(plan.case, plan.distributions, machine=self.machine)
        for mode in plan.modes:
            if any(listing.provider == "compiled" for listing in listed):
                torch.compiler.reset()  # so that no earlier mode counts against its limits
            self._measure_mode([li for li in listed if li.mode == mode], shared, stream)
        del shared
        self.machine.release()

    def _stream(self, threads: int) -> Bandwidth:
        if self.stream is None or self.stream[0] != threads:
            self.stream = None
            self.stream = (threads, self.machine.make_stream(self.options.stream_size))
        return self.stream[1]

    def _measure_mode(self, listed: list[Listing], shared: Shared, stream: Bandwidth) -> None:
        if not listed:
            return
        mode, warm = listed[0].mode, listed[0].mode == "step"
        measured: list[Listing] = []
        entries: list[Entry] = []
        for listing in listed:
            entry = self._begin(listing, shared, warm)
            if entry is None:
                self.machine.release()
                tried = replace(listing, skipped="does not fit: out of memory when it was tried")
                self._write(self._row(tried))
                self.on_progress(f"{listing.provider} skipped", self.options.settings.rounds + 2)
            else:
                measured.append(listing)
                entries.append(entry)
        if not entries:
            return

        def advance(name: str) -> None:
            self.on_progress(f"{name} {mode}, {shared.case.describe()}", 1)

        speeds = measure_rounds(entries, self.options.settings, stream, warm, advance)
        bandwidth = sorted(speeds)[len(speeds) // 2]
        for listing, entry in zip(measured, entries, strict=True):
            provider = PROVIDERS[listing.provider]
            size = provider.algorithmic_bytes(
                listing.case,
                listing.mode,
                listing.spelling,
                shared.count_distinct(listing.distribution),
            )
            speed = gigabytes_per_second(size, entry.median)
            self._write(
                replace(
                    self._row(listing),
                    median_s=entry.median,
                    min_s=min(entry.seconds),
                    max_s=max(entry.seconds),
                    rounds=len(entry.seconds),
                    calls=entry.calls,
                    bytes=size,
                    gb_per_s=speed,
                    stream_gb_per_s=bandwidth,
                    stream_formula=stream.formula,
                    stream_share=speed / bandwidth,
                    peak_bytes=entry.peak,
                )
            )

    def _begin(self, listing: Listing, shared: Shared, warm: bool) -> Entry | None:
        """Checks an entry and measures it once; None if a GPU had too little memory after all."""
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
            measure_first(entry, warm)
        except WrongResultError as error:
            raise WrongResultError(
                f"{name}, {listing.distribution}, {listing.case.describe()}: {error}"
            ) from None
        except torch.OutOfMemoryError:
            return None
        finally:
            work.finish()
            work.close()
        self.on_progress(f"measured {name} once", 2)
        return entry

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
            skipped=listing.skipped,
            capability=self.capability,
            processor=self.processor,
            **sizes,
        )

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        if self.options.csv is not None:
            rows.append([row], self.options.csv)
        self.on_row(row)
