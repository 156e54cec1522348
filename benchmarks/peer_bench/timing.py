"""Rounds in which providers take turns, and what is made of their times."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.bench.failures import Failure, attempt
from peer.bench.machine import Machine
from peer.bench.stream import Bandwidth
from peer.bench.works import Work

__all__ = ["SETTINGS", "Entry", "Settings", "measure_first", "measure_rounds", "takes_part"]

SLOW = 0.5  # seconds; a provider whose call takes longer runs in three rounds only
FEWEST = 3
LARGE = 256 * 2**20  # bytes; what a turn leaves beyond is returned at once


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        rounds: turns of each provider; slow ones take three.
        min_time: seconds of a turn at least, in as many calls as fit.
    """

    rounds: int = 7
    min_time: float = 0.2


# By device. On a GPU calls take about a hundredth of the time, and vary less.
SETTINGS = {"cpu": Settings(), "cuda": Settings(rounds=5, min_time=0.1)}


@dataclass
class Entry:
    """A provider in one mode on one distribution, and its measurements.

    Args:
        provider: its name.
        spelling: of the provider.
        distribution: of the ids.
        work: its calls, None once it failed.
        bytes: that a call reads and writes, by the formulas.
        first: seconds of a call before the rounds.
        peak: bytes.
        calls: in all rounds.
        seconds: of a call, by round.
        failure: in a round, after which it takes no part.
    """

    provider: str
    spelling: str
    distribution: str
    work: Work | None
    bytes: int = 0
    first: float = 0.0
    peak: int | None = None
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    failure: Failure | None = None

    def drop(self) -> None:
        """Frees what its calls hold."""
        assert self.work is not None
        self.work.finish()
        self.work.close()
        self.work = None

    @property
    def median(self) -> float:
        """Over the rounds, seconds of a call."""
        return statistics.median(self.seconds)


def _time(work: Work, first: int, count: int = 1) -> float:
    """Seconds of some calls together, of which what prepares them is no part."""
    clock = work.shared.machine.start_clock()
    if work.runs_back_to_back:
        clock.start()
        for index in range(first, first + count):
            work.run(index)
        clock.stop()
        work.finish()
        return clock.total()
    for index in range(first, first + count):
        work.prepare(index)
        clock.start()
        work.run(index)
        clock.stop()
        work.finish()
    return clock.total()


def measure_first(entry: Entry, warm: bool) -> None:
    """Peak memory of a turn of its own, and the time of a call for planning the rounds."""
    work = entry.work
    assert work is not None

    def turn() -> None:
        work.open()
        work.keep_parameters()
        entry.first = _time(work, 0)
        if warm or entry.first < SLOW:  # the first step also makes the optimizer's state
            entry.first = min(_time(work, 1), _time(work, 2) if entry.first < SLOW else 1e9)
        work.close()

    entry.peak = work.shared.machine.measure_peak(turn)


def takes_part(round_: int, rounds: int, seconds: float) -> bool:
    """Whether a provider runs in a round: always, or if slow in the first, middle and last."""
    if seconds < SLOW or rounds <= FEWEST:
        return True
    return round_ in {0, rounds // 2, rounds - 1}


def measure_rounds(
    entries: list[Entry],
    settings: Settings,
    stream: Bandwidth,
    machine: Machine,
    warm: bool,
    advance: Callable[[str], None],
) -> list[float]:
    """Lets the entries take turns. One that fails drops out, and says why.

    Args:
        entries: measured once by `measure_first`.
        settings: how long.
        stream: measured in every round, too.
        machine: on which the entries are.
        warm: whether even a slow provider's turn starts with calls that are not timed.
        advance: called with the provider's name after each turn.

    Returns:
        GB/s of the stream by round.
    """
    speeds = []
    for round_ in range(settings.rounds):
        if not machine.is_lost:
            speeds.append(stream.measure())
        for entry in entries:
            if entry.failure is None and takes_part(round_, settings.rounds, entry.first):
                seconds = attempt(
                    machine,
                    functools.partial(_turn, entry, settings, warm),
                    when=f"in round {round_ + 1}",
                    drop=entry.drop,
                )
                if isinstance(seconds, Failure):
                    entry.failure = seconds
                else:
                    entry.seconds.append(seconds)
            advance(entry.provider)
    return speeds


def _turn(entry: Entry, settings: Settings, warm: bool) -> float:
    work = entry.work
    assert work is not None
    machine = work.shared.machine
    calls = max(1, min(10_000, round(settings.min_time / max(entry.first, 1e-7))))
    work.open()
    work.keep_parameters()
    if warm or entry.first < SLOW:
        _time(work, entry.calls, machine.warm_up_calls)
    entry.calls += machine.warm_up_calls
    total = _time(work, entry.calls, calls)
    entry.calls += calls
    work.close()
    if entry.peak is None or entry.peak > LARGE:
        machine.release()  # room for the next provider
    return total / calls
