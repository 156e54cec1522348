"""Clipping of dense and sparse gradients, by their total norm or by value."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peer.optim.row_gradient import accumulation_dtype

__all__ = ["clip_grad_norm_", "clip_grad_value_"]

_BLOCK = 2**20  # numbers of a 16-bit gradient that are converted at a time


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    r"""Scales all gradients, dense and sparse, so that their total norm is at most `max_norm`.

    Like `torch.nn.utils.clip_grad_norm_`, which takes only dense gradients, it multiplies all
    gradients by :math:`\min(1, \text{max\_norm} / (n + 10^{-6}))`, where n is the norm of the
    concatenated gradients. Rows that a sparse gradient does not hold count as zero. A sparse
    gradient with repeated ids, such as the sum over micro-batches, is coalesced first, because the
    norm is that of the sum. Norms of 16-bit gradients are computed in float32.

    Args:
        parameters: the parameters; gradients are scaled in place, and parameters without a gradient
            are skipped.
        max_norm: the maximum of the total norm.
        norm_type: p of the p-norm, positive; infinity for the largest absolute value.
        error_if_nonfinite: whether an infinite or NaN norm raises an error.

    Returns:
        The total norm before scaling, a scalar.

    Raises:
        ValueError: `norm_type` is not positive.
        RuntimeError: the norm is infinite or NaN and `error_if_nonfinite` is set. The gradients are
            not changed.

    Example:
        >>> import torch, peer
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> table.grad = torch.sparse_coo_tensor([[1]], [[3.0, 4.0]], (3, 2), check_invariants=True)
        >>> peer.optim.clip_grad_norm_([table], max_norm=1.0)
        tensor(5.)
        >>> table.grad.to_dense()[1]
        tensor([0.6000, 0.8000])
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: expected norm_type to be positive, got {norm_type}")
    values = _values_of_gradients(parameters)
    norm = _total_norm([each for each in values if each.numel() > 0], norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the total norm of order {norm_type} of the gradients is non-finite "
            f"({norm.item()}); set error_if_nonfinite=False to scale by it anyway"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in values:
        each.mul_(scale.to(each.device))
    return norm


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clamps all gradients, dense and sparse, to [-clip_value, clip_value].

    Like `torch.nn.utils.clip_grad_value_`, which takes only dense gradients. A sparse gradient with
    repeated ids is coalesced first, because the clamped number is the sum.

    Args:
        parameters: the parameters; gradients are clamped in place, and parameters without a
            gradient are skipped.
        clip_value: the largest absolute value, not negative.

    Raises:
        ValueError: `clip_value` is negative or NaN.

    Example:
        >>> import torch, peer
        >>> table = torch.nn.Parameter(torch.zeros(3, 2))
        >>> table.grad = torch.tensor([[0.0, 0.0], [3.0, -4.0], [0.0, 0.0]]).to_sparse(1)
        >>> peer.optim.clip_grad_value_([table], 3.5)
        >>> table.grad.to_dense()[1]
        tensor([ 3.0000, -3.5000])
    """
    if not clip_value >= 0:
        raise ValueError(
            f"clip_grad_value_: expected clip_value to be not negative, got {clip_value}"
        )
    for each in _values_of_gradients(parameters):
        each.clamp_(-clip_value, clip_value)


def _values_of_gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The numbers of all gradients, as views. Sparse gradients are coalesced."""
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    values = []
    for parameter in dict.fromkeys(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout == torch.sparse_coo:
            if not _is_coalesced(gradient):
                # The sum of rows in 16 bits would round at every addition, and could overflow.
                gradient = parameter.grad = (
                    gradient.to(accumulation_dtype(gradient.dtype)).coalesce().to(gradient.dtype)
                )
            gradient = gradient._values()
        elif gradient.layout != torch.strided:
            gradient = gradient.values()
        values.append(gradient)
    return values


def _total_norm(values: list[Tensor], norm_type: float) -> Tensor:
    """The norm of concatenated tensors, in float32, or in float64 if any of them is."""
    if not values:
        return torch.tensor(0.0)
    norms: list[Tensor] = []
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in values:
        groups.setdefault((each.device, each.dtype), []).append(each)
    for (_, dtype), group in groups.items():
        wide = accumulation_dtype(dtype)
        # A norm in another dtype converts its argument, all at once.
        blocks = group if wide == dtype else [block for each in group for block in _blocks(each)]
        norms += torch._foreach_norm(blocks, norm_type, dtype=wide)
    wide = max((each.dtype for each in norms), key=lambda dtype: dtype.itemsize)
    device = values[0].device
    return torch.linalg.vector_norm(
        torch.stack([each.to(device, wide) for each in norms]), norm_type
    )


def _blocks(values: Tensor) -> Iterable[Tensor]:
    if values.numel() <= _BLOCK or values.device.type != "cpu":
        return (values,)
    rows = max(1, _BLOCK * len(values) // values.numel())
    return values.split(rows)


def _is_coalesced(gradient: Tensor) -> bool:
    """Whether the ids are distinct and ascending. Accumulation of gradients clears the flag."""
    if gradient.is_coalesced():
        return True
    ids = gradient._indices()
    return len(ids) == 1 and bool((ids[0, 1:] > ids[0, :-1]).all())
