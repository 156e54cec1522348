"""Growth of all layers of a model, to given sizes or to those of a state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer._evaluate import padding_mask, run_batches
from peer._growth import require_growable
from peer.modules import PEER, ExpertPool, ProductKeyRouter
from peer.modules.masks import POOL_MASKS, ROUTER_MASKS

__all__ = ["grow_", "grow_to_", "keys_from"]

Module = TypeVar("Module", bound=nn.Module)


def grow_(model: Module, rows: int) -> Module:
    """Appends rows to the grid of every `PEER` layer in a model.

    A router that layers share grows once. A pool that layers share grows once, to what the largest
    of them needs. The keys are drawn. `peer.PEER.grow` describes what else follows. Afterwards,
    call `peer.optim.grow_` for every optimizer.

    Args:
        model: a model with at least one `PEER` layer. It is changed in place.
        rows: how many rows are appended to each grid.

    Returns:
        The model.

    Raises:
        ValueError: the model has no layer, or `rows` is not positive.
        RuntimeError: some keys or a table cannot grow now; see `peer.PEER.grow`. Nothing is
            changed.

    Example:
        >>> import torch, peer
        >>> options = dict(heads=2, num_experts_per_head=4, dim_key=4)
        >>> first = peer.PEER(8, num_experts=(4, 6), **options)
        >>> second = peer.PEER(8, num_experts=(2, 6), experts=first.experts, **options)
        >>> model = peer.grow_(torch.nn.Sequential(first, second), rows=3)
        >>> first.num_experts, second.num_experts, first.experts.num_experts
        (42, 30, 42)
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, PEER)}
    if not layers:
        raise ValueError(f"expected a model with a PEER layer, got {type(model).__name__}")
    keys = {layer.router: layer.router.make_row_keys(rows) for layer in layers.values()}
    missing: dict[ExpertPool, int] = {}
    for layer in layers.values():
        needed = (layer.router.rows + rows) * layer.router.columns - layer.experts.num_experts
        missing[layer.experts] = max(needed, missing.get(layer.experts, 0))
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        require_growable({f"{prefix}router.row_keys": layer.router.row_keys})
        if missing[layer.experts] > 0:
            require_growable({f"{prefix}experts.weight": layer.experts.weight})
    for pool, experts in missing.items():
        if experts > 0:
            pool.grow(experts)
    for router, new_keys in keys.items():
        router.append_row_keys(new_keys)
    return model


