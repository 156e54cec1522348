"""Whether the rows of a run reach what the layer is meant to reach on their device."""

from __future__ import annotations

from peer.bench.rows import Row
from peer.bench.targets_cpu import CPU_TARGETS, CPU_USUAL
from peer.bench.targets_cuda import CUDA_TARGETS, CUDA_USUAL
from peer.bench.verdicts import RunRows, Verdict

__all__ = ["evaluate"]


def evaluate(rows: list[Row], device: str = "cpu") -> list[Verdict]:
    """Verdicts on all targets of a device.

    Args:
        rows: of one run, whose ratios are then between providers that took turns. Those of other
            devices are left out.
        device: "cpu" or "cuda".
    """
    parts, usual = {"cpu": (CPU_TARGETS, CPU_USUAL), "cuda": (CUDA_TARGETS, CUDA_USUAL)}[device]
    run = RunRows([row for row in rows if row.device == device], usual)
    return [verdict for part in parts for verdict in part(run)]
