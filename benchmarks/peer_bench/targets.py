"""Whether the rows of a run reach what the layer is meant to reach on their device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peer.bench.rows import Row
from peer.bench.targets_cpu import CPU_TARGETS, CPU_USUAL
from peer.bench.targets_cuda import CUDA_TARGETS, CUDA_USUAL
from peer.bench.verdicts import NOT_MEASURED, RunRows, Verdict

__all__ = ["TARGET_PRESETS", "evaluate", "evaluate_runs"]

TARGET_PRESETS = ("targets", "cuda-targets", "cuda-compiled")


def evaluate(
    rows: list[Row], device: str = "cpu", sizes: Mapping[str, int] | None = None
) -> list[Verdict]:
    """Verdicts on all targets of a device.

    Args:
        rows: of one run, whose ratios are then between providers that took turns. Those of other
            devices are left out.
        device: "cpu" or "cuda".
        sizes: that the run had in place of the targets', by column. Its numbers are then reported,
            without the bounds, which are not about these sizes.
    """
    parts, usual = {"cpu": (CPU_TARGETS, CPU_USUAL), "cuda": (CUDA_TARGETS, CUDA_USUAL)}[device]
    others = {name: size for name, size in (sizes or {}).items() if usual.get(name, size) != size}
    run = RunRows([row for row in rows if row.device == device], {**usual, **others})
    verdicts = [verdict for part in parts for verdict in part(run)]
    if not others:
        return verdicts
    return [
        replace(v, target=replace(v.target, bound=None, dim=others.get("dim", v.target.dim)))
        for v in verdicts
    ]


def evaluate_runs(rows: list[Row], device: str = "cpu") -> list[Verdict]:
    """Verdicts on all targets of a device, each from the last run that has something to say on it.

    Args:
        rows: of several runs. Those of presets that are not about targets are left out.
        device: "cpu" or "cuda".
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.preset in TARGET_PRESETS and row.device == device:
            runs.setdefault(row.run, []).append(row)
    verdicts = evaluate([], device)
    for run in sorted(runs):
        for index, verdict in enumerate(evaluate(runs[run], device)):
            if verdict.note != NOT_MEASURED:
                note = f"{verdict.note}; run of {run}".removeprefix("; ")
                verdicts[index] = replace(verdict, note=note)
    return verdicts
