"""Trains one model, with checkpoints that Ctrl-C also writes."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data import Corpus, Windows, held_out_batches
from .model import LanguageModel
from .settings import Settings, differences

CHECKPOINT_SECONDS = 180.0


class OtherRunError(Exception):
    """The output folder contains a run with other settings."""


@dataclass
class Progress:
    """The progress of a run, without weights and optimizer states.

    Attributes:
        step: number of completed optimizer steps.
        losses: training loss of every step, in nats per token.
        curve: (training tokens, bits per byte) of each evaluation on a part of the held-out text.
        seconds: time in training steps.
        finished: whether all steps and the final evaluation are complete.
        results: results of the final evaluation.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    results: dict[str, Any] = field(default_factory=dict)


class Interrupt:
    """A context in which the first Ctrl-C sets `requested`. The second has its usual effect."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Sets `requested` and restores the previous handler."""
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)


def schedule(step: int, settings: Settings) -> float:
    """The factor on every learning rate: linear warm-up times a cosine decay to zero."""
    warm_up = min(1.0, (step + 1) / settings.warm_up)
    return warm_up * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))


def make_optimizers(model: LanguageModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """SparseAdam for the expert tables, which have row-sparse gradients; AdamW for the rest."""
    layer = model.peer
    router = list(layer.router.parameters()) if layer else []
    tables = list(layer.experts.parameters()) if layer else []
    apart = {id(p) for p in router + tables}
    outside = [p for p in model.parameters() if id(p) not in apart]
    lr = settings.peer_lr if layer else settings.dense_lr
    groups = [
        {"params": [p for p in outside if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in outside if p.dim() == 1], "weight_decay": 0.0},
    ]
    if layer:
        groups.append({"params": router, "weight_decay": 0.0, "lr": settings.router_lr})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]
    if layer:
        optimizers.append(torch.optim.SparseAdam(tables, lr=settings.table_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, context: int, limit: int | None = None) -> float:
    """Bits per byte of held-out text: the code length of all tokens over the number of bytes."""
    model.eval()
    nats, size = 0.0, 0
    for inputs, targets in held_out_batches(corpus.held_out, context, 16, limit):
        logits = model(inputs)
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        size += int(corpus.token_bytes[targets].sum())
    model.train()
    return nats / math.log(2) / size


class Run:
    """One model with its optimizers and progress, saved in one file."""

    def __init__(self, name: str, settings: Settings, corpus: Corpus, path: Path) -> None:
        self.name, self.settings, self.corpus, self.path = name, settings, corpus, path
        torch.manual_seed(settings.seed)
        self.model = LanguageModel(settings.model_config(name))
        self.optimizers = make_optimizers(self.model, settings)
        self.progress = Progress()
        self.saved = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """The settings that affect this model, and the fingerprint of the text."""
        return {**self.settings.describe(self.name), "corpus": self.corpus.fingerprint[:12]}

    def save(self) -> None:
        """Writes the file atomically. A finished run has no optimizer states."""
        state = {
            "settings": self.describe(),
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "generator": torch.get_rng_state(),
        }
        if not self.progress.finished:
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Resumes from the file if it exists.

        Raises:
            OtherRunError: the file contains a run with other settings.
        """
        if not self.path.exists():
            return
        state = torch.load(self.path, mmap=True, weights_only=True)
        current = self.describe()
        if state["settings"] != current:
            raise OtherRunError(
                f"{self.path} holds a run with other settings "
                f"({differences(state['settings'], current)}): pass --restart to replace it, "
                "or another folder as --out"
            )
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        if not self.progress.finished:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        torch.set_rng_state(state["generator"])

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Runs one optimizer step. Returns the loss before it, in nats per token."""
        factor = schedule(self.progress.step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        dense = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def train(self, interrupt: Interrupt, finish: Callable[[Run], dict[str, Any]]) -> bool:
        """Trains until the last step or Ctrl-C.

        Args:
            interrupt: set by Ctrl-C.
            finish: evaluates the run after the last step, and returns the results.

        Returns:
            Whether the run is finished.
        """
        settings, progress = self.settings, self.progress
        tokens = settings.batch * settings.model.context
        windows = Windows(self.corpus.train, settings.model.context, settings.batch, settings.seed)
        every = max(1, settings.steps // settings.curve_points)
        bar = tqdm(
            total=settings.steps,
            initial=progress.step,
            desc=f"{self.name:>5}",
            unit="step",
            bar_format="{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )
        with bar:
            while progress.step < settings.steps and not interrupt.requested:
                started = time.perf_counter()
                progress.losses.append(self.step(*windows[progress.step]))
                progress.seconds += time.perf_counter() - started
                progress.step += 1
                recent = progress.losses[-20:]
                speed = tokens * progress.step / progress.seconds
                bar.set_postfix_str(
                    f"loss {sum(recent) / len(recent):.3f}, {speed:,.0f} tokens/s", refresh=False
                )
                bar.update()
                if progress.step % every == 0:
                    bits = evaluate(
                        self.model, self.corpus, settings.model.context, settings.curve_tokens
                    )
                    progress.curve.append((progress.step * tokens, bits))
                if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
                    self.save()
        if progress.step < settings.steps:
            self.save()
            return False
        print(f"{self.name}: evaluating on all held-out files")
        progress.results = finish(self)
        progress.finished = True
        self.save()
        return True
