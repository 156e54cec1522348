"""The base class of the optimizers for expert tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, overload

import torch
from torch import Tensor, nn

from peer._growth import require_current_state
from peer.memory import empty_huge
from peer.optim.fused import FusedUpdate
from peer.optim.row_gradient import RowGradient, TableGradient, accumulation_dtype

__all__ = ["TableOptimizer", "wrap_entries"]


class TableOptimizer(torch.optim.Optimizer):
    """The base of the optimizers for tables, which update single rows.

    A table is (N, D), or (N, parts, D) as in `peer.ExpertPool`. The parts are updated like separate
    tables: row-wise state has one value per row and part.

    A step updates the rows that have a nonzero gradient, dense or sparse, coalesced or not. It does
    not write other rows: they do not decay, their momentum does not move them, and they count no
    step. A row of a gradient is zero if all its numbers are, in all parts; -0.0 is zero, NaN is
    not. Dense and sparse gradients of equal numbers therefore give the same training, bit by bit.
    To keep rows whatever their gradient, freeze them: `peer.PEER.freeze_experts`.

    With `stochastic_rounding`, 16-bit tables and their momentum are rounded up or down at random,
    so that the expectation of a value is the exact result. The random bits are a function of the
    group's `seed`, the number of updates of the table, the position of the table in the optimizer,
    the row and the column. A run can be repeated and resumed bit by bit with any number of threads.

    Derived classes define `_update`.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of tables with its own options.

        Args:
            param_group: "params", one or several tables, and the options that differ from the
                optimizer's defaults.

        Raises:
            ValueError: a parameter is neither 2-D nor 3-D or is given twice, or an option is out of
                range.
            TypeError: a parameter has an unsupported dtype.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for item in params:
            name, table = item if isinstance(item, tuple) else ("a parameter", item)
            if isinstance(table, Tensor):
                _check_table(type(self).__name__, name, table)
        tables = [item[1] if isinstance(item, tuple) else item for item in params]
        if len(set(map(id, tables))) < len(tables):
            raise ValueError(
                f"{type(self).__name__}: expected every table of a group once, got a table twice; "
                f"a step would update it twice by the same gradient. Tables that modules share are "
                f"listed once by model.parameters() and peer.param_groups"
            )
        self._check_options({**self.defaults, **param_group})
        super().add_param_group({**param_group, "params": params})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # There is nothing to fuse with the operators, and the number of updates of a table, an argument
    # of stochastic rounding, would be compiled into the code of every step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every table that has a gradient.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.

        Returns:
            The loss from the closure, or None without a closure.

        Raises:
            ValueError: a gradient is neither dense nor sparse by rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_tables()
        return loss

    @torch.no_grad()
    def update_tables(self) -> None:
        """Updates every table that has a gradient. A step without its hooks."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update_table(table, group, RowGradient.from_tensor(table.grad))

    def fuse_into_backward(self, *modules: nn.Module) -> FusedUpdate:
        r"""Makes every backward pass through a pool update its table, without a gradient.

        The gradient of a row is :math:`\sum_p c_p\, x_{t(p)}` over the pairs that retrieved it. The
        coefficients c are scalars, and x is the layer's input or the gradient of its output. The
        fused backward pass computes the coefficients and updates each row by its sum while the row
        is in the cache. It never stores the gradient of a table, so `weight.grad` stays None and
        `step()` skips these tables. Options such as the learning rate are those of the table's
        group at the time of the backward pass. Experts that were frozen in the forward pass are not
        updated. In float32 and float64, the update equals that of
        `step()` with `sparse_grad=True` bit by bit. 16-bit tables are updated by unrounded sums.

        Every backward pass is a step. The following therefore gives wrong results, and no error:

        * accumulation of gradients over several backward passes;
        * clipping by a global norm;
        * `GradScaler`;
        * data parallelism, because each process would update its own copy by its own batch.

        `torch.autograd.grad` through the pool also updates the table. Hooks that are registered on
        the optimizer's `step` do not run. Schedulers of torch work: step them after the backward
        pass.

        The forward pass must run in eager mode: `torch.compile` breaks the graph there, and
        `torch.export`, TorchScript's tracer and `torch.func` raise an error. Without grad mode, and
        in a scripted copy, a pool behaves as if it were not fused. A copied or unpickled pool is
        not fused.

        Args:
            modules: pools, or modules that contain pools. Pools with tables of other optimizers are
                skipped.

        Returns:
            A handle. Its `remove()` ends the fusion. As a context manager, it ends the fusion at
            the end of the block.

        Raises:
            ValueError: this optimizer holds no pool's table, a table does not require grad, or a
                pool is fused already.

        A backward pass raises RuntimeError if the table changed after its forward pass. This
        happens if a graph contains a pool twice, or if a graph runs twice. It also raises
        RuntimeError if another use of the table adds a gradient, such as a second pool with the
        same table that is not fused, or a penalty on the weights. The table has then been updated
        by a part of its gradient.

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
        """Loads a saved state, so that training resumes bit by bit.

        It differs from `torch.optim.Optimizer.load_state_dict` in two ways. The float32 state of a
        16-bit table stays in float32, and the state of a table of another dtype gets the dtypes
        that this optimizer uses. Tensors are copied, so that two optimizers never share state. All
        else is torch's: hooks, groups, and parameters that are matched by their positions, not by
        their names.

        Args:
            state_dict: the `state_dict()` of an optimizer of the same class.

        Raises:
            ValueError: the groups do not match.
        """
        # The last of the pre-hooks: it sees what the others return.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: wrap_entries(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state" in state:
            entries: defaultdict[Any, Any] = defaultdict(dict)
            for table, of_table in state["state"].items():
                entries[table] = self.unwrap_entries(table, of_table)
            state = {**state, "state": entries}
        super().__setstate__(state)

    def unwrap_entries(self, table: Any, entries: Any) -> Any:
        """Copies the state of a table that `wrap_entries` passed through torch's loading."""
        if not isinstance(entries, dict):
            return entries
        dtypes = self._state_dtypes(table) if isinstance(table, Tensor) else {}
        return {
            name: _copy_for(table, entry.value, dtypes.get(name))
            if isinstance(entry, _Entry)
            else entry
            for name, entry in entries.items()
        }

    def holds(self, table: Tensor) -> bool:
        """Whether the optimizer updates this table."""
        return any(each is table for each in self._tables())

    @torch.no_grad()
    def apply_gradient(self, table: Tensor, gradient: TableGradient) -> None:
        """Updates one table by a gradient that is not in `table.grad`.

        Args:
            table: a table that the optimizer holds.
            gradient: the gradient of its rows.

        Raises:
            ValueError: the optimizer does not hold the table.
            RuntimeError: the table has grown, and its state has not.
        """
        for group in self.param_groups:
            if any(each is table for each in group["params"]):
                self._update_table(table, group, gradient)
                # Schedulers of torch warn if the optimizer has made no step before theirs.
                self._opt_called = True
                return
        raise ValueError("expected a table that the optimizer holds")

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups for table in group["params"]]

    def _update_table(self, table: Tensor, group: dict[str, Any], gradient: TableGradient) -> None:
        require_current_state(self, table)
        state = self.state[table]
        step = state.get("step", 0) + 1
        rounding: dict[str, int | None] = {"seed": None}
        if group["stochastic_rounding"]:
            position = next(i for i, each in enumerate(self._tables()) if each is table)
            rounding = {"seed": group["seed"], "step": step, "stream": position}
        self._update(table, state, group, gradient, rounding)
        state["step"] = step

    def _update(
        self,
        table: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        gradient: TableGradient,
        rounding: dict[str, int | None],
    ) -> None:
        """Creates the state that the rule needs, and calls `gradient.update`.

        Args:
            table: (N, D) or (N, parts, D), updated in place.
            state: state of the table.
            group: options of the table.
            gradient: gradient of the rows.
            rounding: the operator's arguments for stochastic rounding.
        """
        raise NotImplementedError

    def _state_dtypes(self, table: Tensor) -> dict[str, torch.dtype]:
        """The dtypes that `_update` gives to the tensors of a table's state, by name."""
        return {}

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            require(self, name, options[name], options[name] >= 0, "not negative")
        seed = options["seed"]
        require(self, "seed", seed, isinstance(seed, int) and -(2**63) <= seed < 2**63, "int64")


