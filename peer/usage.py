"""Expert usage and unevenness."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer._evaluate import padding_mask, run_batches
from peer.modules import PEER, ExpertPool, ProductKeyRouter

__all__ = ["UsageTracker", "count_usage"]


class UsageTracker:
    r"""Accumulates the router weight of each expert while data passes through layers.

    The tracker hooks into the forward pass of the layers. It sums the router weights of expert e
    over all tokens x that are not padding: :math:`z'_e = \sum_x g_e(x)`. An expert that x did not
    retrieve has :math:`g_e(x) = 0`. With :math:`z = z' / \lVert z' \rVert_1`,

    * usage is the fraction of experts with :math:`z_e \ne 0`;
    * unevenness is :math:`\mathrm{KL}(z \,\|\, \mathrm{uniform}) = \log N + \sum_e z_e \log z_e`
      in nats: 0 if all experts are used equally, log N if only one is used.

    The weights are those before dropout. Retrievals with a weight that is not finite do not count.
    `mass` and `counts` stay on the device of the layers. If a layer grows, they grow in its next
    call. As a context manager, the tracker stops at the end of the block.

    Args:
        layers: `PEER` layers or routers with the same number of experts, or `PEER` layers that
            share a pool. The tracker sums over all of them.

    Attributes:
        mass: (N,) float64, the sums :math:`z'`. N is the largest number of experts of a layer.
        counts: (N,) int64, the number of retrievals of each expert.

    Raises:
        TypeError: an argument is not a layer or a router; scripted modules are not.
        ValueError: there is no layer, or layers of different pools have different numbers of
            experts.

    Source: arXiv 2407.04153, table 2.

    Example:
        >>> import math, torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> with peer.UsageTracker(layer) as tracker:
        ...     _ = layer(torch.randn(100, 8))
        >>> int(tracker.counts.sum()), tracker.unevenness() < math.log(16)
        (800, True)
    """

    mass: Tensor
    counts: Tensor

    def __init__(self, *layers: PEER | ProductKeyRouter) -> None:
        routers = [layer.router if isinstance(layer, PEER) else layer for layer in layers]
        for router in routers:
            if not isinstance(router, ProductKeyRouter):
                raise TypeError(
                    f"expected PEER layers or ProductKeyRouters, got {type(router).__name__}"
                )
        if not routers:
            raise ValueError("expected at least one layer")
        sizes = {router.num_experts for router in routers}
        pools = {layer.experts if isinstance(layer, PEER) else None for layer in layers}
        if len(sizes) > 1 and (len(pools) > 1 or None in pools):
            raise ValueError(
                f"expected layers that share a pool or have the same number of experts, got "
                f"{sorted(sizes)}"
            )
        device = routers[0].row_keys.device
        with torch.inference_mode(False):
            self.mass = torch.zeros(max(sizes), dtype=torch.float64, device=device)
            self.counts = torch.zeros(max(sizes), dtype=torch.int64, device=device)
        self._hooks = [
            router.register_forward_hook(self._observe, with_kwargs=True)
            for router in dict.fromkeys(routers)
        ]

    @torch.no_grad()
    def _observe(
        self,
        router: ProductKeyRouter,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: tuple[Tensor, Tensor],
    ) -> None:
        weights, indices = output
        mask = padding_mask(arguments, keywords)
        added = router.num_experts - len(self.counts)
        if added > 0:  # the layer has grown
            with torch.inference_mode(False):
                self.mass = F.pad(self.mass, (0, added))
                self.counts = F.pad(self.counts, (0, added))
        is_counted = _is_counted(weights, mask)
        self.mass = _add_uses(self.mass, indices, torch.where(is_counted, weights, 0))
        self.counts = _add_uses(self.counts, indices, is_counted)

    def usage(self) -> float:
        """The fraction of experts with a nonzero sum of weights, in [0, 1]."""
        return float((self.mass != 0).double().mean())

    def unevenness(self) -> float:
        """KL(z || uniform) in nats, in [0, log N]. NaN if no expert was used."""
        z = self.mass / self.mass.sum()
        divergence = math.log(len(z)) + torch.special.xlogy(z, z).sum()
        return float(divergence.clamp(min=0.0))  # rounding may give a negative sum

    def reset(self) -> None:
        """Sets `mass` and `counts` to zero."""
        self.mass.zero_()
        self.counts.zero_()

    def remove(self) -> None:
        """Removes the hooks. `mass` and `counts` keep their values."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> UsageTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def count_usage(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Counts how often each expert is retrieved while data passes through a model.

    The model runs in evaluation mode and without gradients, and every module's mode is restored.
    A retrieval counts whatever its router weight is, if that is finite. Tokens that the
    `padding_mask` of a `PEER` layer marks do not count. Layers that share a pool add to the same
    counts.

    Args:
        model: a model with at least one `ExpertPool`, as in `PEER` layers. Compiled parts run
            eagerly.
        batches: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list
            of positional arguments, or any other object as the only argument.

    Returns:
        For each pool, by its name in `model.named_modules()`, the number of retrievals of each
        expert, (N,), int64, on the device of the table.

    Raises:
        ValueError: the model has no pool; scripted pools are not found.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> counts = peer.count_usage(layer, [torch.randn(100, 8), torch.randn(5, 20, 8)])
        >>> {name: int(count.sum()) for name, count in counts.items()}
        {'experts': 1600}
    """
    pools = {
        name: module for name, module in model.named_modules() if isinstance(module, ExpertPool)
    }
    if not pools:
        raise ValueError("expected a model with an ExpertPool, such as that of a PEER layer")
    with torch.inference_mode(False):
        counts = {
            name: torch.zeros(pool.num_experts, dtype=torch.int64, device=pool.weight.device)
            for name, pool in pools.items()
        }
    # A pool does not see the mask. So the layer notes its mask before the call, and drops it after.
    masks: dict[nn.Module, Tensor | None] = {}  # of the layers that are being called, in order

    def note_mask(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        masks[layer] = padding_mask(arguments, keywords)

    def drop_mask(layer: nn.Module, *_: object) -> None:
        masks.pop(layer, None)

    def count_in(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            weights = arguments[1] if len(arguments) > 1 else keywords["weights"]
            indices = arguments[2] if len(arguments) > 2 else keywords["indices"]
            mask = next(reversed(masks.values()), None)
            counts[name] = _add_uses(counts[name], indices, _is_counted(weights, mask))

        return hook

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PEER):
                for handle in (
                    module.register_forward_pre_hook(note_mask, with_kwargs=True),
                    module.register_forward_hook(drop_mask, always_call=True),
                ):
                    stack.callback(handle.remove)
        for name, pool in pools.items():
            handle = pool.register_forward_pre_hook(count_in(name), with_kwargs=True)
            stack.callback(handle.remove)
        run_batches(model, batches)
    return counts


def _is_counted(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Which retrievals count: those of tokens that are not padding, with finite weights.

    Args:
        weights: (..., H, K) or (..., P).
        mask: (...) bool, True for padding, or None.

    Returns:
        The shape of the weights, bool.
    """
    is_finite = weights.isfinite()
    if mask is None:
        return is_finite
    trailing = (1,) * (weights.dim() - mask.dim())
    return is_finite & ~mask.reshape(*mask.shape, *trailing)


def _add_uses(total: Tensor, indices: Tensor, uses: Tensor) -> Tensor:
    """Adds the uses of experts.

    Args:
        total: (N,), changed in place if it is on the device of the indices.
        indices: (..., H, K) or (..., P).
        uses: what each retrieval adds, in the shape of the indices.

    Returns:
        The total on the device of the indices.
    """
    total = total.to(indices.device)
    return total.index_add_(0, indices.flatten(), uses.flatten().to(total.dtype))
