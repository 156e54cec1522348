"""Rounds in which providers take turns, and what is made of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.bench.stream import Bandwidth
from peer.bench.works import Work

__all__ = ["Entry", "Settings", "measure_first", "measure_rounds", "takes_part"]

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


@dataclass
class Entry:
    """A provider in one mode on one distribution, and its measurements."""

    provider: str
    spelling: str
    distribution: str
    work: Work
    first: float = 0.0
    peak: int | None = None
    calls: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Over the rounds, seconds of a call."""
        return statistics.median(self.seconds)


def _time(work: Work, first: int, count: int = 1) -> float:
    """Seconds of some calls together, of which what prepares them is no part."""
    clock = work.shared.machine.start_clock()
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
    warm: bool,
    advance: Callable[[str], None],
) -> list[float]:
    """Lets the entries take turns.

    Args:
        entries: measured once by `measure_first`.
        settings: how long.
        stream: measured in every round, too.
        warm: whether even a slow provider's turn starts with calls that are not timed.
        advance: called with the provider's name after each turn.

    Returns:
        GB/s of the stream by round.
    """
    speeds = []
    for round_ in range(settings.rounds):
        speeds.append(stream.measure())
        for entry in entries:
            if takes_part(round_, settings.rounds, entry.first):
                entry.seconds.append(_turn(entry, settings, warm))
            advance(entry.provider)
    return speeds


def _turn(entry: Entry, settings: Settings, warm: bool) -> float:
    work, machine = entry.work, entry.work.shared.machine
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
