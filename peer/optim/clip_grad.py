"""Clipping of dense and sparse gradients by their total norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_grad_norm_"]


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
    norm is that of the sum.

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
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_gradients = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in with_gradients:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse and not _is_coalesced(gradient):
            parameter.grad = gradient.coalesce()
    values = [_values(parameter.grad) for parameter in with_gradients]
    norm = torch.nn.utils.get_total_norm(
        [each for each in values if each.numel() > 0], norm_type, error_if_nonfinite
    )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in values:
        each.mul_(scale.to(each.device))
    return norm


def _is_coalesced(gradient: Tensor) -> bool:
    """Whether the ids are distinct and ascending. Accumulation of gradients clears the flag."""
    if gradient.is_coalesced():
        return True
    ids = gradient._indices()
    return len(ids) == 1 and bool((ids[0, 1:] > ids[0, :-1]).all())


def _values(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient._values() if gradient.is_sparse else gradient
