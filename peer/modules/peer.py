"""The PEER layer: a router and a pool of experts."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer._growth import require_growable
from peer.modules.experts import ExpertPool
from peer.modules.grid import parse_grid
from peer.modules.masks import Experts
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
        key_norm: whether keys are scaled to one length at every call, so that training moves their
            directions only.
        dropout: the probability that a retrieved expert is dropped in training, independently for
            each (token, expert) pair. The other weights are divided by 1 - dropout. Since an expert
            has one hidden neuron, this is dropout of the hidden layer.
        sparse_grad: whether the table gets a coalesced sparse gradient.
        zero_init_out: whether `w_up` starts at zero. The output of the layer is then zero at first.
        router: an existing router. Options that describe the router can then be omitted.
        experts: an existing pool, for layers that share one. Options that describe the pool can
            then be omitted. The layer uses its first R * C experts.
        device: device of the new parameters.
        dtype: dtype of the new parameters.

    Raises:
        ValueError: an option is out of range or contradicts the given router or pool, or the
            pool is smaller than the router's grid.
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
        key_norm: bool = False,
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
            "key_norm": key_norm,
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
            _require("experts", experts, {"dim": dim})
            if experts.num_experts < rows * columns:  # a larger one is for other layers, too
                _require("experts", experts, {"num_experts": rows * columns})
            _require("experts", experts, _without_defaults(pooling))
        self.router = router
        self.experts = experts
        self.dropout = dropout

    @property
    def num_experts(self) -> int:
        """N, the number of experts that the layer uses, at most those of its pool."""
        return self.router.num_experts

    def reset_parameters(self) -> None:
        """Initialises the router and the pool, even if other layers share them."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def grow(self, rows: int, keys: Tensor | None = None) -> None:
        """Appends rows to the grid of experts, and with each row C experts.

        Old experts, keys and ids do not change by a bit. New experts have random input weights and
        zero output, so they change the output of a token only by taking the places of old experts.
        The output of a token that retrieves old experts only stays equal bit for bit.

        Columns cannot be appended: expert (r, c) has the id r * C + c, so another C would renumber
        all experts.

        `router.row_keys` and `experts.weight` stay the same parameters and get more rows, so
        optimizers, parameter groups and hooks go on holding them. The following see the growth:

        * Optimizers: call `peer.optim.grow_(optimizer)` before the next step. Until then, every
          step raises RuntimeError.
        * Layers that share the pool: they go on using its first experts. The pool grows only if
          this layer needs more experts than it has; otherwise the new rows use experts that other
          layers use already. Layers that share the router need larger pools: use `peer.grow_`.
        * `torch.compile`: the next call recompiles.
        * Scripted and traced modules and programs from `torch.export`: in the same process they
          share the parameters and see the new experts. Those that were saved keep the old ones.
        * CUDA graphs: they read the old memory, which growth frees; capture again.
        * Averages such as `torch.optim.swa_utils.AveragedModel`: call
          `peer.grow_to_(averaged.module, model.state_dict())`.
        * DistributedDataParallel and sharding: grow before wrapping.

        On Linux, a CPU table that `peer.ExpertPool` made is not copied, but its address may change;
        do not use one from DLPack any more. Other tables, and those on CUDA, are copied, so the old
        and the new table exist at once.

        Args:
            rows: how many rows are appended.
            keys: (rows, dim_key / 2), for all heads, or (H, rows, dim_key / 2) if the heads do not
                share keys. By default they are noisy copies of old keys, see
                `ProductKeyRouter.make_row_keys`. `peer.keys_from` takes them from new data. Keys
                that are longer than the old ones win far more retrievals than their share, unless
                `key_norm` gives all keys one length.

        Raises:
            ValueError: `rows` is not positive, or the keys have another shape.
            TypeError: the keys are no floating-point tensor.
            RuntimeError: the keys or the table are sharded, are computed by a parametrisation, are
                in shared memory, have a gradient, or are part of a graph of autograd: a loss that
                is kept, or DistributedDataParallel. Nothing is changed.

        Example:
            >>> import torch, peer
            >>> layer = peer.PEER(8, num_experts=(4, 6), heads=2, num_experts_per_head=4, dim_key=4)
            >>> layer.grow(2)
            >>> layer.num_experts, layer.experts.weight.shape
            (36, torch.Size([36, 2, 8]))
        """
        keys = self.router.make_row_keys(rows, keys)
        missing = (self.router.rows + rows) * self.router.columns - self.experts.num_experts
        require_growable({"router.row_keys": self.router.row_keys})
        if missing > 0:
            self.experts.grow(missing)
        self.router.append_row_keys(keys)

    def reset_experts(self, experts: Experts, optimizer: Any = None) -> None:
        """Makes experts fresh: random input weights, zero output and fresh optimizer state.

        For experts that no token needs any more, see `peer.select_rows.unused`. The layer then
        learns with them as with the new experts of `grow`, without more memory. Their keys do not
        change. In the other layers that share the pool, the experts are fresh, too.

        Args:
            experts: ids, or a mask (N,) bool over the pool.
            optimizer: the optimizer that holds the table, or a wrapper that holds it as
                `optimizer`. The state of the rows becomes what `peer.optim.grow_` gives new rows.
                With None, no state changes.

        Raises:
            ValueError: an expert is frozen, a mask has another shape, the optimizer does not hold
                the table, or its state has a shape that does not show where the state of a row is.
                Nothing is changed.
            TypeError: ids are not integers, or `optimizer` is no optimizer.
            IndexError: an id is outside [0, N).
            RuntimeError: the table has a gradient, or has grown and the state has not.

        Example:
            >>> import torch, peer
            >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
            >>> optimizer = peer.optim.RowwiseAdagrad(layer.experts.parameters())
            >>> layer.reset_experts([3, 7], optimizer)
            >>> layer.experts.w_up[3].count_nonzero()
            tensor(0)
        """
        self.experts.reset_experts(experts, optimizer)

    def freeze_experts(
        self, experts: Experts | None = None, keys: bool = True, router: bool | None = None
    ) -> None:
        r"""Freezes experts, so that training changes neither them nor, on request, their routing.

        A frozen row of the table gets no gradient, and the optimizers of `peer.optim` never write
        it. Torch's own optimizers update a dense gradient's rows even if they are zero: weight
        decay and momentum then move frozen rows. Gradients to tokens and router weights still flow
        through frozen experts.

        Without `experts`, the layer stops learning. After `layer.freeze_experts()` and
        `layer.grow(rows)`, only what is new learns.

        The layers that share the pool share its frozen experts, but each has its own router.
        Freeze before wrapping the model in `DistributedDataParallel`. A scripted or exported copy
        has the masks that it was made with.

        Args:
            experts: ids, or a mask (N,) bool over the pool, added to those that are frozen; None
                for all experts, all keys and, unless `router` is False, the query network.
            keys: whether to freeze the row keys and column keys of these experts, for all heads. A
                key serves many experts, so experts that still learn may have frozen keys. Frozen
                keys hold their values under any optimizer.
            router: whether to freeze the query network and its normalisation. Batch normalisation
                then uses its running statistics in training, too. None: if `experts` is None.

        Raises:
            ValueError: a mask has another shape.
            TypeError: ids are not integers.
            IndexError: an id is outside [0, N).

        Example:
            >>> import torch, peer
            >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
            >>> layer.freeze_experts([0, 5])
            >>> int(layer.experts.frozen.sum()), layer.router.frozen_rows.tolist()
            (2, [True, True, False, False])
            >>> layer(torch.randn(3, 8)).sum().backward()
            >>> int(layer.experts.weight.grad[[0, 5]].count_nonzero())
            0
        """
        mask = self.experts._mask(experts)
        self.experts.freeze_experts(mask)
        if keys and experts is None:
            self.router.freeze_keys()
        elif keys:
            grid = self._grid_of(mask)
            self.router.freeze_keys(grid.any(1), grid.any(0))
        if experts is None if router is None else router:
            self.router.freeze_network()

    def unfreeze_experts(
        self, experts: Experts | None = None, keys: bool = True, router: bool | None = None
    ) -> None:
        """Lets frozen experts learn again.

        Args:
            experts: ids, or a mask (N,) bool over the pool; None for all.
            keys: whether to unfreeze the keys that no frozen expert uses.
            router: whether to unfreeze the query network and its normalisation. None: if `experts`
                is None.

        Raises:
            ValueError, TypeError, IndexError: as `freeze_experts`.

        Example:
            >>> import torch, peer
            >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
            >>> layer.freeze_experts()
            >>> layer.unfreeze_experts(range(8))
            >>> layer.router.frozen_rows.tolist(), layer.router.frozen_columns.tolist()
            ([False, False, True, True], [True, True, True, True])
        """
        self.experts.unfreeze_experts(experts)
        if keys:
            frozen = self.experts.frozen
            if frozen is None:
                self.router.unfreeze_keys()
            else:
                grid = self._grid_of(frozen)
                self.router.unfreeze_keys(~grid.any(1), ~grid.any(0))
        if experts is None if router is None else router:
            self.router.unfreeze_network()

    def disable_experts(self, experts: Experts) -> None:
        """Disables experts: no token retrieves them.

        Retrieval equals the ranking of all other experts. It is exact, but slower than without
        disabled experts, most of all if many of the best experts are disabled. All layers that
        share the pool are affected.

        Args:
            experts: ids, or a mask (N,) bool over the pool, added to those that are disabled.

        Raises:
            ValueError: fewer than K experts of the layer would stay enabled, or a mask has another
                shape.
            TypeError: ids are not integers.
            IndexError: an id is outside [0, N).

        Example:
            >>> import torch, peer
            >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
            >>> layer.disable_experts(range(8))
            >>> _, indices = layer.router(torch.randn(3, 8), disabled=layer.experts.disabled)
            >>> int(indices.min()) >= 8
            True
        """
        mask = self.experts._mask(experts)
        disabled = mask if self.experts.disabled is None else mask | self.experts.disabled
        enabled = int((~self._grid_of(disabled)).sum())
        if enabled < self.router.num_experts_per_head:
            raise ValueError(
                f"expected at least num_experts_per_head={self.router.num_experts_per_head} "
                f"enabled experts, but {enabled} of {self.num_experts} would be left"
            )
        self.experts.disable_experts(mask)

    def enable_experts(self, experts: Experts | None = None) -> None:
        """Lets tokens retrieve disabled experts again.

        Args:
            experts: ids, or a mask (N,) bool over the pool; None for all.

        Raises:
            ValueError, TypeError, IndexError: as `freeze_experts`.
        """
        self.experts.enable_experts(experts)

    def _grid_of(self, mask: Tensor) -> Tensor:
        """The layer's part of a mask over the pool, (R, C)."""
        return mask[: self.num_experts].view(self.router.rows, self.router.columns)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Applies the layer to every token.

        Args:
            x: (..., dim).
            padding_mask: (...) bool, True for padding. Its outputs are zeros. What stands in the
                padding, including NaN, and the gradients of its outputs have no influence: not on
                other tokens, statistics or gradients, and not on `peer.optim`, which skips rows of
                zeros.

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
        if padding_mask is None:
            out: Tensor = self.experts(x, weights, indices)
            return out
        # Zero weights are not enough: 0 * NaN is NaN. The first fill keeps the tokens out of the
        # backward pass, the second one the gradients of their outputs.
        padding = padding_mask.unsqueeze(-1)
        masked: Tensor = self.experts(x.masked_fill(padding, 0.0), weights, indices)
        return masked.masked_fill(padding, 0.0)

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
