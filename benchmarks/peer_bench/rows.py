"""One CSV row for every measurement, appended as it is made."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import peer
from peer.bench.cases import Case

__all__ = ["HUGE_PAGES", "Row", "append", "read", "uses_huge_pages"]

# With it set to 1, torch asks for huge pages for large tensors, whoever's they are. Without it only
# the tables and gradients of peer's own layer lie on them.
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
    spelling: str
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
    stream_gb_per_s: float | None = None
    stream_formula: str = ""
    stream_share: float | None = None
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


def append(rows: list[Row], path: Path) -> None:
    """Appends rows to a file, with a line of names if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: _format(v) for k, v in values.items()})


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: it has other columns.
    """
    types = {field.name: str(field.type) for field in fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(types):
            raise ValueError(f"{path}: expected the columns {', '.join(types)}")
        found = []
        for line in reader:
            values: dict[str, Any] = {name: _parse(types[name], line[name]) for name in types}
            found.append(Row(**values))
        return found


def _format(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _parse(kind: str, text: str) -> int | float | str | None:
    if kind == "str":
        return text
    if text == "" and kind.endswith("None"):
        return None
    return int(text) if kind.startswith("int") else float(text)