def require(
    optimizer: object, name: str, value: object, is_in_range: bool, valid_range: str
) -> None:
    """Checks an option of an optimizer.

    Args:
        optimizer: the optimizer.
        name: name of the option.
        value: value of the option.
        is_in_range: whether the value is valid.
        valid_range: description of the valid values.

    Raises:
        ValueError: `is_in_range` is False.
    """
    if not is_in_range:
        kind = type(optimizer).__name__
        raise ValueError(f"{kind}: expected {name} to be {valid_range}, got {value}")


def row_state(table: Tensor, value: float) -> Tensor:
    """Makes row-wise state, filled with `value`, in the accumulation dtype of the table.

    Returns:
        (N,), or (N, parts) for a table with parts.
    """
    dtype = accumulation_dtype(table.dtype)
    return torch.full(table.shape[:-1], value, dtype=dtype, device=table.device)


class _Entry:
    """An entry of a state dict that torch's loading passes through as it is.

    Torch casts the tensors of a state to the dtype of their parameter, and the function that does
    so cannot be overridden.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def wrap_entries(
    state_dict: dict[str, Any], parameters: Collection[Any] | None = None
) -> dict[str, Any]:
    """Wraps the entries of a state dict, so that torch's loading does not cast them.

    Args:
        state_dict: the state dict.
        parameters: the ids of the parameters whose entries are wrapped; None for all.
    """
    wrapped = {
        key: {name: _Entry(value) for name, value in entries.items()}
        if isinstance(entries, dict) and (parameters is None or key in parameters)
        else entries
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": wrapped}


def _copy_for(table: Any, value: Any, dtype: torch.dtype | None) -> Any:
    """Copies an entry of a state to the device of its table, and to a dtype unless it is None."""
    if not isinstance(table, Tensor):
        return value  # state of no parameter, which torch does not touch either
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return value.to(table.device, dtype, copy=True)
        if value.shape == table.shape and type(value) is Tensor:
            return empty_huge(*value.shape, dtype=dtype or value.dtype, device=table.device).copy_(
                value
            )
        return value.to(table.device, dtype, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: _copy_for(table, each, dtype) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_for(table, each, dtype) for each in value)
    return value


def _check_table(optimizer: str, name: str, table: Tensor) -> None:
    if table.dim() not in (2, 3):
        raise ValueError(
            f"{optimizer}: expected tables of shape [rows, width] or [rows, parts, width], got "
            f"{name} of shape {list(table.shape)}; use another optimizer for dense parameters"
        )
    if table.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{optimizer}: expected tables of dtype float32, float64, bfloat16 or float16, got "
            f"{name} of {table.dtype}"
        )
