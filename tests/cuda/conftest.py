"""Fixtures of the GPU tests. `make test-cuda` runs the tests on a machine with a GPU.

`make rehearse` runs them without a GPU, on the device that `tests/emulated_cuda/emulated_cuda.py`
emulates. There, sizes are small, and tests marked `needs_gpu(reason)` are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

import peer

Size = TypeVar("Size")


def is_emulated() -> bool:
    """Whether the device is emulated on the CPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_gpu(reason): does not hold on an emulated device")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not torch.cuda.is_available():
        pytest.exit("the tests in tests/cuda need a GPU that torch can use", returncode=1)
    if not peer._library.build_info()["cuda"]:
        pytest.exit("the tests in tests/cuda need a build with CUDA: PEER_CUDA=1", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if is_emulated():
        for item in items:
            if marker := item.get_closest_marker("needs_gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {marker.args[0]}"))


@pytest.fixture(scope="session")
def on_gpu() -> Callable[[Any], Any]:
    """A function that moves the tensors of a named tuple to the GPU."""

    def move(inputs: Any) -> Any:
        return type(inputs)(*(t if t is None else t.detach().cuda() for t in inputs))

    return move


@pytest.fixture(scope="session")
def sized() -> Callable[[Size, Size], Size]:
    """A function that returns its first argument on a GPU, its second on an emulated device."""
    return lambda on_gpu, emulated: emulated if is_emulated() else on_gpu


@pytest.fixture(scope="session")
def run_python(run_python: Callable[..., Any]) -> Callable[..., Any]:
    """As in the other tests, but the new interpreter emulates the device if this one does."""
    if not is_emulated():
        return run_python

    def run(snippet: str, *arguments: object, **options: Any) -> Any:
        begin = "import emulated_cuda; emulated_cuda.install()\n"
        return run_python(begin + snippet, *arguments, **options)

    return run


def free_memory() -> int:
    """The number of bytes that can be allocated on the GPU."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
