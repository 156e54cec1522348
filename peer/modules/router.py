"""The router: maps a token to the ids and weights of its experts."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from peer._growth import append_rows_, require_growable
from peer._row_state import append_rows
from peer.functional import SCORES, product_key_topk, router_weights
from peer.modules.grid import parse_grid
from peer.modules.masks import (
    ROUTER_MASKS,
    clear_gradient_,
    describe,
    union,
    without,
)
from peer.modules.norms import BatchQueryNorm, make_query_norm

__all__ = ["Observer", "ProductKeyRouter", "fold_key_norm_", "fold_query_norm_"]

Module = TypeVar("Module", bound=nn.Module)

# The length of the noise on a copy of a key, relative to the key. A copy then has a cosine of 0.9
# with its source. A quarter more rows of fresh keys take 18 to 20 % of all retrievals, for a fair
# share of 20 %.
KEY_NOISE = 0.5


class Observer(Protocol):
    """Sees what a router retrieves. Copies, pickles, scripts and exports have no observers."""

    def observe(
        self, num_experts: int, weights: Tensor, indices: Tensor, padding_mask: Tensor | None
    ) -> None:
        """Is called in each forward pass.

        Args:
            num_experts: N.
            weights: (..., H, K), the router's weights. It must not be changed.
            indices: (..., H, K), the ids. It must not be changed.
            padding_mask: (...) bool, True for padding, or None.
        """
        ...


class _ObserverHook:
    """Shows an observer the calls of a router that has a forward method of its own."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def __call__(
        self, router: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        mask = arguments[1] if len(arguments) > 1 else keywords.get("padding_mask")
        weights, indices = output
        self.observer.observe(router.num_experts, weights, indices, mask)


