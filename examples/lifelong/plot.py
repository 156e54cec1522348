"""Draws the curves of forgetting against learning, and prints the table and the goals.

Run `python -m lifelong.plot ROWS.csv --image curves.png` in the directory `examples`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from language_model.search import read_seeds

from .methods import METHODS
from .results import (
    Point,
    check_goals,
    format_goals,
    format_table,
    frontier,
    read_points,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DENSE = "#8a8f98"
PEER = ("#c2410c", "#0f766e", "#1d4ed8", "#7c3aed", "#be185d", "#a16207", "#15803d")


def draw_method(axes: Axes, name: str, points: Sequence[Point], color: str) -> None:
    """Draws the points of a method, and the best of them as a line."""
    errors = [[point.deviation(each) for point in points] for each in ("learning", "forgetting")]
    places = [[getattr(point, each) for point in points] for each in ("learning", "forgetting")]
    marker = "s" if points[0].model == "dense" else "o"
    axes.errorbar(
        *places,
        xerr=errors[0],
        yerr=errors[1],
        linestyle="none",
        marker=marker,
        markersize=5,
        elinewidth=0.8,
        color=color,
        label=name,
    )
    curve = frontier(points)
    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1, linestyle="--")


def draw(points: Sequence[Point], path: Path) -> None:
    """Draws the methods without replay on the left, and those with it on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    methods = [name for name in METHODS if any(point.method == name for point in points)]
    of_peer = [name for name in METHODS if METHODS[name].model == "peer"]
    colors = {name: PEER[index % len(PEER)] for index, name in enumerate(of_peer)}
    for name in methods:
        its_points = [point for point in points if point.method == name]
        old_text = its_points[0].old_text
        label = f"{name} (counts old text)" if old_text == "counts" else name
        side = axes[int(old_text == "replay")]
        draw_method(side, label, its_points, colors.get(name, DENSE))
    for side, title in zip(axes, ("without replay", "a quarter of old text"), strict=True):
        side.set_title(title)
        side.set_xlabel("learning, bits per byte: more is better")
        side.set_ylabel("forgetting, bits per byte: less is better")
        side.grid(alpha=0.25)
        side.spines[["top", "right"]].set_visible(False)
        if side.has_data():
            side.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draws and prints. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lifelong.plot", description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="CSV files of `python -m lifelong`")
    parser.add_argument(
        "--seeds", type=read_seeds, help="seeds that count, with commas (default: all)"
    )
    parser.add_argument("--image", type=Path, help="file for the plot")
    options = parser.parse_args(arguments)
    try:
        points = read_points(options.rows, options.seeds)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(format_table(points) + "\n")
    print(format_goals(check_goals(points)))
    if options.image:
        draw(points, options.image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
