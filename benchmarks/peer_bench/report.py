"""What a run shows in a terminal: progress, a table of rows, a table of targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from peer.bench.rows import Row
from peer.bench.run import Listing
from peer.bench.verdicts import Verdict, format_number

__all__ = ["Display", "make_listing_table", "make_rows_table", "make_targets_table"]

GIB = 2**30


class Display:
    """A console with a progress bar.

    Args:
        console: to print to.
        total: turns of the whole run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=total)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar."""
        with self.progress:
            yield

    def advance(self, what: str, turns: int) -> None:
        """Says what goes on, and that turns are done."""
        self.progress.update(self.task, description=what, advance=turns)

    def show_row(self, row: Row) -> None:
        """Prints a row above the bar."""
        text = f"{_describe(row)}: "
        if row.median_s is None:
            text += row.skipped
        else:
            text += (
                f"{_seconds(row.median_s)} ({_seconds(row.min_s)} to {_seconds(row.max_s)}), "
                f"{_number(row.gb_per_s)} GB/s"
            )
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _describe(row: Row) -> str:
    words = [row.mode, row.provider, row.spelling, row.distribution, row.case.describe()]
    return " ".join(filter(None, words))


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{1e6 * value:.1f} µs"
    return f"{1e3 * value:.4g} ms" if value < 10 else f"{value:.4g} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / GIB:.3f}"


def make_rows_table(rows: list[Row]) -> Group:
    """A table a case; of a provider with several spellings the fastest has a star."""
    best: dict[tuple[object, ...], float] = {}
    spellings: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        spellings.setdefault(_key(row), set()).add(row.spelling)
        if row.median_s is not None:
            best[_key(row)] = min(row.median_s, best.get(_key(row), row.median_s))
    tables: list[Table] = []
    case: tuple[object, ...] = ()
    for row in rows:
        if (row.case, row.capability) != case:
            case = (row.case, row.capability)
            tables.append(_make_table(f"{row.case.describe()}, {row.capability}", ROW_COLUMNS))
        name = f"{row.provider} {row.spelling}".strip()
        is_best = row.median_s is not None and row.median_s == best[_key(row)]
        if is_best and len(spellings[_key(row)]) > 1:
            name += " *"
        share = "" if row.stream_share is None else f"{100 * row.stream_share:.0f} %"
        tables[-1].add_row(
            row.mode,
            name,
            row.distribution,
            _seconds(row.median_s),
            _seconds(row.min_s),
            _seconds(row.max_s),
            _number(row.gb_per_s),
            share,
            _gib(row.peak_bytes),
            Text(row.skipped),
        )
    return Group(*tables)


ROW_COLUMNS = {
    "mode": "left",
    "provider": "left",
    "ids": "left",
    "median": "right",
    "min": "right",
    "max": "right",
    "GB/s": "right",
    "of stream": "right",
    "peak GiB": "right",
    "skipped": "left",
}


def _make_table(title: str, columns: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    return table


def _key(row: Row) -> tuple[object, ...]:
    return row.case, row.mode, row.provider, row.distribution


def make_targets_table(verdicts: list[Verdict]) -> Table:
    """Targets with what was measured."""
    have_bounds = any(verdict.target.bound is not None for verdict in verdicts)
    title = "targets" if have_bounds else "targets at other sizes, for which there are no bounds"
    columns = {"": "left", "D": "right", "target": "right", "measured": "right"}
    table = _make_table(title, {**columns, "met": "left", "from": "left"})
    for verdict in verdicts:
        target = verdict.target
        measured = "" if verdict.measured is None else format_number(verdict.measured, target.unit)
        met = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[verdict.is_met]
        table.add_row(target.text, str(target.dim), str(target), measured, met, Text(verdict.note))
    return table


def make_listing_table(listings: list[Listing]) -> Group:
    """What would run, with estimates of memory; a table a case."""
    columns = {"mode": "left", "provider": "left", "ids": "left", "estimated GiB": "right"}
    tables: list[Table] = []
    case = None
    for listing in listings:
        if listing.case != case:
            case = listing.case
            tables.append(_make_table(case.describe(), {**columns, "skipped": "left"}))
        name = f"{listing.provider} {listing.spelling}".strip()
        tables[-1].add_row(
            listing.mode, name, listing.distribution, _gib(listing.estimate), listing.skipped
        )
    return Group(*tables)
