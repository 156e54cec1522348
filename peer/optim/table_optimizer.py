"""What the optimizers for expert tables share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from peer.optim.fused import FusedUpdate

__all__ = ["TableOptimizer"]


class TableOptimizer(torch.optim.Optimizer):
    """The base of the optimizers for tables, which update them row by row.

    A table is (N, D), or (N, parts, D) as in `peer.ExpertPool`. Its parts are updated as tables of
    their own would be, each with numbers of its own where the state has one per row.

    A step updates the rows that have a gradient: those that a sparse gradient names, whether
    coalesced or not, and all rows where the gradient is dense. Rows, and their state, that a step
    does not touch are neither read nor written.

    With `stochastic_rounding` a 16-bit table, and its momentum, is rounded up or down at random so
    that its expectation is the exact result. The random bits are a function of the group's `seed`,
    of how often the table was updated, of its place in the optimizer, of the row and the place in
    the row: a run can be repeated and resumed bit by bit, whatever the number of threads.

    Derived classes define `_update`.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds tables with options of their own.

        Args:
            param_group: "params", one or several tables, and the options that differ from the
                optimizer's.

        Raises:
            ValueError: a parameter is not of two or three dimensions, or an option is out of range.
            TypeError: a parameter is not of a floating dtype that the operators take.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for item in params:
            name, table = item if isinstance(item, tuple) else ("a parameter", item)
            if isinstance(table, Tensor):
                _check_table(type(self).__name__, name, table)
        self._check_options({**self.defaults, **param_group})
        super().add_param_group({**param_group, "params": params})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every table that has a gradient.

        Args:
            closure: computes the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is neither dense nor sparse by rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update_by(table, group, *_rows_and_values(table.grad))
        return loss

    def fuse_into_backward(self, *modules: nn.Module) -> FusedUpdate:
        r"""Makes every backward pass through a pool update its table, without a gradient.

        The gradient of a row is :math:`\sum_p c_p\, x_{t(p)}` over the pairs that retrieved it,
        where the coefficients c are numbers and x is the layer's input or the gradient of its
        output. With this, the backward pass computes the coefficients, and updates each row by its
        sum while that is in the cache; no gradient of a table is ever stored. `weight.grad` stays
        None, so `step()` has nothing to do for these tables. Options such as the learning rate are
        those of the table's group at the time of the backward pass. The update equals that of
        `step()` with `sparse_grad=True` bit by bit in float32 and float64; 16-bit tables are
        updated by unrounded sums.

        As every backward pass is a step, this excludes, without a way to tell: accumulation of
        gradients over several backward passes, clipping by a global norm, `GradScaler`, and data
        parallelism, under which each process would update its own copy by its own batch.
        `torch.autograd.grad` through the pool updates, too.

        The forward pass must be in eager mode: `torch.compile` breaks its graph there, and
        `torch.export`, TorchScript's tracer and `torch.func` are refused. Without grad mode, and in
        a scripted copy, a pool works as always. A copied or unpickled pool is not fused.

        Args:
            modules: pools, or modules that contain some. Pools whose table this optimizer does
                not hold are left alone.

        Returns:
            A handle. Its `remove()` ends the fusion, and so does leaving it as a context manager.

        Raises:
            ValueError: no pool's table is held by this optimizer, a table does not require grad, or
                a pool is fused already.

        A backward pass raises RuntimeError if the table changed after its forward pass: where a
        pool is used twice in one graph, or a graph is run twice.

        Example:
            >>> import torch, peer
            >>> pool = peer.ExpertPool(8, num_experts=24)
            >>> optimizer = peer.optim.RowwiseAdagrad(pool.parameters(), lr=0.1)
            >>> weights, indices = torch.rand(5, 3), torch.randint(24, (5, 3))
            >>> before = pool.weight.detach().clone()
            >>> with optimizer.fuse_into_backward(pool):
            ...     pool(torch.randn(5, 8), weights, indices).square().sum().backward()
            >>> pool.weight.grad is None, torch.equal(pool.weight, before)
            (True, False)
        """
        return FusedUpdate(self, modules)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state, bit by bit.

        Unlike `torch.optim.Optimizer.load_state_dict` it keeps the dtypes of the state: float32
        numbers of a 16-bit table stay what they are.

        Args:
            state_dict: what `state_dict()` of an optimizer of the same kind returned.

        Raises:
            ValueError: the groups do not match.
        """
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, table in zip(saved_ids, self._tables(), strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[table][name] = value.to(table.device)

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups for table in group["params"]]

    def _group_of(self, table: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(each is table for each in group["params"]):
                return group
        raise ValueError("the optimizer does not hold the table")

    def _update_by(
        self,
        table: Tensor,
        group: dict[str, Any],
        indices: Tensor | None,
        source: Tensor,
        coefficients: Tensor | None = None,
    ) -> None:
        """Updates one table by the gradient that the operators take in this form."""
        state = self.state[table]
        step = state.get("step", 0) + 1
        rounding: dict[str, int | None] = {"seed": None}
        if group["stochastic_rounding"]:
            place = next(i for i, each in enumerate(self._tables()) if each is table)
            rounding = {"seed": group["seed"], "step": step, "stream": place}
        self._update(table, state, group, (indices, source, coefficients), rounding)
        state["step"] = step

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        gradient: tuple[Tensor | None, Tensor, Tensor | None],
        rounding: dict[str, int | None],
    ) -> None:
        raise NotImplementedError

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            require(self, name, options[name], options[name] >= 0, "not negative")
        seed = options["seed"]
        require(self, "seed", seed, isinstance(seed, int) and -(2**63) <= seed < 2**63, "int64")


def require(owner: object, name: str, value: object, holds: bool, what: str) -> None:
    """Raises ValueError unless an option is in range.

    Args:
        owner: the optimizer.
        name: of the option.
        value: of the option.
        holds: whether it is in range.
        what: the range in words.
    """
    if not holds:
        raise ValueError(f"{type(owner).__name__}: expected {name} to be {what}, got {value}")


def number_per_row(table: Tensor, value: float) -> Tensor:
    """State of a number for every row, (N,), or for every part of one, (N, parts).

    In the dtype that the table's sums have.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    return torch.full(table.shape[:-1], value, dtype=dtype, device=table.device)


def _check_table(optimizer: str, name: str, table: Tensor) -> None:
    if table.dim() not in (2, 3):
        raise ValueError(
            f"{optimizer}: expected tables of shape [rows, width] or [rows, parts, width], got "
            f"{name} of shape {list(table.shape)}; give other parameters to an optimizer for dense "
            f"ones"
        )
    if table.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{optimizer}: expected tables of dtype float32, float64, bfloat16 or float16, got "
            f"{name} of {table.dtype}"
        )


def _rows_and_values(gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    if gradient.layout == torch.strided:
        return None, gradient
    if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1:
        # Accumulation drops the coalesced flag; the operators find out for themselves whether the
        # ids are distinct and ascending, and sum the rows of equal ids if not.
        return gradient._indices()[0], gradient._values()
    raise ValueError(
        "expected a dense gradient, or a sparse COO gradient with one sparse dimension, got "
        + (
            f"{gradient.sparse_dim()} sparse dimensions"
            if gradient.layout == torch.sparse_coo
            else str(gradient.layout)
        )
    )