@torch.inference_mode(False)
@torch.no_grad()
def grow_to_(model: Module, state_dict: Mapping[str, Any]) -> Module:
    """Gives the layers of a model the sizes and the masks of a state.

    Afterwards the state loads as usual. New rows have the values of the state, old rows keep their
    own. The masks and the kept keys of frozen experts are those of the state; masks that the state
    does not have are removed. A model that has them already does not change.

    It also lets an average of the model follow its growth, with new rows that begin at the model's:
    `peer.grow_to_(averaged.module, model.state_dict())`.

    Args:
        model: a model with at least one `ProductKeyRouter` or `ExpertPool`. It is changed in place.
        state_dict: the state of a model of the same structure.

    Returns:
        The model.

    Raises:
        ValueError: the model has neither router nor pool, the state lacks a part of the model, or
            growth does not lead to its sizes. Nothing is changed.
        RuntimeError: some keys or a table cannot grow now; see `peer.PEER.grow`. Nothing is
            changed.

    Example:
        >>> import peer
        >>> options = dict(num_experts=(4, 6), heads=2, num_experts_per_head=4, dim_key=4)
        >>> layer, other = peer.PEER(8, **options), peer.PEER(8, **options)
        >>> layer.grow(2)
        >>> state = layer.state_dict()
        >>> peer.grow_to_(other, state).load_state_dict(state)
        <All keys matched successfully>
    """
    routers = _parts(model, ProductKeyRouter)
    pools = _parts(model, ExpertPool)
    if not routers and not pools:
        raise ValueError(
            f"expected a model with a router or a pool of experts, got {type(model).__name__}"
        )
    for prefix, router in routers.items():
        rows = router.row_keys.dim() - 2
        _check_parameters(prefix, router, {"row_keys": rows, "col_keys": None}, state_dict)
        row_keys, col_keys = (state_dict[prefix + name].shape for name in ("row_keys", "col_keys"))
        shapes = (row_keys[-2:-1], col_keys[-2:-1], row_keys, col_keys, ())
        _check_masks(prefix, dict(zip(ROUTER_MASKS, shapes, strict=True)), state_dict)
    for prefix, pool in pools.items():
        _check_parameters(prefix, pool, {"weight": 0}, state_dict)
        experts = state_dict[prefix + "weight"].shape[:1]
        _check_masks(prefix, dict.fromkeys(POOL_MASKS, experts), state_dict)
    for prefix, pool in pools.items():
        new = state_dict[prefix + "weight"][pool.num_experts :]
        if len(new) > 0:
            pool.append_experts(new)
        _set_masks(prefix, pool, POOL_MASKS, pool.weight.device, state_dict)
    for prefix, router in routers.items():
        new = state_dict[prefix + "row_keys"][..., router.rows :, :]
        if new.shape[-2] > 0:
            router.append_row_keys(new)
        was_frozen = router.frozen is not None
        _set_masks(prefix, router, ROUTER_MASKS, router.row_keys.device, state_dict)
        if was_frozen != (router.frozen is not None):
            router._apply_frozen_state()
    return model


