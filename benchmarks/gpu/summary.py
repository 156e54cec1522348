"""Summarizes a run of `benchmarks/gpu.sh` in at most 40 lines: `python summary.py OUT`.

It compares the measured times with `predictions.csv`. These predictions are for an H200, 8192
tokens, D = 1024, N = 1024², H = 8, K = 16 and bfloat16. They were derived from instruction counts
and bytes before the kernels had run on a GPU.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from pathlib import Path

MAX_LINES = 40
MAX_FAILURES = 12
SIZES = {"num_experts": "1048576", "dim": "1024", "dtype": "bfloat16"}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def split_log(text: str) -> dict[str, str]:
    """What each phase printed, in its last run."""
    parts = re.split(r"^==== ([\w-]+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def describe_phases(phases: list[dict[str, str]], logs: dict[str, str]) -> list[str]:
    """A line for each phase: how it ended, and what pytest counted."""
    last = {row["phase"]: row for row in phases}
    lines = []
    for name, row in last.items():
        counts = re.findall(
            r"^=*\s?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", logs.get(name, ""), re.MULTILINE
        )
        words = [row["status"], *counts[-1:]]
        lines.append(f"{name:<14} {row['seconds']:>4} s  {', '.join(words)}")
    return lines


def find_failures(logs: dict[str, str]) -> list[str]:
    """Tests that failed, wrong results, and what sanitizers counted."""
    patterns = (
        r"^(?:\w+: )?((?:FAILED|ERROR) \S+.*)$",
        r"^((?:wrong result|failed): .*)$",
        r"^(\w+: =+ ERROR SUMMARY: [1-9].*)$",
    )
    found = [
        line for log in logs.values() for p in patterns for line in re.findall(p, log, re.MULTILINE)
    ]
    lines = [line[:118] for line in dict.fromkeys(found)]
    if len(lines) > MAX_FAILURES:
        lines = [*lines[:MAX_FAILURES], f"... and {len(lines) - MAX_FAILURES} more, in log.txt"]
    return lines


def measure(
    prediction: dict[str, str], rows: list[dict[str, str]], kernels: list[dict[str, str]]
) -> float | None:
    """Milliseconds of a predicted stage: of a benchmark row, or of kernels in a step.

    For kernels it is one call of each kernel that matches the pattern.
    """
    if prediction["mode"] == "kernels":
        chosen = [
            row
            for row in kernels
            if row["step"] == "sparse" and re.search(prediction["provider"], row["kernel"])
        ]
        if not chosen:
            return None
        calls = min(int(row["calls"]) for row in chosen)
        return sum(float(row["total_ms"]) for row in chosen) / calls
    wanted = {**SIZES, **{name: prediction[name] for name in ("mode", "provider", "tokens")}}
    times = [
        1e3 * float(row["median_s"])
        for row in rows
        if row["median_s"]
        and row["distribution"] in ("uniform", "router")
        and all(row[name] == value for name, value in wanted.items())
    ]
    return statistics.median(times) if times else None


def compare(
    predictions: list[dict[str, str]], rows: list[dict[str, str]], kernels: list[dict[str, str]]
) -> list[str]:
    """A table of predicted, measured and target times."""
    lines = [f"{'milliseconds':<40} {'predicted':>13} {'measured':>9} {'target':>7}"]
    for prediction in predictions:
        low, high = float(prediction["low_ms"]), float(prediction["high_ms"])
        measured = measure(prediction, rows, kernels)
        verdict = ""
        if measured is not None:
            verdict = (
                "as predicted"
                if low <= measured <= high
                else "slower"
                if measured > high
                else "faster"
            )
        lines.append(
            f"{prediction['stage']:<40} {low:>6.3g}-{high:<6.3g} "
            f"{'' if measured is None else f'{measured:.3f}':>9} {prediction['target_ms']:>7} "
            f"{verdict}"
        )
    return lines


def summarize(out: Path) -> list[str]:
    """The lines of the summary."""
    card = (out / "card.txt").read_text().splitlines() if (out / "card.txt").exists() else []
    log = (out / "log.txt").read_text(errors="replace") if (out / "log.txt").exists() else ""
    logs = split_log(log)
    rows = read_csv(out / "rows.csv")
    failures = find_failures(logs)
    lines = [
        "; ".join(card),
        *describe_phases(read_csv(out / "phases.csv"), logs),
        *(["", "failed", *failures] if failures else []),
        "",
        *compare(
            read_csv(Path(__file__).parent / "predictions.csv"), rows, read_csv(out / "kernels.csv")
        ),
    ]
    timed = sum(bool(row["median_s"]) for row in rows)
    lines.append(f"rows.csv: {timed} timed, {len(rows) - timed} without a time")
    return lines[:MAX_LINES]


if __name__ == "__main__":
    print("\n".join(summarize(Path(sys.argv[1]))))
