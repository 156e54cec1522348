"""The quantizer that gives a model its PEER layers while `from_pretrained` loads it.

Importing this module registers it. `peer` does so when transformers has its registry.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peer.hf.saving import METHOD, mark_blocks, update_config
from peer.memory import empty_huge
from peer.modules import ExpertPool
from peer.modules.masks import POOL_MASKS, ROUTER_MASKS
from peer.swap.saved import layer_in, place_layers

__all__ = ["PEERLayersConfig", "PEERLayersQuantizer"]


@register_quantization_config(METHOD)
class PEERLayersConfig(QuantizationConfigMixin):
    """The PEER layers of a model in its `config.json`.

    Args:
        layers: see `peer.swap.saved`.
        version: of this description.
        quant_method: its name in the registry of transformers.
    """

    def __init__(
        self, layers: Mapping[str, Any], version: int = 1, quant_method: str = METHOD, **_: Any
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.layers = dict(layers)


@register_quantizer(METHOD)
class PEERLayersQuantizer(HfQuantizer):
    """Puts PEER layers in the place of the blocks that they replaced. It quantizes nothing."""

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                "from_pretrained loads PEER layers that were saved, and adds none to others; "
                "call peer.replace_ffn_ after loading"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers = self.quantization_config.layers
        sizes = _Sizes(kwargs.get("checkpoint_files") or ())
        names = {name: _resolve(model, name) for name in layers}
        current = {}
        for name, entry in layers.items():
            entry = sizes.apply(name, entry)
            if "pool" in entry:
                entry["pool"] = names[entry["pool"]]
            current[names[name]] = entry
        placed = place_layers(
            model, {"version": self.quantization_config.version, "layers": current}
        )
        mark_blocks(placed)
        self._names = list(current)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers = [layer_in(model.get_submodule(name)) for name in self._names]
        for layer in layers:
            assert layer is not None
            if layer.router.frozen is not None:
                layer.router._apply_frozen_state()
        for part in model.modules():
            if isinstance(part, ExpertPool):
                _move_to_huge_pages(part)
        # Nothing is quantized. With these attributes, Trainer would not train the model, and half()
        # and float() would raise.
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        model.is_quantized = False
        for part in model.modules():
            for name in ("_is_quantized", "_pre_quantization_dtype"):
                if hasattr(getattr(part, "config", None), name):
                    delattr(part.config, name)
        update_config(model)
        return model

    # transformers before version 5 does not tell which files it loads, but calls these methods with
    # the names that the files lack or have in excess. Missing weights would be left uninitialised,
    # and masks in excess dropped. Version 5 does not call them.

    def update_missing_keys(self, model: Any, missing_keys: list[str], *_: Any) -> list[str]:
        """Raises ValueError if the files lack a weight of a layer."""
        self._check_keys("lack", missing_keys)
        return missing_keys

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], *_: Any) -> list[str]:
        """Raises ValueError if the files have a tensor that a layer has not."""
        self._check_keys("have in addition", unexpected_keys)
        return unexpected_keys

    def _check_keys(self, problem: str, keys: Iterable[str]) -> None:
        names = tuple(f"{name}." for name in self._names)
        wrong = sorted(key for key in keys if key.startswith(names))
        if wrong:
            raise ValueError(
                f"config.json describes PEER layers as they were earlier: the files {problem} "
                f"{', '.join(wrong[:4])}; load the model with transformers 5, or call "
                f"peer.hf.update_config(model) before saving it"
            )

    @property
    def is_trainable(self) -> bool:
        """Whether a model can be trained."""
        return True

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Whether a model can be saved."""
        return True


def _resolve(model: Any, name: str) -> str:
    """The name of a block in a model that may have another head than the saved one."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ValueError(
        f"config.json names a PEER layer at {name!r}, where {type(model).__name__} has no module"
    )


def _move_to_huge_pages(pool: ExpertPool) -> None:
    weight = pool.weight
    if weight.device.type == "cpu" and type(weight.data) is torch.Tensor:
        table = empty_huge(*weight.shape, dtype=weight.dtype)
        table.copy_(weight.detach())
        weight.data = table


class _Sizes:
    """The shapes of a checkpoint's tensors.

    Layers can grow, and experts can be frozen, after config.json got its description. Loading goes
    by what the files hold.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            self.shapes.update(_shapes_in(Path(file)))

    def apply(self, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry of a layer with the sizes and the masks that its tensors have.

        Raises:
            ValueError: the files lack a parameter of the layer. transformers would leave it
                uninitialised.
        """
        entry = {**entry, "options": dict(entry["options"])}
        shapes = self.shapes
        if not shapes:
            return entry  # from_pretrained got a state and no files
        prefix = self._prefix(name)
        needed = ["router.query.weight", "router.row_keys", "router.col_keys"]
        needed += [] if "pool" in entry else ["experts.weight"]
        missing = [key for key in needed if f"{prefix}{key}" not in shapes]
        if missing:
            raise ValueError(
                f"config.json names a PEER layer at {name!r}, but the files lack its "
                f"{', '.join(missing)}"
            )
        rows = shapes[f"{prefix}router.row_keys"][-2]
        entry["options"]["num_experts"] = [rows, shapes[f"{prefix}router.col_keys"][-2]]
        if f"{prefix}experts.weight" in shapes:
            entry["options"]["pool_size"] = shapes[f"{prefix}experts.weight"][0]
        if f"{prefix}router.norm.weight" not in shapes:
            entry["options"]["query_norm"] = None
        entry["options"]["query_bias"] = f"{prefix}router.query.bias" in shapes
        masks = [f"experts.{mask}" for mask in POOL_MASKS]
        masks += [f"router.{mask}" for mask in ROUTER_MASKS]
        entry["masks"] = [mask for mask in masks if f"{prefix}{mask}" in shapes]
        return entry

    def _prefix(self, name: str) -> str | None:
        """The beginning of the names of a layer's tensors, or None if they are not there."""
        ending = "router.row_keys"
        for prefix in (f"{name}.", f"{name}.peer."):
            if f"{prefix}{ending}" in self.shapes:
                return prefix
        # transformers saves some models under other names than those of their modules. The numbers
        # of layers are the same.
        found = [key[: -len(ending)] for key in self.shapes if key.endswith(f".{ending}")]
        alike = [key for key in found if _numbers(key) == _numbers(name)]
        return alike[0] if len(alike) == 1 else None


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        return {
            name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        }
    state = torch.load(file, map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
