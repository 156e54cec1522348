"""The PEER layer: a router and a pool of experts."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer.modules.experts import ExpertPool
from peer.modules.grid import parse_grid
from peer.modules.router import ProductKeyRouter

__all__ = ["PEER"]


class PEER(nn.Module):
    r"""Parameter Efficient Expert Retrieval: a feed-forward layer with a million tiny experts.

    For a token x, each of H heads retrieves K of N experts by product keys and weights them by
    their scores. An expert is an MLP with one hidden neuron. All heads share the experts:

    .. math:: y = \sum_{h=1}^{H} \sum_{p=1}^{K} g_{h,p}(x)\,
              \sigma(x^\top \text{down}_{e_{h,p}})\, \text{up}_{e_{h,p}} .

    The defaults are those of the paper. The layer maps (..., dim) to (..., dim), like the
    feed-forward layer that it replaces. The table has 2 * N * dim parameters; a token reads
    2 * H * K * dim of them.

    `layer.router` is a `ProductKeyRouter` and `layer.experts` an `ExpertPool`. The layer's state is
    theirs, with the prefixes `router.` and `experts.`.

    Args:
        dim: width of input and output.
        num_experts: N, a perfect square, or the grid (rows, columns).
        heads: H.
        num_experts_per_head: K, at most N.
        dim_key: query width per head, even.
        activation: the experts' activation: "gelu" (by erf), "gelu_tanh", "relu", "silu",
            "identity" or "relu2" (ReLU squared).
        glu: whether the experts have a linear gate.
        scores: the function from the K scores of a head to weights: "softmax", "sigmoid" or "relu".
        query_norm: "batch", "layer", "rms" or None.
        query_bias: whether the query projection has a bias before the normalisation.
        share_keys: whether all heads use the same keys.
        dropout: the probability that a retrieved expert is dropped in training, independently for
            each (token, expert) pair. The other weights are divided by 1 - dropout. Since an expert
            has one hidden neuron, this is dropout of the hidden layer.
        sparse_grad: whether the table gets a coalesced sparse gradient.
        zero_init_out: whether `w_up` starts at zero. The output of the layer is then zero at first.
        router: an existing router. Options that describe the router can then be omitted.
        experts: an existing pool, for layers that share one. Options that describe the pool can
            then be omitted.
        device: device of the new parameters.
        dtype: dtype of the new parameters.

    Raises:
        ValueError: an option is out of range or contradicts the given router or pool, or the
            router and the pool have different sizes.
        TypeError: `num_experts` is neither an int nor a pair of ints.

    Source: arXiv 2407.04153, algorithm 1 and equation 7.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(16, num_experts=64, heads=2, num_experts_per_head=4, dim_key=8)
        >>> y = layer(torch.randn(5, 7, 16))
        >>> y.shape
        torch.Size([5, 7, 16])
        >>> sibling = peer.PEER(16, heads=2, num_experts_per_head=4, experts=layer.experts)
        >>> sibling.num_experts
        64
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int | tuple[int, int] = 1024**2,
        heads: int = 8,
        num_experts_per_head: int = 16,
        dim_key: int = 256,
        activation: str = "gelu",
        glu: bool = False,
        scores: str = "softmax",
        query_norm: str | None = "batch",
        query_bias: bool = False,
        share_keys: bool = True,
        dropout: float = 0.0,
        sparse_grad: bool = False,
        zero_init_out: bool = False,
        router: ProductKeyRouter | None = None,
        experts: ExpertPool | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"expected dropout between 0 and 1, got {dropout}")
        routing: dict[str, Any] = {
            "heads": heads,
            "num_experts_per_head": num_experts_per_head,
            "dim_key": dim_key,
            "scores": scores,
            "query_norm": query_norm,
            "query_bias": query_bias,
            "share_keys": share_keys,
        }
        pooling: dict[str, Any] = {
            "activation": activation,
            "glu": glu,
            "sparse_grad": sparse_grad,
            "zero_init_out": zero_init_out,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if router is not None and experts is not None and (device, dtype) != (None, None):
            raise ValueError("device and dtype have no effect if router and experts are given")
        if num_experts == _DEFAULTS["num_experts"]:
            if router is not None:
                num_experts = (router.rows, router.columns)
            elif experts is not None:
                num_experts = experts.num_experts
        rows, columns = parse_grid(num_experts)

        if router is None:
            router = ProductKeyRouter(dim, num_experts=(rows, columns), **routing, **factory)
        else:
            _require("router", router, {"dim": dim, "rows": rows, "columns": columns})
            _require("router", router, _without_defaults(routing))
        if experts is None:
            experts = ExpertPool(
                dim,
                num_experts=rows * columns,
                num_experts_per_token=router.heads * router.num_experts_per_head,
                **pooling,
                **factory,
            )
        else:
            _require("experts", experts, {"dim": dim, "num_experts": rows * columns})
            _require("experts", experts, _without_defaults(pooling))
        self.router = router
        self.experts = experts
        self.dropout = dropout

    @property
    def num_experts(self) -> int:
        """N, the number of experts."""
        return self.router.num_experts

    def reset_parameters(self) -> None:
        """Initialises the router and the pool, even if other layers share them."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Applies the layer to every token.

        Args:
            x: (..., dim).
            padding_mask: (...) bool, True for padding. Padding has outputs like other tokens, but
                the statistics of batch normalisation exclude it.

        Returns:
            (..., dim), x's dtype, or the autocast dtype under autocast.

        Raises:
            ValueError: x or the mask has the wrong shape, or batch normalisation in training gets a
                single token.
            TypeError: the mask is not bool, or x's dtype does not fit the parameters'.
        """
        disabled = self.experts.disabled
        if disabled is not None:  # the layer may use a prefix of its pool
            disabled = disabled[: self.router.num_experts]
        weights, indices = self.router(x, padding_mask, disabled)
        weights = F.dropout(weights, self.dropout, self.training)
        out: Tensor = self.experts(x, weights, indices)
        return out

    def extra_repr(self) -> str:
        """The option that neither router nor pool has, for `repr`."""
        return f"dropout={self.dropout}"


def _require(name: str, part: nn.Module, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value != getattr(part, option):
            raise ValueError(
                f"{option}={value!r} contradicts the given {name}, which has "
                f"{option}={getattr(part, option)!r}"
            )


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(PEER.__init__).parameters.items()
}


def _without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value != _DEFAULTS[name]}
