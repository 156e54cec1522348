"""Forgetting against learning, from the rows of the CSV file.

After corpus a, the model needs B(a, t) bits per byte on held-out text of corpus t. The corpora are
0, 1, ..., n. Then

* learning is the mean of B(t - 1, t) - B(t, t) over t = 1, ..., n: how much a corpus gains while
  the model learns it;
* forgetting is the mean of B(n, t) - B(t, t) over t = 0, ..., n - 1: how much a corpus loses from
  then to the end of the stream;
* the final mean is the mean of B(n, t) over all t.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .corpora import SOURCES

CORPORA = tuple(SOURCES)
LEARNS_AT_LEAST = 0.6  # of what the dense twin learns at its best rate
SHARE_WITHOUT_OLD_TEXT = 0.2  # of the dense twin's forgetting at the same learning
SHARE_WITH_REPLAY = 0.5  # of what the dense twin forgets with the same replay


@dataclass(frozen=True)
class Score:
    """What a stream shows, in bits per byte.

    Attributes:
        learning: see the module.
        forgetting: see the module.
        final: the final mean.
    """

    learning: float
    forgetting: float
    final: float


@dataclass(frozen=True)
class Point:
    """A method with its settings, over the seeds that it was run with.

    Attributes:
        method: the name of the method.
        changes: its settings, as in the list.
        model: "dense" or "peer".
        old_text: what the method needs of old text.
        seeds: the seeds.
        scores: the score of each seed.
        seconds: mean time in training steps after the first corpus.
        trained: mean number of parameters that learn after the first corpus.
    """

    method: str
    changes: str
    model: str
    old_text: str
    seeds: tuple[int, ...]
    scores: tuple[Score, ...]
    seconds: float
    trained: float

    def mean(self, name: str) -> float:
        """The mean of a number of the score over the seeds."""
        return statistics.fmean(getattr(score, name) for score in self.scores)

    def deviation(self, name: str) -> float:
        """The standard deviation over the seeds; 0 for one seed."""
        values = [getattr(score, name) for score in self.scores]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def learning(self) -> float:
        """Mean learning."""
        return self.mean("learning")

    @property
    def forgetting(self) -> float:
        """Mean forgetting."""
        return self.mean("forgetting")

    @property
    def final(self) -> float:
        """Mean of the final means."""
        return self.mean("final")


def score(bits: dict[tuple[str, str], float], corpora: Sequence[str] = CORPORA) -> Score:
    """The score of a stream.

    Args:
        bits: bits per byte by (corpus just learned, corpus of the test).
        corpora: the stream.
    """
    last = corpora[-1]
    learned = [bits[before, t] - bits[t, t] for before, t in itertools.pairwise(corpora)]
    forgotten = [bits[last, t] - bits[t, t] for t in corpora[:-1]]
    return Score(
        statistics.fmean(learned),
        statistics.fmean(forgotten),
        statistics.fmean(bits[last, t] for t in corpora),
    )


def read_points(paths: Iterable[Path], seeds: Iterable[int] | None = None) -> list[Point]:
    """The points of some CSV files, in the order of their first rows.

    Args:
        paths: the files.
        seeds: the seeds that count; None for all.

    Raises:
        ValueError: a stream lacks rows, or the files have rows of different corpora.
    """
    rows: list[dict[str, str]] = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    fingerprints = sorted({row["corpora"] for row in rows})
    if len(fingerprints) > 1:
        raise ValueError(f"expected rows of the same corpora, got {', '.join(fingerprints)}")
    chosen = None if seeds is None else set(seeds)
    points: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if chosen is None or int(row["seed"]) in chosen:
            streams = points.setdefault((row["method"], row["changes"]), {})
            streams.setdefault(row["key"], []).append(row)
    return [make_point(method, changes, streams) for (method, changes), streams in points.items()]


def make_point(method: str, changes: str, streams: dict[str, list[dict[str, str]]]) -> Point:
    """The point of some streams that differ in their seeds only."""
    seeds, scores, seconds, trained = [], [], [], []
    first: dict[str, Any] = {}
    for key, rows in streams.items():
        bits = {(row["after"], row["test"]): float(row["bits_per_byte"]) for row in rows}
        if len(bits) != len(CORPORA) ** 2 or len(rows) != len(bits):
            raise ValueError(
                f"expected {len(CORPORA) ** 2} rows with the key {key}, got {len(rows)}"
            )
        first = rows[0]
        later = {row["after"]: row for row in rows if row["after"] != CORPORA[0]}.values()
        seeds.append(int(first["seed"]))
        scores.append(score(bits))
        seconds.append(sum(float(row["seconds"]) for row in later))
        trained.append(statistics.fmean(float(row["trained_parameters"]) for row in later))
    return Point(
        method,
        changes,
        first["model"],
        first["old_text"],
        tuple(seeds),
        tuple(scores),
        statistics.fmean(seconds),
        statistics.fmean(trained),
    )


def frontier(points: Iterable[Point]) -> list[tuple[float, float]]:
    """The best of a method: (learning, forgetting) of rising learning.

    It begins with (0, 0), where a method that changes nothing is. Points are left out if another
    one learns at least as much and forgets at most as much.
    """
    pairs = [(0.0, 0.0), *((point.learning, point.forgetting) for point in points)]
    best: list[tuple[float, float]] = []
    for learning, forgetting in sorted(pairs, key=lambda pair: (-pair[0], pair[1])):
        if not best or forgetting < best[-1][1]:
            best.append((learning, forgetting))
    return best[::-1]


def interpolate(curve: Sequence[tuple[float, float]], learning: float) -> float | None:
    """Forgetting at a learning, between two points of a frontier linearly; None outside it."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= learning <= right:
            return low + (high - low) * (learning - left) / (right - left)
    return None


