"""Command line of the demo. Run `python -m language_model` in the directory `examples`."""

from __future__ import annotations

import os

# Huge pages for large tensors: table rows are read at random, and a step allocates many megabytes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from . import data, report
from .settings import MODELS, Settings, override, smoke
from .train import Interrupt, OtherRunError, Run, train


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m language_model",
        description="Trains a dense language model and a PEER model on Python's standard library. "
        "Both need 6 GB of memory. Checkpoints take 4.4 GB in training, 2.2 GB after.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for checkpoints and images"
    )
    parser.add_argument(
        "--models", default="dense,peer", help="models to train (default: dense,peer)"
    )
    parser.add_argument("--seed", type=int, help="seed for initialisation and data order")
    parser.add_argument("--steps", type=int, help="optimizer steps for each model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="another setting, for example dense_training.lr=1e-3; several are possible",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        help="CSV file to append the results to; a file beside it gets the curves",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="use a small grid and few steps, as a test",
    )
    parser.add_argument("--restart", action="store_true", help="discard checkpoints and start over")
    options = parser.parse_args(arguments)
    options.models = options.models.split(",")
    if not set(options.models) <= set(MODELS):
        parser.error(f"expected --models to contain only {', '.join(MODELS)}")
    return options


def make_settings(options: argparse.Namespace) -> Settings:
    """The settings of the demo, with the options of the command line."""
    given = {name: getattr(options, name) for name in ("seed", "steps")}
    settings = smoke() if options.smoke else Settings()
    settings = replace(settings, **{n: value for n, value in given.items() if value is not None})
    for assignment in options.set:
        settings = override(settings, assignment)
    return settings


def finish(run: Run) -> None:
    """Evaluates a trained run, unless that is done, and saves the results."""
    if not run.progress.finished:
        print(f"{run.name}: evaluating on all held-out files")
        run.progress.results = report.finish(run)
        run.progress.finished = True
        run.save()


def main(arguments: list[str] | None = None) -> int:
    """Trains or resumes, then shows the results. Returns the exit status: 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        settings = make_settings(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report.introduce(settings, options.models))
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = data.prepare(options.out / "corpus.pt", settings.model.vocabulary, settings.megabytes)
    print(corpus.describe())
    runs: list[Run] = []
    for name in options.models:
        run = Run(name, settings, corpus, options.out / f"{name}.pt")
        if options.restart:
            run.path.unlink(missing_ok=True)
        try:
            run.load()
        except OtherRunError as error:
            print(error, file=sys.stderr)
            return 2
        if run.progress.finished:
            print(f"{name}: already trained; --restart trains it again")
        elif run.progress.step:
            print(f"{name}: resuming after step {run.progress.step} of {settings.steps}")
        runs.append(run)
    with Interrupt() as interrupt:
        if train(runs, interrupt):
            for run in runs:
                if not interrupt.requested:
                    finish(run)
    if not all(run.progress.finished for run in runs):
        steps = ", ".join(
            f"{run.name} after step {run.progress.step} of {settings.steps}" for run in runs
        )
        print(f"\nStopped. Saved: {steps}. Run the same command to resume.")
        return 130
    report.show(runs, options.out)
    if options.csv:
        report.write_csv(runs, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
