"""One optimizer for a whole model: AdamW, and an optimizer of `peer.optim` for the tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peer.modules import ExpertPool
from peer.optim.fused import FusedUpdate
from peer.optim.row_gradient import TableGradient
from peer.optim.rowwise_adagrad import RowwiseAdagrad
from peer.optim.rowwise_adam import RowwiseAdam
from peer.optim.sgd import SGD
from peer.optim.table_optimizer import TableOptimizer, wrap_entries
from peer.param_groups import param_groups

__all__ = ["ModelOptimizer", "optimizer_for"]

ADAMW = "adamw"

TABLES: dict[str, type[TableOptimizer]] = {
    "rowwise_adagrad": RowwiseAdagrad,
    "rowwise_adam": RowwiseAdam,
    "sgd": SGD,
}


def optimizer_for(
    model: nn.Module,
    *,
    lr: float,
    expert_lr: float,
    weight_decay: float = 0.0,
    expert_weight_decay: float = 0.0,
    tables: str = "rowwise_adagrad",
    fused: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    table_options: Mapping[str, Any] | None = None,
) -> ModelOptimizer:
    """Makes one optimizer for all parameters of a model that require grad.

    It is AdamW of torch for all parameters but the tables, and an optimizer of `peer.optim` for the
    tables. It is a single `torch.optim.Optimizer`, so it fits where a training loop takes one:
    `transformers.Trainer`, accelerate, Lightning. Its groups are those of `peer.param_groups`, with
    the names of the parameters.

    With `fused`, the tables are updated inside the backward pass and have no gradients. Functions
    that clip gradients then see the other parameters only. `ModelOptimizer.fuse_into_backward` says
    what this excludes. Without `fused`, a table has the gradient that its pool gives it. A sparse
    one is clipped by `peer.optim.clip_grad_norm_`, and by torch's function since torch 2.14; for
    `transformers.Trainer` there is `peer.hf.SparseGradientTrainer`.

    Args:
        model: a module with at least one `ExpertPool`, on its device.
        lr: learning rate of AdamW.
        expert_lr: learning rate of the tables.
        weight_decay: weight decay of AdamW, for all of its parameters.
        expert_weight_decay: weight decay of the tables.
        tables: the optimizer of the tables: "rowwise_adagrad", "rowwise_adam" or "sgd".
        fused: whether the tables are updated inside the backward pass. Pools whose table does not
            require grad are left out.
        betas: betas of AdamW.
        eps: epsilon of AdamW.
        table_options: more options of the tables' optimizer, such as `{"momentum": 0.9}`.

    Returns:
        The optimizer.

    Raises:
        ValueError: the model has no `ExpertPool`, `tables` is unknown, an option is out of range,
            or with `fused`, a pool is fused already.
        TypeError: the tables' optimizer has no such option.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> optimizer = peer.optim.optimizer_for(layer, lr=1e-3, expert_lr=1e-2, fused=True)
        >>> layer(torch.randn(5, 8)).square().mean().backward()  # updates the table
        >>> optimizer.step()  # updates the other parameters
        >>> [(group["name"], group["optimizer"]) for group in optimizer.param_groups]
        [('dense', 'adamw'), ('experts', 'rowwise_adagrad')]
    """
    if tables not in TABLES:
        known = ", ".join(map(repr, TABLES))
        raise ValueError(f"expected tables to be one of {known}, got {tables!r}")
    dense, experts = param_groups(
        model,
        lr=lr,
        expert_lr=expert_lr,
        weight_decay=weight_decay,
        expert_weight_decay=expert_weight_decay,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {
            **group,
            "params": [(names.get(id(each), "computed"), each) for each in group["params"]],
            "optimizer": optimizer,
        }
        for group, optimizer in ((dense, ADAMW), (experts, tables))
    ]
    options = {
        ADAMW: {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps},
        tables: {"lr": expert_lr, "weight_decay": expert_weight_decay, **(table_options or {})},
    }
    optimizer = ModelOptimizer(groups, options)
    trained = [pool for pool in _pools(model) if pool.weight.requires_grad]
    if fused and trained:
        optimizer.fuse_into_backward(*trained)
    return optimizer


class ModelOptimizer(torch.optim.Optimizer):
    """AdamW for most parameters and optimizers of `peer.optim` for tables, as one optimizer.

    `optimizer_for` makes it for a model. A group's "optimizer" says how its parameters are updated:
    "adamw", the default, by `torch.optim.AdamW`; "rowwise_adagrad", "rowwise_adam" or "sgd" by the
    optimizer of `peer.optim`. A group has the options of its optimizer, and a parameter the state
    that it would have there. AdamW uses torch's fused kernels for parameters on a CPU or CUDA.

    Everything that acts on an optimizer acts on it as a whole: schedulers, `state_dict` and hooks,
    `add_param_group`, `GradScaler`, `torch.distributed.checkpoint`, `peer.optim.grow_` and
    `layer.reset_experts`. `defaults` has the options that all groups share.

    Args:
        params: groups, or parameters for AdamW.
        options: for each optimizer that groups may name, its options where a group does not give
            them. "lr" is required.

    Raises:
        ValueError: a group names an optimizer without options, a parameter is given twice, a table
            is neither 2-D nor 3-D, or an option is out of range.
        TypeError: an optimizer has no such option, or a table has an unsupported dtype.

    Example:
        >>> import torch, peer
        >>> embedding, linear = torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 2)
        >>> optimizer = peer.optim.ModelOptimizer(
        ...     [
        ...         {"params": linear.parameters()},
        ...         {"params": embedding.parameters(), "optimizer": "rowwise_adam"},
        ...     ],
        ...     {"adamw": {"lr": 1e-3}, "rowwise_adam": {"lr": 1e-2}},
        ... )
        >>> linear(embedding(torch.tensor([3, 5]))).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[embedding.weight])
        ['first_moment', 'row_steps', 'second_moment', 'step']
    """

    def __init__(self, params: Any, options: Mapping[str, Mapping[str, Any]]) -> None:
        self._options = {name: dict(each) for name, each in options.items()}
        self._begin()
        inner = [self._make_inner(name) for name in self._options]
        shared = set.intersection(*(set(each.defaults) for each in inner)) if inner else set()
        super().__init__(params, {key: inner[0].defaults[key] for key in sorted(shared)})

    def _begin(self) -> None:
        # The inner optimizers hold no groups and no state of their own: `_inner` gives them those
        # of this optimizer at every use, because loading, schedulers and wrappers replace them.
        self._inners: dict[str, torch.optim.Optimizer] = {}
        self._fusions: list[FusedUpdate] = []
        self._updated: set[Tensor] = set()  # by backward passes since the last step

    def _make_inner(self, name: str) -> torch.optim.Optimizer:
        if name not in self._inners:
            if name not in self._options:
                known = ", ".join(map(repr, self._options))
                raise ValueError(f"expected the optimizer of a group to be {known}, got {name!r}")
            if name != ADAMW and name not in TABLES:
                known = ", ".join(map(repr, (ADAMW, *TABLES)))
                raise ValueError(f"expected options of {known}, got those of {name!r}")
            kind: Any = torch.optim.AdamW if name == ADAMW else TABLES[name]
            self._inners[name] = kind([{"params": []}], **self._options[name])
        return self._inners[name]

    def _inner(self, name: str) -> Any:
        """The inner optimizer of this name, with the groups and the state of this optimizer."""
        inner = self._make_inner(name)
        inner.param_groups = [each for each in self.param_groups if each["optimizer"] == name]
        inner.state = self.state
        return inner

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters with its own options.

        Args:
            param_group: "params"; "optimizer", which is "adamw" by default; and the options of this
                optimizer that differ from those given to the constructor.

        Raises:
            ValueError: the optimizer has no options here, a parameter is given twice, a table is
                neither 2-D nor 3-D, or an option is out of range.
            TypeError: a table has an unsupported dtype.
        """
        group = {"optimizer": ADAMW, **param_group}
        inner = self._make_inner(group["optimizer"])
        inner.param_groups = []
        inner.add_param_group(group)
        (group,) = inner.param_groups
        if group["optimizer"] == ADAMW and group["fused"] is None and group["foreach"] is None:
            group["fused"] = _are_fusible(group["params"]) or None
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.

        Returns:
            The loss from the closure, or None without a closure.

        Raises:
            ValueError: the gradient of a table is neither dense nor sparse by rows.
            RuntimeError: a parameter of AdamW has a sparse gradient, or tables are fused and a
                `GradScaler` has scaled the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_scaled_updates()
        for name in dict.fromkeys(group["optimizer"] for group in self.param_groups):
            inner = self._inner(name)
            if name == ADAMW:
                _refuse_sparse_gradients(inner)
                _step_without_hooks(inner)
            else:
                inner.update_tables()
        self._updated.clear()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters.

        Args:
            set_to_none: whether gradients become None instead of zero.
        """
        self._updated.clear()
        super().zero_grad(set_to_none)

    def fuse_into_backward(self, *modules: nn.Module) -> FusedUpdate:
        """Makes every backward pass through a pool update its table, without a gradient.

        `TableOptimizer.fuse_into_backward` describes the update. Here every backward pass belongs
        to a step of this optimizer, so what does not go with fusion is an error:

        * Accumulation of gradients: a second backward pass through a pool raises RuntimeError,
          unless `step` or `zero_grad` of this optimizer was called after the first.
        * `GradScaler`: the step raises RuntimeError. The tables have been updated by scaled
          gradients then. Under bfloat16 autocast, which needs no scaler, a scaler is not noticed.
        * Several processes of `torch.distributed`: the backward pass raises RuntimeError, because
          each process would update its own copy of a table by its own batch.

        Clipping acts on the parameters that are not fused. The learning rate of a table is that of
        its group at the time of the backward pass, so schedulers act on it as on a step.

        A copied or unpickled optimizer is not fused, like a copied model.

        Args:
            modules: pools, or modules that contain pools. Pools with tables of other optimizers are
                skipped.

        Returns:
            A handle. Its `remove()` ends the fusion, as `unfuse` does for all.

        Raises:
            ValueError: this optimizer holds no pool's table, a table does not require grad, or a
                pool is fused already.
        """
        fusion = FusedUpdate(self, modules)
        self._fusions.append(fusion)
        return fusion

    def unfuse(self) -> None:
        """Ends all fusions. Tables get gradients again."""
        for fusion in self._fusions:
            fusion.remove()
        self._fusions.clear()
        self._updated.clear()

    @property
    def is_fused(self) -> bool:
        """Whether tables are updated inside the backward pass."""
        return any(fusion.pools for fusion in self._fusions)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then calls `step` in every case and leaves its `found_inf` here. So `step`
        # learns of a scaler; without this, GradScaler is silent about itself. Lightning does not
        # clip for an optimizer that says so, even under bfloat16 autocast, where nobody scales.
        return any(
            fusion.pools and fusion.autocast_dtype != torch.bfloat16 for fusion in self._fusions
        )

    def _refuse_scaled_updates(self) -> None:
        if self.is_fused and self.__dict__.pop("found_inf", None) is not None:
            self.__dict__.pop("grad_scale", None)
            raise RuntimeError(
                "the loss was scaled by a GradScaler, so the backward pass updated the tables by "
                "scaled gradients: make the optimizer with fused=False, or train in bfloat16 or "
                "float32, which need no GradScaler"
            )

    def holds(self, table: Tensor) -> bool:
        """Whether the optimizer updates this tensor as a table."""
        return self._name_of(table) not in (None, ADAMW)

    def _name_of(self, parameter: Tensor) -> str | None:
        for group in self.param_groups:
            if any(each is parameter for each in group["params"]):
                return str(group["optimizer"])
        return None

    def apply_gradient(self, table: Tensor, gradient: TableGradient) -> None:
        """Updates one table by a gradient that is not in `table.grad`.

        Args:
            table: a table that the optimizer holds.
            gradient: the gradient of its rows.

        Raises:
            ValueError: the optimizer does not hold the table.
            RuntimeError: the table has been updated since the last step, there are several
                processes, or the table has grown, and its state has not.
        """
        name = self._name_of(table)
        if name is None or name == ADAMW:
            raise ValueError("expected a table that the optimizer holds")
        if table in self._updated:
            raise RuntimeError(
                "a second backward pass went through a table whose update is fused into the "
                "backward pass, and the optimizer made no step in between. The update of a table "
                "cannot wait for accumulated gradients: make the optimizer with fused=False to "
                "accumulate gradients, or call step() or zero_grad() after every backward pass"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"a table whose update is fused into the backward pass is trained by "
                f"{dist.get_world_size()} processes, each of which would update its own copy by "
                f"its own batch: make the optimizer with fused=False, and average the gradients "
                f"with peer.optim.all_reduce_gradients_"
            )
        self._inner(name).apply_gradient(table, gradient)
        self._updated.add(table)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a saved state, so that training resumes bit by bit.

        The state of a table is loaded as by `TableOptimizer.load_state_dict`, all other state as by
        torch.

        Args:
            state_dict: the `state_dict()` of an optimizer with the same groups.

        Raises:
            ValueError: the groups or their optimizers do not match.
        """
        # The last of the pre-hooks: it sees what the others return.
        handle = self.register_load_state_dict_pre_hook(_wrap_table_entries)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_options" in state:  # unpickled or copied
            self._options = state["_options"]
            self._begin()
        entries = defaultdict(dict, state["state"])
        for group in state["param_groups"]:
            if group["optimizer"] != ADAMW:
                inner: Any = self._make_inner(group["optimizer"])
                for table in group["params"]:
                    if table in entries:
                        entries[table] = inner.unwrap_entries(table, entries[table])
        super().__setstate__({**state, "state": entries})
        if ADAMW in self._options:
            self._inner(ADAMW).__setstate__({})  # gives options that older versions lack


