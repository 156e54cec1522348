"""Trains models in turns, with checkpoints that Ctrl-C also writes."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import peer

from .data import Corpus, Windows, held_out_batches
from .model import LanguageModel
from .settings import PeerTraining, Settings, Training, differences

CHECKPOINT_SECONDS = 600.0
# Steps of one model before the other's turn: seconds, so that other load on the machine slows down
# both models alike.
TURN = 10
EVALUATION_BATCH = 16


class OtherRunError(Exception):
    """The output folder contains a run with other settings."""


class Point(NamedTuple):
    """An evaluation during a run.

    Attributes:
        tokens: training tokens so far.
        seconds: time in training steps so far, without evaluations.
        bits: bits per byte on a part of the held-out text.
    """

    tokens: int
    seconds: float
    bits: float


@dataclass
class Progress:
    """The progress of a run, without weights and optimizer states.

    Attributes:
        step: number of completed optimizer steps.
        losses: training loss of every step, in nats per token.
        curve: the evaluations during the run, as plain tuples; `points` has their names.
        seconds: time in training steps.
        finished: whether all steps and the final evaluation are complete.
        results: results of the final evaluation.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """The evaluations during the run."""
        return [Point(*each) for each in self.curve]


class Interrupt:
    """A context in which the first Ctrl-C or SIGTERM sets `requested`.

    The second one has its usual effect.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self.previous = {number: signal.signal(number, self.handle) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Sets `requested` and restores the previous handlers."""
        self.requested = True
        self.__exit__()


def schedule(step: int, steps: int, training: Training) -> float:
    """The factor on every learning rate: linear warm-up times a decay to zero."""
    warm_up = min(1.0, (step + 1) / training.warm_up)
    if training.decay == "cosine":
        return warm_up * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if training.decay == "linear":
        return warm_up * (1.0 - step / steps)
    raise ValueError(f"expected decay to be 'cosine' or 'linear', got {training.decay!r}")


