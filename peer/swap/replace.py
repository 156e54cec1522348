"""Replaces feed-forward blocks of a model by PEER layers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peer._counts import count_peer
from peer.layer_config import PEERConfig
from peer.modules import PEER, ExpertPool
from peer.swap.blocks import Block, block_at, find_blocks
from peer.swap.layers import BesidePEER
from peer.swap.saved import factory_of, layer_in, place_layers, refer_to_pool_
from peer.swap.table import Replacement, Replacements

__all__ = ["replace_ffn_", "replace_from_config_"]

_MODES = ("replace", "beside")


def replace_ffn_(
    model: nn.Module,
    config: PEERConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mode: str = "replace",
    dry_run: bool = False,
) -> Replacements:
    """Replaces feed-forward blocks of a model by PEER layers.

    Blocks are found by their structure and their names: `torch.nn.TransformerEncoderLayer` and
    `TransformerDecoderLayer`, the MLPs of transformers and timm, gated or not, mixtures of experts
    as a whole, and blocks that BERT-like and BART-like layers split. What stands before and after
    the block does not change. Dropout inside the block disappears with it; the option `dropout` of
    the configuration is its counterpart.

    A layer has the device, the dtype and the training mode of its block. On the meta device it is
    not initialised.

    The model calls the layer without a padding mask. With `query_norm="batch"`, padding and later
    tokens then take part in the statistics of training; "rms" and "layer" treat each token alone.

    In a model of transformers, `save_pretrained` and `from_pretrained` then work, see `peer.hf`.
    For other models, see `peer.save_config`.

    Args:
        model: the model that contains the blocks. It is changed in place.
        config: the options of the layers.
        filter_fn: gets a block and its name, and says whether to replace it. All blocks by default.
            If it accepts no block that is found, the modules that it accepts are replaced if
            `config.dim` says their width: the caller then knows that they map (..., dim) to
            (..., dim) and that only their output is added to the residual stream.
        mode: "replace", or "beside": the block stays, and a layer whose output is zero at first is
            added to it. The outputs of the model do not change by a bit then, until it is trained.
        dry_run: whether to change nothing and only return the table.

    Returns:
        A sequence with one entry per layer, which prints as a table: name, what stood and stands
        there, parameters, active parameters and forward FLOPs per token.

    Raises:
        ValueError: there is no block, the filter accepts none, a width does not fit, or `mode` is
            unknown. Nothing is changed.
        TypeError: an argument is of the wrong type. Nothing is changed.

    Example:
        >>> import torch, peer
        >>> layer = torch.nn.TransformerEncoderLayer(64, nhead=4, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=3)
        >>> config = peer.PEERConfig(
        ...     num_experts=32**2, heads=2, num_experts_per_head=8, dim_key=16, query_norm="rms"
        ... )
        >>> replaced = peer.replace_ffn_(model, config, lambda module, name: "layers.1" in name)
        >>> replaced.names
        ['layers.1.linear1']
        >>> model(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected a torch.nn.Module, not scripted, got {type(model).__name__}")
    if not isinstance(config, PEERConfig):
        raise TypeError(f"expected a peer.PEERConfig, got {type(config).__name__}")
    if mode not in _MODES:
        raise ValueError(f"expected mode to be 'replace' or 'beside', got {mode!r}")
    _require_whole_model(model)
    blocks = _choose(model, config, filter_fn)
    _check_widths(blocks, config)
    if mode == "beside":
        config = replace(config, zero_init_out=True)
    placed: list[tuple[Block, nn.Module]] = []
    pool: ExpertPool | None = None
    for block in blocks:
        device, dtype = factory_of(block)
        if dry_run:
            device = torch.device("meta")
        layer = config.make(block.dim, experts=pool, device=device, dtype=dtype)
        if pool is not None:
            refer_to_pool_(layer)
        elif config.share_experts:
            pool = layer.experts
        layer.train(block.module.training)
        placed.append((block, block.wrap(layer, mode == "beside")))
    table = _table(placed)
    if not dry_run:
        for block, module in placed:
            block.install(module)
        _finish(model, placed)
    return table


def replace_from_config_(
    model: nn.Module, config: Mapping[str, Any] | str | os.PathLike[str]
) -> Replacements:
    """Gives a model the PEER layers of a file of `peer.save_config`, for a state to be loaded.

    Args:
        model: the model, built as the saved one was before its blocks were replaced. It is changed
            in place. The layers have the device and dtype of the blocks.
        config: the file, or its contents.

    Returns:
        What was replaced, as `peer.replace_ffn_`.

    Raises:
        ValueError: the file has another version, or the model lacks a block that it names. Nothing
            is changed.

    Example:
        See `peer.save_config`.
    """
    description: Any = config
    if isinstance(config, (str, os.PathLike)):
        description = json.loads(Path(config).read_text())
    _require_whole_model(model)
    placed = place_layers(model, description)
    _finish(model, placed)
    return _table(placed)


def _choose(
    model: nn.Module, config: PEERConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> list[Block]:
    found = find_blocks(model)
    if filter_fn is None:
        if not found:
            raise ValueError(
                f"found no feed-forward block in {type(model).__name__}; pass filter_fn, which "
                f"says for a module and its name whether to replace it, and PEERConfig(dim=...), "
                f"the width that each of these modules maps to itself"
            )
        return found
    chosen = [block for block in found if filter_fn(block.module, block.name)]
    if chosen:
        return chosen
    accepted = [name for name, part in model.named_modules() if name and filter_fn(part, name)]
    accepted = [name for name in accepted if layer_in(model.get_submodule(name)) is None]
    listed = f"the blocks of {type(model).__name__} are {_list([b.name for b in found])}"
    if not found:
        listed = f"{type(model).__name__} has no block of a known structure"
    if not accepted:
        raise ValueError(f"filter_fn accepts no feed-forward block; {listed}")
    if config.dim is None:
        raise ValueError(
            f"filter_fn accepts {_list(accepted)}, no known feed-forward blocks; {listed}. If each "
            f"of these modules maps (..., dim) to (..., dim), pass PEERConfig(dim=...)"
        )
    for name in accepted:
        inner = [other for other in accepted if other.startswith(f"{name}.")]
        if inner:
            raise ValueError(
                f"filter_fn accepts {name!r} and also {_list(inner)} inside it; accept one of them"
            )
    return [block_at(model, name, config.dim) for name in accepted]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def _check_widths(blocks: list[Block], config: PEERConfig) -> None:
    for block in blocks:
        if config.dim not in (None, block.dim):
            raise ValueError(
                f"expected blocks of width dim={config.dim}, got {block.name!r} "
                f"({block.description}) of width {block.dim}; leave dim out, or choose blocks with "
                f"filter_fn"
            )
    if config.share_experts:
        first = blocks[0]
        for block in blocks:
            if (block.dim, *factory_of(block)) != (first.dim, *factory_of(first)):
                raise ValueError(
                    f"share_experts=True needs blocks of one width, device and dtype, got "
                    f"{first.name!r} of width {first.dim} ({_factory_text(first)}) and "
                    f"{block.name!r} of width {block.dim} ({_factory_text(block)})"
                )


def _factory_text(block: Block) -> str:
    device, dtype = factory_of(block)
    return f"{dtype} on {device}"


def _table(placed: list[tuple[Block, nn.Module]]) -> Replacements:
    entries = []
    pools: set[int] = set()
    for block, module in placed:
        layer = layer_in(module)
        assert layer is not None
        after = count_peer(layer)
        if id(layer.experts) in pools:
            after = after._replace(parameters=after.parameters - layer.experts.weight.numel())
        pools.add(id(layer.experts))
        text = _describe(layer)
        if isinstance(module, BesidePEER):
            after, text = after + block.counts, f"block + {text}"
        entries.append(Replacement(block.name, block.description, text, block.counts, after))
    return Replacements(entries)


def _describe(layer: PEER) -> str:
    router = layer.router
    return (
        f"PEER: {router.num_experts:,} experts, {router.heads} x {router.num_experts_per_head} "
        f"per token"
    )


def _require_whole_model(model: nn.Module) -> None:
    if "transformers.modeling_utils" in sys.modules:
        from peer.hf import saving

        saving.require_savable(model)


def _finish(model: nn.Module, placed: list[tuple[Block, nn.Module]]) -> None:
    """What the model itself must know of layers that were put into it."""
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder):
            has_layers = any(layer_in(inner) is not None for inner in part.modules())
            # The layers take no nested tensors.
            part.use_nested_tensor = bool(part.use_nested_tensor) and not has_layers
    if "transformers.modeling_utils" in sys.modules:
        from peer.hf import saving

        saving.prepare_saving(model, placed)
