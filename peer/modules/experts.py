"""The pool of experts: the tables that the retrieved ids point into."""

from typing import Any

import torch
from torch import Tensor, nn

from peer.functional import ACTIVATIONS, expert_mlp
from peer.memory import empty_huge
from peer.modules.grid import parse_grid

__all__ = ["ExpertPool"]


class ExpertPool(nn.Module):
    r"""N experts, each an MLP with one hidden neuron.

    Expert e maps a token x to :math:`\sigma(x^\top \text{w\_down}_e)\, \text{w\_up}_e`, with `glu`
    to :math:`\sigma(x^\top \text{w\_down}_e)\, (x^\top \text{w\_gate}_e)\, \text{w\_up}_e`. The
    output for a token is the weighted sum over its experts. One pool can serve several layers.

    State: `w_down` (N, dim), `w_up` (N, dim_out) and, with `glu`, `w_gate` (N, dim).

    Args:
        dim: input width.
        num_experts: N; a pair (rows, columns) stands for its product.
        dim_out: output width, dim unless given.
        activation: one of "gelu" (by erf), "gelu_tanh", "relu", "silu", "identity" and "relu2"
            (the square of ReLU).
        glu: whether the experts have a linear gate.
        num_experts_per_token: P, for how many experts of a token the initialisation is scaled.
        sparse_grad: whether the tables get coalesced sparse gradients, which hold the retrieved
            rows and need an optimizer that takes them, such as `peer.optim.RowwiseAdagrad`. In
            eager mode only.
        zero_init_out: whether `w_up` starts at zero, so that a layer added to a trained model
            changes nothing at first.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an option is out of range.

    Source: arXiv 2407.04153, equations 3, 6 and 7.

    Example:
        >>> import torch, peer
        >>> pool = peer.ExpertPool(8, num_experts=24)
        >>> weights, indices = torch.rand(5, 7, 2, 3), torch.randint(24, (5, 7, 2, 3))
        >>> pool(torch.randn(5, 7, 8), weights, indices).shape
        torch.Size([5, 7, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int | tuple[int, int] = 1024**2,
        dim_out: int | None = None,
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
        dim_out = dim if dim_out is None else dim_out
        for name, value in (
            ("dim", dim),
            ("num_experts", num_experts),
            ("dim_out", dim_out),
            ("num_experts_per_token", num_experts_per_token),
        ):
            if value < 1:
                raise ValueError(f"expected {name} to be positive, got {value}")
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"expected activation to be one of {known}, got {activation!r}")
        self.dim = dim
        self.num_experts = num_experts
        self.dim_out = dim_out
        self.activation = activation
        self.glu = glu
        self.num_experts_per_token = num_experts_per_token
        self.sparse_grad = sparse_grad
        self.zero_init_out = zero_init_out
        # What updates the tables in the backward pass, while an optimizer is fused into it.
        self.fused_update: Any = None

        def table(width: int) -> nn.Parameter:
            return nn.Parameter(empty_huge(num_experts, width, device=device, dtype=dtype))

        self.w_down = table(dim)
        self.w_up = table(dim_out)
        self.w_gate = table(dim) if glu else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the tables.

        Normal, with standard deviation 1 / sqrt(dim) in `w_down` and `w_gate` and 1 / sqrt(P) in
        `w_up` (zero with `zero_init_out`): the output's scale does not depend on N.
        """
        nn.init.normal_(self.w_down, std=self.dim**-0.5)
        if self.w_gate is not None:
            nn.init.normal_(self.w_gate, std=self.dim**-0.5)
        if self.zero_init_out:
            nn.init.zeros_(self.w_up)
        else:
            nn.init.normal_(self.w_up, std=self.num_experts_per_token**-0.5)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Sums the weighted outputs of the experts that each token names.

        Args:
            x: (..., dim).
            weights: (..., H, K) or (..., P), floating.
            indices: weights' shape, int64, in [0, N).

        Returns:
            (..., dim_out), x's dtype.

        Raises:
            ValueError: a shape does not fit.
            TypeError: a dtype is not supported in its place.
            IndexError: an index is outside [0, N).
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            update = self.fused_update
            if update is not None and torch.is_grad_enabled():
                fused: Tensor = update.forward(self, x, weights, indices)
                return fused
        return expert_mlp(
            x,
            weights,
            indices,
            self.w_down,
            self.w_up,
            self.w_gate,
            self.activation,
            self.sparse_grad,
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, dim_out={self.dim_out}, "
            f"activation={self.activation!r}, glu={self.glu}, sparse_grad={self.sparse_grad}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tables of its own, which no optimizer knows.
        return {**self.__dict__, "fused_update": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        down, up = state_dict.get(prefix + "w_down"), state_dict.get(prefix + "w_up")
        if not (isinstance(down, Tensor) and isinstance(up, Tensor)):
            return
        if down.dim() != 2 or up.dim() != 2:
            return  # not of any pool; torch has listed their shapes
        if (down.shape, up.shape) != (self.w_down.shape, self.w_up.shape):
            glu = prefix + "w_gate" in state_dict
            error_msgs.append(
                f"{prefix.rstrip('.') or 'experts'}: the checkpoint's pool has "
                f"{_describe_sizes(down, up, glu)}, this one "
                f"{_describe_sizes(self.w_down, self.w_up, self.glu)}; build the layer with the "
                f"checkpoint's options."
            )


def _describe_sizes(w_down: Tensor, w_up: Tensor, glu: bool) -> str:
    return f"num_experts={len(w_down)}, dim={w_down.shape[1]}, dim_out={w_up.shape[1]}, glu={glu}"