def make_optimizers(model: LanguageModel, training: Training) -> list[torch.optim.Optimizer]:
    """AdamW, and for a model with PEER layers the optimizer of its table."""
    layers = model.layers
    router = [p for layer in layers for p in layer.router.parameters()]
    tables = list(dict.fromkeys(p for layer in layers for p in layer.experts.parameters()))
    apart = {id(p) for p in router + tables}
    outside = [p for p in model.parameters() if id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in outside if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in outside if p.dim() == 1], "weight_decay": 0.0},
    ]
    if isinstance(training, PeerTraining):
        groups.append({"params": router, "weight_decay": 0.0, "lr": training.router_lr})
    betas = (training.beta1, training.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=training.lr, betas=betas)
    ]
    if isinstance(training, PeerTraining):
        table_optimizer = getattr(peer.optim, training.table_optimizer)
        optimizers.append(table_optimizer(tables, lr=training.table_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class HeldOut(NamedTuple):
    """What a model makes of held-out text, by target token in the order of the text.

    Attributes:
        nats: code length of the token.
        best: the token that the model finds most probable.
    """

    nats: Tensor
    best: Tensor


@torch.no_grad()
def predict(model: nn.Module, corpus: Corpus, context: int, limit: int | None = None) -> HeldOut:
    """Predicts every token of the held-out text, or of a part of `limit` tokens."""
    device = next(model.parameters(), corpus.held_out).device
    model.eval()
    nats, best = [], []
    for inputs, targets in held_out_batches(corpus.held_out, context, EVALUATION_BATCH, limit):
        logits = model(inputs.to(device)).flatten(0, 1)
        losses = F.cross_entropy(logits, targets.flatten().to(device), reduction="none")
        nats.append(losses.cpu())
        best.append(logits.argmax(-1).to(torch.int32).cpu())
    model.train()
    return HeldOut(torch.cat(nats), torch.cat(best))


def bits_per_byte(nats: Tensor, corpus: Corpus, context: int, limit: int | None = None) -> float:
    """The code length of held-out text over its size in bytes."""
    batches = held_out_batches(corpus.held_out, context, EVALUATION_BATCH, limit)
    size = sum(int(corpus.token_bytes[targets].sum()) for _, targets in batches)
    return float(nats.double().sum()) / math.log(2) / size


def evaluate(model: nn.Module, corpus: Corpus, context: int, limit: int | None = None) -> float:
    """Bits per byte of the held-out text, or of a part of `limit` tokens."""
    return bits_per_byte(predict(model, corpus, context, limit).nats, corpus, context, limit)


class Run:
    """One model with its optimizers and progress, saved in one file.

    The update of the expert table is fused into the backward pass, unless several layers share
    the table.

    Attributes:
        replacing: how to replace a file of a run with other settings, for an error.
    """

    replacing = "pass --restart to replace it"

    def __init__(
        self, name: str, settings: Settings, corpus: Corpus, path: Path, device: str = "cpu"
    ) -> None:
        self.name, self.settings, self.corpus, self.path = name, settings, corpus, path
        torch.manual_seed(settings.seed)
        self.training = settings.training(name)
        self.model = LanguageModel(settings.model_config(name)).to(device)
        self.optimizers = make_optimizers(self.model, self.training)
        self.windows = Windows(corpus.train, settings.model.context, settings.batch, settings.seed)
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
                f"({differences(state['settings'], current)}): {self.replacing}, "
                "or pass another folder as --out"
            )
        self.progress = Progress(**state["progress"])
        self.model.load_state_dict(state["model"])
        if not self.progress.finished:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Runs one optimizer step. Returns the loss before it, in nats per token."""
        factor = schedule(self.progress.step, self.settings.steps, self.training)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        logits = self.model(inputs.to(self.model.embedding.weight.device)).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten().to(logits.device))
        loss.backward()
        dense = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    @property
    def is_trained(self) -> bool:
        """Whether all steps are complete."""
        return self.progress.step >= self.settings.steps

    @property
    def recent_loss(self) -> float:
        """Mean training loss of the latest steps."""
        recent = self.progress.losses[-20:]
        return sum(recent) / max(1, len(recent))

    def advance(self) -> None:
        """Runs one step, and evaluates after it at regular intervals and after the last step."""
        settings, progress = self.settings, self.progress
        started = time.perf_counter()
        progress.losses.append(self.step(*self.windows[progress.step]))
        progress.seconds += time.perf_counter() - started
        progress.step += 1
        every = max(1, settings.steps // settings.curve_points)
        if progress.step % every == 0 or self.is_trained:
            limit = settings.curve_tokens
            bits = evaluate(self.model, self.corpus, settings.model.context, limit)
            tokens = progress.step * settings.tokens_per_step
            progress.curve.append((tokens, progress.seconds, bits))


def train(runs: Sequence[Run], interrupt: Interrupt) -> bool:
    """Trains runs in turns until the last step or an interrupt, which saves them.

    Args:
        runs: the runs, which may be at different steps.
        interrupt: set by Ctrl-C.

    Returns:
        Whether all steps of all runs are complete.
    """
    with ExitStack() as stack:
        for run in runs:
            if len(run.model.layers) == 1 and not run.is_trained:
                tables = run.optimizers[1]
                assert isinstance(tables, peer.optim.TableOptimizer)
                stack.enter_context(tables.fuse_into_backward(run.model))
        bar = stack.enter_context(
            tqdm(
                total=sum(run.settings.steps for run in runs),
                initial=sum(run.progress.step for run in runs),
                unit="step",
                bar_format="training {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )
        )
        while not interrupt.requested:
            untrained = [run for run in runs if not run.is_trained]
            if not untrained:
                return True
            # The run that is furthest behind, so that resumed runs train in turns, too.
            run = min(untrained, key=lambda run: run.progress.step)
            for _ in range(TURN):
                run.advance()
                losses = ", ".join(f"{run.name} {run.recent_loss:.3f}" for run in runs)
                bar.set_postfix_str(f"loss: {losses}", refresh=False)
                bar.update()
                if run.is_trained or interrupt.requested:
                    break
            if time.monotonic() - run.saved > CHECKPOINT_SECONDS:
                run.save()
    for run in runs:
        if not run.progress.finished:
            run.save()
    return all(run.is_trained for run in runs)
