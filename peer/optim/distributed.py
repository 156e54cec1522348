"""Sparse gradients under data parallelism."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from peer.optim.row_gradient import accumulation_dtype

__all__ = ["all_reduce_gradients_"]


@torch.no_grad()
def all_reduce_gradients_(
    parameters: Tensor | Iterable[Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Replaces the gradients of tables by their mean over all processes.

    `torch.nn.parallel.DistributedDataParallel` supports sparse gradients only for
    `torch.nn.Embedding`; its backward pass fails for those of a pool. Hide the tables from it, and
    call this function between the backward pass and the step. The function communicates only the
    retrieved rows and sums them in float32 or float64. The mean is coalesced and equal on all
    processes.

    Args:
        parameters: tables with sparse gradients, in the same order on every process. A table
            without a gradient counts as one with an empty gradient.
        group: the process group; None for the default group. Its backend must support sparse
            tensors, as gloo does.

    Raises:
        RuntimeError: there is no process group.

    Example:
        In each process, for a model whose tables have sparse gradients:

            tables = {id(m.weight) for m in model.modules() if isinstance(m, peer.ExpertPool)}
            names = [name for name, p in model.named_parameters() if id(p) in tables]
            DDP = torch.nn.parallel.DistributedDataParallel
            DDP._set_params_and_buffers_to_ignore_for_model(model, names)
            parallel = DDP(model)

            dense, experts = peer.param_groups(model, lr=1e-3, expert_lr=1e-2)
            for table in experts["params"]:
                torch.distributed.broadcast(table.detach(), src=0)  # DDP skips them

            loss(parallel(x), y).backward()
            peer.optim.all_reduce_gradients_(experts["params"])
            for optimizer in optimizers:
                optimizer.step()
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    processes = dist.get_world_size(group)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            gradient = _empty_gradient(parameter)
        total = gradient.to(accumulation_dtype(gradient.dtype))
        if total is gradient:
            total = gradient.clone()
        dist.all_reduce(total, group=group)
        parameter.grad = (total / processes).to(parameter.dtype)


def _empty_gradient(parameter: Tensor) -> Tensor:
    ids = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty(0, *parameter.shape[1:])
    return torch.sparse_coo_tensor(ids, values, parameter.shape, check_invariants=True)
