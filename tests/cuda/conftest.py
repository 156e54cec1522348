"""What the GPU tests share. `make test-cuda` runs them, on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import peer


def pytest_sessionstart(session: pytest.Session) -> None:
    if not torch.cuda.is_available():
        pytest.exit("the tests in tests/cuda need a GPU that torch can use", returncode=1)
    if not peer.build_info().get("cuda"):
        pytest.exit("the tests in tests/cuda need a build with CUDA: PEER_CUDA=1", returncode=1)


@pytest.fixture(scope="session")
def on_gpu() -> Callable[[Any], Any]:
    """Moves the tensors of a named tuple to the GPU."""

    def move(inputs: Any) -> Any:
        return type(inputs)(*(t if t is None else t.detach().cuda() for t in inputs))

    return move


def free_memory() -> int:
    """Bytes that can be allocated on the GPU."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
