"""The options of PEER layers that are yet to be built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from peer.modules import PEER, ExpertPool
from peer.modules.grid import parse_grid

__all__ = ["PEERConfig"]


@dataclass(frozen=True, kw_only=True)
class PEERConfig:
    """The options of a PEER layer, for functions that build layers or predict their costs.

    The options and their defaults are those of `peer.PEER`, with two more.

    Args:
        dim: the width of the layers. None: the width of each block that a layer replaces.
        num_experts: N, a perfect square, or the grid (rows, columns).
        heads: H.
        num_experts_per_head: K.
        dim_key: query width per head, even.
        activation: the experts' activation, see `peer.ExpertPool`.
        glu: whether the experts have a linear gate.
        scores: "softmax", "sigmoid" or "relu".
        query_norm: "batch", "layer", "rms" or None.
        query_bias: whether the query projection has a bias.
        share_keys: whether all heads use the same keys.
        key_norm: whether keys are scaled to one length at every call.
        dropout: the probability that a retrieved expert is dropped in training.
        sparse_grad: whether the table gets a coalesced sparse gradient.
        zero_init_out: whether `w_up` starts at zero.
        share_experts: whether all layers that are built together share one pool of experts. They
            must have the same width. Each has its own router.

    Raises:
        ValueError, TypeError: an option is out of range, as for `peer.PEER`.

    Example:
        >>> import peer
        >>> config = peer.PEERConfig(num_experts=64, heads=2, num_experts_per_head=4, dim_key=8)
        >>> config.make(16).num_experts
        64
    """

    dim: int | None = None
    num_experts: int | tuple[int, int] = 1024**2
    heads: int = 8
    num_experts_per_head: int = 16
    dim_key: int = 256
    activation: str = "gelu"
    glu: bool = False
    scores: str = "softmax"
    query_norm: str | None = "batch"
    query_bias: bool = False
    share_keys: bool = True
    key_norm: bool = False
    dropout: float = 0.0
    sparse_grad: bool = False
    zero_init_out: bool = False
    share_experts: bool = False

    def __post_init__(self) -> None:
        self.make(8 if self.dim is None else self.dim, device="meta")  # the layer checks them

    @property
    def grid(self) -> tuple[int, int]:
        """R and C, the rows and columns of the grid of experts."""
        return parse_grid(self.num_experts)

    def layer_options(self) -> dict[str, Any]:
        """The keyword arguments of `peer.PEER`."""
        options = asdict(self)
        del options["dim"], options["share_experts"]
        return options

    def make(
        self,
        dim: int | None = None,
        *,
        experts: ExpertPool | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> PEER:
        """Builds a layer.

        Args:
            dim: the width, if the configuration has none.
            experts: an existing pool with the options of the configuration.
            device: device of the new parameters.
            dtype: dtype of the new parameters.

        Returns:
            The layer.

        Raises:
            ValueError: the width is missing or contradicts that of the configuration, or the pool
                does not fit.
        """
        if dim is None:
            dim = self.dim
        if dim is None or self.dim not in (None, dim):
            raise ValueError(f"expected dim={self.dim} to be the width of the layer, got {dim}")
        return PEER(dim, experts=experts, device=device, dtype=dtype, **self.layer_options())
