"""Memory of this process and of the machine: peaks, what is left, and returning it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

__all__ = ["HEADROOM", "available", "measure_peak", "release", "resident"]

HEADROOM = 2 * 2**30  # left to the system by every case


def available() -> int:
    """Bytes that can still be allocated without swapping, within the control group's limit."""
    fields = _fields("/proc/meminfo")
    left = fields.get("MemAvailable", 2**62)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            cached = _fields(group / "memory.stat", scale=1).get("inactive_file", 0)
            left = min(left, int(limit) - used + cached)
    except (OSError, ValueError):
        pass
    return left


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    return _fields("/proc/self/status").get("VmRSS", 0)


def release() -> None:
    """Collects garbage and returns freed memory to the system, so that peaks are what is used."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_peak(call: Callable[[], object]) -> int | None:
    """Peak of resident memory during a call beyond what was resident before it, in bytes.

    The system's high-water mark is reset through /proc/self/clear_refs; None where that is refused.
    """
    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return None
    before = resident()
    call()
    peak = _fields("/proc/self/status").get("VmHWM")
    return None if peak is None else max(0, peak - before)


def _fields(path: str | Path, scale: int = 1024) -> dict[str, int]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    fields = {}
    for line in lines:
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            fields[words[0]] = int(words[1]) * scale
    return fields
