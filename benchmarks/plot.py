"""Draws rows of `python -m peer_bench`: `python benchmarks/plot.py rows.csv --out pictures`.

Bars show the time of each mode by provider, in one picture for each case with several providers.
Lines show what changes with one size, in one picture for each size that takes several values while
the others stay. The script reads only files. It needs matplotlib but no torch.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

SIZES = ("num_experts", "tokens", "dim", "heads", "k", "dim_key", "dtype", "threads")
AXES = {
    "num_experts": "experts N",
    "tokens": "tokens T",
    "dim": "width D",
    "heads": "heads H",
    "k": "experts per head K",
    "dim_key": "query width per head",
    "dtype": "element type",
    "threads": "threads",
    "distribution": "distribution of the ids",
}
MODES = {
    "forward": "layer forward",
    "backward": "layer forward + backward",
    "step": "training step",
    "experts-forward": "experts forward",
    "experts-backward": "experts backward",
    "routing": "query projection + retrieval",
    "retrieval": "retrieval",
    "selection": "selection",
    "optimizer": "optimizer",
}
COLORS = {
    "peer": "#c2410c",
    "peer-fused": "#f59e0b",
    "peer-graph": "#92400e",
    "peer-dense-grad": "#fdba74",
    "eager": "#1e3a8a",
    "compiled": "#3b82f6",
    "embedding_bag": "#93c5fd",
    "PEER-pytorch": "#6d28d9",
    "dense-4d": "#525252",
    "dense-active": "#a3a3a3",
}

Row = dict[str, str]


def read(paths: list[Path]) -> list[Row]:
    """The rows that have a time; of a measurement that was repeated, the latest."""
    latest: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["median_s"]:
                    names = ("mode", "provider", "variant", "distribution", "routers")
                    latest[tuple(row[n] for n in (*names, "capability", *SIZES))] = row
    return list(latest.values())


def fastest(rows: list[Row]) -> dict[str, Row]:
    """Of each provider the fastest variant, in the order of `COLORS`."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: float(row["median_s"])):
        best.setdefault(row["provider"], row)
    order = [*COLORS, *best]
    return dict(sorted(best.items(), key=lambda item: order.index(item[0])))


def describe(row: Row, without: str = "") -> str:
    """The sizes of a row's case."""
    names = {"num_experts": "N", "tokens": "T", "dim": "D", "heads": "H", "k": "K"}
    parts = [f"{names.get(n, n)}={row[n]}" for n in SIZES if n not in (without, "dtype", "threads")]
    if without != "dtype":
        parts.append(row["dtype"])
    if without != "threads" and row["device"] == "cpu":
        parts.append(f"{row['threads']} threads")
    if without != "distribution":
        parts.append(row["distribution"])
    return " ".join(parts)


