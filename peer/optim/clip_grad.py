"""Clipping of dense and sparse gradients by their common norm."""

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
    r"""Scales all gradients, dense and sparse, so that their common norm is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, which takes dense gradients only: with n the norm of all
    gradients taken as one vector, they are multiplied by
    :math:`\min(1, \text{max\_norm} / (n + 10^{-6}))`. Rows that a sparse gradient does not hold are
    zero and add nothing. A sparse gradient with repeated ids, such as the sum of several
    micro-batches, is coalesced first, since the norm is that of the sum.

    Args:
        parameters: whose gradients are scaled in place; those without one are left out.
        max_norm: the largest norm allowed.
        norm_type: p of the p-norm, positive; infinity for the largest absolute value.
        error_if_nonfinite: whether a norm that is infinite or NaN is an error.

    Returns:
        The norm before scaling.

    Raises:
        ValueError: norm_type is not positive.
        RuntimeError: the norm is infinite or NaN, and that is an error. No gradient is scaled then.

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
    """Whether ids are distinct and ascending; the flag is lost when a gradient is accumulated."""
    if gradient.is_coalesced():
        return True
    ids = gradient._indices()
    return len(ids) == 1 and bool((ids[0, 1:] > ids[0, :-1]).all())


def _values(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient._values() if gradient.is_sparse else gradient
