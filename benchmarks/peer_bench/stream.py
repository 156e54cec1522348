"""The memory bandwidth of the machine, measured beside everything else in the same rounds.

On a CPU, a read-only stream: a buffer far larger than the caches is read once by all of torch's
threads,
    GB/s = bytes of the buffer / seconds / 10⁹,
by `torch.sum` or by a matrix-vector product, whichever is faster here. On a GPU, a copy, which
reads and writes:
    GB/s = 2 · bytes of the buffer / seconds / 10⁹.
A row says which in `stream_formula`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from peer.bench.clock import Clock, WallClock

__all__ = ["Bandwidth", "CopyStream", "Stream", "gigabytes_per_second", "last_level_cache"]

_COLUMNS = 4096


class Bandwidth(Protocol):
    """A way to measure bandwidth.

    Attributes:
        size: bytes of the buffer.
        formula: what is done with it, as rows say it.
    """

    size: int
    formula: str

    def measure(self) -> float:
        """GB/s, the median of a few times."""


def gigabytes_per_second(size: int, seconds: float) -> float:
    """10⁹ bytes per second."""
    return size / seconds / 1e9


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()):
            largest = max(largest, int(found[1]) * units[found[2]])
    return largest or 32 * 2**20


class Stream:
    """A buffer of the CPU, and the fastest way to read it.

    Args:
        size: bytes of the buffer; by default 8 times the last-level cache, at least 256 MiB.
    """

    def __init__(self, size: int | None = None) -> None:
        size = max(8 * last_level_cache(), 256 * 2**20) if size is None else size
        rows = max(1, size // (4 * _COLUMNS))
        self.buffer = torch.ones(rows, _COLUMNS)
        vector = torch.ones(_COLUMNS)
        self.size = self.buffer.numel() * 4
        ways: dict[str, Callable[[], object]] = {
            "read, torch.sum": self.buffer.sum,
            "read, torch.mv": lambda: torch.mv(self.buffer, vector),
        }
        seconds = {
            name: min(_time(read, WallClock()) for _ in range(4)) for name, read in ways.items()
        }
        self.formula = min(seconds, key=lambda name: seconds[name])
        self._read = ways[self.formula]

    def measure(self) -> float:
        """GB/s, the median of three reads."""
        seconds = statistics.median(_time(self._read, WallClock()) for _ in range(3))
        return gigabytes_per_second(self.size, seconds)


class CopyStream:
    """Two buffers of a device, of which one is copied to the other.

    Args:
        device: where they are.
        start_clock: makes a clock for a copy.
        size: bytes of each buffer, 1 GiB by default. They are random, since zeros may be faster.
    """

    formula = "copy, 2 * bytes / seconds"

    def __init__(
        self, device: torch.device, start_clock: Callable[[], Clock], size: int | None = None
    ) -> None:
        self.size = 2**30 if size is None else size
        self._from = torch.randint(256, (self.size,), dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        self._start_clock = start_clock
        self._copy()

    def _copy(self) -> None:
        self._to.copy_(self._from)

    def measure(self) -> float:
        """GB/s, the median of five copies."""
        seconds = statistics.median(_time(self._copy, self._start_clock()) for _ in range(5))
        return gigabytes_per_second(2 * self.size, seconds)


def _time(call: Callable[[], object], clock: Clock) -> float:
    clock.start()
    call()
    clock.stop()
    return clock.total()
