"""What the layer is meant to reach on a GPU, in bfloat16 with 8192 tokens and D = 1024."""

from __future__ import annotations

from collections.abc import Iterator

from peer.bench.rows import Row
from peer.bench.verdicts import (
    OURS,
    USUAL,
    Part,
    RunRows,
    Target,
    Verdict,
    describe,
    ratio,
    why_not,
)

__all__ = ["CUDA_TARGETS", "CUDA_USUAL"]

DIM = 1024
GIB = 2**30

CUDA_USUAL: dict[str, object] = {**USUAL, "tokens": 8192, "dtype": "bfloat16", "dim": DIM}


def _bandwidth(run: RunRows) -> Iterator[Verdict]:
    target = Target("experts forward, share of copy bandwidth", DIM, 0.85, True, "%")
    row = run.best(("peer",), mode="experts-forward")
    if isinstance(row, str) or row.gb_per_s is None:
        yield Verdict(target, None, why_not(row))
    else:
        note = f"{row.gb_per_s:.0f} of {row.stream_gb_per_s:.0f} GB/s, {_time(row)}"
        yield Verdict(target, row.stream_share, note)


def _times(run: RunRows) -> Iterator[Verdict]:
    for text, bound, providers, mode in (
        ("retrieval, projection included", 0.25e-3, ("peer",), "routing"),
        ("experts backward, sparse gradients", 2.0e-3, ("peer",), "experts-backward"),
        (
            "experts backward, row-wise Adagrad fused into it",
            2.2e-3,
            ("peer-fused",),
            "experts-backward",
        ),
        ("training step", 3.6e-3, OURS, "step"),
    ):
        target = Target(text, DIM, bound, False, "ms")
        row = run.best(providers, mode=mode)
        if isinstance(row, str):
            yield Verdict(target, None, row)
        else:
            yield Verdict(target, row.median_s, describe(row))


def _against_others(run: RunRows) -> Iterator[Verdict]:
    for text, bound, theirs, ours, mode in (
        ("routing / the same with torch.topk", 10, "eager", ("peer",), "routing"),
        ("experts forward / best compiled spelling", 1.3, "compiled", ("peer",), "experts-forward"),
        ("layer forward + backward / best compiled spelling", 3, "compiled", ("peer",), "backward"),
        ("training step / eager einsum with fused dense Adam", 8, "eager", OURS, "step"),
    ):
        target = Target(text, DIM, bound, True)
        yield ratio(target, run.best((theirs,), mode=mode), run.best(ours, mode=mode))


def _memory(run: RunRows) -> Iterator[Verdict]:
    target = Target("peak memory of that eager step over peer's", DIM, 20, True)
    theirs, ours = run.best(("eager",), mode="step"), run.best(OURS, mode="step")
    if (
        isinstance(theirs, str)
        or isinstance(ours, str)
        or not (theirs.peak_bytes and ours.peak_bytes)
    ):
        yield Verdict(target, None, why_not(theirs, ours))
        return
    note = ", ".join(f"{describe(r)} {(r.peak_bytes or 0) / GIB:.3f} GiB" for r in (theirs, ours))
    yield Verdict(target, theirs.peak_bytes / ours.peak_bytes, note)


def _skew(run: RunRows) -> Iterator[Verdict]:
    for mode in ("experts-forward", "experts-backward", "step"):
        for provider in OURS if mode != "experts-forward" else ("peer",):
            target = Target(f"Zipf(1.0) over uniform, {provider} {mode}", DIM, 1.0, False)
            zipf = run.best((provider,), mode=mode, distribution="zipf:1.0")
            yield ratio(target, zipf, run.last(provider, mode=mode))


def _latency(run: RunRows) -> Iterator[Verdict]:
    target = Target("one token, layer forward in a CUDA graph", DIM, 15e-6, False, "µs")
    wanted = {"mode": "forward", "tokens": 1, "distribution": "router"}
    row = run.best(("peer-graph",), **wanted)
    if isinstance(row, str):
        yield Verdict(target, None, row)
        return
    eager = run.best(("peer",), **wanted)
    note = "" if isinstance(eager, str) else f"without a graph {_time(eager)}"
    yield Verdict(target, row.median_s, note)


def _reported(run: RunRows) -> Iterator[Verdict]:
    for mode, providers in (
        ("experts-forward", ("peer",)),
        ("routing", ("peer",)),
        ("experts-backward", ("peer",)),
        ("step", OURS),
    ):
        target = Target(f"bfloat16 over float32, {mode}", DIM, None, True)
        single = run.best(providers, mode=mode, dtype="float32")
        yield ratio(target, single, run.best(providers, mode=mode))


def _time(row: Row) -> str:
    return f"{1e3 * (row.median_s or 0.0):.4g} ms"


CUDA_TARGETS: tuple[Part, ...] = (
    _bandwidth,
    _times,
    _against_others,
    _memory,
    _skew,
    _latency,
    _reported,
)
