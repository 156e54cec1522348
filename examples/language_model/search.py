"""Trains one model after the other with different settings, and records every result.

Run `python -m language_model.search LIST --seeds 1,2` in the directory `examples`. A line of the
list is a model and the settings that differ from the demo's, and `#` starts a comment:

    dense dense_training.lr=1e-3
    peer  peer_training.table_lr=3e-3 peer.blocks=(0,)

The CSV file says what is done: a line with a row there is skipped, so the same command resumes a
search. Ctrl-C saves the run in progress, and the next command goes on with it. The list may grow
during a search: it is read again after every run.
"""

from __future__ import annotations

import os

# As in __main__: large tensors on huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import csv
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from . import data, report
from .settings import MODELS, Settings, make_key, override, smoke
from .train import Interrupt, Run, train


class Described(Protocol):
    """A dataclass of settings that says which of them affect a model or a method."""

    @property
    def seed(self) -> int:
        """Seed for initialisation and data order."""
        ...

    def describe(self, name: str) -> dict[str, Any]:
        """The settings that affect what is called `name`, as plain values."""
        ...


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        name: the model, "dense" or "peer". In other searches, the method.
        changes: what differs from the settings without changes, as in the list.
        settings: the settings.
    """

    name: str
    changes: str
    settings: Any

    @property
    def key(self) -> str:
        """A digest of the name and of the settings that affect it."""
        return make_key(self.name, self.settings.describe(self.name))


def read_trials(
    path: Path,
    seeds: list[int],
    base: Described,
    common: Sequence[str] = (),
    names: Sequence[str] = MODELS,
) -> list[Trial]:
    """The runs of a list, line by line, and for each line seed by seed.

    Args:
        path: the list.
        seeds: the seeds.
        base: the settings without changes.
        common: changes for all lines. Those of a line come after them.
        names: what a line may begin with.

    Returns:
        The runs.

    Raises:
        ValueError: a line begins with none of `names`, or has a setting that does not exist.
    """
    trials = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, *changes = shlex.split(line, comments=True) or [""]
        if not name:
            continue
        if name not in names:
            raise ValueError(f"{path}:{number}: expected {' or '.join(names)}, got {name}")
        settings = base
        changes = [*common, *changes]
        for change in changes:
            try:
                settings = override(settings, change)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        for seed in seeds:
            trials.append(Trial(name, " ".join(changes), replace(settings, seed=seed)))
    return trials


def read_keys(path: Path) -> set[str]:
    """The keys of the runs in a CSV file, empty if there is no file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {row["key"] for row in csv.DictReader(file)}


def run_trial(trial: Trial, folder: Path, interrupt: Interrupt) -> dict[str, Any] | None:
    """Trains and evaluates one model.

    Args:
        trial: the run.
        folder: folder for the corpus and for the checkpoint, which is deleted at the end.
        interrupt: set by Ctrl-C.

    Returns:
        The row of the CSV file; None if the run was interrupted and saved.
    """
    settings = trial.settings
    corpus = data.prepare(folder / "corpus.pt", settings.model.vocabulary, settings.megabytes)
    run = Run(trial.name, settings, corpus, folder / f"{trial.key}.pt")
    run.load()
    if not train([run], interrupt):
        return None
    row = report.finish(run)["row"]
    run.path.unlink(missing_ok=True)
    return {"key": trial.key, "changes": trial.changes, **row}


def read_seeds(text: str) -> list[int]:
    """The seeds of a command line."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected integers with commas, got {text}") from error


def make_parser(program: str, description: str, folder: str) -> argparse.ArgumentParser:
    """The command line of a program that runs a list.

    Args:
        program: how the program is called.
        description: what it does.
        folder: the folder for its files, unless the caller names one.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("list", type=Path, help="file with a name and its settings on each line")
    parser.add_argument(
        "--seeds", type=read_seeds, default="1", help="seeds, with commas (default: 1)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a change for all lines, for example steps=400; several are possible",
    )
    parser.add_argument("--csv", type=Path, required=True, help="CSV file to append the rows to")
    parser.add_argument(
        "--out", type=Path, default=Path(folder), help="folder for corpora and checkpoints"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="change the small settings of the tests instead"
    )
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "python -m language_model.search",
        "Trains the models of a list with each seed, and appends a row for each run.",
        "search-output",
    )
    return parser.parse_args(arguments)


def run_list(
    read: Callable[[], list[Trial]],
    run: Callable[[Trial, Interrupt], list[dict[str, Any]] | None],
    path: Path,
) -> int:
    """Runs what is left of a list.

    Args:
        read: reads the list. It is called again after every run.
        run: makes the rows of a run; None if it was interrupted and saved.
        path: CSV file, whose keys say what is done.

    Returns:
        The exit status: 130 after Ctrl-C, 2 after an error in the list.
    """
    finished: set[str] = set()  # here, so that a lost row does not repeat its run for ever
    with Interrupt() as interrupt:
        while not interrupt.requested:
            try:
                trials = read()
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            done = finished | read_keys(path)
            left = [trial for trial in trials if trial.key not in done]
            print(f"{len(trials) - len(left)} of {len(trials)} runs are done", flush=True)
            if not left:
                return 0
            trial = left[0]
            print(f"{trial.name}, seed {trial.settings.seed}: {trial.changes or 'no changes'}")
            rows = run(trial, interrupt)
            if rows is None:
                break
            report.append_rows(rows, path)
            finished.add(trial.key)
    print("Stopped. Run the same command to resume.")
    return 130


def main(arguments: list[str] | None = None) -> int:
    """Runs what is left of the list. Returns the exit status: 130 after Ctrl-C."""
    options = parse(arguments)
    base = smoke() if options.smoke else Settings()
    options.out.mkdir(parents=True, exist_ok=True)

    def run(trial: Trial, interrupt: Interrupt) -> list[dict[str, Any]] | None:
        row = run_trial(trial, options.out, interrupt)
        if row is None:
            return None
        print(f"{row['bits_per_byte']} bits per byte", flush=True)
        return [row]

    return run_list(
        lambda: read_trials(options.list, options.seeds, base, options.set), run, options.csv
    )


if __name__ == "__main__":
    sys.exit(main())
