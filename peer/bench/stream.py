"""The memory bandwidth of this machine, measured beside everything else in the same rounds.

Read-only stream: a buffer far larger than the caches is read once by all of torch's threads,
    GB/s = bytes of the buffer / seconds / 10⁹,
by `torch.sum` or by a matrix-vector product, whichever is faster here. A copy, which reads and
writes, is 2 · bytes / seconds / 10⁹; it is not what the kernels' reads are compared with.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["Stream", "gigabytes_per_second", "last_level_cache"]

_COLUMNS = 4096


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
    """A buffer, and the fastest way to read it.

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
        seconds = {name: min(_time(read) for _ in range(4)) for name, read in ways.items()}
        self.formula = min(seconds, key=lambda name: seconds[name])
        self._read = ways[self.formula]

    def measure(self, times: int = 3) -> float:
        """GB/s, the median of a few reads."""
        seconds = sorted(_time(self._read) for _ in range(times))
        return gigabytes_per_second(self.size, seconds[times // 2])


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
