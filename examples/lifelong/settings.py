"""The settings of a stream: its own ones, and those of the model that learned the first corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from language_model.config import ModelConfig, PeerConfig
from language_model.settings import PeerTraining, Settings, Training, flatten, make_key

from .methods import METHODS


def base_settings() -> Settings:
    """The demo's settings with a smaller pool, so that files and memory of a stream are small."""
    return Settings(peer=PeerConfig(grid=(512, 512)), curve_points=4, held_out_tokens=65_536)


@dataclass(frozen=True)
class StreamSettings:
    """The settings of a stream. What a method does not use has no effect on it.

    Attributes:
        seed: seed for initialisation and data order.
        rate: factor on all peak learning rates of `base`.
        rest: factor on the learning rates of everything outside the table, in addition to `rate`;
            None for what the method says. 0 freezes it.
        steps: optimizer steps for each corpus after the first.
        at_most: the largest number of counted retrievals by old text of a row that learns.
        ratio: how often old text may use a row that learns, relative to new text.
        rows: rows of keys that are added for each corpus, each with a row of experts.
        slots: rows of the table that a step updates.
        measure: what use is: "count" of retrievals, or "weight" that the router gave.
        count_tokens: tokens of text of which the use of the experts is taken.
        base: the settings of the model and of its training on the first corpus.
            `held_out_tokens` is the size of each evaluation, `megabytes` that of each corpus.
    """

    seed: int = 0
    rate: float = 1.0
    rest: float | None = None
    steps: int = 800
    at_most: int = 0
    ratio: float = 0.3
    rows: int = 64
    slots: int = 2000
    measure: str = "count"
    count_tokens: int = 131_072
    base: Settings = field(default_factory=base_settings)

    @property
    def first(self) -> Settings:
        """The settings of training on the first corpus."""
        return replace(self.base, seed=self.seed)

    @property
    def phase(self) -> Settings:
        """The settings of training on each further corpus, without the method."""
        return replace(self.first, steps=self.steps)

    def describe_base(self, model: str) -> dict[str, Any]:
        """The settings that affect the model that learned the first corpus, by path."""
        described = self.first.describe(model)
        del described["sample_tokens"]  # a base samples no text
        return described

    def base_key(self, model: str) -> str:
        """A digest of the model's name and of the settings that affect its base."""
        return make_key(model, self.describe_base(model))

    def describe(self, name: str) -> dict[str, Any]:
        """The settings that affect the method called `name`, as plain values by path."""
        method = METHODS[name]
        base = self.describe_base(method.model)
        del base["seed"]  # that of the stream
        values = {f"base.{path}": value for path, value in base.items()}
        own = ("seed", "rate", "steps", *method.uses)
        values |= {path: value for path, value in flatten(asdict(self)).items() if path in own}
        values["rest"] = method.rest if self.rest is None else self.rest
        return values


def cuda() -> StreamSettings:
    """A larger size for one GPU."""
    model = ModelConfig(context=512, dim=512, blocks=8, heads=8, hidden=2048)
    return StreamSettings(
        base=replace(
            base_settings(),
            steps=1500,
            batch=32,
            model=model,
            peer=PeerConfig(blocks=(3,)),
            dense_training=Training(lr=1e-3, warm_up=100),
            peer_training=PeerTraining(lr=1e-3, warm_up=100),
        )
    )


def smoke() -> StreamSettings:
    """Settings for tests: the same code with a 16 x 16 grid and few steps."""
    return StreamSettings(
        steps=4,
        rows=2,
        slots=8,
        count_tokens=1024,
        base=Settings(
            steps=6,
            batch=4,
            model=ModelConfig(vocabulary=512, context=32, dim=32, blocks=2, heads=2, hidden=128),
            peer=PeerConfig(blocks=(1,), grid=(16, 16), heads=2, experts_per_head=4, dim_key=8),
            dense_training=Training(lr=4e-3, warm_up=2),
            peer_training=PeerTraining(lr=4e-3, router_lr=4e-3, warm_up=2),
            curve_points=1,
            curve_tokens=256,
            held_out_tokens=1024,
        ),
    )
