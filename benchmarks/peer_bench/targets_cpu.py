"""What the layer is meant to reach on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from peer.bench import traffic
from peer.bench.verdicts import OURS, USUAL, Part, RunRows, Target, Verdict, ratio, why_not

__all__ = ["CPU_TARGETS", "CPU_USUAL"]

GIB = 2**30
DIMS = (512, 1024)
LATENCY = "one token, layer forward, time minus its bytes at stream bandwidth"
PLAIN = ("eager", "compiled")

CPU_USUAL: dict[str, object] = {**USUAL, "tokens": 1024, "dtype": "float32"}


def _experts_forward(run: RunRows) -> Iterator[Verdict]:
    for dim, bound in zip(DIMS, (1.8, 2.3), strict=True):
        target = Target("experts forward / best compiled spelling", dim, bound, True)
        ours = run.best(("peer",), mode="experts-forward", dim=dim)
        theirs = run.best(("compiled",), mode="experts-forward", dim=dim)
        yield ratio(target, theirs, ours)
    for dim, bound in zip(DIMS, (0.50, 0.62), strict=True):
        target = Target("experts forward, share of stream bandwidth", dim, bound, True, "%")
        ours = run.best(("peer",), mode="experts-forward", dim=dim)
        if isinstance(ours, str) or ours.gb_per_s is None:
            yield Verdict(target, None, why_not(ours))
        else:
            note = f"{ours.gb_per_s:.1f} of {ours.stream_gb_per_s:.1f} GB/s"
            yield Verdict(target, ours.stream_share, note)


def _against_plain(run: RunRows) -> Iterator[Verdict]:
    comparisons = (
        ("selection / torch.topk doing the same", "selection", ("peer",), ("eager",), (8, 8)),
        ("layer forward + backward / best plain", "backward", ("peer",), PLAIN, (14, 18)),
        ("training step / plain with fused dense Adam", "step", OURS, PLAIN, (20, None)),
    )
    for text, mode, ours, theirs, bounds in comparisons:
        for dim, bound in zip(DIMS, bounds, strict=True):
            target = Target(text, dim, bound, True)
            slow = run.best(theirs, mode=mode, dim=dim)
            yield ratio(target, slow, run.best(ours, mode=mode, dim=dim))


def _against_dense(run: RunRows) -> Iterator[Verdict]:
    for dim, bound in zip(DIMS, (1.6, 1.0), strict=True):
        target = Target("training step, time over the dense 4·D layer's", dim, bound, False)
        ours = run.best(OURS, mode="step", dim=dim)
        yield ratio(target, ours, run.best(("dense-4d",), mode="step", dim=dim))


def _memory(run: RunRows) -> Iterator[Verdict]:
    for provider, text, bounds in (
        ("peer", "peak memory of training beyond the tables, sparse gradients", (0.8, 1.3)),
        ("peer-fused", "the same with the update fused into backward", (0.25, 0.35)),
    ):
        for dim, bound in zip(DIMS, bounds, strict=True):
            target = Target(text, dim, bound, False, "GiB")
            row = run.best((provider,), mode="step", dim=dim)
            if isinstance(row, str) or row.peak_bytes is None:
                yield Verdict(target, None, why_not(row))
            else:
                yield Verdict(target, row.peak_bytes / GIB)


def _growth(run: RunRows) -> Iterator[Verdict]:
    target = Target("training step, N = 2^22 over N = 2^16", 256, 1.5, False)
    large = run.best(OURS, mode="step", dim=256, num_experts=2**22)
    # The same provider at both ends: the one that is faster at the large one.
    names = OURS if isinstance(large, str) else (large.provider,)
    yield ratio(target, large, run.best(names, mode="step", dim=256, num_experts=2**16))


def _skew(run: RunRows) -> Iterator[Verdict]:
    for mode in ("experts-forward", "experts-backward", "step"):
        for dim in DIMS:
            target = Target(f"Zipf(1.0) over uniform, {mode}", dim, 1.0, False)
            wanted = {"mode": mode, "dim": dim}
            zipf = run.best(("peer",), distribution="zipf:1.0", **wanted)
            yield ratio(target, zipf, run.last("peer", **wanted))


def _latency(run: RunRows) -> Iterator[Verdict]:
    row = run.best(("peer",), mode="forward", tokens=1, distribution="router")
    target = Target(LATENCY, 512, 60e-6, False, "µs")
    if isinstance(row, str) or not row.median_s or not row.stream_gb_per_s:
        yield Verdict(target, None, why_not(row))
        return
    case = row.case
    size = traffic.router_bytes(case)
    size += traffic.experts_bytes(case, "experts-forward", case.per_token, "sparse")
    spent = size / (row.stream_gb_per_s * 1e9)
    note = f"{1e6 * row.median_s:.0f} µs, of which {1e6 * spent:.0f} µs for {size / 1e6:.1f} MB"
    yield Verdict(target, row.median_s - spent, note)


def _reported(run: RunRows) -> Iterator[Verdict]:
    target = Target("experts forward, bfloat16 over float32, N = 512²", 4096, 1.5, True)
    wide = {"mode": "experts-forward", "dim": 4096, "num_experts": 512**2}
    single = run.best(("peer",), **wide)
    half = run.best(("peer",), dtype="bfloat16", **wide)
    yield ratio(target, single, half)
    for mode in ("experts-forward", "step"):
        for dim in DIMS:
            target = Target(f"bfloat16 over float32, {mode}", dim, None, True)
            ours = ("peer",) if mode == "experts-forward" else OURS
            wanted = {"mode": mode, "dim": dim}
            half = run.best(ours, dtype="bfloat16", **wanted)
            yield ratio(target, run.best(ours, **wanted), half)


CPU_TARGETS: tuple[Part, ...] = (
    _experts_forward,
    _against_plain,
    _against_dense,
    _memory,
    _growth,
    _skew,
    _latency,
    _reported,
)
