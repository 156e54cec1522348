"""Optimizer parameter groups for models with expert tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from peer.modules import ExpertPool

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    expert_lr: float,
    weight_decay: float = 0.0,
    expert_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Splits a model's parameters into the expert tables and all others.

    The tables need a different optimizer, or at least a different learning rate, because a row has
    a gradient only in the steps that retrieve its expert.

    Args:
        model: a module with at least one `ExpertPool`.
        lr: learning rate of the dense parameters.
        expert_lr: learning rate of the tables.
        weight_decay: weight decay of the dense parameters.
        expert_weight_decay: weight decay of the tables.

    Returns:
        Two groups with the keys "params", "lr", "weight_decay" and "name". The first, "dense", has
        all parameters that require grad and are not tables. The second, "experts", has the table of
        every pool, once if layers share it.

    Raises:
        ValueError: the model has no `ExpertPool`.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> groups = peer.param_groups(layer, lr=1e-3, expert_lr=1e-2)
        >>> [(group["name"], len(group["params"])) for group in groups]
        [('dense', 5), ('experts', 1)]

        One optimizer for both groups, or one for each:

        >>> both = torch.optim.AdamW(groups)
        >>> dense, experts = groups
        >>> optimizers = [torch.optim.AdamW([dense]), peer.optim.RowwiseAdagrad([experts])]
    """
    pools = [module for module in model.modules() if isinstance(module, ExpertPool)]
    if not pools:
        raise ValueError(f"expected a model with an ExpertPool, got {type(model).__name__}")
    tables = list(dict.fromkeys(pool.weight for pool in pools))
    known = {id(table) for table in tables}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay, "name": "dense"},
        {
            "params": tables,
            "lr": expert_lr,
            "weight_decay": expert_weight_decay,
            "name": "experts",
        },
    ]
