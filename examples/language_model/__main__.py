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
from .settings import MODELS, Settings, smoke
from .train import Interrupt, OtherRunError, Run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m language_model",
        description="Trains a dense language model and a PEER model on Python's standard library. "
        "The PEER model needs 4 GB of memory. Its checkpoint takes 3 GB in training, 1 GB after.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for checkpoints and images"
    )
    parser.add_argument(
        "--models", default="dense,peer", help="models to train (default: dense,peer)"
    )
    parser.add_argument("--seed", type=int, help="seed for initialisation and data order")
    parser.add_argument("--steps", type=int, help="optimizer steps for each model")
    parser.add_argument("--dense-lr", type=float, help="learning rate of the dense model")
    parser.add_argument(
        "--peer-lr", type=float, help="learning rate of the PEER model outside its PEER layer"
    )
    parser.add_argument("--router-lr", type=float, help="learning rate of queries and keys")
    parser.add_argument("--table-lr", type=float, help="learning rate of the expert tables")
    parser.add_argument("--csv", type=Path, help="CSV file to append the results to")
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
    names = ("seed", "steps", "dense_lr", "peer_lr", "router_lr", "table_lr")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(smoke() if options.smoke else Settings(), **given)


def main(arguments: list[str] | None = None) -> int:
    """Trains or resumes, then shows the results. Returns the exit status: 130 after Ctrl-C."""
    options = parse(arguments)
    settings = make_settings(options)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = data.prepare(options.out / "corpus.pt", settings.model.vocabulary, settings.megabytes)
    print(corpus.describe())
    runs: list[Run] = []
    with Interrupt() as interrupt:
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
            if not run.progress.finished and not run.train(interrupt, report.finish):
                print(
                    f"\nStopped: {name} is saved after step {run.progress.step} of "
                    f"{settings.steps}; run the same command to resume."
                )
                return 130
            run.optimizers.clear()
            runs.append(run)
    report.show(runs, options.out)
    if options.csv:
        report.append_rows([run.progress.results["row"] for run in runs], options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
