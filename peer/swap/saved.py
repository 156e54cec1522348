"""Describes the PEER layers of a model, and puts layers of a description into a model.

A description is made of JSON types:

    {"version": 1, "layers": {"blocks.3.mlp": {"mode": "replace", "options": {...}}, ...}}

The name is that of the module in the place of a feed-forward block. The options are those of
`peer.PEER` as the layer has them now, after growth and folding. A layer that uses the pool of an
earlier one has its name as "pool". The names of masks that exist are under "masks", because a mask
loads only into a layer that has one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peer.modules import PEER, ExpertPool
from peer.modules.masks import POOL_MASKS, ROUTER_MASKS
from peer.swap.blocks import Block, block_at, find_blocks
from peer.swap.layers import BesidePEER, WithMoreOutputs

__all__ = ["describe_layers", "layer_in", "place_layers", "refer_to_pool_", "save_config"]

VERSION = 1

_POOL_OPTIONS = ("activation", "glu", "num_experts_per_token", "sparse_grad", "zero_init_out")
_ROUTER_OPTIONS = (
    "heads",
    "num_experts_per_head",
    "dim_key",
    "scores",
    "query_norm",
    "query_bias",
    "share_keys",
    "key_norm",
)


def describe_layers(model: nn.Module) -> dict[str, Any]:
    """The description of the PEER layers of a model.

    Raises:
        ValueError: the model has no layer.
    """
    layers: dict[str, dict[str, Any]] = {}
    owners: dict[int, str] = {}
    inside: set[int] = set()  # the layers inside the modules that are described
    for name, module in model.named_modules():
        layer = layer_in(module)
        if layer is None or id(module) in inside:
            continue
        if layer is not module:
            inside.add(id(layer))
        entry: dict[str, Any] = {
            "mode": "beside" if isinstance(module, BesidePEER) else "replace",
            "options": _options_of(layer),
        }
        masks = [f"experts.{mask}" for mask in POOL_MASKS if _has(layer.experts, mask)]
        masks += [f"router.{mask}" for mask in ROUTER_MASKS if _has(layer.router, mask)]
        if masks:
            entry["masks"] = masks
        owner = owners.setdefault(id(layer.experts), name)
        if owner != name:
            entry["pool"] = owner
        layers[name] = entry
    if not layers:
        raise ValueError(f"expected a model with a PEER layer, got {type(model).__name__}")
    return {"version": VERSION, "layers": layers}


def layer_in(module: nn.Module) -> PEER | None:
    """The layer of a module that stands in the place of a block, or None for other modules."""
    if isinstance(module, (BesidePEER, WithMoreOutputs)):
        return module.peer
    return module if isinstance(module, PEER) else None


def refer_to_pool_(layer: PEER) -> None:
    """Makes a layer use a pool that another layer holds.

    The pool is then no submodule of this layer. A model has it once: in its state, for every format
    of files, in its modules and in its parameters.
    """
    layer.__dict__["experts"] = layer._modules.pop("experts")


def _has(module: nn.Module, mask: str) -> bool:
    return getattr(module, mask) is not None


def _options_of(layer: PEER) -> dict[str, Any]:
    router, pool = layer.router, layer.experts
    return {
        "dim": router.dim,
        "num_experts": [router.rows, router.columns],
        "pool_size": pool.num_experts,
        **{name: getattr(router, name) for name in _ROUTER_OPTIONS},
        **{name: getattr(pool, name) for name in _POOL_OPTIONS},
        "dropout": layer.dropout,
    }


def place_layers(model: nn.Module, description: Mapping[str, Any]) -> list[tuple[Block, nn.Module]]:
    """Puts the layers of a description into a model that has feed-forward blocks in their places.

    The layers have the device and the dtype of the blocks. Their parameters are not initialised
    from anything but random numbers: load a state afterwards.

    Args:
        model: the model, built as it was before its blocks were replaced.
        description: see `describe_layers`. Names for which the model has a PEER layer already are
            left out.

    Returns:
        The blocks and what now stands in their places.

    Raises:
        ValueError: the description is not one, or the model has no block of a width at a name.
            Nothing is changed.
    """
    layers = _check(description)
    found = {block.name: block for block in find_blocks(model)}
    placed: list[tuple[Block, nn.Module]] = []
    pools: dict[str, ExpertPool] = {}
    for name, entry in layers.items():
        dim = entry["options"]["dim"]
        block = found.get(name)
        if block is None:
            try:
                present = layer_in(model.get_submodule(name))
            except AttributeError:
                raise ValueError(
                    f"expected a feed-forward block at {name!r}, but {type(model).__name__} has no "
                    f"module of this name; build the model as it was before peer.replace_ffn_"
                ) from None
            if present is not None:
                pools[name] = present.experts
                continue
            block = block_at(model, name, dim)
        if block.dim != dim:
            raise ValueError(
                f"expected a block of width {dim} at {name!r}, got {block.description} of width "
                f"{block.dim}"
            )
        device, dtype = factory_of(block)
        pool = pools.get(entry.get("pool", ""))
        layer = _build(entry, pool, device, dtype)
        if pool is not None:
            refer_to_pool_(layer)
        pools[name] = layer.experts
        layer.train(block.module.training)
        placed.append((block, block.wrap(layer, entry["mode"] == "beside")))
    for block, module in placed:
        block.install(module)
    return placed


def factory_of(block: Block) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a block, for what replaces it.

    Raises:
        ValueError: the block has no floating-point parameter that shows them, or its weights are
            offloaded.
    """
    for parameter in block.parameters.values():
        if parameter.is_meta and any(hasattr(part, "_hf_hook") for part in block.module.modules()):
            raise ValueError(
                f"expected the weights of {block.name!r} in memory, but accelerate offloads them; "
                f"replace blocks before the model is dispatched"
            )
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    raise ValueError(
        f"expected {block.name!r} ({block.description}) to have a floating-point parameter, which "
        f"shows the device and the dtype of the layer"
    )


