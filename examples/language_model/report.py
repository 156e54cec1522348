"""The report on finished runs: tables, curves, an example, a text sample and the expert atlas."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import peer

from .data import SEPARATOR, Corpus
from .flops import count_model
from .model import sample
from .names import RARE, Name, code_lengths, find_example, find_names, group_by_count
from .settings import Settings
from .train import HeldOut, Point, Run, bits_per_byte, predict

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm

PROMPT = "def "
NAMES = {"dense": "dense", "peer": "PEER"}
COLORS = {"dense": "#8a8f98", "peer": "#c2410c"}
CELLS = 128  # of the atlas, in each direction
CONTEXT_LINES = 6
TRAINING_FLOPS = 1.1e11  # a second, of either model at the demo's sizes on two cores with AVX-512


def count_active(run: Run) -> int:
    """The number of parameters that a token uses; of the table, only the retrieved rows count."""
    total = sum(p.numel() for p in run.model.parameters())
    layers, settings = run.model.layers, run.settings.peer
    if not layers:
        return total
    table = layers[0].experts.weight
    per_layer = settings.heads * settings.experts_per_head * table[0].numel()
    return total - table.numel() + len(layers) * per_layer


def introduce(settings: Settings, models: Sequence[str]) -> str:
    """Three lines for a reader who sees the demo for the first time."""
    experts = settings.peer.grid[0] * settings.peer.grid[1]
    tokens = settings.steps * settings.tokens_per_step
    flops = sum(sum(count_model(settings.model_config(name)).values()) for name in models)
    minutes = 3 * flops * tokens / TRAINING_FLOPS / 60  # a backward pass is two forward passes
    time = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    return (
        "What: a dense language model and its PEER twin, in which a pool of "
        f"{experts:,} tiny experts replaces a part of the feed-forward layer at the same FLOPs, "
        "learn Python from the standard library.\n"
        f"How long: {settings.steps:,} steps of {settings.tokens_per_step:,} tokens for each "
        f"model, in turns, {time} of training on two cores. Ctrl-C saves, and the same command "
        "resumes.\n"
        "Look for: bits per byte on files that neither has seen; lower is better. The table "
        "compares the twins at equal tokens, at equal FLOPs and at equal time."
    )


def finish(run: Run) -> dict[str, Any]:
    """Evaluates a trained model on the held-out text and samples from it."""
    settings, model, corpus = run.settings, run.model, run.corpus
    context, limit = settings.model.context, settings.held_out_tokens
    atlas = None
    if model.layers:
        with peer.UsageTracker(*model.layers) as tracker:
            held_out = predict(model, corpus, context, limit)
        atlas = {
            "mass": tracker.mass.clone(),
            "usage": float(tracker.usage()),
            "unevenness": float(tracker.unevenness()),
        }
    else:
        held_out = predict(model, corpus, context, limit)
    model.eval()
    tokenizer = corpus.tokenizer
    prompt = torch.tensor([tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(PROMPT).ids])
    written = sample(
        model, prompt, settings.sample_tokens, torch.Generator().manual_seed(settings.seed)
    )
    return {
        "row": make_row(run, bits_per_byte(held_out.nats, corpus, context, limit), atlas),
        "sample": tokenizer.decode(written[1:].tolist()),
        "atlas": atlas,
        "held_out": held_out._asdict(),
    }


def make_row(run: Run, bits: float, atlas: dict[str, Any] | None) -> dict[str, Any]:
    """The numbers of a finished run, by column of the CSV file."""
    settings, training = run.settings, run.training
    tokens = run.progress.step * settings.tokens_per_step
    return {
        "model": run.name,
        "seed": settings.seed,
        "steps": run.progress.step,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "active_parameters": count_active(run),
        "flops_per_token": round(sum(count_model(run.model.config).values())),
        "bits_per_byte": round(bits, 4),
        "tokens_per_second": round(tokens / run.progress.seconds),
        "training_seconds": round(run.progress.seconds, 1),
        "usage": round(atlas["usage"], 4) if atlas else "",
        "unevenness": round(atlas["unevenness"], 3) if atlas else "",
        "lr": training.lr,
        "router_lr": getattr(training, "router_lr", ""),
        "table_lr": getattr(training, "table_lr", ""),
        "torch": str(torch.__version__),
    }


def bits_after(points: Sequence[Point], seconds: float) -> float:
    """Bits per byte on the part after a time of training, between two evaluations linearly."""
    for before, after in itertools.pairwise(points):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.bits + share * (after.bits - before.bits)
    return points[-1].bits if points and seconds >= points[-1].seconds else math.nan


def compare_times(runs: Sequence[Run]) -> tuple[float, dict[str, float]]:
    """The time of the faster run, and bits per byte on the part that each run had by then.

    The slower run has then made fewer steps, and its learning rate has not decayed to zero yet.
    """
    seconds = min(run.progress.seconds for run in runs)
    return seconds, {run.name: bits_after(run.progress.points, seconds) for run in runs}


def layout(lines: Sequence[Sequence[str]]) -> str:
    """Formats cells as columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_table(runs: Sequence[Run]) -> str:
    """Formats what the runs have in common and how they compare, for the terminal."""
    rows = [run.progress.results["row"] for run in runs]
    names = [row["model"] for row in rows]

    def compare(title: str, bits: Sequence[float]) -> list[str]:
        ahead = f"{bits[0] - bits[1]:+.4f}" if len(bits) == 2 else ""
        return [title, *(f"{each:.4f}" for each in bits), ahead]

    def show(title: str, column: str, form: str = ",") -> list[str]:
        return [title, *(format(row[column], form) for row in rows), ""]

    seconds, by_time = compare_times(runs)
    both = names == ["dense", "peer"]
    return layout(
        [
            ["", *(NAMES[name] for name in names), "PEER ahead by" if both else ""],
            show("parameters", "parameters"),
            show("parameters that a token uses", "active_parameters"),
            show("FLOPs per token, forward", "flops_per_token"),
            show("training tokens", "tokens"),
            show("training tokens per second", "tokens_per_second"),
            show("seconds of training", "training_seconds", ".0f"),
            compare("bits per byte at equal tokens and FLOPs", [r["bits_per_byte"] for r in rows]),
            compare("  the same on a part of the text", [r.progress.points[-1].bits for r in runs]),
            compare(
                f"  on this part at equal time ({seconds:.0f} s)",
                [by_time[name] for name in names],
            ),
        ]
    )