class ProductKeyRouter(nn.Module):
    r"""Retrieves experts for tokens by product keys.

    A linear projection and a normalisation give each of H heads a query :math:`q = [q_1; q_2]`. The
    experts form a grid of R rows and C columns. Expert (r, c) has the id r * C + c and the score

    .. math:: s_{r,c} = q_1^\top \text{row\_keys}_r + q_2^\top \text{col\_keys}_c .

    Each head retrieves the K experts with the highest scores. Their weights are a function of these
    K scores.

    State:

    * `query.weight` (H * dim_key, dim), and `query.bias` (H * dim_key) with `query_bias`;
    * `row_keys` (R, dim_key / 2) and `col_keys` (C, dim_key / 2), with a leading H if the heads do
      not share keys;
    * `norm.weight` (H * dim_key) with a normalisation, and `norm.bias` (H * dim_key) with "batch"
      and "layer";
    * `norm.running_mean` and `norm.running_var` (H * dim_key) and `norm.num_batches_tracked` with
      "batch";
    * while keys are frozen, `frozen_rows` (R) and `frozen_columns` (C), bool, and `kept_row_keys`
      and `kept_col_keys`, like the keys: the values that frozen keys keep;
    * `frozen`, a bool scalar, while the query network and its normalisation are frozen.

    Args:
        dim: input width.
        num_experts: N, a perfect square, or the grid (rows, columns).
        heads: H.
        num_experts_per_head: K, at most N.
        dim_key: query width per head, even. The first half of a query scores rows, the second
            columns.
        scores: "softmax", "sigmoid" or "relu", see `peer.functional.router_weights`.
        query_norm: "batch" normalises each feature over the tokens, see
            `peer.modules.BatchQueryNorm`. "layer" and "rms" normalise each head's query. None
            disables the normalisation.
        query_bias: whether the query projection has a bias before the normalisation.
        share_keys: whether all heads use the same keys, as in the paper.
        key_norm: whether keys are scaled to the length sqrt(1/3) at every call, so that training
            moves their directions only. A key shorter than 1e-12 is used as it is: a key of zeros
            scores zero and learns like any other parameter.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an option is out of range, or the router would have no gradient, because the
            softmax over a single expert is always 1.
        TypeError: `num_experts` is neither an int nor a pair of ints.

    Source: arXiv 2407.04153, equations 1, 2, 4, 5 and algorithm 1; arXiv 1907.05242.

    Example:
        >>> import torch, peer
        >>> router = peer.ProductKeyRouter(
        ...     8, num_experts=(4, 6), heads=2, num_experts_per_head=3, dim_key=4
        ... )
        >>> weights, indices = router(torch.randn(5, 7, 8))
        >>> weights.shape, indices.shape
        (torch.Size([5, 7, 2, 3]), torch.Size([5, 7, 2, 3]))
    """

    __constants__: ClassVar = ["masks_padding"]  # lets TorchScript drop the dead branch

    frozen: Tensor | None
    frozen_rows: Tensor | None
    frozen_columns: Tensor | None
    kept_row_keys: Tensor | None
    kept_col_keys: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int | tuple[int, int] = 1024**2,
        heads: int = 8,
        num_experts_per_head: int = 16,
        dim_key: int = 256,
        scores: str = "softmax",
        query_norm: str | None = "batch",
        query_bias: bool = False,
        share_keys: bool = True,
        key_norm: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows, columns = parse_grid(num_experts)
        for name, value in ("dim", dim), ("heads", heads):
            if value < 1:
                raise ValueError(f"expected {name} to be positive, got {value}")
        if dim_key < 2 or dim_key % 2:
            raise ValueError(
                f"expected an even dim_key, because its halves score the rows and the columns, "
                f"got {dim_key}"
            )
        if key_norm and dim_key < 4:
            raise ValueError(
                f"expected dim_key of at least 4 with key_norm, because a key of one number has no "
                f"direction to learn, got {dim_key}"
            )
        if not 1 <= num_experts_per_head <= rows * columns:
            raise ValueError(
                f"expected num_experts_per_head between 1 and the number of experts "
                f"{rows * columns}, got {num_experts_per_head}"
            )
        if scores not in SCORES:
            known = ", ".join(map(repr, SCORES))
            raise ValueError(f"expected scores to be one of {known}, got {scores!r}")
        if scores == "softmax" and num_experts_per_head == 1:
            raise ValueError(
                "the softmax over one expert per head is always 1, so the router would get no "
                "gradient: use scores='sigmoid' or 'relu', or num_experts_per_head > 1"
            )
        self.dim = dim
        self.rows = rows
        self.columns = columns
        self.num_experts = rows * columns
        self.heads = heads
        self.num_experts_per_head = num_experts_per_head
        self.dim_key = dim_key
        self.scores = scores
        self.query_norm = query_norm
        self.query_bias = query_bias
        self.share_keys = share_keys
        self.key_norm = key_norm

        self.query = nn.Linear(dim, heads * dim_key, bias=query_bias, device=device, dtype=dtype)
        self.norm = make_query_norm(query_norm, heads, dim_key, device=device, dtype=dtype)
        self.masks_padding = isinstance(self.norm, BatchQueryNorm)
        per_head = () if share_keys else (heads,)
        half = dim_key // 2
        self.row_keys = nn.Parameter(torch.empty(*per_head, rows, half, device=device, dtype=dtype))
        self.col_keys = nn.Parameter(
            torch.empty(*per_head, columns, half, device=device, dtype=dtype)
        )
        for name in ROUTER_MASKS:
            self.register_buffer(name, None)
        # Not hooks: those are copied, pickled and exported with the module, and do not script.
        self.observers: tuple[Observer, ...] = ()
        self._reset_keys()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a part, as `torch.nn.Module` does.

        `torch.nn.SyncBatchNorm.convert_sync_batchnorm` puts its result back by this method. The
        router needs a norm that takes a mask, so a `torch.nn.SyncBatchNorm` becomes a synchronized
        `BatchQueryNorm` with the same parameters and buffers. The same holds for an assignment to
        `norm`.
        """
        super().add_module(name, self._adapt(name, module))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._adapt(name, value))

    def _adapt(self, name: str, value: Any) -> Any:
        if name == "norm" and isinstance(value, nn.SyncBatchNorm):
            return _synchronized(value, are_statistics_frozen=self.frozen is not None)
        return value

    def reset_parameters(self) -> None:
        """Initialises all parameters. Nothing is frozen then.

        Keys get random directions, uniform on the sphere, and the length sqrt(1/3). Retrieval then
        depends on directions alone; of keys of different lengths, it prefers the long ones. The
        other parameters start as in torch.
        """
        self.unfreeze_keys()
        self.unfreeze_network()
        self.query.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()
        self._reset_keys()

    @torch.no_grad()
    def _reset_keys(self) -> None:
        for keys in self.row_keys, self.col_keys:
            keys.copy_(_normalised(nn.init.normal_(keys)))

    def grow(self, rows: int, keys: Tensor | None = None) -> None:
        """Appends rows of keys, so that each head also scores `rows` * C more experts.

        Old keys and old ids do not change. `row_keys` stays the same parameter; new keys are not
        frozen. The pool is not touched: it needs R * C experts before the next call.
        `peer.PEER.grow` grows both and describes what else follows.

        Args:
            rows: how many rows are appended.
            keys: (rows, dim_key / 2), for all heads, or (H, rows, dim_key / 2) if the heads do not
                share keys. By default they are drawn by `make_row_keys`.

        Raises:
            ValueError: `rows` is not positive, or the keys have another shape.
            TypeError: the keys are no floating-point tensor.
            RuntimeError: the keys cannot grow now; see `peer.PEER.grow`. Nothing is changed.

        Example:
            >>> import peer
            >>> router = peer.ProductKeyRouter(8, num_experts=(4, 6), heads=2, dim_key=4)
            >>> router.grow(3)
            >>> router.rows, router.columns, router.num_experts
            (7, 6, 42)
        """
        keys = self.make_row_keys(rows, keys)
        require_growable({"the row_keys of a router": self.row_keys})
        self.append_row_keys(keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def make_row_keys(self, rows: int, keys: Tensor | None = None) -> Tensor:
        """Returns the keys of new rows: those given, in the shape of this router, or drawn ones.

        A drawn key is an old key of a random row plus normal noise of half its length, scaled to
        the length of the old key. Copies of at most R rows are of different rows.

        Args:
            rows: how many rows.
            keys: (rows, dim_key / 2) or, if the heads do not share keys, (H, rows, dim_key / 2).

        Returns:
            (rows, dim_key / 2), or (H, rows, dim_key / 2) if the heads do not share keys.

        Raises:
            ValueError: `rows` is not positive, or the keys have another shape.
            TypeError: the keys are no floating-point tensor.
        """
        if rows < 1:
            raise ValueError(f"expected rows to be positive, got {rows}")
        shape = [*self.row_keys.shape[:-2], rows, self.dim_key // 2]
        if keys is not None:
            if not isinstance(keys, Tensor) or not keys.is_floating_point():
                kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
                raise TypeError(f"expected keys as a floating-point tensor, got {kind}")
            if list(keys.shape) not in (shape, shape[-2:]):
                heads = "" if self.share_keys else f" or {shape[-2:]}"
                raise ValueError(f"expected keys of shape {shape}{heads}, got {list(keys.shape)}")
            return keys.detach().to(self.row_keys).expand(shape)
        order = torch.randperm(self.rows, device=self.row_keys.device)
        source = self.effective_keys()[0][..., order.repeat(-(-rows // self.rows))[:rows], :]
        source = source.to(torch.promote_types(source.dtype, torch.float32))
        length = source.norm(dim=-1, keepdim=True)
        noise = torch.randn_like(source) * (KEY_NOISE * length / (self.dim_key / 2) ** 0.5)
        return F.normalize(source + noise, dim=-1).mul_(length).to(self.row_keys.dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def append_row_keys(self, keys: Tensor) -> None:
        """Appends rows to keys that can grow.

        Args:
            keys: (rows, dim_key / 2), or (H, rows, dim_key / 2) if the heads do not share keys.
        """
        append_rows_(self.row_keys, self.row_keys.dim() - 2, keys)
        self.rows = self.row_keys.shape[-2]
        self.num_experts = self.rows * self.columns
        if self.frozen_rows is not None:
            self.frozen_rows = append_rows(self.frozen_rows, 0, keys.shape[-2])
        if self.kept_row_keys is not None:
            self.kept_row_keys = torch.cat([self.kept_row_keys, keys.to(self.kept_row_keys)], -2)

    def effective_keys(self) -> tuple[Tensor, Tensor]:
        """The keys that retrieval uses: the parameters, normalised with `key_norm`.

        Frozen keys have the values that they keep, bit by bit.

        Returns:
            Row keys and column keys, in the shapes of `row_keys` and `col_keys`.
        """
        return (
            _effective(self.row_keys, self.key_norm, self.frozen_rows, self.kept_row_keys),
            _effective(self.col_keys, self.key_norm, self.frozen_columns, self.kept_col_keys),
        )

    @torch.no_grad()
    def freeze_keys(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Freezes keys, for all heads: retrieval goes on using their present values.

        The values are kept in buffers. So whatever an optimizer does to the parameters, by weight
        decay or momentum, has no effect on retrieval. Frozen keys get no gradient.

        Args:
            rows: mask (R,) bool of row keys, added to those that are frozen; None for all.
            columns: mask (C,) bool of column keys, likewise.
        """
        rows, columns = self._key_masks(rows, columns)
        row_keys, col_keys = self.effective_keys()
        clear_gradient_(self.row_keys, rows, dim=-2)
        clear_gradient_(self.col_keys, columns, dim=-2)
        self.frozen_rows = union(self.frozen_rows, rows)
        self.kept_row_keys = None if self.frozen_rows is None else row_keys.detach().clone()
        self.frozen_columns = union(self.frozen_columns, columns)
        self.kept_col_keys = None if self.frozen_columns is None else col_keys.detach().clone()

    @torch.no_grad()
    def unfreeze_keys(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Lets frozen keys learn again, from the values that they kept.

        Args:
            rows: mask (R,) bool of row keys; None for all.
            columns: mask (C,) bool of column keys; None for all.
        """
        rows, columns = self._key_masks(rows, columns)
        if self.frozen_rows is not None:
            self.row_keys.copy_(_with_kept(self.row_keys, self.frozen_rows, self.kept_row_keys))
            self.frozen_rows = without(self.frozen_rows, rows)
        if self.frozen_columns is not None:
            self.col_keys.copy_(_with_kept(self.col_keys, self.frozen_columns, self.kept_col_keys))
            self.frozen_columns = without(self.frozen_columns, columns)
        if self.frozen_rows is None:
            self.kept_row_keys = None
        if self.frozen_columns is None:
            self.kept_col_keys = None

    def _key_masks(self, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        masks = []
        for name, mask, size in ("rows", rows, self.rows), ("columns", columns, self.columns):
            if mask is None:
                mask = torch.ones(size, dtype=torch.bool, device=self.row_keys.device)
            if mask.dtype != torch.bool or mask.shape != (size,):
                raise ValueError(
                    f"expected {name} as a bool mask of shape [{size}], got {mask.dtype} of shape "
                    f"{list(mask.shape)}"
                )
            masks.append(mask.to(self.row_keys.device))
        return masks[0], masks[1]

    def freeze_network(self) -> None:
        """Freezes the query network, and the parameters and statistics of its normalisation.

        The parameters no longer require grad, and their gradients are dropped, so that no optimizer
        updates them. Batch normalisation uses its running statistics from now on, in training too.
        """
        self.frozen = torch.ones((), dtype=torch.bool, device=self.row_keys.device)
        self._apply_frozen_state()

    def unfreeze_network(self) -> None:
        """Lets a frozen query network and its normalisation learn again."""
        if self.frozen is not None:
            self.frozen = None
            self._apply_frozen_state()

    def _apply_frozen_state(self) -> None:
        """Makes the query network learn, or not, as the buffer `frozen` says."""
        is_frozen = self.frozen is not None
        if isinstance(self.norm, BatchQueryNorm):
            self.norm.are_statistics_frozen = is_frozen
        for parameter in (*self.query.parameters(), *self.norm.parameters()):
            parameter.requires_grad_(not is_frozen)
            if is_frozen:
                parameter.grad = None

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, disabled: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Retrieves the experts of every token.

        Args:
            x: (..., dim).
            padding_mask: (...) bool, True for padding, like `key_padding_mask` of
                `torch.nn.MultiheadAttention`. Padding is routed as zeros and with zero weights. So
                what stands there, including NaN, has no influence on statistics or gradients.
            disabled: (R * C,) bool, True for experts that are never retrieved. At least K are
                False. None if all experts can be retrieved.

        Returns:
            Weights (..., H, K), float32 or float64, and the ids of the experts (..., H, K), int64.
            The experts of a head are distinct and sorted by descending score.

        Raises:
            ValueError: x or a mask has the wrong shape, fewer than K experts are enabled, or batch
                normalisation in training gets a single token.
            TypeError: a mask is not bool.
        """
        # A tracer turns sizes into tensors and warns about every comparison.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._check(x, padding_mask)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        query = self.query(x).reshape(-1, self.heads * self.dim_key)
        if self.masks_padding and padding_mask is not None:
            query = self.norm(query, padding_mask.reshape(-1))
        else:
            query = self.norm(query)
        # Not by effective_keys(): torch.jit.freeze makes no constants of tensors in a tuple.
        scores, indices = product_key_topk(
            query.view(-1, self.heads, self.dim_key),
            _effective(self.row_keys, self.key_norm, self.frozen_rows, self.kept_row_keys),
            _effective(self.col_keys, self.key_norm, self.frozen_columns, self.kept_col_keys),
            self.num_experts_per_head,
            disabled,
        )
        weights = router_weights(scores, self.scores)
        shape = list(x.shape)
        shape[-1] = self.heads
        shape.append(self.num_experts_per_head)
        weights = weights.view(shape)
        if padding_mask is not None:
            weights = weights.masked_fill(padding_mask.unsqueeze(-1).unsqueeze(-1), 0.0)
        indices = indices.view(shape)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            for observer in self.observers:
                observer.observe(self.num_experts, weights, indices, padding_mask)
        return weights, indices

    def _check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"expected x of shape [..., {self.dim}], got {list(x.shape)}")
        if padding_mask is not None:
            if padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"expected padding_mask of dtype bool, True for padding, "
                    f"got {padding_mask.dtype}"
                )
            if padding_mask.shape != x.shape[:-1]:
                raise ValueError(
                    f"expected padding_mask of shape {list(x.shape[:-1])} to match x, "
                    f"got {list(padding_mask.shape)}"
                )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"dim={self.dim}, num_experts=({self.rows}, {self.columns}), heads={self.heads}, "
            f"num_experts_per_head={self.num_experts_per_head}, dim_key={self.dim_key}, "
            f"scores={self.scores!r}, share_keys={self.share_keys}, key_norm={self.key_norm}"
        ) + describe(frozen_rows=self.frozen_rows, frozen_columns=self.frozen_columns)

    def add_observer(self, observer: Observer) -> Callable[[], None]:
        """Lets an observer see every call from now on.

        Args:
            observer: the observer.

        Returns:
            A function that removes it.
        """
        if type(self).forward is not ProductKeyRouter.forward or "forward" in self.__dict__:
            hook = _ObserverHook(observer)
            return self.register_forward_hook(hook, with_kwargs=True).remove
        self.observers = (*self.observers, observer)

        def remove() -> None:
            self.observers = tuple(each for each in self.observers if each is not observer)

        return remove

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "observers": ()}
        hooks = state["_forward_hooks"]
        kept = {key for key, hook in hooks.items() if not isinstance(hook, _ObserverHook)}
        if len(kept) < len(hooks):
            for name in ("_forward_hooks", "_forward_hooks_with_kwargs"):
                entries = ((key, value) for key, value in state[name].items() if key in kept)
                state[name] = OrderedDict(entries)
        return state

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
        names = ("query.weight", "row_keys", "col_keys")
        saved: list[Any] = [state_dict.get(prefix + name) for name in names]
        here = [self.query.weight, self.row_keys, self.col_keys]
        if _is_router_state(*saved) and [t.shape for t in saved] != [t.shape for t in here]:
            error_msgs.append(
                f"{prefix.rstrip('.') or 'router'}: the checkpoint's router has "
                f"{_describe_sizes(*saved)}, this one {_describe_sizes(*here)}; build the layer "
                f"with the checkpoint's options, or call peer.grow_to_(model, state_dict) before "
                f"loading if the checkpoint's layer has grown."
            )


