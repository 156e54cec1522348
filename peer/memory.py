"""Memory for tables of a million rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["empty_huge", "zeros_huge"]


def empty_huge(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """An uninitialised tensor on pages of 2 MB, for a table whose rows are read at random.

    On pages of 4 KB almost every row of a large table misses the processor's translation cache.
    Where the system grants no large pages the tensor is on small ones, and is the same otherwise.
    For small tensors and on devices other than the CPU this is `torch.empty`.

    `peer.ExpertPool` allocates its tables so. Operations that allocate anew, such as `to`, `clone`
    and `copy.deepcopy`, do not keep the pages.

    Args:
        size: of the tensor, as numbers or as one sequence.
        dtype: by default torch's.
        device: by default torch's.

    Raises:
        RuntimeError: there is not enough memory, or a size is negative.

    Example:
        >>> import torch, peer
        >>> table = peer.empty_huge(1024, 512, dtype=torch.bfloat16)
        >>> table.shape, table.dtype
        (torch.Size([1024, 512]), torch.bfloat16)
    """
    return _make(torch.ops.peer.empty_huge, torch.empty, size, dtype, device)


def zeros_huge(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """A tensor of zeros on pages of 2 MB, which take no memory until they are written.

    For the state of an optimizer that touches few rows of a table.

    Args:
        size: of the tensor, as numbers or as one sequence.
        dtype: by default torch's.
        device: by default torch's. Elsewhere than on the CPU this is `torch.zeros`.

    Raises:
        RuntimeError: there is not enough memory, or a size is negative.

    Example:
        >>> import torch, peer
        >>> int(peer.zeros_huge(1024, 512).count_nonzero())
        0
    """
    return _make(torch.ops.peer.zeros_huge, torch.zeros, size, dtype, device)


def _make(
    on_huge_pages: Callable[..., Tensor],
    elsewhere: Callable[..., Tensor],
    size: tuple[int | Sequence[int], ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
) -> Tensor:
    # What torch would make here, under the default device and any mode that is active.
    example = torch.empty(0, dtype=dtype, device=device)
    sizes = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    if example.device.type != "cpu" or type(example) is not Tensor:
        return elsewhere(sizes, dtype=dtype, device=device)
    return on_huge_pages(sizes, example.dtype)
