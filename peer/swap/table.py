"""The table of what was replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from peer._counts import Counts

__all__ = ["Replacement", "Replacements"]

_HEADER = ("name", "before", "after", "parameters", "active parameters", "FLOPs per token")


@dataclass(frozen=True)
class Replacement:
    """A block and the layer that took its place.

    Attributes:
        name: the name of the layer in the model.
        before: the block.
        after: the layer.
        counts_before: parameters, active parameters and forward FLOPs per token of the block.
        counts_after: those of what stands there now. With `mode="beside"`, this includes the block.
            A pool that layers share counts for the first of them.
    """

    name: str
    before: str
    after: str
    counts_before: Counts
    counts_after: Counts


class Replacements(Sequence[Replacement]):
    """What `peer.replace_ffn_` did, one entry per layer. Printing it gives a table."""

    def __init__(self, entries: Sequence[Replacement]) -> None:
        self._entries = tuple(entries)

    @overload
    def __getitem__(self, index: int) -> Replacement: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Replacement, ...]: ...
    def __getitem__(self, index: int | slice) -> Replacement | tuple[Replacement, ...]:
        """The entry of a layer."""
        return self._entries[index]

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Replacement]:
        """The entries."""
        return iter(self._entries)

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [entry.name for entry in self._entries]

    def total(self) -> tuple[Counts, Counts]:
        """The sums of the counts before and after."""
        before = after = Counts(0, 0, 0)
        for entry in self._entries:
            before, after = before + entry.counts_before, after + entry.counts_after
        return before, after

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [_HEADER]
        for entry in self._entries:
            cells = _cells(entry.counts_before, entry.counts_after)
            rows.append((entry.name, entry.before, entry.after, *cells))
        if len(self._entries) > 1:
            rows.append(("total", "", "", *_cells(*self.total())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            texts = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
            texts += [f"{cell:>{width}}" for cell, width in zip(row[3:], widths[3:], strict=True)]
            lines.append("  ".join(texts).rstrip())
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)

    __repr__ = __str__


def _cells(before: Counts, after: Counts) -> tuple[str, ...]:
    return tuple(
        f"{_shorten(old)} -> {_shorten(new)}" for old, new in zip(before, after, strict=True)
    )


def _shorten(count: float) -> str:
    """A count with three significant digits and a unit: 1.23 M."""
    if count < 1000:
        return f"{count:.0f}"
    units = iter("kMGT")
    unit = ""
    while count >= 999.5:
        count, unit = count / 1000, next(units)
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"
