"""A CUDA device for Python on a machine without a GPU, so that code for a GPU can be tested there.

A `libpeer.so` built with PEER_EMULATE_CUDA runs its CUDA operators and kernels on CPU memory that
is marked as device memory (`emulated_device.cpp`). `install()` adapts torch to it:

- The device "cuda" makes marked tensors. Results of marked tensors are marked. `device` and
  `is_cuda` report the mark. Marked and unmarked tensors do not mix.
- `torch.cuda` works. New memory holds NaN, and its peak is counted. Events measure wall time.
- A graph records operators and replays them. It cannot record operators that wait for the device.
- `torch.compile` returns its argument.

All other torch functions compute on the CPU.

    PYTHONPATH=tests/emulated_cuda pytest -p emulated_cuda tests/cuda
    PYTHONPATH=tests/emulated_cuda PEER_EMULATE_EVERYTHING=1 pytest -p emulated_cuda tests/python

The benchmark runs from `benchmarks/`:

    PYTHONPATH=.:../tests/emulated_cuda python -m emulated_cuda -m peer_bench --device cuda

With PEER_EMULATE_EVERYTHING=1, CPU tensors run the CUDA operators, too, and torch is not changed.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

EVERYTHING = "PEER_EMULATE_EVERYTHING"
GIB = 2**30
MEMORY = 80 * GIB  # the memory that the device reports
DEVICE = torch.device("cuda", 0)
# Functions that may take tensors of both devices.
BETWEEN_DEVICES = {
    *("to", "cpu", "cuda", "copy_", "__set__", "__getitem__", "backward", "grad"),
    "_has_compatible_shallow_copy_type",
}


def install() -> None:
    """Starts the emulation, in this thread.

    Raises:
        RuntimeError: If `libpeer.so` is not built with PEER_EMULATE_CUDA.
    """
    import peer

    if (peer._library.build_info()["cuda"] or {}).get("toolkit") != "emulated":
        raise RuntimeError("this libpeer.so emulates no CUDA: build it with -DPEER_EMULATE_CUDA=ON")
    emulated = torch.ops.peer_emulated
    emulated.install()
    if os.environ.get(EVERYTHING) == "1":
        emulated.set_everything_on_device(True)
        return
    _replace_in_torch()
    _Device().__enter__()


def pytest_configure() -> None:
    """The hook of the pytest plugin: `-p emulated_cuda`."""
    install()


# Tests of the CPU operators that do not hold for the CUDA operators, by a part of their names.
DIFFERENT = {
    "[index negative": "a bad index ends a CUDA kernel",
    "[index too large": "a bad index ends a CUDA kernel",
    "::test_a_bad_gradient_in_a_step_changes_nothing": "a bad index ends a CUDA kernel",
    "::test_a_bad_index_is_named_and_changes_nothing": "a bad index ends a CUDA kernel",
    "::test_k_of_all_experts_is_a_permutation_of_them": "k is at most 64 on CUDA",
    "::test_equals_brute_force_on_every_grid_for_every_k": "k is at most 64 on CUDA",
    "::test_adding_rows_of_keys_keeps_the_ids_of_existing_experts": "k is at most 64 on CUDA",
    "::test_equals_ranking_all_for_k_beyond_64": "k is at most 64 on CUDA",
    "::test_fewer_than_k_enabled_experts_are_refused": "too few enabled experts end a CUDA kernel",
    "::test_denormal_numbers_are_not_zero": "CUDA kernels never take them as zero",
    "::test_every_cpu_capability": "new interpreters run the CPU's operators",
    "::test_tables_beyond_two_to_the_31_elements": "takes minutes, and tests/cuda has it, too",
}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skips the tests in DIFFERENT if CPU tensors run the CUDA operators."""
    if os.environ.get(EVERYTHING) != "1":
        return
    for item in items:
        for name, reason in DIFFERENT.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor with memory and not a wrapper around tensors."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _is_on_device(value: object) -> bool:
    return _is_plain(value) and torch.ops.peer_emulated.is_on_device(value)


def _put_on_device(value: Any) -> Any:
    if _is_plain(value):
        torch.ops.peer_emulated.put_on_device(value)
    return value