def best(points: Iterable[Point]) -> Point | None:
    """The point with the least final mean; None if there is no point."""
    return min(points, key=lambda point: point.final, default=None)


@dataclass(frozen=True)
class Goal:
    """A goal and what was reached.

    Attributes:
        text: the goal.
        is_met: whether it is met; None if rows are missing.
        found: what was reached.
    """

    text: str
    is_met: bool | None
    found: str


def compare_without_old_text(points: Sequence[Point]) -> dict[Point, float]:
    """The forgetting of methods without old text over the dense twin's at the same learning.

    Only PEER methods count that need nothing of old text and learn `LEARNS_AT_LEAST` of what the
    dense twin learns at its best rate. If one learns more than the dense twin, its forgetting is
    compared with that of the dense twin's best rate.
    """
    dense = [point for point in points if point.method == "dense"]
    if not dense:
        return {}
    curve = frontier(dense)
    most = max(point.learning for point in dense)
    shares = {}
    for point in points:
        if point.model != "peer" or point.old_text != "none":
            continue
        if point.learning < LEARNS_AT_LEAST * most:
            continue
        at_same = interpolate(curve, min(point.learning, curve[-1][0]))
        if at_same is not None and at_same > 0:
            shares[point] = point.forgetting / at_same
    return shares


def check_goals(points: Sequence[Point]) -> list[Goal]:
    """The goals of the experiment."""
    goals = []
    shares = compare_without_old_text(points)
    text = (
        f"Without old text, a PEER method that learns at least {LEARNS_AT_LEAST:.0%} of what the "
        f"dense twin learns at its best rate forgets at most {SHARE_WITHOUT_OLD_TEXT:.0%} of what "
        "the dense twin forgets at the same learning"
    )
    if shares:
        least = min(shares, key=lambda point: shares[point])
        found = (
            f"{shares[least]:.0%}, by {describe(least)}: learning {least.learning:.3f}, "
            f"forgetting {least.forgetting:.3f}"
        )
        goals.append(Goal(text, shares[least] <= SHARE_WITHOUT_OLD_TEXT, found))
    else:
        goals.append(Goal(text, None, "no such rows"))

    dense = best(point for point in points if point.method == "dense-replay")
    replayed = [point for point in points if point.method == "peer-replay"]
    text = (
        f"With replay, PEER forgets at most {SHARE_WITH_REPLAY:.0%} of what the dense twin with "
        "the same replay forgets, and learns more"
    )
    if dense and replayed:
        ahead = [point for point in replayed if point.learning > dense.learning]
        least = min(ahead or replayed, key=lambda point: point.forgetting)
        found = " against ".join(
            f"learning {point.learning:.3f}, forgetting {point.forgetting:.3f} ({describe(point)})"
            for point in (least, dense)
        )
        met = bool(ahead) and least.forgetting <= SHARE_WITH_REPLAY * dense.forgetting
        goals.append(Goal(text, met, found))
    else:
        goals.append(Goal(text, None, "no such rows"))

    for title, old_text in (("without old text", "none"), ("with replay", "replay")):
        group = [point for point in points if point.old_text == old_text]
        text = f"After the last corpus, the mean over all corpora is best for PEER {title}"
        each = [best(p for p in group if p.model == model) for model in ("peer", "dense")]
        sides = [point for point in each if point]
        if len(sides) == 2:
            found = " against ".join(f"{point.final:.4f} ({describe(point)})" for point in sides)
            goals.append(Goal(text, sides[0].final < sides[1].final, found))
        else:
            goals.append(Goal(text, None, "no such rows"))
    return goals


def describe(point: Point) -> str:
    """The method and its settings."""
    return f"{point.method} {point.changes}".strip()


def format_table(points: Sequence[Point]) -> str:
    """All points as a Markdown table; the best final mean of each method is marked."""
    chosen = {
        best(p for p in points if p.method == method) for method in {p.method for p in points}
    }
    lines = [
        "| method | settings | old text | learning | forgetting | final mean | trained parameters "
        "| seconds | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in points:
        numbers = []
        for name in ("learning", "forgetting", "final"):
            number = f"{point.mean(name):.4f}"
            if len(point.seeds) > 1:
                number += f" ± {point.deviation(name):.4f}"
            numbers.append(number)
        if point in chosen:
            numbers[-1] = f"**{numbers[-1]}**"
        settings = f"`{point.changes}`" if point.changes else ""
        cells = (
            point.method,
            settings,
            point.old_text,
            *numbers,
            f"{point.trained / 1e6:.2f} M",
            f"{point.seconds:.0f}",
            str(len(point.seeds)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_goals(goals: Iterable[Goal]) -> str:
    """The goals as a Markdown table."""
    words = {True: "yes", False: "no", None: "not known"}
    lines = ["| goal | met | found |", "| --- | --- | --- |"]
    lines += [f"| {goal.text} | {words[goal.is_met]} | {goal.found} |" for goal in goals]
    return "\n".join(lines)
