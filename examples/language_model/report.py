"""The report on finished runs: a table, curves, a text sample and the expert atlas."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib
import torch

import peer

from .data import SEPARATOR
from .flops import count_model
from .model import sample
from .train import Run, evaluate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PROMPT = "def "
NAMES = {"dense": "dense", "peer": "PEER"}
COLORS = {"dense": "#8a8f98", "peer": "#c2410c"}


def count_active(run: Run) -> int:
    """The number of parameters that a token uses; of the tables, only the retrieved rows count."""
    total = sum(p.numel() for p in run.model.parameters())
    layer, settings = run.model.peer, run.settings.peer
    if layer is None:
        return total
    tables = sum(p.numel() for p in layer.experts.parameters())
    per_expert = tables // layer.num_experts
    return total - tables + settings.heads * settings.experts_per_head * per_expert


def evaluate_usage(run: Run) -> tuple[float, dict[str, Any] | None]:
    """Bits per byte of the held-out text, and the expert usage of a PEER model."""
    context = run.settings.model.context
    if run.model.peer is None:
        return evaluate(run.model, run.corpus, context), None
    with peer.UsageTracker(run.model.peer) as tracker:
        bits = evaluate(run.model, run.corpus, context)
    return bits, {
        "mass": tracker.mass.clone(),
        "usage": float(tracker.usage()),
        "unevenness": float(tracker.unevenness()),
    }


def finish(run: Run) -> dict[str, Any]:
    """Evaluates a trained model on the held-out text and samples from it."""
    settings, model = run.settings, run.model
    bits, atlas = evaluate_usage(run)
    model.eval()
    tokenizer = run.corpus.tokenizer
    prompt = torch.tensor([tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(PROMPT).ids])
    written = sample(
        model, prompt, settings.sample_tokens, torch.Generator().manual_seed(settings.seed)
    )
    tokens = run.progress.step * settings.batch * settings.model.context
    return {
        "row": {
            "model": run.name,
            "seed": settings.seed,
            "steps": run.progress.step,
            "tokens": tokens,
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_parameters": count_active(run),
            "flops_per_token": round(sum(count_model(model.config).values())),
            "bits_per_byte": round(bits, 4),
            "tokens_per_second": round(tokens / run.progress.seconds),
            "training_minutes": round(run.progress.seconds / 60, 2),
            "usage": round(atlas["usage"], 4) if atlas else "",
            "unevenness": round(atlas["unevenness"], 3) if atlas else "",
            "lr": settings.peer_lr if atlas else settings.dense_lr,
            "router_lr": settings.router_lr if atlas else "",
            "table_lr": settings.table_lr if atlas else "",
            "torch": str(torch.__version__),
        },
        "sample": tokenizer.decode(written[1:].tolist()),
        "atlas": atlas,
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as a table for the terminal."""
    heads = ("", "parameters", "active", "FLOPs/token", "bits per byte", "tokens/s", "minutes")
    lines = [heads] + [
        (
            NAMES[row["model"]],
            f"{row['parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['flops_per_token']:,}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['tokens_per_second']:,}",
            f"{row['training_minutes']:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def draw_curves(runs: list[Run], path: Path) -> None:
    """Draws bits per byte over training tokens, one line per model."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        tokens, bits = zip(*run.progress.curve, strict=True)
        millions = [count / 1e6 for count in tokens]
        axes.plot(
            millions, bits, color=COLORS[run.name], marker="o", markersize=3, label=NAMES[run.name]
        )
        axes.annotate(
            f"{bits[-1]:.3f}",
            (millions[-1], bits[-1]),
            (4, 6 if run.name == "dense" else -6),
            textcoords="offset points",
            va="center",
            color=COLORS[run.name],
        )
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("bits per byte, part of the held-out files")
    axes.set_title("Held-out Python files: the dense model and the PEER model")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_atlas(run: Run, path: Path) -> None:
    """Draws the expert grid; brightness is the log of an expert's share of router weight."""
    rows, columns = run.settings.peer.grid
    atlas = run.progress.results["atlas"]
    mass = atlas["mass"].view(rows, columns)
    share = torch.full_like(mass, float("nan"))
    share[mass > 0] = (mass[mass > 0] / mass.sum()).log10()
    figure, axes = plt.subplots(figsize=(8.5, 8), layout="constrained")
    axes.set_facecolor("black")
    image = axes.imshow(share.numpy(), cmap="inferno", interpolation="nearest")
    axes.set_title(
        f"Expert atlas: {rows} x {columns} experts on the held-out files\n"
        f"usage {atlas['usage']:.1%}, unevenness {atlas['unevenness']:.2f} nats"
    )
    axes.set_xlabel("column")
    axes.set_ylabel("row")
    label = "log10 of the share of router weight (black: never used)"
    figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def append_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Appends one line per model to a CSV file, after a header if the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(runs: list[Run], folder: Path) -> None:
    """Prints and plots the results of finished runs."""
    rows = [run.progress.results["row"] for run in runs]
    print("\n" + format_table(rows) + "\n")
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
