"""The machine that is measured, a CPU or a GPU: timing, bandwidth and memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import peer

GIB = 2**30
HEADROOM = 2 * GIB  # left to the system by every case

# Memory and last-level cache that a dry run for a GPU assumes without one: an H100's.
ASSUMED_GPU = 80 * GIB, 50 * 2**20


class MachineError(RuntimeError):
    """The machine does not exist, or peer has no kernels for it."""


class HostEvent:
    """The interface of `torch.cuda.Event`, for calls that return when their work is done."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.time - self.time)


@dataclass
class Timer:
    """Adds up the time between events before and after calls. What lies between calls is left out.

    On a GPU nothing waits between the calls, so the work of a turn is queued back to back, as in
    training. If the host queues more slowly than the GPU works, the GPU reaches the first event
    early and idles until the work of the call arrives. That time counts.
    """

    make_event: Callable[[], Any] = HostEvent
    synchronize: Callable[[], None] = lambda: None  # waits until all events have happened
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def start(self) -> None:
        pair = self.make_event(), self.make_event()
        self.pairs.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self.pairs[-1][1].record()

    def total(self) -> float:
        """Waits, once; the seconds of all calls so far."""
        self.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self.pairs) / 1e3


@dataclass
class Bandwidth:
    """A transfer of `size` bytes, which is measured in the same rounds as everything else."""

    formula: str
    size: int
    transfer: Callable[[], object]
    make_timer: Callable[[], Timer] = Timer
    repeats: int = 3

    def time(self) -> float:
        """Seconds of one transfer."""
        timer = self.make_timer()
        timer.start()
        self.transfer()
        timer.stop()
        return timer.total()

    def measure(self) -> float:
        """GB/s, the median of the repeats."""
        seconds = statistics.median(self.time() for _ in range(self.repeats))
        return gigabytes_per_second(self.size, seconds)


def gigabytes_per_second(size: int, seconds: float) -> float:
    """10⁹ bytes per second."""
    return size / seconds / 1e9