def _names_device(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.split(":")[0] == "cuda"


class _Device(TorchFunctionMode):
    """Intercepts every torch function, tensor property and operator that Python calls."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self._get_property(function, *args)
        if name == "_parse_to" or function is torch.device:  # they parse device names
            return function(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        wants_device = name == "cuda" or any(_names_device(value) for value in given)
        args, kwargs = tree_map(
            lambda value: torch.device("cpu") if _names_device(value) else value, (args, kwargs)
        )
        tensors = [value for value in given if _is_plain(value)]
        on_device = [_is_on_device(tensor) for tensor in tensors]
        if any(on_device) and name not in BETWEEN_DEVICES:
            self._check_same_device(function, tensors, on_device)
        result = args[0] if name == "cuda" else function(*args, **kwargs)
        if name == "cpu" or (name == "to" and not wants_device and _names_cpu(given)):
            return result.clone() if _is_on_device(result) else result
        if name in ("to", "cuda") and wants_device and not _is_on_device(result):
            return _put_on_device(result.clone())
        if wants_device or any(on_device):
            return tree_map(
                lambda value: value if any(value is t for t in tensors) else _put_on_device(value),
                result,
            )
        return result

    @staticmethod
    def _get_property(function: Any, tensor: Any, *others: Any) -> Any:
        name = function.__self__.__name__
        if name in ("device", "is_cuda", "is_cpu") and _is_on_device(tensor):
            return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[name]
        value = function(tensor, *others)
        if name == "grad" and _is_on_device(tensor):
            _put_on_device(value)
        return value

    @staticmethod
    def _check_same_device(
        function: Any, tensors: list[torch.Tensor], on_device: list[bool]
    ) -> None:
        if torch._C._current_graph_task_id() != -1:  # autograd makes unmarked gradients
            for tensor in tensors:
                _put_on_device(tensor)
            return
        for tensor, is_there in zip(tensors, on_device, strict=True):
            if not is_there and tensor.dim() > 0:
                raise RuntimeError(
                    f"{function}: expected all tensors to be on the same device, got some on "
                    f"{DEVICE} and one of shape {tuple(tensor.shape)} on cpu"
                )


def _names_cpu(values: Iterable[object]) -> bool:
    return any(
        value.type == "cpu" if isinstance(value, torch.device) else value == "cpu"
        for value in values
        if isinstance(value, (str, torch.device))
    )


class Event:
    """`torch.cuda.Event` by wall time: all work is done when the event is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.time: float | None = None

    def record(self, stream: object = None) -> None:
        """Stores the current time."""
        self.time = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """The time between the events in milliseconds."""
        if not (self.enable_timing and end_event.enable_timing):
            raise RuntimeError("both events must be made with enable_timing=True")
        if self.time is None or end_event.time is None:
            raise RuntimeError("both events must be recorded")
        return 1e3 * (end_event.time - self.time)

    def synchronize(self) -> None:
        """Does nothing, because no work is pending."""


class Stream:
    """`torch.cuda.Stream`: work is executed at once, in program order."""

    cuda_stream = 0
    capturing = False

    def is_capturing(self) -> bool:
        """Whether a graph capture is in progress."""
        return Stream.capturing

    def wait_stream(self, stream: Stream) -> None:
        """Does nothing, because no work is pending."""

    def synchronize(self) -> None:
        """Does nothing, because no work is pending."""


class CUDAGraph:
    """`torch.cuda.CUDAGraph`: operators, their arguments, and the memory of their results."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        """Runs the operators again and writes the results to the memory of the capture."""
        if not self.calls:
            raise RuntimeError("nothing was captured")
        with torch._C.DisableTorchFunction():
            for operator, args, kwargs, results in self.calls:
                again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Records operators into a graph. The end of the capture undoes what they wrote."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if operator.namespace == "peer_emulated":
            return operator(*args, **kwargs)
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor):
                self.before.append((value, value.detach().clone()))
        results = operator(*args, **kwargs)
        self.graph.calls.append((operator, args, kwargs, results))
        return results

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, before in reversed(self.before):
            tensor.copy_(before)


@contextlib.contextmanager
def _capture(graph: CUDAGraph, **_: object) -> Iterator[None]:
    """`torch.cuda.graph`: after the capture, no tensor has changed."""
    recorder = _Recorder(graph)
    _set_capturing(True)
    try:
        with recorder:
            yield
    finally:
        _set_capturing(False)
    recorder.restore()


def _set_capturing(value: bool) -> None:
    Stream.capturing = value
    torch.ops.peer_emulated.set_capturing(value)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return _TorchGenerator("cpu" if _names_device(device) else device)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


_TorchGenerator = torch.Generator


def _replace_in_torch() -> None:
    emulated = torch.ops.peer_emulated
    stream = Stream()
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "emulated",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(L2_cache_size=50 * 2**20),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (MEMORY - emulated.memory_in_use(), MEMORY),
        "memory_allocated": lambda device=None: emulated.memory_in_use(),
        "max_memory_allocated": lambda device=None: emulated.peak_memory(),
        "reset_peak_memory_stats": lambda device=None: emulated.reset_peak_memory(),
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": stream.is_capturing,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": _capture,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.accelerator.current_stream = torch.cuda.current_stream
    torch.compile = lambda model, **_: model
    torch.Generator = _Generator  # type: ignore[misc]
    torch.autocast = _Autocast  # type: ignore[misc]


def main() -> None:
    """`python -m emulated_cuda -m MODULE ARGUMENTS...` or `... SCRIPT ARGUMENTS...`."""
    install()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
