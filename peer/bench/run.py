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
from peer.bench.memory import HEADROOM, available, release
from peer.bench.providers import PROVIDERS
from peer.bench.rows import Row
from peer.bench.shared import Shared, count_inputs
from peer.bench.stream import Stream, gigabytes_per_second
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
        memory: bytes that may be used, None for what the system has left.
    """

    preset: str = ""
    csv: Path | None = None
    settings: Settings = field(default_factory=Settings)
    stream_size: int | None = None
    memory: int | None = None


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


def estimate_case(case: Case) -> int:
    """Bytes of the tables, the routers, the inputs and their ids, and of filling 16-bit tables."""
    tokens = count_inputs(case) * case.tokens
    inputs = tokens * (case.dim * case.itemsize + 8 * case.per_token)
    routers = case.routers * (case.dim * case.heads + case.root) * case.dim_key * case.itemsize
    return case.table_bytes + inputs + routers


def list_entries(plan: Plan, memory: int) -> Iterator[Listing]:
    """The entries of a plan in the order in which they run.

    Args:
        plan: the plan.
        memory: bytes that the case and its providers may take, headroom excluded.
    """
    base = estimate_case(plan.case)
    for mode in plan.modes:
        for distribution in plan.distributions:
            for name in plan.providers:
                provider = PROVIDERS[name]
                if mode not in provider.modes:
                    continue
                if distribution != plan.distributions[0] and (
                    mode in ("retrieval", "selection") or name.startswith("dense")
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
        self.processor = rows.name_processor()
        self.capability = str(torch.ops.peer.cpu_capability())
        self.threads = torch.get_num_threads()
        self.stream: tuple[int, Stream] | None = None

    def measure(self, plan: Plan) -> None:
        """One case: its providers that fit, mode by mode."""
        torch.set_num_threads(plan.case.threads or self.threads)
        stream = self._stream(plan.case.threads or self.threads)
        release()
        memory = self.options.memory
        listed = list(list_entries(plan, available() - HEADROOM if memory is None else memory))
        for listing in listed:
            if listing.skipped:
                self._write(self._row(listing))
                self.on_progress(f"{listing.provider} skipped", self.options.settings.rounds + 2)
        listed = [listing for listing in listed if not listing.skipped]
        if not listed:
            return
        self.on_progress(f"tables: {plan.case.describe()}", 0)
        shared = Shared(plan.case, plan.distributions)
        for mode in plan.modes:
            if any(listing.provider == "compiled" for listing in listed):
                torch.compiler.reset()  # so that no earlier mode counts against its limits
            self._measure_mode([li for li in listed if li.mode == mode], shared, stream)
        del shared
        release()

    def _stream(self, threads: int) -> Stream:
        if self.stream is None or self.stream[0] != threads:
            self.stream = None
            self.stream = (threads, Stream(self.options.stream_size))
        return self.stream[1]

    def _measure_mode(self, listed: list[Listing], shared: Shared, stream: Stream) -> None:
        entries: list[Entry] = []
        warm = bool(listed) and listed[0].mode == "step"
        for listing in listed:
            name = " ".join(filter(None, (listing.provider, listing.spelling, listing.mode)))
            self.on_progress(f"checking {name}", 0)
            provider = PROVIDERS[listing.provider]
            work = provider.build(shared, listing.distribution, listing.mode, listing.spelling)
            work.open()
            try:
                check(work)
            except WrongResultError as error:
                raise WrongResultError(
                    f"{name}, {listing.distribution}, {listing.case.describe()}: {error}"
                ) from None
            finally:
                work.close()
            self.on_progress(f"checking {name}", 1)
            entry = Entry(listing.provider, listing.spelling, listing.distribution, work)
            measure_first(entry, warm)
            self.on_progress(f"peak memory of {name}", 1)
            entries.append(entry)

        def advance(name: str) -> None:
            self.on_progress(f"{name} {listed[0].mode}, {shared.case.describe()}", 1)

        speeds = measure_rounds(entries, self.options.settings, stream, warm, advance)
        bandwidth = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
        for listing, entry in zip(listed, entries, strict=True):
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
            device="cpu",
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
