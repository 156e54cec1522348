"""Command line of the language model demo: `python -m language_model`, started in `examples`."""

from __future__ import annotations

import os

# Huge pages for large tensors: tables are read at random, and each step allocates many megabytes.
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
        description="Trains a dense language model and its PEER twin on Python's standard library. "
        "The twin takes 4 GB of memory; its checkpoint takes 3 GB while it trains, 1 GB after.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder for checkpoints and pictures"
    )
    parser.add_argument(
        "--models", default="dense,peer", help="which of dense,peer to train (default: both)"
    )
    parser.add_argument("--seed", type=int, help="seed of initialisation and data order")
    parser.add_argument("--steps", type=int, help="optimizer steps of each model")
    parser.add_argument("--dense-lr", type=float, help="learning rate of the dense model")
    parser.add_argument(
        "--peer-lr", type=float, help="learning rate of the PEER model outside its PEER layer"
    )
    parser.add_argument("--router-lr", type=float, help="learning rate of queries and keys")
    parser.add_argument("--table-lr", type=float, help="learning rate of the expert tables")
    parser.add_argument("--csv", type=Path, help="file to append the results to, one line a model")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a small grid and few steps, to see that everything works",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead of resuming")
    options = parser.parse_args(arguments)
    options.models = options.models.split(",")
    if not set(options.models) <= set(MODELS):
        parser.error(f"--models takes names out of {', '.join(MODELS)}")
    return options


def make_settings(options: argparse.Namespace) -> Settings:
    """The demo's settings with what the command line says instead."""
    names = ("seed", "steps", "dense_lr", "peer_lr", "router_lr", "table_lr")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(smoke() if options.smoke else Settings(), **given)


def main(arguments: list[str] | None = None) -> int:
    """Trains or resumes, then shows the results. Returns the exit status, 130 after Ctrl-C."""
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
                print(f"{name}: finished earlier; --restart trains it again")
            elif run.progress.step:
                print(f"{name}: resuming after step {run.progress.step} of {settings.steps}")
            if not run.progress.finished and not run.train(interrupt, report.finish):
                print(
                    f"\nStopped: {name} is saved after step {run.progress.step} of "
                    f"{settings.steps}; "
                    "the same command resumes it."
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
