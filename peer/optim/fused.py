"""The update of a pool's tables inside the backward pass."""

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
        found = dict.fromkeys(
            part
            for module in modules
            for part in module.modules()
            if isinstance(part, ExpertPool)
            and any(id(table) in held for table in part.parameters())
        )
        if not found:
            raise ValueError(
                "expected a module with an ExpertPool whose tables the optimizer holds"
            )
        for pool in found:
            for name, table in pool.named_parameters():
                if id(table) not in held:
                    raise ValueError(
                        f"the optimizer holds only some of the pool's tables, not {name}; all of "
                        f"them are updated in one backward pass"
                    )
                if not table.requires_grad:
                    raise ValueError(f"{name} does not require grad, so it cannot be updated")
            if pool.fused_update is not None:
                raise ValueError("the pool's update is fused into its backward pass already")
        self.pools = list(found)
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
        """What the pool returns, with a backward pass that updates its tables.

        Args:
            pool: one of `pools`.
            x: (..., dim).
            weights: (..., H, K) or (..., P).
            indices: weights' shape.

        Returns:
            (..., dim_out).

        Raises:
            RuntimeError: the call is being traced, or a table no longer requires grad.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                "a pool whose update is fused into its backward pass cannot be traced or exported; "
                "call remove() on what fuse_into_backward returned, or do it under torch.no_grad()"
            )
        if not all(table.requires_grad for table in pool.parameters()):
            raise RuntimeError(
                "a table of a pool whose update is fused into its backward pass does not require "
                "grad; call remove() on what fuse_into_backward returned before freezing it"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        rows = flatten_tokens(x, weights, indices)
        out: Tensor = _Experts.apply(self.optimizer, pool.activation, *rows, *_tables_of(pool))
        return out.view(*x.shape[:-1], pool.dim_out)


def _tables_of(pool: ExpertPool) -> tuple[Tensor, Tensor, Tensor | None]:
    return pool.w_down, pool.w_up, pool.w_gate


class _Experts(torch.autograd.Function):
    """`expert_mlp` with a backward pass that updates the tables and returns no gradient for them.

    The tables are inputs, so that a node exists even if nothing else requires grad. They are not
    among the saved tensors: hooks on those, which may move them elsewhere, have no use for whole
    tables. So their versions are compared by hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        optimizer: TableOptimizer,
        activation: str,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        w_down: Tensor,
        w_up: Tensor,
        w_gate: Tensor | None,
    ) -> Tensor:
        ctx.tables = w_down, w_up, w_gate
        out, hidden, gate = torch.ops.peer.expert_mlp(
            x, weights, indices, *ctx.tables, activation, False
        )
        ctx.save_for_backward(x, weights, indices, hidden, gate)
        ctx.versions = _versions(ctx.tables)
        ctx.optimizer, ctx.activation = optimizer, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if _versions(ctx.tables) != ctx.versions:
            raise RuntimeError(
                "the tables of a pool whose update is fused into its backward pass changed after "
                "this forward pass: a pool can be used only once in a graph, each graph can be run "
                "only once, and a backward pass must follow its forward pass before the next update"
            )
        x, weights, indices, hidden, gate = ctx.saved_tensors
        w_down, w_up, w_gate = ctx.tables
        grad_x, grad_weights, down_coefficients, up_coefficients, gate_coefficients = (
            torch.ops.peer.expert_mlp_backward_coefficients(
                grad_out, x, weights, indices, *ctx.tables, hidden, gate, ctx.activation
            )
        )
        optimizer: TableOptimizer = ctx.optimizer
        updates = [(w_down, x, down_coefficients), (w_up, grad_out, up_coefficients)]
        if w_gate is not None:
            updates.append((w_gate, x, gate_coefficients))
        for table, source, coefficients in updates:
            group = optimizer._group_of(table)
            optimizer._update_by(table, group, indices, source, coefficients)
        # Autograd drops the gradients that nobody asked for.
        return None, None, grad_x, grad_weights, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "a pool whose update is fused into its backward pass has no forward-mode derivative "
            "while a graph is recorded; call it under torch.no_grad() or call remove() on what "
            "fuse_into_backward returned"
        )


def _versions(tables: Iterable[Tensor | None]) -> list[int]:
    return [table._version for table in tables if table is not None]
