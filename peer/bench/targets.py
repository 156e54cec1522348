"""What the layer is meant to reach on a CPU, and whether the rows of a run do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peer.bench import traffic
from peer.bench.rows import Row

__all__ = ["Target", "Verdict", "evaluate"]

GIB = 2**30
DIMS = (512, 1024)
LATENCY = "one token, layer forward, time minus its bytes at stream bandwidth"


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
    if unit == "GiB":
        return f"{value:.2f} GiB"
    return f"{value:.2f}x"


class _Rows:
    """The rows of one run that have a time."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def best(self, providers: tuple[str, ...], **wanted: object) -> Row | None:
        """The row of the fastest of some providers.

        Of a provider that was measured more than once, the first counts, which took turns with the
        others; the minimum of both would favour it.
        """
        wanted = {
            "dtype": "float32",
            "distribution": "uniform",
            "num_experts": 1024**2,
            "tokens": 1024,
            **wanted,
        }
        first: dict[str, Row] = {}
        for row in self.rows:
            if (
                row.provider in providers
                and row.median_s is not None
                and all(getattr(row, name) == value for name, value in wanted.items())
            ):
                first.setdefault(_name(row), row)
        return min(first.values(), key=lambda row: row.median_s or 0.0, default=None)

    def why_not(self, providers: tuple[str, ...], **wanted: object) -> str:
        """The reason why rows are missing."""
        for row in self.rows:
            is_wanted = all(getattr(row, name) == value for name, value in wanted.items())
            if row.skipped and row.provider in providers and is_wanted:
                return f"{row.provider}: {row.skipped}"
        return "not measured"


OURS = ("peer", "peer-fused")
PLAIN = ("eager", "compiled")


def evaluate(rows: list[Row]) -> list[Verdict]:
    """Verdicts on all targets. Ratios are between rows of these, which are of one run.

    Where both ways of peer to train compete, with sparse gradients and with the fused update, the
    faster one counts and is named.
    """
    run = _Rows(rows)
    return [verdict for part in _PARTS for verdict in part(run)]


def _name(row: Row) -> str:
    return f"{row.provider} {row.spelling}".strip()


def _ratio(run: _Rows, target: Target, slow: Row | None, fast: Row | None, why: str) -> Verdict:
    """Time of `slow` over time of `fast`."""
    if slow is None or fast is None or not slow.median_s or not fast.median_s:
        return Verdict(target, None, why)
    note = f"{_name(slow)} {1e3 * slow.median_s:.4g} ms, {_name(fast)} {1e3 * fast.median_s:.4g} ms"
    return Verdict(target, slow.median_s / fast.median_s, note)


def _experts_forward(run: _Rows) -> Iterator[Verdict]:
    for dim, bound in zip(DIMS, (1.8, 2.3), strict=True):
        target = Target("experts forward / best compiled spelling", dim, bound, True)
        ours = run.best(("peer",), mode="experts-forward", dim=dim)
        theirs = run.best(("compiled",), mode="experts-forward", dim=dim)
        why = run.why_not(("peer", "compiled"), mode="experts-forward", dim=dim)
        yield _ratio(run, target, theirs, ours, why)
    for dim, bound in zip(DIMS, (0.50, 0.62), strict=True):
        target = Target("experts forward, share of stream bandwidth", dim, bound, True, "%")
        ours = run.best(("peer",), mode="experts-forward", dim=dim)
        if ours is None or ours.gb_per_s is None:
            yield Verdict(target, None, run.why_not(("peer",), mode="experts-forward", dim=dim))
        else:
            note = f"{ours.gb_per_s:.1f} of {ours.stream_gb_per_s:.1f} GB/s"
            yield Verdict(target, ours.stream_share, note)


def _against_plain(run: _Rows) -> Iterator[Verdict]:
    comparisons = (
        ("selection / torch.topk doing the same", "selection", ("peer",), ("eager",), (8, 8)),
        ("layer forward + backward / best plain", "backward", ("peer",), PLAIN, (14, 18)),
        ("training step / plain with fused dense Adam", "step", OURS, PLAIN, (20, None)),
    )
    for text, mode, ours, theirs, bounds in comparisons:
        for dim, bound in zip(DIMS, bounds, strict=True):
            why = run.why_not((*theirs, *ours), mode=mode, dim=dim)
            target = Target(text, dim, bound, True)
            slow = run.best(theirs, mode=mode, dim=dim)
            yield _ratio(run, target, slow, run.best(ours, mode=mode, dim=dim), why)


