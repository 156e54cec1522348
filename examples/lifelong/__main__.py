"""Runs the streams of a list, and records every result.

Run `python -m lifelong LIST --csv rows.csv --seeds 1` in the directory `examples`. A line of the
list is a method and the settings that differ from the usual ones, and `#` starts a comment:

    dense    rate=0.3
    specific rate=1 ratio=0.1

As in `language_model.search`, a line with rows in the CSV file is skipped, Ctrl-C saves, and the
list is read again after every stream.
"""

from __future__ import annotations

import os

# As in the demo: large tensors on huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from language_model.data import Corpus
from language_model.search import Trial, make_parser, read_trials, run_list
from language_model.train import Interrupt, OtherRunError

from . import corpora
from .methods import METHODS
from .results import score
from .settings import StreamSettings, cuda, smoke
from .stream import run_stream


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(
        "python -m lifelong",
        "Trains language models on a stream of three corpora by the methods of a list, with each "
        "seed, and appends nine rows for each stream.",
        "lifelong-output",
    )
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help=f"read a corpus ({', '.join(corpora.SOURCES)}) from a folder; several are possible",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with a larger size")
    options = parser.parse_args(arguments)
    folders = [assignment.partition("=") for assignment in options.corpus]
    if not all(folder for _, _, folder in folders) or not (
        {name for name, _, _ in folders} <= set(corpora.SOURCES)
    ):
        names = ", ".join(corpora.SOURCES)
        parser.error(f"expected --corpus as NAME=FOLDER with NAME one of {names}")
    options.folders = {name: Path(folder) for name, _, folder in folders}
    return options


def choose_size(options: argparse.Namespace) -> StreamSettings:
    """The usual settings on this device."""
    if options.smoke:
        return smoke()
    return cuda() if options.device.startswith("cuda") else StreamSettings()


def main(arguments: list[str] | None = None) -> int:
    """Runs what is left of the list. Returns the exit status: 130 after Ctrl-C."""
    options = parse(arguments)
    size = choose_size(options)
    options.out.mkdir(parents=True, exist_ok=True)

    def read() -> list[Trial]:
        return read_trials(options.list, options.seeds, size, options.set, tuple(METHODS))

    @lru_cache(maxsize=1)
    def prepare(vocabulary: int, megabytes: float | None) -> dict[str, Corpus]:
        cache = options.out / "corpora.pt"
        texts = corpora.prepare(cache, vocabulary, megabytes, options.folders)
        print("\n".join(corpus.describe() for corpus in texts.values()), flush=True)
        return texts

    def run(trial: Trial, interrupt: Interrupt) -> list[dict[str, Any]] | None:
        base = trial.settings.base
        texts = prepare(base.model.vocabulary, base.megabytes)
        rows = run_stream(trial, texts, options.out, options.device, interrupt)
        if rows is not None:
            found = score({(row["after"], row["test"]): row["bits_per_byte"] for row in rows})
            print(
                f"{trial.name}: learning {found.learning:.4f}, forgetting {found.forgetting:.4f}, "
                f"final mean {found.final:.4f} bits per byte",
                flush=True,
            )
        return rows

    try:
        return run_list(read, run, options.csv)
    except (corpora.CorpusError, OtherRunError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
