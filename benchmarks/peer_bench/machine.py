"""The machine that is measured, a CPU or a GPU: what differs between them, in one place."""

from __future__ import annotations

import functools
import gc
import platform
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from peer import _library
from peer.bench import memory
from peer.bench.clock import Clock, EventClock, WallClock
from peer.bench.stream import Bandwidth, CopyStream, Stream, last_level_cache

__all__ = [
    "ASSUMED_GPU",
    "CPU",
    "Cpu",
    "Cuda",
    "Machine",
    "MachineError",
    "Sizes",
    "open_machine",
]

GIB = 2**30


class MachineError(RuntimeError):
    """The machine that was asked for is not here, or peer has no kernels for it."""


@dataclass(frozen=True)
class Sizes:
    """What a dry run needs to know of a machine.

    Args:
        memory: bytes that can be allocated.
        last_level_cache: bytes.
    """

    memory: int
    last_level_cache: int


# What dry runs for a GPU reckon with where there is none: an H100's, in round numbers.
ASSUMED_GPU = Sizes(memory=80 * GIB, last_level_cache=50 * 2**20)


class Machine(ABC):
    """Where tensors are, and how calls on them are timed and their memory is measured.

    Attributes:
        kind: "cpu" or "cuda", the `device` of cases and rows.
        device: of all tensors.
        warm_up_calls: calls at the start of a turn that are not timed.
        is_lost: whether a failure made it useless to this process.
    """

    kind: ClassVar[str]
    warm_up_calls: ClassVar[int]
    device: torch.device
    is_lost: bool = False

    @property
    @abstractmethod
    def processor(self) -> str:
        """Its name, as rows have it."""

    @property
    @abstractmethod
    def capability(self) -> str:
        """What the kernels in use are compiled for."""

    @property
    @abstractmethod
    def last_level_cache(self) -> int:
        """Bytes of the largest cache."""

    @abstractmethod
    def available(self) -> int:
        """Bytes that can still be allocated."""

    @abstractmethod
    def release(self) -> None:
        """Collects garbage and returns freed memory to the system."""

    def recover(self) -> None:
        """After a failed call: frees what it left, or finds that the machine is lost."""
        self.release()

    @abstractmethod
    def measure_peak(self, call: Callable[[], object]) -> int | None:
        """Peak of memory during a call beyond what was in use before it, in bytes.

        None where the system does not tell.
        """

    @abstractmethod
    def start_clock(self) -> Clock:
        """A clock for the calls of a turn."""

    @abstractmethod
    def make_stream(self, size: int | None = None) -> Bandwidth:
        """What bandwidth is measured with.

        Args:
            size: bytes of the buffer, None for the machine's default.
        """

    @property
    def sizes(self) -> Sizes:
        """As they are now."""
        return Sizes(self.available(), self.last_level_cache)


class Cpu(Machine):
    """The processors of this machine, with torch's threads."""

    kind = "cpu"
    warm_up_calls = 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @property
    def processor(self) -> str:
        """The model, as far as the system tells."""
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:
            text = ""
        model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
        return model[1].strip() if model else platform.processor() or platform.machine()

    @property
    def capability(self) -> str:
        """The vector instructions."""
        return str(torch.ops.peer.cpu_capability())

    @property
    def last_level_cache(self) -> int:
        """Of processor 0."""
        return last_level_cache()

    def available(self) -> int:
        """Without swapping, within the control group's limit."""
        return memory.available()

    def release(self) -> None:
        """Trims the heap, so that peaks are what is used."""
        memory.release()

    def measure_peak(self, call: Callable[[], object]) -> int | None:
        """Of resident memory."""
        memory.drop_kept_gradients()
        return memory.measure_peak(call)

    def start_clock(self) -> Clock:
        """By the wall."""
        return WallClock()

    def make_stream(self, size: int | None = None) -> Bandwidth:
        """Reads."""
        return Stream(size)


class Cuda(Machine):
    """The current GPU, which CUDA_VISIBLE_DEVICES chooses.

    Raises:
        MachineError: torch has no GPU, or peer is built without CUDA.
    """

    kind = "cuda"
    warm_up_calls = 3  # after freed memory went back: the first allocates anew

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            why = "torch finds none" if torch.version.cuda else "torch is built without CUDA"
            raise MachineError(f"--device cuda needs a GPU, but {why}")
        if not _library.build_info().get("cuda"):
            raise MachineError("--device cuda needs CUDA kernels, but peer is built without CUDA")
        self.device = torch.device("cuda", torch.cuda.current_device())

    @functools.cached_property
    def processor(self) -> str:
        """The GPU, its driver, and the CUDA that torch is built with."""
        parts = [torch.cuda.get_device_name(self.device), _driver(), f"CUDA {torch.version.cuda}"]
        return ", ".join(filter(None, parts))

    @property
    def capability(self) -> str:
        """Such as sm_90."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"sm_{major}{minor}"

    @property
    def last_level_cache(self) -> int:
        """The second-level cache."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def available(self) -> int:
        """On the GPU; what torch holds and does not use is not among it."""
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        """Empties torch's cache of freed memory."""
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
        """Of what tensors take; what torch's allocator holds beyond that does not count."""
        self.release()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def start_clock(self) -> Clock:
        """By events on the current stream."""
        return EventClock(
            lambda: torch.cuda.Event(enable_timing=True),
            lambda: torch.cuda.synchronize(self.device),
        )

    def make_stream(self, size: int | None = None) -> Bandwidth:
        """Copies."""
        return CopyStream(self.device, self.start_clock, size)


CPU = Cpu()


def open_machine(kind: str) -> Machine:
    """The machine of a kind.

    Args:
        kind: "cpu" or "cuda".

    Raises:
        MachineError: it is not here.
    """
    return CPU if kind == "cpu" else Cuda()


def _driver() -> str:
    """The version of the GPU's driver, empty where nvidia-smi does not tell within seconds."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = run.stdout.split() if run.returncode == 0 else []
    return f"driver {lines[0]}" if lines else ""
