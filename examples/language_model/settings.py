"""The settings of a run: those of the demo, and small ones for tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .model import ModelConfig, PeerConfig

MODELS = ("dense", "peer")


@dataclass(frozen=True)
class Settings:
    """The settings of both models, which are trained on the same tokens in the same order.

    Attributes:
        seed: seed for initialisation and data order.
        steps: optimizer steps for each model.
        batch: windows per step.
        model: sizes of the dense model. The PEER model differs in one block.
        peer: the PEER layer.
        dense_lr: peak learning rate of the dense model.
        peer_lr: peak learning rate of the PEER model outside its PEER layer.
        router_lr: peak learning rate of the layer's query network and keys.
        table_lr: peak learning rate of the expert tables.
        weight_decay: weight decay of the matrices outside the PEER layer.
        warm_up: steps of linear warm-up; a cosine decay to zero follows.
        curve_points: number of evaluations during a run.
        curve_tokens: held-out tokens per evaluation; the final evaluation uses all of them.
        sample_tokens: length of the generated sample in tokens.
        megabytes: approximate amount of text to use, None for all.
    """

    seed: int = 0
    steps: int = 1000
    batch: int = 8
    model: ModelConfig = field(default_factory=ModelConfig)
    peer: PeerConfig = field(default_factory=PeerConfig)
    dense_lr: float = 4e-3
    peer_lr: float = 4e-3
    router_lr: float = 8e-4
    table_lr: float = 1e-2
    weight_decay: float = 0.1
    warm_up: int = 50
    curve_points: int = 10
    curve_tokens: int = 65_536
    sample_tokens: int = 160
    megabytes: float | None = None

    def model_config(self, name: str) -> ModelConfig:
        """Sizes of the model called `name`."""
        return replace(self.model, peer=self.peer if name == "peer" else None)

    def describe(self, name: str) -> dict[str, Any]:
        """The settings that affect the model called `name`, as plain values."""
        others = {"dense": ("peer", "peer_lr", "router_lr", "table_lr"), "peer": ("dense_lr",)}[
            name
        ]
        return {key: value for key, value in asdict(self).items() if key not in others}


def smoke() -> Settings:
    """Settings for tests: the same code with a 32 x 32 grid and a part of the text."""
    return Settings(
        steps=24,
        batch=4,
        model=ModelConfig(vocabulary=512, context=64, dim=32, blocks=2, heads=2, hidden=128),
        peer=PeerConfig(grid=(32, 32), heads=2, experts_per_head=4, dim_key=8, hidden=32),
        warm_up=4,
        curve_points=3,
        curve_tokens=2048,
        sample_tokens=24,
        megabytes=2.0,
    )


def differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """The settings in which a saved run differs from the current one, as text."""
    names = sorted(name for name in saved | current if saved.get(name) != current.get(name))
    return ", ".join(
        f"{name} = {saved.get(name)} there, {current.get(name)} here" for name in names
    )