def keys_from(
    layer: PEER | ProductKeyRouter,
    batches: Iterable[Any],
    rows: int,
    *,
    model: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Takes keys for new rows from the queries of new data.

    The data passes through the model in evaluation mode and without gradients. The function draws
    `rows` of the row halves of the layer's normalised queries: over all tokens that are not padding
    and have finite queries and, if the heads share keys, over all heads. It scales them to the mean
    length of the old keys, so that they compete with old keys by direction alone.

    Args:
        layer: the layer or the router that will grow.
        batches: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list
            of positional arguments, or any other object as the only argument.
        rows: how many keys are drawn.
        model: the model that contains the layer. By default the batches are arguments of the layer.
        generator: a generator on the CPU that draws the queries.

    Returns:
        Keys for `layer.grow`: (rows, dim_key / 2), or (H, rows, dim_key / 2) if the heads do not
        share keys.

    Raises:
        TypeError: `layer` is neither a layer nor a router.
        ValueError: the model does not contain the layer, or the data has fewer queries than `rows`.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=(4, 6), heads=2, num_experts_per_head=4, dim_key=4)
        >>> keys = peer.keys_from(layer, [torch.randn(5, 20, 8)], rows=2)
        >>> layer.grow(2, keys)
        >>> layer.router.rows
        6
    """
    router = layer.router if isinstance(layer, PEER) else layer
    if not isinstance(router, ProductKeyRouter):
        raise TypeError(f"expected a PEER layer or a ProductKeyRouter, got {type(layer).__name__}")
    if rows < 1:
        raise ValueError(f"expected rows to be positive, got {rows}")
    model = layer if model is None else model
    if all(part is not router for part in model.modules()):
        raise ValueError("expected a model that contains the layer")
    masks: list[Tensor | None] = []  # of the call of the router that is running
    # The drawn queries (groups, rows, half) and their random priorities (groups, rows): those of
    # the highest priorities so far. A group is a head, or all heads if they share keys.
    keys = router.effective_keys()[0].detach()
    groups = 1 if router.share_keys else router.heads
    drawn = keys.new_empty(groups, 0, keys.shape[-1])
    priorities = torch.empty(groups, 0)

    def note_mask(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        masks[:] = [padding_mask(arguments, keywords)]

    def draw(_: nn.Module, arguments: tuple[Any, ...], query: Tensor) -> None:
        nonlocal drawn, priorities
        halves = query.view(-1, router.heads, 2, router.dim_key // 2)[:, :, 0]
        (mask,) = masks
        if mask is not None:
            halves = halves[~mask.reshape(-1)]
        halves = halves[halves.isfinite().flatten(1).all(1)]
        halves = halves.flatten(0, 1)[None] if router.share_keys else halves.transpose(0, 1)
        drawn = torch.cat([drawn.to(halves), halves], 1)
        more = torch.rand(halves.shape[:2], generator=generator)
        priorities, best = torch.cat([priorities, more], 1).topk(min(rows, drawn.shape[1]))
        drawn = drawn.take_along_dim(best[..., None].to(drawn.device), 1)

    with ExitStack() as stack:
        for handle in (
            router.register_forward_pre_hook(note_mask, with_kwargs=True),
            router.norm.register_forward_hook(draw),
        ):
            stack.callback(handle.remove)
        run_batches(model, batches)
    if drawn.shape[1] < rows:
        raise ValueError(f"expected data with at least {rows} queries, got {drawn.shape[1]}")
    dtype = torch.promote_types(keys.dtype, torch.float32)
    length = keys.to(dtype).norm(dim=-1).mean(-1).reshape(-1, 1, 1)
    scaled = F.normalize(drawn.to(dtype), dim=-1) * length.to(drawn.device)
    return scaled.to(keys).reshape(*keys.shape[:-2], rows, keys.shape[-1])


Part = TypeVar("Part", ProductKeyRouter, ExpertPool)


def _parts(model: nn.Module, kind: type[Part]) -> dict[str, Part]:
    """The parts of a kind by the prefix of their state."""
    return {
        f"{name}." if name else "": part
        for name, part in model.named_modules()
        if isinstance(part, kind)
    }


def _check_parameters(
    prefix: str, part: nn.Module, rows: Mapping[str, int | None], state_dict: Mapping[str, Any]
) -> None:
    """Checks that the parameters of a part become those of a state by growth.

    Args:
        prefix: the prefix of the part in the state.
        part: the router or the pool.
        rows: for each parameter, the dimension along which it can grow, or None.
        state_dict: the state.
    """
    for name, dim in rows.items():
        here: Tensor = getattr(part, name)
        saved = state_dict.get(prefix + name)
        if not isinstance(saved, Tensor):
            raise ValueError(f"the state has no tensor {prefix}{name}; it is not one of this model")
        if saved.shape == here.shape:
            continue
        grown = list(here.shape)
        if dim is not None and saved.dim() == here.dim():
            grown[dim] = max(grown[dim], saved.shape[dim])
        if grown != list(saved.shape):
            raise ValueError(
                f"growth does not lead to the state: {prefix}{name} has the shape "
                f"{list(here.shape)}, and in the state {list(saved.shape)}"
                + ("" if dim is None else f"; only the size of dimension {dim} can grow")
            )
        require_growable({prefix + name: here})


def _check_masks(
    prefix: str, shapes: Mapping[str, Sequence[int]], state_dict: Mapping[str, Any]
) -> None:
    """Checks the shapes of the masks and the kept keys in a state."""
    for name, shape in shapes.items():
        mask = state_dict.get(prefix + name)
        if mask is not None and tuple(mask.shape) != tuple(shape):
            raise ValueError(
                f"expected {prefix}{name} of shape {list(shape)} in the state, got "
                f"{list(mask.shape)}"
            )


def _set_masks(
    prefix: str,
    part: nn.Module,
    names: Iterable[str],
    device: torch.device,
    state_dict: Mapping[str, Any],
) -> None:
    """Gives a part the masks of a state, and removes those that the state does not have."""
    for name in names:
        here, saved = getattr(part, name), state_dict.get(prefix + name)
        if here is not None and saved is not None and here.shape == saved.shape:
            here.copy_(saved)
        else:
            setattr(part, name, None if saved is None else saved.detach().to(device, copy=True))
