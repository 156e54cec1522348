"""A stream: a model that has learned the first corpus learns the others, one after the other."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from language_model.data import Corpus
from language_model.model import LanguageModel
from language_model.search import Trial
from language_model.train import Interrupt, Progress, Run, evaluate, make_optimizers, train

import peer

from . import methods
from .corpora import Batches
from .methods import METHODS, Notes
from .settings import StreamSettings


class Base(Run):
    """A model that learns the first corpus. All methods with this model and seed begin with it."""

    replacing = "delete it"

    def __init__(
        self,
        model: str,
        settings: StreamSettings,
        corpora: dict[str, Corpus],
        folder: Path,
        device: str,
    ) -> None:
        self.described = settings.describe_base(model)
        path = folder / f"base-{model}-{settings.base_key(model)}.pt"
        first = next(iter(corpora.values()))
        super().__init__(model, settings.first, first, path, device)

    def describe(self) -> dict[str, Any]:
        """The settings that affect this model, and the fingerprint of the text."""
        return {**self.described, "corpus": self.corpus.fingerprint[:12]}


def load_base(
    model: str,
    settings: StreamSettings,
    corpora: dict[str, Corpus],
    folder: Path,
    device: str,
    interrupt: Interrupt,
) -> Base | None:
    """Trains a base, unless that is done, or None if this was interrupted and saved."""
    base = Base(model, settings, corpora, folder, device)
    base.load()
    if not base.progress.finished:
        print(f"{model}: learning {base.corpus.title}, the base of its methods", flush=True)
        if not train([base], interrupt):
            return None
        base.progress.results = {"bits": evaluate_all(base.model, corpora, settings)}
        base.progress.finished = True
        base.save()
    return base


def evaluate_all(
    model: LanguageModel, corpora: dict[str, Corpus], settings: StreamSettings
) -> dict[str, float]:
    """Bits per byte on the held-out text of each corpus."""
    context, limit = settings.base.model.context, settings.base.held_out_tokens
    return {name: evaluate(model, corpus, context, limit) for name, corpus in corpora.items()}


class Phase(Run):
    """A model that has learned the earlier corpora of a stream and learns the next one.

    Args:
        trial: the method and the settings.
        corpora: the stream.
        index: the position of the new corpus in the stream.
        model: the model, in which nothing is frozen.
        rows: the rows of the CSV file so far.
        notes: the notes on the earlier corpora.
        path: file of an interrupted phase.
    """

    replacing = "delete it"

    def __init__(
        self,
        trial: Trial,
        corpora: dict[str, Corpus],
        index: int,
        model: LanguageModel,
        rows: list[dict[str, Any]],
        notes: Notes | None,
        path: Path,
    ) -> None:
        self.trial, self.index, self.corpora, self.path = trial, index, corpora, path
        self.method = METHODS[trial.name]
        self.stream: StreamSettings = trial.settings
        self.name, self.settings = self.method.model, self.stream.phase
        self.training = self.settings.training(self.name)
        names = list(corpora)
        self.old = [corpora[name] for name in names[:index]]
        self.corpus = corpora[names[index]]
        self.model = model
        self.windows = Batches(
            self.corpus,
            self.old,
            self.method.replay,
            self.settings.model.context,
            self.settings.batch,
            self.settings.seed,
        )
        self.progress = Progress(results={"rows": rows, "notes": notes and asdict(notes)})
        self.rest = methods.factor_on_rest(self.method, self.stream)
        methods.freeze_rest(model, self.rest)
        # New experts are drawn. They are the same ones after an interrupt in an earlier phase.
        torch.manual_seed(self.settings.seed * 1_000_003 + index)
        if not path.exists():
            methods.prepare(model, self.method, self.stream, self.old, self.corpus, notes)
        self.optimizers = make_optimizers(model, self.training)
        # The groups outside the table are those of the first optimizer. If the rest is frozen, only
        # new keys learn there.
        for factor, optimizer in zip((self.rest or 1.0, 1.0), self.optimizers, strict=False):
            for group in optimizer.param_groups:
                group["peak_lr"] *= self.stream.rate * factor
        self.saved = time.monotonic()

    @property
    def notes(self) -> Notes | None:
        """The notes on the earlier corpora."""
        notes = self.progress.results["notes"]
        return notes and Notes(**notes)

    def describe(self) -> dict[str, Any]:
        """The settings that affect this phase, and the fingerprint of the text."""
        return {
            **self.stream.describe(self.trial.name),
            "method": self.trial.name,
            "phase": self.index,
            "corpus": self.corpus.fingerprint[:12],
        }

    def load(self) -> None:
        """Resumes from the file if it exists, with the sizes and masks that the model has there."""
        if self.path.exists() and self.model.layers:
            peer.grow_to_(self.model, torch.load(self.path, mmap=True, weights_only=True)["model"])
        super().load()

    def advance(self) -> None:
        """Runs one step, without evaluations."""
        started = time.perf_counter()
        self.progress.losses.append(self.step(*self.windows[self.progress.step]))
        self.progress.seconds += time.perf_counter() - started
        self.progress.step += 1

    def train(self, interrupt: Interrupt) -> bool:
        """Trains to the last step or to an interrupt, which saves. Returns whether it is done."""
        with ExitStack() as stack:
            if self.method.table == "tf-idf":
                assert self.notes is not None
                stack.enter_context(methods.update_slots(self.model, self.notes, self.stream.slots))
            return train([self], interrupt)

    def count_trained(self) -> tuple[int, int]:
        """The rows of the table and the number of parameters that learn."""
        layers = self.model.layers
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [p for p in self.model.parameters() if id(p) not in inside]
        learns = sum(p.numel() for p in outside if p.requires_grad)
        rows = 0
        for layer in layers:
            router = layer.router
            learns += sum(
                p.numel()
                for part in (router.query, router.norm)
                for p in part.parameters()
                if p.requires_grad
            )
            for keys, frozen in (
                (router.row_keys, router.frozen_rows),
                (router.col_keys, router.frozen_columns),
            ):
                share = 1.0 if frozen is None else float((~frozen).double().mean())
                learns += round(keys.numel() * share)
        if layers:
            pool = layers[0].experts
            rows = pool.num_experts if pool.frozen is None else int((~pool.frozen).sum())
            learns += rows * pool.weight[0].numel()
        return rows, learns

    def finish(self) -> None:
        """Evaluates, lets everything learn again and notes the use of the experts."""
        results = self.progress.results
        trained = self.count_trained()
        bits = evaluate_all(self.model, self.corpora, self.stream)
        results["rows"] += make_rows(
            self.trial, self.corpora, self.index, bits, trained, self.progress.seconds
        )
        methods.release(self.model)
        if self.index + 1 < len(self.corpora):
            taken = methods.take_notes(self.model, self.corpus, self.method, self.stream)
            notes = methods.add_notes(self.notes, taken)
            results["notes"] = notes and asdict(notes)


def make_rows(
    trial: Trial,
    corpora: dict[str, Corpus],
    index: int,
    bits: dict[str, float],
    trained: tuple[int, int],
    seconds: float,
) -> list[dict[str, Any]]:
    """The rows of the CSV file after a corpus, one for each corpus that the model is tested on."""
    settings: StreamSettings = trial.settings
    method = METHODS[trial.name]
    after = list(corpora)[index]
    tokens = (settings.steps if index else settings.base.steps) * settings.base.tokens_per_step
    return [
        {
            "key": trial.key,
            "method": trial.name,
            "changes": trial.changes,
            "model": method.model,
            "old_text": method.old_text,
            "seed": settings.seed,
            "rate": settings.rate,
            "after": after,
            "test": test,
            "bits_per_byte": round(value, 5),
            "tokens": tokens,
            "trained_rows": trained[0],
            "trained_parameters": trained[1],
            "seconds": round(seconds, 1),
            "corpora": corpora[after].fingerprint[:12],
            "torch": str(torch.__version__),
        }
        for test, value in bits.items()
    ]


def run_stream(
    trial: Trial,
    corpora: dict[str, Corpus],
    folder: Path,
    device: str,
    interrupt: Interrupt,
) -> list[dict[str, Any]] | None:
    """Trains and evaluates a model on the whole stream.

    Args:
        trial: the method and the settings.
        corpora: the stream.
        folder: folder for the bases, which stay, and for an interrupted phase.
        device: the device of the model.
        interrupt: set by Ctrl-C.

    Returns:
        The rows of the CSV file; None if the stream was interrupted and saved.
    """
    settings: StreamSettings = trial.settings
    method = METHODS[trial.name]
    base = load_base(method.model, settings, corpora, folder, device, interrupt)
    if base is None:
        return None
    model, path = base.model, folder / f"{trial.key}.pt"
    if path.exists():
        first = torch.load(path, mmap=True, weights_only=True)["settings"]["phase"]
        rows, notes = [], None  # those of the file
    else:
        first = 1
        everything = sum(p.numel() for p in model.parameters())
        experts = model.layers[0].experts.num_experts if model.layers else 0
        bits, seconds = base.progress.results["bits"], base.progress.seconds
        rows = make_rows(trial, corpora, 0, bits, (experts, everything), seconds)
        notes = methods.take_notes(model, base.corpus, method, settings)
    del base
    for index in range(first, len(corpora)):
        phase = Phase(trial, corpora, index, model, rows, notes, path)
        phase.load()
        print(f"{trial.name}: learning {phase.corpus.title}", flush=True)
        if not phase.train(interrupt):
            return None
        phase.finish()
        path.unlink(missing_ok=True)
        rows, notes = phase.progress.results["rows"], phase.notes
    return rows