def _wrap_table_entries(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    tables: set[Any] = set()
    pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    for i, (ours, saved) in enumerate(pairs):
        if ours["optimizer"] != saved.get("optimizer"):
            raise ValueError(
                f"ModelOptimizer: expected the state of {ours['optimizer']!r} for group {i}, got "
                f"that of {saved.get('optimizer', 'another optimizer')!r}"
            )
        if ours["optimizer"] != ADAMW:
            tables.update(saved["params"])
    return wrap_entries(state_dict, tables)


def _refuse_sparse_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                name = group["param_names"][i] if "param_names" in group else "a parameter"
                raise RuntimeError(
                    f"AdamW takes no sparse gradients, and {name} of shape "
                    f"{list(parameter.shape)} has one: add tables in a group of their own, with "
                    f"an optimizer for tables, such as "
                    f"{{'params': tables, 'optimizer': 'rowwise_adagrad'}}"
                )


def _step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """A step without the hooks of torch, which run once, for the optimizer that the user sees."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def _are_fusible(parameters: list[Tensor]) -> bool:
    """Whether torch's fused AdamW takes the parameters on every version of torch."""
    return all(
        each.is_floating_point() and each.device.type in ("cpu", "cuda") for each in parameters
    )


def _pools(model: nn.Module) -> list[ExpertPool]:
    return [module for module in model.modules() if isinstance(module, ExpertPool)]
