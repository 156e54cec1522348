"""How calls are timed: by the wall, or by events that a GPU records between its work.

A clock takes the calls of one turn, `start()` before and `stop()` after each, or before the first
and after the last of calls that run back to back. It says in the end how long they took together.
What happens between a stop and the next start is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Clock", "Event", "EventClock", "WallClock"]


class Clock(Protocol):
    """Adds up the time of calls."""

    def start(self) -> None:
        """A call begins."""

    def stop(self) -> None:
        """It has returned."""

    def total(self) -> float:
        """Seconds of all calls so far."""


class WallClock:
    """Time that passes on the host, for calls that have done their work when they return."""

    def __init__(self) -> None:
        self._total = 0.0
        self._start = 0.0

    def start(self) -> None:
        """A call begins."""
        self._start = time.perf_counter()

    def stop(self) -> None:
        """It has returned."""
        self._total += time.perf_counter() - self._start

    def total(self) -> float:
        """Seconds of all calls so far."""
        return self._total


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> Any:
        """Queues the event behind the work that was queued so far."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to another event."""


class EventClock:
    """Time that passes on a GPU between two events, queued around each call or around many.

    Nothing waits between the calls, so the work of a turn is queued back to back, as in training.
    Where the host queues more slowly than the GPU works, the GPU reaches the first event early and
    idles until the call's work arrives: that time counts.

    Args:
        make_event: a new event that keeps time.
        synchronize: waits until all events have happened.
    """

    def __init__(self, make_event: Callable[[], Event], synchronize: Callable[[], None]) -> None:
        self._make_event = make_event
        self._synchronize = synchronize
        self._pairs: list[tuple[Event, Event]] = []

    def start(self) -> None:
        """Queues the event before a call's work, and has the one after it ready."""
        pair = self._make_event(), self._make_event()
        self._pairs.append(pair)
        pair[0].record()

    def stop(self) -> None:
        """Queues the event after a call's work."""
        self._pairs[-1][1].record()

    def total(self) -> float:
        """Waits, once; seconds of all calls so far."""
        self._synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._pairs) / 1e3
