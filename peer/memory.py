"""Tensors on huge pages, for tables with a million rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["append_zero_rows", "empty_huge", "zeros_huge"]


def empty_huge(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Allocates an uninitialised tensor on 2 MB pages, for a table with random row access.

    On 4 KB pages, reading a random row of a large table almost always misses the TLB. If the system
    grants no huge pages, the tensor is on small pages. Small tensors and tensors on other devices
    than the CPU come from `torch.empty`.

    `peer.ExpertPool` allocates its table with this function. Operations that allocate a new tensor,
    such as `to`, `clone` and `copy.deepcopy`, do not preserve the huge pages.

    Args:
        size: the shape, as ints or as one sequence.
        dtype: torch's default dtype if None.
        device: torch's default device if None.

    Returns:
        The tensor, of shape `size`.

    Raises:
        RuntimeError: the memory cannot be allocated, or a size is negative.

    Example:
        >>> import torch, peer
        >>> table = peer.empty_huge(1024, 512, dtype=torch.bfloat16)
        >>> table.shape, table.dtype
        (torch.Size([1024, 512]), torch.bfloat16)
    """
    return _allocate(torch.ops.peer.empty_huge, torch.empty, size, dtype, device)


def zeros_huge(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Allocates zeros on 2 MB pages, which take no memory until they are written.

    The optimizers of `peer.optim` keep their state in such tensors, because they write only the
    retrieved rows.

    Args:
        size: the shape, as ints or as one sequence.
        dtype: torch's default dtype if None.
        device: torch's default device if None. On other devices than the CPU the tensor comes from
            `torch.zeros`.

    Returns:
        The tensor, of shape `size`.

    Raises:
        RuntimeError: the memory cannot be allocated, or a size is negative.

    Example:
        >>> import torch, peer
        >>> int(peer.zeros_huge(1024, 512).count_nonzero())
        0
    """
    return _allocate(torch.ops.peer.zeros_huge, torch.zeros, size, dtype, device)


def append_zero_rows(table: Tensor, rows: int) -> Tensor:
    """Appends rows of zeros to a table, without a copy if it is on pages of `empty_huge`.

    On Linux, the storage of a tensor from `empty_huge` or `zeros_huge` grows in place. Its other
    views stay valid and go on sharing memory with it. New rows take no memory until they are
    written. On other systems and devices, and if the storage was allocated in another way or has
    exported its address to NumPy, the rows are copied to a new tensor. The old and the new tensor
    then exist at once. Torch does not note exports by DLPack: their address may become invalid.

    Args:
        table: the table, of at least one dimension, without gradients.
        rows: how many rows are appended.

    Returns:
        The larger table. It shares memory with `table` if the storage grew in place.

    Raises:
        ValueError: `table` has no dimension or `rows` is negative.
        RuntimeError: the memory cannot be allocated.

    Example:
        >>> import peer
        >>> peer.memory.append_zero_rows(peer.zeros_huge(1000, 512), 24).shape
        torch.Size([1024, 512])
    """
    larger: Tensor = torch.ops.peer.append_zero_rows(table, rows)
    return larger


def _allocate(
    huge_operator: Callable[..., Tensor],
    torch_function: Callable[..., Tensor],
    size: tuple[int | Sequence[int], ...],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
) -> Tensor:
    # Resolves the default device and dtype, and shows whether a mode such as FakeTensor is active.
    example = torch.empty(0, dtype=dtype, device=device)
    sizes = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    if example.device.type != "cpu" or type(example) is not Tensor:
        return torch_function(sizes, dtype=dtype, device=device)
    return huge_operator(sizes, example.dtype)