def make_read(size: int | None = None) -> Bandwidth:
    """All threads of torch read a buffer once, by the faster of two functions.

    By default the buffer is 8 times the last-level cache, at least 256 MiB.
    """
    size = max(8 * last_level_cache(), 256 * 2**20) if size is None else size
    columns = 4096
    buffer, vector = torch.ones(max(1, size // (4 * columns)), columns), torch.ones(columns)
    reads = [
        Bandwidth("read, torch.sum", 4 * buffer.numel(), buffer.sum),
        Bandwidth("read, torch.mv", 4 * buffer.numel(), lambda: torch.mv(buffer, vector)),
    ]
    return min(reads, key=lambda read: min(read.time() for _ in range(4)))


def make_copy(
    device: torch.device, make_timer: Callable[[], Timer], size: int | None = None
) -> Bandwidth:
    """A device copies a buffer, by default of 1 GiB: each byte is read and written.

    The bytes are random, since zeros may be faster.
    """
    size = GIB if size is None else size
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    copy()
    return Bandwidth("copy, 2 * bytes / seconds", 2 * size, copy, make_timer, repeats=5)


class Machine:
    """The processors of this computer, with torch's threads."""

    kind = "cpu"  # the `device` of cases and rows
    device = torch.device("cpu")
    warm_up_calls = 1  # at the start of a turn, not timed
    is_lost = False  # a failure made it useless to this process

    @property
    def processor(self) -> str:
        """The model."""
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:
            text = ""
        model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
        return model[1].strip() if model else platform.processor() or platform.machine()

    @property
    def capability(self) -> str:
        """What the kernels in use are compiled for."""
        return str(torch.ops.peer.cpu_capability())

    @property
    def last_level_cache(self) -> int:
        return last_level_cache()

    def available(self) -> int:
        """Bytes that can be allocated without swapping, within the control group's limit."""
        left = _read_fields("/proc/meminfo").get("MemAvailable", 2**62)
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text())  # ValueError: "max"
            used = int((group / "memory.current").read_text())
            cached = _read_fields(group / "memory.stat", scale=1).get("inactive_file", 0)
            left = min(left, limit - used + cached)
        return left

    def release(self) -> None:
        """Collects garbage and returns freed memory to the system."""
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)

    def recover(self) -> None:
        """After a failed call: frees what it left, or finds that the machine is lost."""
        self.release()

    def measure_peak(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call allocates at its peak, None if the system does not tell.

        It is resident memory. Its high-water mark is reset through /proc/self/clear_refs.
        """
        _drop_kept_gradients()
        self.release()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            call()
            return None
        before = _read_fields("/proc/self/status").get("VmRSS", 0)
        call()
        peak = _read_fields("/proc/self/status").get("VmHWM")
        return None if peak is None else max(0, peak - before)

    def make_timer(self) -> Timer:
        return Timer()

    def make_bandwidth(self, size: int | None = None) -> Bandwidth:
        return make_read(size)


class Gpu(Machine):
    """The current GPU, which CUDA_VISIBLE_DEVICES chooses; a `MachineError` if it is unusable."""

    kind = "cuda"
    warm_up_calls = 3  # after freed memory went back: the first allocates anew

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            why = "torch finds none" if torch.version.cuda else "torch is built without CUDA"
            raise MachineError(f"--device cuda needs a GPU, but {why}")
        if not json.loads(torch.ops.peer.build_info())["cuda"]:
            raise MachineError("--device cuda needs CUDA kernels, but peer is built without CUDA")
        self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def processor(self) -> str:
        """The GPU, its driver, and the CUDA that torch is built with."""
        parts = [torch.cuda.get_device_name(self.device), _driver(), f"CUDA {torch.version.cuda}"]
        return ", ".join(filter(None, parts))

    @property
    def capability(self) -> str:
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    @property
    def last_level_cache(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def available(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def recover(self) -> None:
        """After some errors, such as an illegal address, CUDA refuses all further work."""
        try:
            torch.cuda.synchronize(self.device)
            self.release()
        except RuntimeError:
            self.is_lost = True

    def measure_peak(self, call: Callable[[], object]) -> int:
        """Bytes of tensors, without what torch's allocator holds beyond that."""
        self.release()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def make_timer(self) -> Timer:
        make_event = functools.partial(torch.cuda.Event, enable_timing=True)
        return Timer(make_event, functools.partial(torch.cuda.synchronize, self.device))

    def make_bandwidth(self, size: int | None = None) -> Bandwidth:
        return make_copy(self.device, self.make_timer, size)


CPU = Machine()


def last_level_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB if the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()):
            largest = max(largest, int(found[1]) * units[found[2]])
    return largest or 32 * 2**20


def _drop_kept_gradients() -> None:
    """Makes peer free the memory of sparse gradients that it keeps for the next ones.

    Kept blocks are resident, so a call that uses them again would seem to need nothing. peer keeps
    the five that were freed last. Some of about 2 MiB, its smallest, push the large ones out.
    """
    rows, width = 1050, 256
    ids = torch.arange(rows).view(21, -1)
    x, weights = torch.ones(21, width), torch.ones(ids.shape)
    table = torch.ones(rows, 2, width, requires_grad=True)
    held = []
    for _ in range(6):
        out = peer.functional.expert_mlp(x, weights, ids, table, sparse_grad=True)
        held.append(torch.autograd.grad(out.sum(), table))


def _read_fields(path: str | Path, scale: int = 1024) -> dict[str, int]:
    """Names and numbers of a file of the system, one pair a line."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {w[0]: int(w[1]) * scale for w in words if len(w) >= 2 and w[1].isdigit()}


def _driver() -> str:
    """The version of the GPU's driver, "" if nvidia-smi does not tell within seconds."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = run.stdout.split() if run.returncode == 0 else []
    return f"driver {lines[0]}" if lines else ""