def _synchronized(given: nn.SyncBatchNorm, are_statistics_frozen: bool) -> BatchQueryNorm:
    norm = BatchQueryNorm(
        given.num_features,
        given.eps,
        given.momentum,
        device="meta",
        is_synchronized=True,
        process_group=given.process_group,
    )
    norm.weight, norm.bias = given.weight, given.bias
    norm.running_mean, norm.running_var = given.running_mean, given.running_var
    norm.num_batches_tracked = given.num_batches_tracked
    norm.are_statistics_frozen = are_statistics_frozen
    return norm.train(given.training)


def _normalised(keys: Tensor) -> Tensor:
    """Keys at the length sqrt(1/3), in their dtype, computed in at least float32.

    That is the root mean square length of keys that are uniform in the cube ±1 / sqrt(dim_key / 2).
    """
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    squares = wide.square().sum(-1, keepdim=True)
    # A key of zeros stays zero, and its gradients are finite, of any order.
    squares = squares.masked_fill(squares < 1e-24, 1 / 3)
    return (wide * (3 * squares).rsqrt()).to(keys.dtype)


def _effective(keys: Tensor, key_norm: bool, frozen: Tensor | None, kept: Tensor | None) -> Tensor:
    # The kept values are normalised already. To normalise them again would change their last bits.
    return _with_kept(_normalised(keys) if key_norm else keys, frozen, kept)


