"""Memory of this process and of the machine: peaks, what is left, and returning it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

import peer

__all__ = ["HEADROOM", "available", "drop_kept_gradients", "measure_peak", "release", "resident"]

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


def drop_kept_gradients() -> None:
    """Makes peer give back the freed memory of sparse gradients that it keeps for the next ones.

    Kept blocks are resident, so a call that uses them again would seem to need nothing. Peer keeps
    the five that were freed last: some of about 2 MiB, its smallest, push the large ones out.
    """
    rows, width = 1050, 256
    ids = torch.arange(rows).view(21, -1)
    x, weights = torch.ones(21, width), torch.ones(ids.shape)
    table = torch.ones(rows, 2, width, requires_grad=True)
    held = []
    for _ in range(6):
        out = peer.functional.expert_mlp(x, weights, ids, table, sparse_grad=True)
        held.append(torch.autograd.grad(out.sum(), table))


def measure_peak(call: Callable[[], object]) -> int | None:
    """Peak of resident memory during a call beyond what was resident before it, in bytes.

    The system's high-water mark is reset through /proc/self/clear_refs; None where that is refused.
    Call `drop_kept_gradients` before.
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
