"""The settings of a run: those of the demo, and small ones for tests."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from .config import ModelConfig, PeerConfig

MODELS = ("dense", "peer")
Config = TypeVar("Config")


@dataclass(frozen=True)
class Training:
    """How the dense parameters of a model are trained: AdamW with a schedule.

    Attributes:
        lr: peak learning rate.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        weight_decay: weight decay of matrices.
        warm_up: steps of linear warm-up.
        decay: what follows the warm-up: "cosine" or "linear", to zero at the last step.
    """

    lr: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    warm_up: int = 50
    decay: str = "cosine"


@dataclass(frozen=True)
class PeerTraining(Training):
    """How a model with PEER layers is trained.

    Attributes:
        lr: peak learning rate of everything but the routers and the table.
        router_lr: peak learning rate of query networks and keys.
        table_optimizer: class of `peer.optim` for the expert table.
        table_lr: peak learning rate of the expert table.
    """

    lr: float = 3e-3
    router_lr: float = 1.5e-3
    table_optimizer: str = "RowwiseAdam"
    table_lr: float = 1e-2


@dataclass(frozen=True)
class Settings:
    """The settings of both models, which are trained on the same tokens in the same order.

    Attributes:
        seed: seed for initialisation and data order.
        steps: optimizer steps for each model.
        batch: windows per step.
        model: sizes of the dense model. The PEER model differs in the blocks with a PEER layer.
        peer: the PEER layers.
        dense_training: how the dense model is trained.
        peer_training: how the PEER model is trained.
        curve_points: number of evaluations during a run.
        curve_tokens: held-out tokens per evaluation.
        held_out_tokens: held-out tokens of the final evaluation, None for all.
        sample_tokens: length of the generated sample in tokens.
        megabytes: approximate amount of text to use, None for all.
    """

    seed: int = 0
    steps: int = 5000
    batch: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    peer: PeerConfig = field(default_factory=PeerConfig)
    dense_training: Training = field(default_factory=Training)
    peer_training: PeerTraining = field(default_factory=PeerTraining)
    curve_points: int = 20
    curve_tokens: int = 65_536
    held_out_tokens: int | None = None
    sample_tokens: int = 160
    megabytes: float | None = None

    def model_config(self, name: str) -> ModelConfig:
        """Sizes of the model called `name`."""
        return replace(self.model, peer=self.peer if name == "peer" else None)

    def training(self, name: str) -> Training:
        """How the model called `name` is trained."""
        return self.peer_training if name == "peer" else self.dense_training

    @property
    def tokens_per_step(self) -> int:
        """Number of training tokens in a step."""
        return self.batch * self.model.context

    def describe(self, name: str) -> dict[str, Any]:
        """The settings that affect the model called `name`, as plain values by path."""
        others = {"dense": ("peer.", "peer_training."), "peer": ("dense_training.",)}[name]
        values = flatten(asdict(self))
        return {path: value for path, value in values.items() if not path.startswith(others)}


def make_key(name: str, described: dict[str, Any]) -> str:
    """A digest of the name of a run and of the settings that affect it."""
    text = json.dumps([name, described], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their path, with a dot between names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        path = prefix + name
        leaves |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves


def override(config: Config, assignment: str) -> Config:
    """A copy of a configuration with one value replaced.

    Args:
        config: a dataclass, whose values may be dataclasses.
        assignment: `path=value`, for example `peer.blocks=(0, 2)` or `dense_training.lr=2e-3`. The
            value is a Python literal. Other text is a string.

    Returns:
        The copy.

    Raises:
        ValueError: there is no such path, or the value has another type than the old one.
    """
    path, separator, text = assignment.partition("=")
    name, _, rest = path.strip().partition(".")
    known = [each.name for each in fields(config)]  # type: ignore[arg-type]
    if not separator or name not in known:
        raise ValueError(f"expected NAME=VALUE with NAME one of {', '.join(known)}: {assignment}")
    old = getattr(config, name)
    if is_dataclass(old):
        return replace(config, **{name: override(old, f"{rest}={text}")})  # type: ignore[type-var]
    try:
        new = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        new = text.strip()
    if isinstance(old, float) and type(new) is int:
        new = float(new)
    if rest or not (old is None or new is None or type(new) is type(old)):
        raise ValueError(f"expected a value like {name}={old!r}: {assignment}")
    return replace(config, **{name: new})  # type: ignore[type-var]


def smoke() -> Settings:
    """Settings for tests: the same code with a 32 x 32 grid and a part of the text."""
    return Settings(
        steps=24,
        batch=4,
        model=ModelConfig(vocabulary=512, context=64, dim=32, blocks=2, heads=2, hidden=128),
        peer=PeerConfig(blocks=(1,), grid=(32, 32), heads=2, experts_per_head=4, dim_key=8),
        dense_training=Training(lr=4e-3, warm_up=4),
        peer_training=PeerTraining(lr=4e-3, router_lr=4e-3, warm_up=4),
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
