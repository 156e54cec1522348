"""The results of a run: its rows, in a CSV file, and the targets that they meet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import peer
from peer_bench.cases import OURS, PLAIN, Case

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


# What the layer is meant to reach.

TARGET_PRESETS = ("targets", "cuda-targets", "cuda-compiled")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Wanted:
    """The row of the fastest of some providers.

    If a provider was measured more than once, its first row counts, because that one took turns
    with the other providers; with `last` its last row, which took turns with other distributions.
    """

    providers: tuple[str, ...]
    columns: Mapping[str, object]
    last: bool = False

    def find(self, rows: list[Row]) -> Row | str:
        """The row, or why there is none."""
        found = [
            row
            for row in rows
            if row.provider in self.providers
            and all(getattr(row, name) == value for name, value in self.columns.items())
        ]
        chosen: dict[str, Row] = {}
        for row in reversed(found) if not self.last else found:
            if row.median_s:
                chosen[row.name] = row
        if not chosen:
            reasons = (f"{row.name}: {row.skipped}" for row in found if row.skipped)
            return next(reasons, NOT_MEASURED)
        return min(chosen.values(), key=lambda row: row.median_s or 0.0)


@dataclass(frozen=True)
class Target:
    """A bound on a column of a row, or on the ratio of a column in two rows."""

    text: str
    dim: int
    bound: float | None  # None: the number is only reported
    rows: tuple[Wanted, ...]
    column: str = "median_s"  # or "overhead", the time beyond that of the bytes at full bandwidth
    unit: str = "x"
    at_least: bool = True

    def __str__(self) -> str:
        if self.bound is None:
            return "reported"
        return f"{'≥' if self.at_least else '≤'} {format_number(self.bound, self.unit)}"

    def judge(self, rows: list[Row], defaults: Mapping[str, object]) -> Verdict:
        """The number in the rows of a run, or why there is none."""
        wanted = [replace(w, columns={**defaults, **w.columns}) for w in self.rows]
        found = [each.find(rows) for each in wanted]
        timed = [row for row in found if isinstance(row, Row)]
        if reasons := [reason for reason in found if isinstance(reason, str)]:
            reasons = [reason for reason in reasons if reason != NOT_MEASURED] or reasons
            return Verdict(self, None, reasons[0])
        values = [_get(row, self.column) for row in timed]
        if not all(values):
            return Verdict(self, None, NOT_MEASURED)
        number = values[0] / values[1] if len(values) == 2 else values[0]
        return Verdict(self, number, ", ".join(map(self._describe, timed)))

    def _describe(self, row: Row) -> str:
        if self.column == "peak_bytes":
            return f"{row.name} {_get(row, 'peak_bytes'):.3f} GiB"
        text = f"{row.name} {1e3 * (row.median_s or 0.0):.4g} ms"
        if self.column == "bandwidth_share":
            text += f", {row.gb_per_s:.4g} of {row.bandwidth_gb_per_s:.4g} GB/s"
        return text


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
        bound = self.target.bound
        if self.measured is None or bound is None:
            return None
        return self.measured >= bound if self.target.at_least else self.measured <= bound


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
    targets, defaults = TARGETS[device]
    others = {n: size for n, size in (sizes or {}).items() if defaults.get(n, size) != size}
    rows = [row for row in rows if row.device == device]
    verdicts = [target.judge(rows, {**defaults, **others}) for target in targets]
    if not others:
        return verdicts
    return [
        replace(v, target=replace(v.target, bound=None, dim=others.get("dim", v.target.dim)))
        for v in verdicts
    ]


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


def _row(providers: str | tuple[str, ...], mode: str, last: bool = False, **columns: Any) -> Wanted:
    names = (providers,) if isinstance(providers, str) else providers
    return Wanted(names, {"mode": mode, **columns}, last)


FORWARD, BACKWARD = "experts-forward", "experts-backward"


def _cpu_targets() -> Iterator[Target]:
    """In float32 with 1024 tokens."""
    dims = (512, 1024)
    rows: tuple[Wanted, ...]
    for text, mode, slow, fast, bounds, at_least in (
        ("experts forward / best compiled variant", FORWARD, "compiled", "peer", (1.8, 2.3), True),
        ("selection / torch.topk doing the same", "selection", "eager", "peer", (8, 8), True),
        ("layer forward + backward / best plain", "backward", PLAIN, "peer", (14, 18), True),
        ("training step / plain with fused dense Adam", "step", PLAIN, OURS, (20, None), True),
        ("training step over the dense 4·D layer's", "step", OURS, "dense-4d", (1.6, 1), False),
    ):
        for dim, bound in zip(dims, bounds, strict=True):
            rows = _row(slow, mode, dim=dim), _row(fast, mode, dim=dim)
            yield Target(text, dim, bound, rows, at_least=at_least)
    for dim, bound in zip(dims, (0.5, 0.62), strict=True):
        row = _row("peer", FORWARD, dim=dim)
        text = "experts forward, share of read bandwidth"
        yield Target(text, dim, bound, (row,), "bandwidth_share", "%")
    for name, peaks in (("peer", (0.8, 1.3)), ("peer-fused", (0.25, 0.35))):
        for dim, bound in zip(dims, peaks, strict=True):
            text = f"peak memory of a training step beyond the tables, {name}"
            rows = (_row(name, "step", dim=dim),)
            yield Target(text, dim, bound, rows, "peak_bytes", "GiB", at_least=False)
    rows = tuple(_row(OURS, "step", dim=256, num_experts=n) for n in (2**22, 2**16))
    yield Target("training step, N = 2^22 over N = 2^16", 256, 1.5, rows, at_least=False)
    for mode in (FORWARD, BACKWARD, "step"):
        for dim in dims:
            zipf = _row("peer", mode, dim=dim, distribution="zipf:1.0")
            rows = zipf, _row("peer", mode, last=True, dim=dim)
            yield Target(f"Zipf(1.0) over uniform, {mode}", dim, 1.0, rows, at_least=False)
    rows = (_row("peer", "forward", tokens=1, distribution="router"),)
    text = "one token, layer forward, time minus its bytes at read bandwidth"
    yield Target(text, 512, 60e-6, rows, "overhead", "µs", at_least=False)
    single, half = (
        _row("peer", FORWARD, dim=4096, num_experts=512**2, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    text = "experts forward, bfloat16 over float32, N = 512²"
    yield Target(text, 4096, 1.5, (single, half))
    for mode, names in ((FORWARD, ("peer",)), ("step", OURS)):
        for dim in dims:
            rows = _row(names, mode, dim=dim), _row(names, mode, dim=dim, dtype="bfloat16")
            yield Target(f"bfloat16 over float32, {mode}", dim, None, rows)


def _cuda_targets() -> Iterator[Target]:
    """In bfloat16 with 8192 tokens and D = 1024."""
    dim = 1024
    row = _row("peer", FORWARD)
    text = "experts forward, share of copy bandwidth"
    yield Target(text, dim, 0.85, (row,), "bandwidth_share", "%")
    graph = _row("peer-graph", "forward", tokens=1, distribution="router")
    for text, bound, unit, row in (
        ("retrieval, projection included", 0.25e-3, "ms", _row("peer", "routing")),
        ("experts backward, sparse gradients", 2.0e-3, "ms", _row("peer", BACKWARD)),
        ("experts backward, fused row-wise Adagrad", 2.2e-3, "ms", _row("peer-fused", BACKWARD)),
        ("training step", 3.6e-3, "ms", _row(OURS, "step")),
        ("one token, layer forward in a CUDA graph", 15e-6, "µs", graph),
    ):
        yield Target(text, dim, bound, (row,), unit=unit, at_least=False)
    for text, bound, slow, fast, mode in (
        ("routing / the same with torch.topk", 10, "eager", "peer", "routing"),
        ("experts forward / best compiled variant", 1.3, "compiled", "peer", FORWARD),
        ("layer forward + backward / best compiled variant", 3, "compiled", "peer", "backward"),
        ("training step / eager einsum with fused dense Adam", 8, "eager", OURS, "step"),
        ("peak memory of that eager step over peer's", 20, "eager", OURS, "step"),
    ):
        column = "peak_bytes" if "memory" in text else "median_s"
        yield Target(text, dim, bound, (_row(slow, mode), _row(fast, mode)), column)
    for mode in (FORWARD, BACKWARD, "step"):
        for name in OURS if mode != FORWARD else ("peer",):
            rows = _row(name, mode, distribution="zipf:1.0"), _row(name, mode, last=True)
            text = f"Zipf(1.0) over uniform, {name} {mode}"
            yield Target(text, dim, 1.0, rows, at_least=False)
    for mode in (FORWARD, "routing", BACKWARD, "step"):
        names = OURS if mode == "step" else ("peer",)
        rows = _row(names, mode, dtype="float32"), _row(names, mode)
        yield Target(f"bfloat16 over float32, {mode}", dim, None, rows)


# The columns of a target's rows unless it says otherwise.
_SIZES = {"distribution": "uniform", "num_experts": 1024**2, "heads": 8, "k": 16, "dim_key": 256}
_CPU_SIZES: dict[str, object] = {**_SIZES, "tokens": 1024, "dtype": "float32"}
_CUDA_SIZES: dict[str, object] = {**_SIZES, "tokens": 8192, "dtype": "bfloat16", "dim": 1024}

TARGETS = {
    "cpu": (tuple(_cpu_targets()), _CPU_SIZES),
    "cuda": (tuple(_cuda_targets()), _CUDA_SIZES),
}
