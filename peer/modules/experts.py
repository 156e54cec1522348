"""The pool of experts: a table with one expert per row."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peer._growth import append_rows_, growth_of, require_current_state, require_growable
from peer._row_state import append_rows, inner_optimizer, refresh, row_entries
from peer.functional import ACTIVATIONS, expert_mlp
from peer.memory import empty_huge
from peer.modules.grid import parse_grid
from peer.modules.masks import (
    POOL_MASKS,
    Experts,
    as_mask,
    clear_gradient_,
    describe,
    union,
    without,
)

__all__ = ["ExpertPool"]


class FusedForward(Protocol):
    """Replaces the forward pass of a pool while an optimizer is fused into its backward pass."""

    def forward(self, pool: "ExpertPool", x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Computes the pool's output and records a backward pass that updates the table."""
        ...


class ExpertPool(nn.Module):
    r"""A pool of N experts, each an MLP with one hidden neuron.

    Expert e maps a token x to :math:`\sigma(x^\top \text{down}_e)\, \text{up}_e`. With `glu`, it
    maps x to :math:`\sigma(x^\top \text{down}_e)\, (x^\top \text{gate}_e)\, \text{up}_e`. The
    output for a token is the weighted sum over its experts. Several layers can share a pool.

    State: `weight` (N, parts, dim). Row e holds [down, up], or [down, gate, up] with `glu`.
    `w_down`, `w_gate` and `w_up` are views of `weight`. The masks `frozen` and `disabled`, (N,)
    bool, are None, and not in the state, while no expert is frozen or disabled.

    Gradients of a 16-bit table are summed in float32 and rounded to its dtype. With
    `weight.grad_dtype = torch.float32`, they stay in float32. Copies and pickles of the pool keep
    this setting.

    Args:
        dim: width of input and output.
        num_experts: N, or a pair (rows, columns) with this product.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" or "relu2" (ReLU
            squared).
        glu: whether the experts have a linear gate.
        num_experts_per_token: P, the number of experts per token. The initialisation scales with
            it.
        sparse_grad: whether the table gets a coalesced sparse gradient that holds only the
            retrieved rows. It needs an optimizer for sparse gradients, such as
            `peer.optim.RowwiseAdagrad`. In a model that `torch.compile` compiles for training, the
            pool runs in eager mode.
        zero_init_out: whether `w_up` starts at zero. A new layer then adds zero to the output of a
            trained model.
        device: device of the table.
        dtype: dtype of the table.

    Raises:
        ValueError: an option is out of range.
        TypeError: `num_experts` is neither an int nor a pair of ints.

    Source: arXiv 2407.04153, equations 3, 6 and 7.

    Example:
        >>> import torch, peer
        >>> pool = peer.ExpertPool(8, num_experts=24)
        >>> weights, indices = torch.rand(5, 7, 2, 3), torch.randint(24, (5, 7, 2, 3))
        >>> pool(torch.randn(5, 7, 8), weights, indices).shape
        torch.Size([5, 7, 8])
    """

    __jit_unused_properties__ = ("w_down", "w_gate", "w_up")

    frozen: Tensor | None
    disabled: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int | tuple[int, int] = 1024**2,
        activation: str = "gelu",
        glu: bool = False,
        num_experts_per_token: int = 128,
        sparse_grad: bool = False,
        zero_init_out: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_experts, int):
            rows, columns = parse_grid(num_experts)
            num_experts = rows * columns
        for name, value in (
            ("dim", dim),
            ("num_experts", num_experts),
            ("num_experts_per_token", num_experts_per_token),
        ):
            if value < 1:
                raise ValueError(f"expected {name} to be positive, got {value}")
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"expected activation to be one of {known}, got {activation!r}")
        self.dim = dim
        self.num_experts = num_experts
        self.activation = activation
        self.glu = glu
        self.num_experts_per_token = num_experts_per_token
        self.sparse_grad = sparse_grad
        self.zero_init_out = zero_init_out
        # Set while an optimizer is fused into the backward pass, by peer.optim.FusedUpdate.
        self.fused_update: FusedForward | None = None
        parts = 3 if glu else 2
        self.weight = nn.Parameter(empty_huge(num_experts, parts, dim, device=device, dtype=dtype))
        self.register_buffer("frozen", None)
        self.register_buffer("disabled", None)
        self.reset_parameters()

    @property
    def w_down(self) -> Tensor:
        """The down vectors (N, dim), a view of `weight`."""
        return self.weight[:, 0]

    @property
    def w_gate(self) -> Tensor | None:
        """The gate vectors (N, dim), a view of `weight`. None without `glu`."""
        return self.weight[:, 1] if self.glu else None

    @property
    def w_up(self) -> Tensor:
        """The up vectors (N, dim), a view of `weight`."""
        return self.weight[:, -1]

    def reset_parameters(self) -> None:
        """Initialises the table with normal random numbers. No expert is frozen or disabled then.

        The standard deviation is 1 / sqrt(dim) in `w_down` and `w_gate`, and 1 / sqrt(P) in `w_up`.
        The scale of the output then does not depend on N. With `zero_init_out`, `w_up` is zero.
        """
        self.frozen = self.disabled = None
        self._draw_experts(self.weight, zero_out=self.zero_init_out)

    def _draw_experts(self, rows: Tensor, zero_out: bool) -> None:
        """Draws experts (..., parts, dim) into rows of a table."""
        _draw_normal(rows[:, 0], self.dim**-0.5)
        if self.glu:
            _draw_normal(rows[:, 1], self.dim**-0.5)
        if zero_out:
            nn.init.zeros_(rows[:, -1])
        else:
            _draw_normal(rows[:, -1], self.num_experts_per_token**-0.5)

    def grow(self, experts: int) -> None:
        """Appends experts with random input weights and zero output.

        The old experts and their ids do not change. `weight` stays the same parameter and gets more
        rows; new experts are neither frozen nor disabled. Afterwards, call `peer.optim.grow_` for
        every optimizer that has state of the table. `peer.PEER.grow` describes what else follows.

        Args:
            experts: how many experts are appended.

        Raises:
            ValueError: `experts` is not positive.
            RuntimeError: the table cannot grow now; see `peer.PEER.grow`. Nothing is changed.

        Example:
            >>> import peer
            >>> pool = peer.ExpertPool(8, num_experts=24)
            >>> pool.grow(6)
            >>> pool.num_experts, pool.weight.shape
            (30, torch.Size([30, 2, 8]))
        """
        if experts < 1:
            raise ValueError(f"expected experts to be positive, got {experts}")
        require_growable({"the weight of a pool": self.weight})
        self.append_experts(experts)
        self._draw_experts(self.weight[-experts:], zero_out=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def append_experts(self, rows: Tensor | int) -> None:
        """Appends rows to a table that can grow, without drawing them.

        Args:
            rows: the rows (M, parts, dim), or the number M of rows of zeros.
        """
        old = self.num_experts
        append_rows_(self.weight, 0, rows)
        self.num_experts = len(self.weight)
        for name in POOL_MASKS:
            mask = getattr(self, name)
            if mask is not None:
                setattr(self, name, append_rows(mask, 0, self.num_experts - old))

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset_experts(self, experts: Experts, optimizer: Any = None) -> None:
        """Makes experts fresh. See `peer.PEER.reset_experts`."""
        rows = self._mask(experts).nonzero()[:, 0]
        frozen = rows[:0] if self.frozen is None else rows[self.frozen[rows]]
        if len(frozen) > 0:
            raise ValueError(
                f"expected experts that are not frozen, got {len(frozen)} frozen ones, such as "
                f"{int(frozen[0])}; unfreeze them first"
            )
        if self.weight.grad is not None:
            raise RuntimeError(
                "cannot reset experts: the table has a gradient of the old experts; call "
                "zero_grad(set_to_none=True) first"
            )
        state: dict[str, Tensor] = {}
        if optimizer is not None:
            optimizer = inner_optimizer(optimizer)
            if not any(p is self.weight for g in optimizer.param_groups for p in g["params"]):
                raise ValueError("expected an optimizer that holds the table")
            require_current_state(optimizer, self.weight)
            growth = growth_of(self.weight)
            state = row_entries(optimizer, self.weight, 0, growth.earlier if growth else ())
        for block in rows.split(65536):
            fresh = self.weight.new_empty(len(block), *self.weight.shape[1:])
            self._draw_experts(fresh, zero_out=True)
            self.weight[block] = fresh
        refresh(optimizer, self.weight, rows, state)

    def freeze_experts(self, experts: Experts | None = None) -> None:
        """Freezes experts: their rows of the table get no gradient and are never updated.

        Gradients to tokens and router weights still flow through frozen experts. Their rows in a
        gradient that exists are cleared. A backward pass uses the mask that its forward pass saw.

        Args:
            experts: ids, or a mask (N,) bool, added to those that are frozen; None for all.

        Raises:
            ValueError: a mask has another shape.
            TypeError: ids are not integers.
            IndexError: an id is outside [0, N).
        """
        mask = self._mask(experts)
        self.frozen = union(self.frozen, mask)
        clear_gradient_(self.weight, mask)

    def unfreeze_experts(self, experts: Experts | None = None) -> None:
        """Lets frozen experts learn again.

        Args:
            experts: as for `freeze_experts`.

        Raises:
            ValueError, TypeError, IndexError: as `freeze_experts`.
        """
        self.frozen = without(self.frozen, self._mask(experts))

    def disable_experts(self, experts: Experts) -> None:
        """Disables experts: the layers of this pool never retrieve them.

        Args:
            experts: ids, or a mask (N,) bool, added to those that are disabled.

        Raises:
            ValueError, TypeError, IndexError: as `freeze_experts`.
        """
        self.disabled = union(self.disabled, self._mask(experts))

    def enable_experts(self, experts: Experts | None = None) -> None:
        """Lets layers retrieve disabled experts again.

        Args:
            experts: ids, or a mask (N,) bool; None for all.

        Raises:
            ValueError, TypeError, IndexError: as `freeze_experts`.
        """
        self.disabled = without(self.disabled, self._mask(experts))

    def _mask(self, experts: Experts | None) -> Tensor:
        device = self.weight.device
        if experts is None:
            return torch.ones(self.num_experts, dtype=torch.bool, device=device)
        return as_mask(experts, self.num_experts, device)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Computes the weighted sum of the outputs of each token's experts.

        Args:
            x: (..., dim).
            weights: (..., H, K) or (..., P), of a floating dtype.
            indices: weights' shape, int64, in [0, N).

        Returns:
            (..., dim), x's dtype.

        Raises:
            ValueError: a shape does not fit.
            TypeError: an argument has an unsupported dtype.
            IndexError: an index is outside [0, N).
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            update = self.fused_update
            if update is not None and torch.is_grad_enabled():
                return update.forward(self, x, weights, indices)
        return expert_mlp(
            x, weights, indices, self.weight, self.activation, self.sparse_grad, self.frozen
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, activation={self.activation!r}, "
            f"glu={self.glu}, sparse_grad={self.sparse_grad}"
        ) + describe(frozen=self.frozen, disabled=self.disabled)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own table, which the optimizer does not hold.
        state = {**self.__dict__, "fused_update": None}
        if self.weight.grad_dtype != self.weight.dtype:
            state["grad_dtype"] = self.weight.grad_dtype
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = {name: value for name, value in state.items() if name != "grad_dtype"}
        super().__setstate__(attributes)
        if "grad_dtype" in state:
            self.weight.grad_dtype = state["grad_dtype"]

    def _apply(self, *args: Any, **kwargs: Any) -> "ExpertPool":
        with self._keep_grad_dtype():
            super()._apply(*args, **kwargs)
        return self

    @contextmanager
    def _keep_grad_dtype(self) -> Iterator[None]:
        """Gives a parameter that replaces the table the `grad_dtype` that the table has."""
        table, grad_dtype = self.weight, self.weight.grad_dtype
        yield
        if self.weight is not table and grad_dtype != table.dtype:
            self.weight.grad_dtype = grad_dtype

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        with self._keep_grad_dtype():
            super()._load_from_state_dict(state_dict, prefix, *rest)
        error_msgs: list[str] = rest[-1]
        saved = state_dict.get(prefix + "weight")
        # A tensor that is not 3-D is not from a pool; torch has reported its shape.
        if isinstance(saved, Tensor) and saved.dim() == 3 and saved.shape != self.weight.shape:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'experts'}: the checkpoint's pool has "
                f"{_describe_sizes(saved)}, this one {_describe_sizes(self.weight)}; build the "
                f"layer with the checkpoint's options, or call peer.grow_to_(model, state_dict) "
                f"before loading if the checkpoint's layer has grown."
            )


@torch.no_grad()
def _draw_normal(part: Tensor, std: float) -> None:
    # `part` is not contiguous, and torch draws slowly and other numbers for such tensors. So each
    # block of rows is drawn into contiguous memory. For blocks of a multiple of 16 elements, the
    # numbers equal those of one contiguous tensor.
    sizes = [4096] * max(len(part) // 4096, 1)
    sizes[-1] += len(part) - sum(sizes)
    for rows in part.split(sizes):
        rows.copy_(torch.empty_like(rows, memory_format=torch.contiguous_format).normal_(std=std))


def _describe_sizes(weight: Tensor) -> str:
    num_experts, parts, dim = weight.shape
    return f"num_experts={num_experts}, dim={dim}, glu={parts == 3}"
