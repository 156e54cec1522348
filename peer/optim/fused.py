"""The update of a pool's table inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peer.functional import flatten_tokens
from peer.modules import ExpertPool

if TYPE_CHECKING:
    from peer.optim.table_optimizer import TableOptimizer

__all__ = ["FusedUpdate"]


class FusedUpdate:
    """The fusion of an optimizer's update into the backward passes of some pools.

    `TableOptimizer.fuse_into_backward` makes it. It works as a context manager and ends when that
    is left.

    Args:
        optimizer: holds the tables.
        modules: pools, or modules that contain some.

    Attributes:
        pools: the fused pools.
    """

    def __init__(self, optimizer: TableOptimizer, modules: Iterable[nn.Module]) -> None:
        self.optimizer = optimizer
        held = {id(table) for table in optimizer._tables()}
        self.pools = [
            part
            for part in dict.fromkeys(part for module in modules for part in module.modules())
            if isinstance(part, ExpertPool) and id(part.weight) in held
        ]
        if not self.pools:
            raise ValueError("expected a module with an ExpertPool whose table the optimizer holds")
        for pool in self.pools:
            if not pool.weight.requires_grad:
                raise ValueError("a pool's weight does not require grad, so it cannot be updated")
            if pool.fused_update is not None:
                raise ValueError("the pool's update is fused into its backward pass already")
        for pool in self.pools:
            pool.fused_update = self

    def remove(self) -> None:
        """Ends the fusion: the pools' tables get gradients again."""
        for pool in self.pools:
            if pool.fused_update is self:
                pool.fused_update = None

    def __enter__(self) -> FusedUpdate:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, pool: ExpertPool, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """What the pool returns, with a backward pass that updates its table.

        Args:
            pool: one of `pools`.
            x: (..., dim).
            weights: (..., H, K) or (..., P).
            indices: weights' shape.

        Returns:
            (..., dim).

        Raises:
            RuntimeError: the call is being traced, or the table no longer requires grad.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                "a pool whose update is fused into its backward pass cannot be traced or exported; "
                "call remove() on what fuse_into_backward returned, or do it under torch.no_grad()"
            )
        if not pool.weight.requires_grad:
            raise RuntimeError(
                "the table of a pool whose update is fused into its backward pass does not require "
                "grad; call remove() on what fuse_into_backward returned before freezing it"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        rows = flatten_tokens(x, weights, indices)
        out: Tensor = _Experts.apply(self.optimizer, pool.activation, *rows, pool.weight)
        return out.view(x.shape)


class _Experts(torch.autograd.Function):
    """`expert_mlp` with a backward pass that updates the table and returns no gradient for it.

    The table is an input, so that a node exists even if nothing else requires grad. It is not among
    the saved tensors: hooks on those, which may move them elsewhere, have no use for a whole table.
    So its version is compared by hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        optimizer: TableOptimizer,
        activation: str,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        table: Tensor,
    ) -> Tensor:
        out, hidden, gate = torch.ops.peer.expert_mlp(x, weights, indices, table, activation, False)
        ctx.save_for_backward(x, weights, indices, hidden, gate)
        ctx.table, ctx.version = table, table._version
        ctx.optimizer, ctx.activation = optimizer, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        table: Tensor = ctx.table
        if table._version != ctx.version:
            raise RuntimeError(
                "the table of a pool whose update is fused into its backward pass changed after "
                "this forward pass: a pool can be used only once in a graph, each graph can be run "
                "only once, and a backward pass must follow its forward pass before the next update"
            )
        x, weights, indices, hidden, gate = ctx.saved_tensors
        grad_x, grad_weights, coefficients = torch.ops.peer.expert_mlp_backward_coefficients(
            grad_out, x, weights, indices, table, hidden, gate, ctx.activation
        )
        # What the coefficients of each part multiply: x, except that of the last the gradient.
        source = torch.stack([x] * (table.shape[1] - 1) + [grad_out], dim=1)
        optimizer: TableOptimizer = ctx.optimizer
        optimizer._update_by(table, optimizer._group_of(table), indices, source, coefficients)
        # Autograd drops the gradients that nobody asked for.
        return None, None, grad_x, grad_weights, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "a pool whose update is fused into its backward pass has no forward-mode derivative "
            "while a graph is recorded; call it under torch.no_grad() or call remove() on what "
            "fuse_into_backward returned"
        )
