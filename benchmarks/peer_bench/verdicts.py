"""What a target is, and how the rows of a run are looked up and compared for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peer.bench.rows import Row

__all__ = [
    "NOT_MEASURED",
    "OURS",
    "USUAL",
    "Part",
    "RunRows",
    "Target",
    "Verdict",
    "describe",
    "format_number",
    "ratio",
    "why_not",
]

GIB = 2**30

# Both ways of peer to train, with sparse gradients and with the fused update: where they compete,
# the faster one counts and is named.
OURS = ("peer", "peer-fused")

# What is wanted of a row unless a target says otherwise, by column.
USUAL: dict[str, object] = {
    "distribution": "uniform",
    "num_experts": 1024**2,
    "heads": 8,
    "k": 16,
    "dim_key": 256,
}

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """A bound.

    Args:
        text: what is bounded.
        dim: D.
        bound: the number, None where the measurement is only reported.
        at_least: whether the bound is from below.
        unit: of the number.
    """

    text: str
    dim: int
    bound: float | None
    at_least: bool
    unit: str = "x"

    def __str__(self) -> str:
        if self.bound is None:
            return "reported"
        return f"{'≥' if self.at_least else '≤'} {format_number(self.bound, self.unit)}"


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and how."""

    target: Target
    measured: float | None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured, or is only reported."""
        if self.measured is None or self.target.bound is None:
            return None
        if self.target.at_least:
            return self.measured >= self.target.bound
        return self.measured <= self.target.bound


def format_number(value: float, unit: str) -> str:
    """A number with its unit."""
    if unit == "%":
        return f"{100 * value:.0f} %"
    if unit == "µs":
        return f"{1e6 * value:.0f} µs"
    if unit == "ms":
        return f"{1e3 * value:.2f} ms"
    if unit == "GiB":
        return f"{value:.2f} GiB"
    return f"{value:.2f}x"


class RunRows:
    """The rows of one run on one device.

    Args:
        rows: in the order in which they were measured.
        usual: what is wanted of a row unless the caller says otherwise, by column.
    """

    def __init__(self, rows: list[Row], usual: dict[str, object]) -> None:
        self.rows = rows
        self.usual = usual

    def best(self, providers: tuple[str, ...], **wanted: object) -> Row | str:
        """The row of the fastest of some providers, or why there is none.

        Of a provider that was measured more than once, the first counts, which took turns with the
        others; the minimum of both would favour it.
        """
        first: dict[str, Row] = {}
        found = self._find(providers, wanted)
        for row in found:
            if row.median_s:
                first.setdefault(describe(row), row)
        if not first:
            return _reason(found)
        return min(first.values(), key=lambda row: row.median_s or 0.0)

    def last(self, provider: str, **wanted: object) -> Row | str:
        """The last row of a provider, which took turns with those of other distributions."""
        found = self._find((provider,), wanted)
        timed = [row for row in found if row.median_s]
        return timed[-1] if timed else _reason(found)

    def _find(self, providers: tuple[str, ...], wanted: dict[str, object]) -> list[Row]:
        wanted = {**self.usual, **wanted}
        return [
            row
            for row in self.rows
            if row.provider in providers
            and all(getattr(row, name) == value for name, value in wanted.items())
        ]


def _reason(rows: list[Row]) -> str:
    return next((f"{describe(row)}: {row.skipped}" for row in rows if row.skipped), NOT_MEASURED)


def why_not(*found: Row | str) -> str:
    """The reason for which a target has no number, out of what was found for it."""
    reasons = (reason for reason in found if isinstance(reason, str) and reason != NOT_MEASURED)
    return next(reasons, NOT_MEASURED)


# Verdicts on some of the targets of a device.
Part = Callable[[RunRows], Iterator[Verdict]]


def describe(row: Row) -> str:
    """Provider and spelling."""
    return f"{row.provider} {row.spelling}".strip()


def ratio(target: Target, slow: Row | str, fast: Row | str) -> Verdict:
    """Time of `slow` over time of `fast`.

    Args:
        target: bounds it.
        slow: a row with a time, or why there is none.
        fast: likewise.
    """
    if isinstance(slow, str) or isinstance(fast, str):
        return Verdict(target, None, why_not(slow, fast))
    assert slow.median_s
    assert fast.median_s
    times = [f"{describe(row)} {1e3 * (row.median_s or 0):.4g} ms" for row in (slow, fast)]
    return Verdict(target, slow.median_s / fast.median_s, ", ".join(times))
