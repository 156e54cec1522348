"""What a model of transformers must know to be saved with PEER layers and loaded again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peer.swap.blocks import Block
from peer.swap.saved import describe_layers, layer_in

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

__all__ = [
    "METHOD",
    "mark_blocks",
    "outermost_models",
    "prepare_saving",
    "require_savable",
    "update_config",
]

# The name of the quantizer, and of this package in config.json.
METHOD = "peer"


def outermost_models(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module that are not inside another one."""
    # Not before: the quantizer is registered while transformers imports this module.
    from transformers.modeling_utils import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [inner for child in model.children() for inner in outermost_models(child)]


def require_savable(model: nn.Module) -> None:
    """Checks that `save_pretrained` will be able to save PEER layers in a model.

    Raises:
        ValueError: the model is a part of a model of transformers, which has no configuration of
            its own, or a model is quantized.
    """
    inner = outermost_models(model)
    inside = {id(part) for each in inner for part in each.modules()}
    for part in model.modules():
        if type(part).__module__.startswith("transformers.models.") and id(part) not in inside:
            raise ValueError(
                f"expected the whole model of transformers, whose config.json says what layers it "
                f"has, got {type(model).__name__} with a {type(part).__name__}; to choose parts, "
                f"use filter_fn"
            )
    for each in inner:
        method = _method(getattr(each.config, "quantization_config", None))
        if method not in (None, METHOD):
            raise ValueError(
                f"expected a model that is not quantized, got one quantized by {method!r}; "
                f"config.json has a single place for both"
            )


def prepare_saving(model: nn.Module, placed: list[tuple[Block, nn.Module]]) -> None:
    """Writes the layers of all models of transformers in a module into their configurations."""
    for each in outermost_models(model):
        parts = {id(part) for part in each.modules()}
        mark_blocks([pair for pair in placed if id(pair[1]) in parts])
        update_config(each)


def update_config(model: PreTrainedModel) -> None:
    """Writes the PEER layers that a model has now into its configuration.

    `peer.replace_ffn_` and `from_pretrained` do so. transformers 5 needs no more, because it loads
    layers by the sizes and the masks in the files. Before version 5, call this function before
    `save_pretrained` if layers have grown or been folded, or experts been frozen or disabled, since
    then. Otherwise loading raises an error.

    Args:
        model: the model.

    Raises:
        ValueError: the model has no PEER layer.
    """
    model.config.quantization_config = {"quant_method": METHOD, **describe_layers(model)}


def mark_blocks(placed: list[tuple[Block, nn.Module]]) -> None:
    """Makes an error of loading a model with PEER layers without peer.

    Without peer, transformers builds the dense block, warns that the quantizer is unknown, finds
    no weights of the block in the file and initialises them at random. So the file gets a weight
    of the block that has another shape, which transformers does not accept.
    """
    for block, module in placed:
        for name in block.parameters:
            path = name.split(".")
            # Mixtures merge and split weights of experts when they are loaded and saved.
            if path[0] == "experts" or path[0] in module._modules:
                continue
            _mark(module, path)
            break
        layer = layer_in(module)
        assert layer is not None
        for part in layer.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]  # in another way


def _mark(module: nn.Module, path: list[str]) -> None:
    layer = layer_in(module)
    assert layer is not None
    for part in path[:-1]:
        module.add_module(part, _Marker())
        module = module.get_submodule(part)
    marker = torch.ones(1, dtype=torch.uint8, device=layer.experts.weight.device)
    module.register_buffer(path[-1], marker)


class _Marker(nn.Module):
    """Holds the weight that stands for those of the block that is gone."""


def _method(config: Any) -> str | None:
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))