def spell_time(seconds: float) -> str:
    """A time with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"


def name_transfer(row: Row) -> str:
    """The transfer whose bandwidth a row is compared with: a read on a CPU, a copy on a GPU."""
    return "copy" if row["bandwidth_formula"].startswith("copy") else "read"


def draw_bars(rows: list[Row], folder: Path) -> list[Path]:
    """For each case the time of every mode by provider, logarithmic."""
    cases: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row["distribution"], row["capability"], row["routers"])
        cases[(*(row[name] for name in SIZES), *key)].append(row)
    paths = []
    for key, group in sorted(cases.items()):
        by_mode = {mode: fastest([r for r in group if r["mode"] == mode]) for mode in MODES}
        by_mode = {mode: best for mode, best in by_mode.items() if len(best) > 1}
        if not by_mode:
            continue
        count = sum(len(best) + 1 for best in by_mode.values())
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.27 * count), layout="constrained")
        place, ticks, labels = 0.0, [], []
        for mode, best in by_mode.items():
            axes.text(0.0, place, MODES[mode], weight="bold", va="center", transform=_left(axes))
            place += 1
            for name, row in best.items():
                seconds = float(row["median_s"])
                axes.barh(place, seconds, color=COLORS.get(name, "#888888"), height=0.8)
                spread = (float(row["min_s"]), float(row["max_s"]))
                axes.plot(spread, (place, place), color="black", linewidth=1)
                text = f"  {spell_time(seconds)}"
                if mode.startswith("experts") and row["bandwidth_share"]:
                    share = f"{100 * float(row['bandwidth_share']):.0f} %"
                    text += f", {share} of {name_transfer(row)} bandwidth"
                axes.text(max(seconds, spread[1]), place, text, va="center", fontsize=8)
                ticks.append(place)
                labels.append(f"{name} ({row['variant']})" if row["variant"] else name)
                place += 1
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.3)  # room for the numbers
        axes.set_ylim(place - 0.5, -0.7)
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.set_xlabel("seconds, median over rounds (line: fastest to slowest round)")
        axes.set_title(f"{describe(group[0])}\n{group[0]['processor']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        name = "-".join((*(row_value.replace(":", "") for row_value in key[:-2]), key[-2]))
        path = folder / f"modes-{name}{'' if key[-1] == '1' else '-routers' + key[-1]}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths


def _left(axes: plt.Axes) -> object:
    """Horizontal places as a share of the axes, vertical ones as in the data."""
    return axes.get_yaxis_transform()


def draw_sweeps(rows: list[Row], folder: Path) -> list[Path]:
    """For each size, time and share of the bandwidth over its values, by mode and provider."""
    paths = []
    for field in (*SIZES, "distribution"):
        others = [name for name in (*SIZES, "distribution", "capability") if name != field]
        groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in rows:
            groups[tuple(row[name] for name in others)].append(row)
        for key, group in sorted(groups.items()):
            if len({row[field] for row in group}) < 3:
                continue
            path = folder / f"sweep-{field}-{'-'.join(key).replace(':', '')}.png"
            if _draw_sweep(field, group, path):
                paths.append(path)
    return paths


def _order(value: str) -> tuple[float, str]:
    """Numbers by size; the router after drawn ids, the others by name."""
    return (float(value), "") if value.isdigit() else (float(value == "router"), value)


def _draw_sweep(field: str, rows: list[Row], path: Path) -> bool:
    values = sorted({row[field] for row in rows}, key=_order)
    curves: dict[str, dict[str, dict[str, Row]]] = {}
    for mode in MODES:
        lines: dict[str, dict[str, Row]] = defaultdict(dict)
        for value in values:
            here = [row for row in rows if row["mode"] == mode and row[field] == value]
            for name, row in fastest(here).items():
                lines[name][value] = row
        lines = {name: line for name, line in lines.items() if len(line) > 1}
        if lines:
            curves[mode] = lines
    if not curves:
        return False
    figure, grid = plt.subplots(
        2,
        len(curves),
        figsize=(max(5.0, 3.3 * len(curves)), 6.2),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    is_number = all(value.isdigit() for value in values)
    for column, (mode, lines) in enumerate(curves.items()):
        top, bottom = grid[0][column], grid[1][column]
        for name, line in lines.items():
            xs = [int(v) if is_number else values.index(v) for v in line]
            style = {"color": COLORS.get(name, "#888888"), "marker": "o", "markersize": 3}
            top.plot(xs, [float(r["median_s"]) for r in line.values()], label=name, **style)
            if not name.startswith("dense"):
                shares = [100 * float(r["bandwidth_share"]) for r in line.values()]
                bottom.plot(xs, shares, **style)
        top.set_title(MODES[mode], fontsize=10)
        top.set_yscale("log")
        top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        top.yaxis.set_major_formatter(lambda seconds, _: spell_time(seconds))
        top.tick_params(axis="y", labelsize=8)
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel(AXES[field])
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if is_number:
                axes.set_xscale("log", base=2)
                ticks = [int(value) for value in values]
                axes.set_xticks(ticks, [_short(tick) for tick in ticks], fontsize=7, rotation=45)
            else:
                axes.set_xticks(range(len(values)), values, fontsize=7, rotation=45)
            axes.minorticks_off()
    grid[0][0].set_ylabel("time, median over rounds")
    grid[1][0].set_ylabel(f"algorithmic bytes per second,\n% of {name_transfer(rows[0])} bandwidth")
    handles: dict[str, object] = {}
    for axes in grid[0]:
        handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(f"{describe(rows[0], without=field)}\n{rows[0]['processor']}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _short(value: int) -> str:
    """Powers of two from 2^14 as such."""
    if value >= 2**14 and value & (value - 1) == 0:
        return f"$2^{{{value.bit_length() - 1}}}$"
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    """Draws everything that the rows allow, and prints the pictures' names."""
    parser = argparse.ArgumentParser(description="Draws rows of `python -m peer_bench`.")
    parser.add_argument("csv", type=Path, nargs="+", help="files of rows")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for pictures")
    options = parser.parse_args(arguments)
    rows = read(options.csv)
    if not rows:
        print("there are no rows with a time", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for path in (*draw_bars(rows, options.out), *draw_sweeps(rows, options.out)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