def _with_kept(keys: Tensor, frozen: Tensor | None, kept: Tensor | None) -> Tensor:
    if frozen is None or kept is None:
        return keys
    # The graph keeps the mask. DistributedDataParallel writes buffers in place before each forward
    # pass, which must not change the mask of an earlier graph.
    return torch.where(frozen.clone().unsqueeze(-1), kept, keys)


def _is_router_state(query_weight: Any, row_keys: Any, col_keys: Any) -> bool:
    """Whether the entries of a checkpoint have the numbers of dimensions of a router's state."""
    if not all(isinstance(each, Tensor) for each in (query_weight, row_keys, col_keys)):
        return False
    return (
        query_weight.dim() == 2
        and row_keys.dim() == col_keys.dim()
        and row_keys.dim() in (2, 3)
        and row_keys.shape[-1] > 0
    )


def _describe_sizes(query_weight: Tensor, row_keys: Tensor, col_keys: Tensor) -> str:
    dim_key = 2 * row_keys.shape[-1]
    return (
        f"dim={query_weight.shape[-1]}, num_experts=({row_keys.shape[-2]}, {col_keys.shape[-2]}), "
        f"heads={query_weight.shape[0] // dim_key}, dim_key={dim_key}, "
        f"share_keys={row_keys.dim() == 2}"
    )


