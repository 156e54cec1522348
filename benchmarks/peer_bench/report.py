"""What a run shows in a terminal: progress, a table of rows, a table of targets."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from peer_bench.cases import Entry
from peer_bench.machine import GIB
from peer_bench.results import Row, Verdict, format_number


class Display:
    """A console with a progress bar for a number of turns. `progress` shows it as a context."""

    def __init__(self, console: Console, total: int) -> None:
        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress("{task.description}", *columns, console=console, transient=True)
        self.task = self.progress.add_task("", total=total)

    def advance(self, what: str, turns: int) -> None:
        """Says what goes on, and that turns are done."""
        self.progress.update(self.task, description=what, advance=turns)

    def show_row(self, row: Row) -> None:
        """Prints a row above the bar."""
        text = " ".join([row.mode, row.name, row.distribution, row.case.describe()])
        times = [_seconds(value) for value in (row.median_s, row.min_s, row.max_s)]
        measured = "{} ({} to {}), ".format(*times) + f"{_number(row.gb_per_s)} GB/s"
        text += f": {row.skipped or measured}"
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


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


def _make_table(title: str, left: str, right: str, last: str) -> Table:
    """A table whose columns are left-aligned, then right-aligned, then left-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in left.split(","):
        table.add_column(name)
    for name in right.split(","):
        table.add_column(name, justify="right")
    for name in last.split(","):
        table.add_column(name)
    return table


def make_rows_table(rows: list[Row]) -> Group:
    """A table for each case. A star marks the fastest of several variants of a provider."""
    best: dict[tuple[object, ...], float] = {}
    variants: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        variants.setdefault(_key(row), set()).add(row.variant)
        if row.median_s is not None:
            best[_key(row)] = min(row.median_s, best.get(_key(row), row.median_s))
    tables: list[Table] = []
    case: tuple[object, ...] = ()
    for row in rows:
        if (row.case, row.capability) != case:
            case = (row.case, row.capability)
            title = f"{row.case.describe()}, {row.capability}"
            numbers = "median,min,max,GB/s,of bandwidth,peak GiB"
            tables.append(_make_table(title, "mode,provider,ids", numbers, "skipped"))
        is_best = row.median_s is not None and row.median_s == best[_key(row)]
        tables[-1].add_row(
            row.mode,
            row.name + (" *" if is_best and len(variants[_key(row)]) > 1 else ""),
            row.distribution,
            *(_seconds(value) for value in (row.median_s, row.min_s, row.max_s)),
            _number(row.gb_per_s),
            "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %",
            _gib(row.peak_bytes),
            Text(row.skipped),
        )
    return Group(*tables)


def _key(row: Row) -> tuple[object, ...]:
    return row.case, row.mode, row.provider, row.distribution


def make_targets_table(verdicts: list[Verdict]) -> Table:
    """Targets with what was measured."""
    have_bounds = any(verdict.target.bound for verdict in verdicts)
    title = "targets" if have_bounds else "targets at other sizes, for which there are no bounds"
    table = _make_table(title, "", "D,target,measured", "met,from")
    for verdict in verdicts:
        target = verdict.target
        measured = "" if verdict.measured is None else format_number(verdict.measured, target.unit)
        met = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[verdict.is_met]
        table.add_row(
            target.target, str(target.dim), str(target), measured, met, Text(verdict.note)
        )
    return table


def make_entries_table(entries: list[Entry]) -> Group:
    """What would run, with estimates of memory; a table for each case."""
    tables: list[Table] = []
    case = None
    for entry in entries:
        if entry.case != case:
            case = entry.case
            title = case.describe()
            tables.append(_make_table(title, "mode,provider,ids", "estimated GiB", "skipped"))
        words = (entry.mode, entry.name, entry.distribution, _gib(entry.estimate), entry.skipped)
        tables[-1].add_row(*words)
    return Group(*tables)