def format_groups(corpus: Corpus, names: list[Name], held_out: dict[str, HeldOut]) -> str:
    """Formats the code lengths of names by their number of occurrences in the training text."""
    lines = [["occurrences in training", "names", *(f"{NAMES[m]} bits" for m in held_out)]]
    for group in group_by_count(names, held_out):
        first, last = group.counts.start, group.counts.stop - 1
        label = f"{first:,} to {last:,}" if last < 10**6 else f"{first:,} and more"
        label = f"{first:,}" if first == last else label
        bits = (f"{group.bits[model]:.2f}" for model in held_out)
        lines.append([label, f"{group.names:,}", *bits])
    return layout(lines)


def show_token(token: int, corpus: Corpus) -> str:
    """A token as a quoted string."""
    return repr(corpus.tokenizer.decode([token], skip_special_tokens=False))


def format_example(
    corpus: Corpus, names: list[Name], held_out: dict[str, HeldOut], context: int
) -> str:
    """Shows the name of `names.find_example` in its context, and what both models expected."""
    targets = corpus.held_out[1:]
    rule = (
        f"The rule: of the names with {RARE.start} to {RARE.stop - 1} occurrences in the training "
        "text that are new in their\nwindow, and of which PEER finds every token the most probable "
        "one, the name that saves the most bits."
    )
    name = find_example(names, targets, held_out["peer"], held_out["dense"])
    if name is None:
        return f"There is no name that PEER predicts and the dense model does not.\n{rule}"
    bits = {model: float(code_lengths([name], each.nats)) for model, each in held_out.items()}
    start = name.first // context * context
    decode = corpus.tokenizer.decode
    before = decode(corpus.held_out[start : name.first + 1].tolist()).splitlines(keepends=True)
    text = decode(targets[name.first : name.last + 1].tolist())
    after = decode(targets[name.last + 1 : name.last + 33].tolist()).splitlines() or [""]
    shown = "".join(before[-CONTEXT_LINES:]) + f"»{text}«" + after[0]
    lines = [["token", *(f"{NAMES[m]}: probability" for m in held_out), "dense expects"]]
    for position in range(name.first, name.last + 1):
        shares = (f"{math.exp(-float(each.nats[position])):.3f}" for each in held_out.values())
        expected = show_token(int(held_out["dense"].best[position]), corpus)
        lines.append([show_token(int(targets[position]), corpus), *shares, expected])
    return (
        f"A rare name that PEER predicts: {name.text}, {name.count} times in the training text.\n"
        f"It costs PEER {bits['peer']:.1f} bits and the dense model {bits['dense']:.1f} bits.\n"
        f"{rule}\n\n" + "\n".join("    " + line for line in shown.splitlines()) + "\n\n"
        f"{layout(lines)}"
    )


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draws bits per byte over training tokens and over seconds of training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    for run in runs:
        style = {"color": COLORS[run.name], "marker": "o", "markersize": 3}
        points = run.progress.points
        bits = [point.bits for point in points]
        label = f"{NAMES[run.name]}: {bits[-1]:.3f} at the end"
        left.plot([point.tokens / 1e6 for point in points], bits, label=label, **style)
        right.plot([point.seconds for point in points], bits, **style)
    if len(runs) > 1:
        seconds, _ = compare_times(runs)
        right.axvline(seconds, color="black", linewidth=0.8, linestyle=":")
        right.annotate(
            "equal time",
            (seconds, 1.0),
            (-4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
        )
    left.set_xlabel("training tokens, millions")
    right.set_xlabel("seconds of training, without evaluations")
    left.set_ylabel("bits per byte on a part of the held-out files, log scale")
    left.set_title("over tokens")
    right.set_title("over time")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bin_atlas(mass: Tensor, grid: tuple[int, int]) -> Tensor:
    """The use of the experts on a scale that can be read.

    Args:
        mass: router weight of each expert, (rows * columns,).
        grid: rows and columns of the expert grid.

    Returns:
        Rows and columns are sorted by use, and put into at most `CELLS` bins of equal size. The
        value of a cell is the mean router weight of its experts over that of all experts.
    """
    table = mass.view(grid) / mass.mean()
    table = table[table.sum(1).argsort(descending=True)][:, table.sum(0).argsort(descending=True)]
    rows, columns = (max(1, size // CELLS) for size in grid)
    pooled = torch.nn.functional.avg_pool2d(
        table[None], (rows, columns), ceil_mode=True, count_include_pad=False
    )
    return pooled[0]


def draw_atlas(run: Run, path: Path) -> None:
    """Draws the use of the experts: as a map of the grid, and sorted by use."""
    atlas = run.progress.results["atlas"]
    mass, grid = atlas["mass"], run.settings.peer.grid
    cells = bin_atlas(mass, grid)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    figure.suptitle(
        f"Expert atlas: {grid[0]} x {grid[1]} experts on the held-out files, "
        f"usage {atlas['usage']:.1%}, unevenness {atlas['unevenness']:.2f} nats"
    )
    limit = 6.0  # in powers of two
    image = left.imshow(
        cells.clamp(min=2.0**-limit).log2().numpy(),
        cmap="RdBu_r",
        norm=TwoSlopeNorm(0.0, -limit, limit),
        interpolation="nearest",
        extent=(0, grid[1], grid[0], 0),
        aspect="auto",
    )
    ticks = range(-int(limit), int(limit) + 1, 2)
    bar = figure.colorbar(image, ax=left, extend="both", ticks=list(ticks))
    bar.ax.set_yticklabels([f"{2.0**tick:g}" for tick in ticks])
    bar.set_label("use of a cell's experts, 1 = average of all")
    left.set_title(f"mean of {grid[0] // cells.shape[0]} x {grid[1] // cells.shape[1]} experts")
    left.set_xlabel("columns, the most used first")
    left.set_ylabel("rows, the most used first")

    share = mass.sort(descending=True).values / mass.mean()
    used = share[share > 0]
    places = torch.arange(1, len(used) + 1)
    right.loglog(places.numpy(), used.numpy(), color=COLORS["peer"])
    right.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    tenth = float(share[: max(1, len(share) // 10)].sum() / share.sum())
    right.set_title(f"the most used tenth has {tenth:.0%} of the router weight")
    right.set_xlabel("experts, the most used first")
    right.set_ylabel("use, 1 = average of all")
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def append_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Appends lines to a CSV file, after a header if the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    columns = list(rows[0])
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(
                f"expected {path} to have the columns {', '.join(columns)}, got {', '.join(found)}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def curve_rows(run: Run) -> list[dict[str, Any]]:
    """The evaluations during a run, by column of the CSV file."""
    return [
        {
            "model": run.name,
            "seed": run.settings.seed,
            "tokens": point.tokens,
            "seconds": round(point.seconds, 2),
            "bits_per_byte_part": round(point.bits, 4),
        }
        for point in run.progress.points
    ]


def rows_with_times(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the runs, with the comparison at equal time."""
    seconds, by_time = compare_times(runs)
    return [
        {
            **run.progress.results["row"],
            "bits_per_byte_part": round(run.progress.points[-1].bits, 4),
            "equal_seconds": round(seconds, 1),
            "bits_per_byte_part_at_equal_seconds": round(by_time[run.name], 4),
        }
        for run in runs
    ]


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Appends the rows of the runs to a file, and their curves to one beside it."""
    append_rows(rows_with_times(runs), path)
    curves = path.with_name(f"{path.stem}-curves{path.suffix}")
    append_rows([row for run in runs for row in curve_rows(run)], curves)


def show(runs: Sequence[Run], folder: Path) -> None:
    """Prints and plots the results of finished runs."""
    print("\n" + format_table(runs) + "\n")
    held_out = {run.name: HeldOut(**run.progress.results["held_out"]) for run in runs}
    # Positions of names are positions in the whole held-out text.
    if set(held_out) == set(NAMES) and runs[0].settings.held_out_tokens is None:
        corpus, context = runs[0].corpus, runs[0].settings.model.context
        names = find_names(corpus, context)
        print("Mean code length of a name that is new in its window:\n")
        print(format_groups(corpus, names, held_out) + "\n")
        print(format_example(corpus, names, held_out, context) + "\n")
    draw_curves(runs, folder / "curves.png")
    print(f"curves: {folder / 'curves.png'}")
    for run in runs:
        if atlas := run.progress.results["atlas"]:
            draw_atlas(run, folder / "atlas.png")
            usage, unevenness = atlas["usage"], atlas["unevenness"]
            print(f"expert atlas: {folder / 'atlas.png'}")
            print(f"expert usage {usage:.1%}, unevenness {unevenness:.3f} nats")
    written = runs[-1].progress.results["sample"]
    print(f"\nwritten by the {NAMES[runs[-1].name]} model:\n")
    print("\n".join("    " + line for line in written.splitlines()))