@torch.no_grad()
def fold_key_norm_(module: Module) -> Module:
    """Writes normalised keys into their parameters, for inference.

    Outputs are equal bit by bit, and calls no longer normalise the keys. Afterwards `key_norm` is
    False, so the state loads into a router with `key_norm=False`. Training would then change the
    lengths of the keys, too.

    Args:
        module: a `ProductKeyRouter`, a `PEER` or a module that contains some, in any mode. It is
            changed in place.

    Returns:
        The module.

    Raises:
        ValueError: no router in the module has `key_norm=True`.

    Example:
        >>> import torch, peer
        >>> options = dict(num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> layer = peer.PEER(8, **options, key_norm=True).eval()
        >>> x = torch.randn(3, 8)
        >>> before = layer(x)
        >>> bool((peer.fold_key_norm_(layer)(x) == before).all())
        True
    """
    routers = [
        part for part in module.modules() if isinstance(part, ProductKeyRouter) and part.key_norm
    ]
    if not routers:
        raise ValueError("expected a module with a router whose key_norm is True, found none")
    # All before the first write, because routers may share a parameter.
    effective = [router.effective_keys() for router in routers]
    for router, (row_keys, col_keys) in zip(routers, effective, strict=True):
        router.row_keys.copy_(row_keys)
        router.col_keys.copy_(col_keys)
        router.key_norm = False
    return module


