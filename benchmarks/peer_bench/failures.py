"""What keeps a provider from being measured becomes a reason in its row, and the run goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from peer.bench.check import WrongResultError
from peer.bench.machine import Machine

__all__ = ["LOST", "Failure", "attempt", "is_out_of_memory"]

T = TypeVar("T")

# Of torch's allocator for the CPU, of CUDA outside of torch's allocator, and of cuBLAS.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Failure:
    """Why there is no time.

    Args:
        reason: for the row.
        is_error: whether the run fails with it. What does not fit is no error.
        traceback: of an exception that nobody expected.
    """

    reason: str
    is_error: bool = True
    traceback: str = ""


LOST = Failure("not run: the GPU failed before", is_error=False)  # the error was reported then


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there is too little memory, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def attempt(
    machine: Machine,
    call: Callable[[], T],
    *,
    when: str = "when it was tried",
    drop: Callable[[], None] = lambda: None,
) -> T | Failure:
    """What a call returns, or why it raised an exception.

    An exception keeps the tensors of all frames that it passed. Here it is gone before the machine
    frees memory.

    Args:
        machine: on which it runs. If it is lost, the call does not happen.
        call: without arguments.
        when: it happens, for the reason if memory runs out.
        drop: gives up what a failed call leaves outside of its frames.
    """
    if machine.is_lost:
        return LOST
    try:
        return call()
    except Exception as error:
        failure = _describe(error, when)
    drop()
    machine.recover()
    return failure


def _describe(error: Exception, when: str) -> Failure:
    if isinstance(error, WrongResultError):
        return Failure(f"wrong result: {error}")
    if is_out_of_memory(error):
        return Failure(f"does not fit: out of memory {when}", is_error=False)
    lines = str(error).strip().splitlines()
    reason = ": ".join(["failed", type(error).__name__, *lines[:1]])
    return Failure(reason, traceback="".join(traceback.format_exception(error)))