def _against_dense(run: _Rows) -> Iterator[Verdict]:
    for dim, bound in zip(DIMS, (1.6, 1.0), strict=True):
        target = Target("training step, time over the dense 4·D layer's", dim, bound, False)
        ours = run.best(OURS, mode="step", dim=dim)
        dense = run.best(("dense-4d",), mode="step", dim=dim)
        yield _ratio(run, target, ours, dense, run.why_not((*OURS, "dense-4d"), mode="step"))


def _memory(run: _Rows) -> Iterator[Verdict]:
    for provider, text, bounds in (
        ("peer", "peak memory of training beyond the tables, sparse gradients", (0.8, 1.3)),
        ("peer-fused", "the same with the update fused into backward", (0.25, 0.35)),
    ):
        for dim, bound in zip(DIMS, bounds, strict=True):
            target = Target(text, dim, bound, False, "GiB")
            row = run.best((provider,), mode="step", dim=dim)
            if row is None or row.peak_bytes is None:
                yield Verdict(target, None, run.why_not((provider,), mode="step", dim=dim))
            else:
                yield Verdict(target, row.peak_bytes / GIB)


def _growth(run: _Rows) -> Iterator[Verdict]:
    target = Target("training step, N = 2^22 over N = 2^16", 256, 1.5, False)
    small, large = (
        {name: run.best((name,), mode="step", dim=256, num_experts=count) for name in OURS}
        for count in (2**16, 2**22)
    )
    # The same provider at both ends: the one that is faster at the large one.
    name = min(
        OURS, key=lambda n: row.median_s or 0.0 if (row := large[n]) is not None else float("inf")
    )
    yield _ratio(run, target, large[name], small[name], run.why_not(OURS, mode="step", dim=256))


def _skew(run: _Rows) -> Iterator[Verdict]:
    for mode in ("experts-forward", "experts-backward", "step"):
        for dim in DIMS:
            target = Target(f"Zipf(1.0) over uniform, {mode}", dim, 1.0, False)
            wanted = {"mode": mode, "dim": dim}
            # The uniform row that took turns with the Zipf row is the last one.
            zipf = run.best(("peer",), distribution="zipf:1.0", **wanted)
            last = [
                row
                for row in run.rows
                if row.provider == "peer"
                and (row.mode, row.dim, row.dtype) == (mode, dim, "float32")
                and (row.distribution, row.num_experts) == ("uniform", 1024**2)
            ]
            uniform = last[-1] if last else None
            yield _ratio(run, target, zipf, uniform, run.why_not(("peer",), mode=mode, dim=dim))


def _latency(run: _Rows) -> Iterator[Verdict]:
    row = run.best(("peer",), mode="forward", tokens=1, distribution="router")
    target = Target(LATENCY, 512, 60e-6, False, "µs")
    if row is None or row.median_s is None or not row.stream_gb_per_s:
        yield Verdict(target, None, run.why_not(("peer",), mode="forward", tokens=1))
        return
    case = row.case
    size = traffic.routing_bytes(case)
    size += traffic.experts_bytes(case, "experts-forward", case.per_token, "sparse")
    spent = size / (row.stream_gb_per_s * 1e9)
    note = f"{1e6 * row.median_s:.0f} µs, of which {1e6 * spent:.0f} µs for {size / 1e6:.1f} MB"
    yield Verdict(target, row.median_s - spent, note)


def _reported(run: _Rows) -> Iterator[Verdict]:
    target = Target("experts forward, bfloat16 over float32, N = 512²", 4096, 1.5, True)
    wide = {"mode": "experts-forward", "dim": 4096, "num_experts": 512**2}
    single = run.best(("peer",), **wide)
    half = run.best(("peer",), dtype="bfloat16", **wide)
    yield _ratio(run, target, single, half, run.why_not(("peer",), **wide))
    for mode in ("experts-forward", "step"):
        for dim in DIMS:
            target = Target(f"bfloat16 over float32, {mode}", dim, None, True)
            ours = ("peer",) if mode == "experts-forward" else OURS
            wanted = {"mode": mode, "dim": dim}
            why = run.why_not(ours, dtype="bfloat16", **wanted)
            half = run.best(ours, dtype="bfloat16", **wanted)
            yield _ratio(run, target, run.best(ours, **wanted), half, why)


_PARTS: tuple[Callable[[_Rows], Iterator[Verdict]], ...] = (
    _experts_forward,
    _against_plain,
    _against_dense,
    _memory,
    _growth,
    _skew,
    _latency,
    _reported,
)