def _check(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    version = description.get("version") if isinstance(description, Mapping) else None
    if version != VERSION:
        raise ValueError(
            f"expected a description of PEER layers of version {VERSION}, got version {version!r}"
        )
    layers: dict[str, dict[str, Any]] = description["layers"]
    return layers


def _build(
    entry: Mapping[str, Any], pool: ExpertPool | None, device: torch.device, dtype: torch.dtype
) -> PEER:
    options = dict(entry["options"])
    dim, grid = options.pop("dim"), tuple(options.pop("num_experts"))
    pool_size = options.pop("pool_size")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    if pool is None:
        pooling = {name: options[name] for name in _POOL_OPTIONS}
        pool = ExpertPool(dim, num_experts=pool_size, **pooling, **factory)
    routing = {name: options[name] for name in (*_ROUTER_OPTIONS, "dropout")}
    layer = PEER(dim, num_experts=grid, experts=pool, **routing, **factory)
    _register_masks(layer, entry.get("masks", ()))
    return layer


def _register_masks(layer: PEER, masks: Any) -> None:
    """Gives a layer masks that mark nothing, into which those of a state load."""
    router, pool = layer.router, layer.experts
    keys, other_keys = router.row_keys, router.col_keys
    kept = {"router.kept_row_keys": keys, "router.kept_col_keys": other_keys}
    sizes = {
        "experts.frozen": (pool.num_experts,),
        "experts.disabled": (pool.num_experts,),
        "router.frozen_rows": (router.rows,),
        "router.frozen_columns": (router.columns,),
        "router.frozen": (),
    }
    for mask in masks:
        part, _, name = mask.partition(".")
        if mask in kept:
            buffer = kept[mask].detach().clone()
        else:
            buffer = torch.zeros(sizes[mask], dtype=torch.bool, device=keys.device)
        setattr(getattr(layer, part), name, buffer)
    if "router.frozen" in masks:
        router._apply_frozen_state()


def save_config(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes what PEER layers a model has to a JSON file, for `peer.replace_from_config_`.

    The state does not say it: a model that is built again has its dense blocks. A model of
    transformers needs no such file, since `save_pretrained` writes its `config.json`.

    Args:
        model: a model with at least one PEER layer, in the place of a block.
        path: the file.

    Raises:
        ValueError: the model has no PEER layer.

    Example:
        >>> import os, tempfile, torch, peer
        >>> make = lambda: torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
        >>> model, config = make(), peer.PEERConfig(num_experts=64, heads=2, dim_key=8)
        >>> _ = peer.replace_ffn_(torch.nn.ModuleList([model]), config)
        >>> path = os.path.join(tempfile.mkdtemp(), "peer.json")
        >>> peer.save_config(torch.nn.ModuleList([model]), path)
        >>> fresh = torch.nn.ModuleList([make()])
        >>> peer.replace_from_config_(fresh, path).names
        ['0.linear1']
        >>> fresh[0].load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    text = json.dumps(describe_layers(model), indent=2)
    Path(path).write_text(text + "\n")
