"""Updates the table of a pool inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peer._tracing import is_exporting
from peer.functional import flatten_tokens
from peer.modules import ExpertPool
from peer.optim.row_gradient import TableGradient

__all__ = ["FusedUpdate"]


_CHANGED = (
    "the table of a pool whose update is fused into its backward pass changed after this forward "
    "pass: use a pool only once in a graph, run each graph only once, and run a backward pass "
    "before the next update of its table"
)


class RowUpdater(Protocol):
    """What a fused update needs of an optimizer."""

    def holds(self, table: Tensor) -> bool:
        """Whether the optimizer updates this table."""
        ...

    def apply_gradient(self, table: Tensor, gradient: TableGradient) -> None:
        """Updates a table that the optimizer holds."""
        ...


class FusedUpdate:
    """An optimizer's update, fused into the backward pass of pools.

    `TableOptimizer.fuse_into_backward` makes this handle. As a context manager, it ends the fusion
    at the end of the block.

    Args:
        optimizer: the optimizer that holds the tables.
        modules: pools, or modules that contain pools.

    Attributes:
        pools: the fused pools; none after `remove()`.
        autocast_dtype: the dtype of autocast in the last forward pass, None without autocast.

    Raises:
        ValueError: the optimizer holds no pool's table, a table does not require grad, or a pool is
            fused already.
    """

    def __init__(self, optimizer: RowUpdater, modules: Iterable[nn.Module]) -> None:
        self.optimizer = optimizer
        self.pools = [
            part
            for part in dict.fromkeys(part for module in modules for part in module.modules())
            if isinstance(part, ExpertPool) and optimizer.holds(part.weight)
        ]
        if not self.pools:
            raise ValueError("expected a module with an ExpertPool whose table the optimizer holds")
        for pool in self.pools:
            if not pool.weight.requires_grad:
                raise ValueError("a pool's weight does not require grad, so it cannot be updated")
            if pool.fused_update is not None:
                raise ValueError(
                    "a pool's update is already fused into its backward pass; end that fusion "
                    "first: pool.fused_update.remove()"
                )
        for pool in self.pools:
            pool.fused_update = self
        tables = dict.fromkeys(pool.weight for pool in self.pools)
        self.autocast_dtype: torch.dtype | None = None
        self._updated: dict[Tensor, _Update] = {}
        # The backward passes that contained the last update of a table. A checkpoint may recompute
        # a forward pass in one backward pass and run its own inside.
        self._updating_passes: dict[Tensor, set[int]] = {}
        self._guards = [
            table.register_post_accumulate_grad_hook(self._refuse_gradient) for table in tables
        ]

    def remove(self) -> None:
        """Ends the fusion. Tables get gradients again."""
        for guard in self._guards:
            guard.remove()
        self._updated.clear()
        self._updating_passes.clear()
        for pool in self.pools:
            if pool.fused_update is self:
                pool.fused_update = None
        self.pools = []

    def __enter__(self) -> FusedUpdate:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def update(self, table: Tensor, gradient: TableGradient, recomputed_in: int) -> None:
        """Updates a table in a backward pass.

        Args:
            table: the table.
            gradient: its gradient.
            recomputed_in: the backward pass in which the forward pass ran; -1 if in none.
        """
        self.optimizer.apply_gradient(table, gradient)
        self._updated[table] = update = _Update.of(table)
        self._updating_passes[table] = {update.backward_pass, recomputed_in} - {-1}

    def _refuse_gradient(self, table: Tensor) -> None:
        # Runs at the end of every backward pass whose graph contains the table, after all of its
        # uses. Another use of the table, such as a second pool that is not fused or a penalty on
        # the weights, has then added a gradient, and the update had only a part of the sum.
        update = self._updated.pop(table, None)
        if update is not None and update.is_followed_by_gradient(table):
            raise RuntimeError(
                "a table got a gradient in a backward pass that also updated it, so the update was "
                "made by a part of the gradient: use a table only once in a graph if a pool's "
                "update is fused into its backward pass, or call remove() on the handle from "
                "fuse_into_backward"
            )

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="the update of a pool's table is fused into its backward pass, which runs in eager "
        "mode; call remove() on the handle from fuse_into_backward for a whole graph"
    )
    def forward(self, pool: ExpertPool, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Computes the pool's output and records a backward pass that updates its table.

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
        if is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                "a pool whose update is fused into its backward pass cannot be traced or exported; "
                "call remove() on the handle from fuse_into_backward, or trace under "
                "torch.no_grad()"
            )
        if not pool.weight.requires_grad:
            raise RuntimeError(
                "the table of a pool whose update is fused into its backward pass does not require "
                "grad; call remove() on the handle from fuse_into_backward before freezing it"
            )
        if torch._C._current_graph_task_id() in self._updating_passes.get(pool.weight, ()):
            raise RuntimeError(_CHANGED)  # a checkpoint recomputes this forward pass too late
        device = x.device.type
        is_autocast = torch.is_autocast_enabled(device)
        self.autocast_dtype = torch.get_autocast_dtype(device) if is_autocast else None
        if self.autocast_dtype is not None and x.dtype != torch.float64:
            x = x.to(self.autocast_dtype)
        rows = flatten_tokens(x, weights, indices)
        out: Tensor = _Experts.apply(self, pool.activation, *rows, pool.weight, pool.frozen)
        return out.view(x.shape)


class _Update(NamedTuple):
    """The backward pass of an update, and the gradient that its table had."""

    backward_pass: int
    gradient: Tensor | None
    version: int

    @classmethod
    def of(cls, table: Tensor) -> _Update:
        gradient = table.grad
        version = 0 if gradient is None else gradient._version
        return cls(torch._C._current_graph_task_id(), gradient, version)

    def is_followed_by_gradient(self, table: Tensor) -> bool:
        now = _Update.of(table)
        return self.backward_pass == now.backward_pass and (
            self.gradient is not now.gradient or self.version != now.version
        )


@dataclass
class _BackwardPass:
    """A backward pass of `expert_mlp`, as the gradient of its table that an optimizer takes.

    The operators do both at once, so the other gradients exist after the update.
    """

    grad_out: Tensor
    x: Tensor
    weights: Tensor
    indices: Tensor
    hidden: Tensor
    gate: Tensor
    activation: str
    frozen: Tensor | None
    grad_x: Tensor = field(init=False)
    grad_weights: Tensor = field(init=False)

    def update(self, rule: str, table: Tensor, *state: Tensor | None, **options: Any) -> None:
        """Runs the pass and updates the table: see `TableGradient`."""
        operator = getattr(torch.ops.peer, f"expert_mlp_backward_{rule}_")
        self.grad_x, self.grad_weights = operator(
            *(self.grad_out, self.x, self.weights, self.indices, table),
            *(self.hidden, self.gate, self.activation, *state),
            **options,
            frozen=self.frozen,
        )


class _Experts(torch.autograd.Function):
    """`expert_mlp` with a backward pass that updates the table and returns no gradient for it.

    The table is an input, so autograd records a node even if nothing else requires grad. It is not
    a saved tensor, because hooks on saved tensors could copy the whole table. The backward pass
    checks its version instead of autograd. The mask of frozen rows is copied, because data
    parallelism writes buffers before every forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fusion: FusedUpdate,
        activation: str,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        table: Tensor,
        frozen: Tensor | None,
    ) -> Tensor:
        out, hidden, gate = torch.ops.peer.expert_mlp(
            x, weights, indices, table, activation, False, frozen
        )
        kept = None if frozen is None else frozen.clone()
        ctx.save_for_backward(x, weights, indices, hidden, gate, kept)
        ctx.table, ctx.version = table, table._version
        ctx.fusion, ctx.activation = fusion, activation
        ctx.recomputed_in = torch._C._current_graph_task_id()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        table: Tensor = ctx.table
        if table._version != ctx.version:
            raise RuntimeError(_CHANGED)
        x, weights, indices, hidden, gate, frozen = ctx.saved_tensors
        gradient = _BackwardPass(
            grad_out, x, weights, indices, hidden, gate, ctx.activation, frozen
        )
        fusion: FusedUpdate = ctx.fusion
        fusion.update(table, gradient, ctx.recomputed_in)
        # Autograd drops gradients of inputs that do not require grad.
        return None, None, gradient.grad_x, gradient.grad_weights, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "a pool whose update is fused into its backward pass has no forward-mode derivative "
            "while a graph is recorded; call it under torch.no_grad() or call remove() on the "
            "handle from fuse_into_backward"
        )
