"""Rounds in which providers take turns, and what is made of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.bench.memory import drop_kept_gradients, measure_peak, release
from peer.bench.stream import Stream
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


def _call(work: Work, index: int) -> float:
    work.prepare(index)
    start = time.perf_counter()
    work.run(index)
    seconds = time.perf_counter() - start
    work.finish()
    return seconds


def measure_first(entry: Entry, warm: bool) -> None:
    """Peak memory of a turn of its own, and the time of a call for planning the rounds."""
    work = entry.work

    def turn() -> None:
        work.open()
        work.keep_parameters()
        entry.first = _call(work, 0)
        if warm or entry.first < SLOW:  # the first step also makes the optimizer's state
            entry.first = min(_call(work, 1), _call(work, 2) if entry.first < SLOW else 1e9)
        work.close()

    drop_kept_gradients()
    entry.peak = measure_peak(turn)


def takes_part(round_: int, rounds: int, seconds: float) -> bool:
    """Whether a provider runs in a round: always, or if slow in the first, middle and last."""
    if seconds < SLOW or rounds <= FEWEST:
        return True
    return round_ in {0, rounds // 2, rounds - 1}


def measure_rounds(
    entries: list[Entry],
    settings: Settings,
    stream: Stream,
    warm: bool,
    advance: Callable[[str], None],
) -> list[float]:
    """Lets the entries take turns.

    Args:
        entries: measured once by `measure_first`.
        settings: how long.
        stream: measured in every round, too.
        warm: whether even a slow provider's turn starts with a call that is not timed.
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
    work = entry.work
    calls = max(1, min(10_000, round(settings.min_time / max(entry.first, 1e-7))))
    work.open()
    work.keep_parameters()
    if warm or entry.first < SLOW:
        _call(work, entry.calls)
    total = 0.0
    for index in range(entry.calls + 1, entry.calls + 1 + calls):
        total += _call(work, index)
    work.close()
    entry.calls += calls + 1
    if entry.peak is None or entry.peak > LARGE:
        release()  # room for the next provider
    return total / calls
