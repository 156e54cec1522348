"""The results of a run: its rows, in a CSV file, and the targets that they meet."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import peer
from peer_bench.cases import Case

# If it is 1, torch asks for huge pages for every large tensor. Otherwise only peer's tables and
# their gradients lie on huge pages.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def uses_huge_pages() -> bool:
    """Whether torch asks for huge pages."""
    return os.environ.get(HUGE_PAGES) == "1"


@dataclass(frozen=True)
class Row:
    """A measurement. Times are seconds, sizes bytes; `skipped` says why there is no time.

    benchmarks/README.md explains the columns.
    """

    date: str
    run: str
    preset: str
    mode: str
    provider: str
    variant: str
    distribution: str
    num_experts: int
    tokens: int
    dim: int
    heads: int
    k: int
    dim_key: int
    dtype: str
    threads: int
    routers: int
    frozen: int
    device: str
    huge_pages: int
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    rounds: int = 0
    calls: int = 0
    bytes: int = 0
    gb_per_s: float | None = None
    bandwidth_gb_per_s: float | None = None
    bandwidth_formula: str = ""
    bandwidth_share: float | None = None
    peak_bytes: int | None = None
    skipped: str = ""
    peer: str = str(peer.__version__)
    torch: str = str(torch.__version__)
    capability: str = ""
    processor: str = ""

    @property
    def case(self) -> Case:
        """The sizes."""
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})

    @property
    def name(self) -> str:
        """Provider and variant."""
        return f"{self.provider} {self.variant}".strip()


def append(rows: list[Row], path: Path) -> None:
    """Appends rows to a file, after a line of column names if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def read(path: Path) -> list[Row]:
    """The rows of a file; a ValueError if it has other columns."""
    types = {field.name: str(field.type) for field in fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(types):
            raise ValueError(f"{path}: expected the columns {', '.join(types)}")
        return [Row(**{n: _parse(types[n], line[n]) for n in types}) for line in reader]


def _parse(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if text == "" and kind.endswith("None"):
        return None
    return int(text) if kind.startswith("int") else float(text)


# Targets: bounds on the results, in targets.csv.

TARGET_PRESETS = ("targets", "cuda-targets", "cuda-compiled")
NOT_MEASURED = "not measured"
TARGETS = Path(__file__).resolve().parents[1] / "targets.csv"
INTEGERS = {field.name for field in fields(Row) if field.type == "int"}

# The columns of a target's rows unless it says otherwise, by device.
SIZES = {"distribution": "uniform", "num_experts": 1024**2, "heads": 8, "k": 16, "dim_key": 256}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {**SIZES, "tokens": 1024, "dtype": "float32"},
    "cuda": {**SIZES, "tokens": 8192, "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Target:
    """A bound on a column of a row, or on the ratio of a column in two rows.

    A row is that of the fastest of some providers. It is chosen by the values of columns; the word
    "last" among them chooses the last of several rows of a provider. Otherwise the first one
    counts, because it took turns with the other providers.
    """

    device: str
    target: str  # what is bounded
    dim: int
    bound: str  # such as ">=1.5", "" if the number is only reported
    unit: str
    column: str  # of `Row`, or "overhead", the time beyond that of the bytes at full bandwidth
    mode: str
    provider: str  # one or several
    sizes: str  # such as "tokens=1 distribution=router"
    over: str  # providers of the second row, or "same" for the provider of the first one
    over_sizes: str

    def __str__(self) -> str:
        if not self.bound:
            return "reported"
        sign = {">=": "≥", "<=": "≤"}[self.bound[:2]]
        return f"{sign} {format_number(float(self.bound[2:]), self.unit)}"

    def judge(self, rows: list[Row], sizes: Mapping[str, object]) -> Verdict:
        """The number in the rows of a run with these sizes, or why there is none."""
        sizes = {"dim": self.dim, "mode": self.mode, **sizes}
        first = _find(rows, self.provider, self.sizes, sizes)
        found = [first]
        if self.over:
            same = first.provider if isinstance(first, Row) else self.provider
            over = same if self.over == "same" else self.over
            found.append(_find(rows, over, self.over_sizes, sizes))
        timed = [row for row in found if isinstance(row, Row)]
        if reasons := [reason for reason in found if isinstance(reason, str)]:
            reasons = [reason for reason in reasons if reason != NOT_MEASURED] or reasons
            return Verdict(self, None, reasons[0])
        values = [_get(row, self.column) for row in timed]
        if not all(values):
            return Verdict(self, None, NOT_MEASURED)
        number = values[0] / values[1] if self.over else values[0]
        return Verdict(self, number, ", ".join(map(self._describe, timed)))

    def _describe(self, row: Row) -> str:
        if self.column == "peak_bytes":
            return f"{row.name} {_get(row, 'peak_bytes'):.3f} GiB"
        text = f"{row.name} {1e3 * (row.median_s or 0.0):.4g} ms"
        if self.column == "bandwidth_share":
            text += f", {row.gb_per_s:.4g} of {row.bandwidth_gb_per_s:.4g} GB/s"
        return text


def _find(rows: list[Row], providers: str, columns: str, sizes: dict[str, object]) -> Row | str:
    """The row of the fastest of some providers, or why there is none."""
    wanted = dict(sizes)
    for name, _, value in (word.partition("=") for word in columns.split() if word != "last"):
        wanted[name] = int(value) if name in INTEGERS else value
    found = [
        row
        for row in rows
        if row.provider in providers.split()
        and all(getattr(row, name) == value for name, value in wanted.items())
    ]
    chosen = {row.name: row for row in found[:: 1 if "last" in columns else -1] if row.median_s}
    if not chosen:
        return next((f"{row.name}: {row.skipped}" for row in found if row.skipped), NOT_MEASURED)
    return min(chosen.values(), key=lambda row: row.median_s or 0.0)


def _get(row: Row, column: str) -> float:
    """A number of a row, memory in GiB; 0 if it was not measured."""
    if column == "overhead":
        bandwidth = (row.bandwidth_gb_per_s or 0.0) * 1e9
        return (row.median_s or 0.0) - row.bytes / bandwidth if bandwidth else 0.0
    value = getattr(row, column) or 0.0
    return value / 2**30 if column == "peak_bytes" else value


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and how."""

    target: Target
    measured: float | None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured, or is only reported."""
        sign, bound = self.target.bound[:2], self.target.bound[2:]
        if self.measured is None or not bound:
            return None
        return self.measured >= float(bound) if sign == ">=" else self.measured <= float(bound)


def format_number(value: float, unit: str) -> str:
    """A number with its unit: x, %, µs, ms or GiB."""
    scale, digits = {"%": (100, 0), "µs": (1e6, 0), "ms": (1e3, 2)}.get(unit, (1, 2))
    return f"{scale * value:.{digits}f}{'' if unit == 'x' else ' '}{unit}"


def evaluate(
    rows: list[Row], device: str = "cpu", sizes: Mapping[str, int] | None = None
) -> list[Verdict]:
    """Verdicts on all targets of a device, from the rows of one run on it.

    `sizes` are those that the run had in place of the targets', by column. The numbers are then
    reported without the bounds, which are for the targets' sizes.
    """
    with TARGETS.open(newline="") as file:
        lines: list[dict[str, Any]] = [r for r in csv.DictReader(file) if r["device"] == device]
    targets = [Target(**{**line, "dim": int(line["dim"])}) for line in lines]
    usual, dims = DEFAULTS[device], {target.dim for target in targets}
    others = {n: size for n, size in (sizes or {}).items() if usual.get(n, size) != size}
    if sizes and "dim" in sizes and len(dims) == 1 and sizes["dim"] not in dims:
        others["dim"] = sizes["dim"]
    rows = [row for row in rows if row.device == device]
    if others:
        targets = [replace(t, bound="", dim=others.get("dim", t.dim)) for t in targets]
    return [target.judge(rows, {**usual, **others}) for target in targets]


def evaluate_runs(rows: list[Row], device: str = "cpu") -> list[Verdict]:
    """Verdicts on all targets of a device, each from the last run that tried to measure it.

    Rows of presets that are not for targets are left out.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.preset in TARGET_PRESETS and row.device == device:
            runs.setdefault(row.run, []).append(row)
    verdicts = evaluate([], device)
    for run in sorted(runs):
        for index, verdict in enumerate(evaluate(runs[run], device)):
            if verdict.note != NOT_MEASURED:
                verdicts[index] = replace(verdict, note=f"{verdict.note}; run of {run}")
    return verdicts