@torch.no_grad()
def fold_query_norm_(module: Module) -> Module:
    r"""Folds batch normalisation of the queries into the query projections, for inference.

    With the running mean :math:`\mu` and variance :math:`\sigma^2`, a feature of the query is
    :math:`w (a^\top x + c - \mu) / \sqrt{\sigma^2 + \epsilon} + b`. That is a linear function with
    the weights :math:`g a` and the bias :math:`g (c - \mu) + b`, where
    :math:`g = w / \sqrt{\sigma^2 + \epsilon}`. Outputs are equal up to rounding. Afterwards `query`
    has a bias and `norm` is the identity, so the state loads into a router with
    `query_norm=None, query_bias=True`.

    Args:
        module: a `ProductKeyRouter`, a `PEER` or a module that contains some, in evaluation mode.
            It is changed in place.

    Returns:
        The module.

    Raises:
        ValueError: no router in the module has `query_norm="batch"`, or one is in training mode.

    Source: arXiv 1502.03167, section 3.1.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4).eval()
        >>> x = torch.randn(3, 8)
        >>> before = layer(x)
        >>> torch.testing.assert_close(peer.fold_query_norm_(layer)(x), before)
    """
    routers = [
        (part, part.norm)
        for part in module.modules()
        if isinstance(part, ProductKeyRouter) and isinstance(part.norm, _BatchNorm)
    ]
    if not routers:
        raise ValueError("expected a module with a router whose query_norm is 'batch', found none")
    if any(norm.training or norm.running_mean is None for _, norm in routers):
        raise ValueError(
            "batch normalisation cannot be folded while it uses the statistics of each batch; call "
            "eval() first"
        )
    for router, norm in routers:
        query = router.query
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        gain = norm.weight.double() * (variance + norm.eps).rsqrt()
        offset = -mean if query.bias is None else query.bias.double() - mean
        bias = (gain * offset + norm.bias.double()).to(query.weight.dtype)
        query.weight.copy_(gain[:, None] * query.weight.double())
        if query.bias is None:
            query.bias = nn.Parameter(bias, requires_grad=query.weight.requires_grad)
        else:
            query.bias.copy_(bias)
        router.norm = nn.Identity()
        router.masks_padding = False
        router.query_norm, router.query_bias = None, True
    return module
