"""Times training beside a busy process, and after a fork.

    python conditions.py rows.csv

`busy`: forward and backward passes of a PEER layer and of the dense layer that it replaces, alone
and while another process keeps one core busy. The layers take turns, and so do the two conditions.

`fork`: steps of a pool before a fork, while the child lives, and after its end, with the memory of
the process that is on huge pages. The child only sleeps, like a worker of a DataLoader that has its
own data.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peer

TOKENS, DIM, EXPERTS, PER_TOKEN, ROUNDS = 1024, 512, 1024**2, 128, 7


class Row(NamedTuple):
    """A number and what it measures."""

    condition: str
    layer: str
    measure: str
    value: float


def timed(layer: nn.Module, x: Tensor) -> float:
    """Milliseconds of a forward and backward pass."""
    start = time.perf_counter()
    layer(x).sum().backward()
    seconds = time.perf_counter() - start
    layer.zero_grad()
    return 1e3 * seconds


def spin() -> None:
    """Keeps a core busy."""
    while True:
        pass


def busy() -> list[Row]:
    """One core is busy with something else."""
    x = torch.randn(TOKENS, DIM)
    layers = {
        "peer": peer.PEER(DIM, num_experts=EXPERTS, sparse_grad=True),
        "dense-4d": nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for layer in layers.values():
        timed(layer, x)
    for _ in range(ROUNDS):
        for condition in "alone", "busy":
            neighbour = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
            if condition == "busy":
                neighbour.start()
                time.sleep(2)  # until it spins
            for name, layer in layers.items():
                timed(layer, x)
                runs = [timed(layer, x) for _ in range(5)]
                times.setdefault((name, condition), []).append(statistics.median(runs))
            if condition == "busy":
                neighbour.kill()
                neighbour.join()
    rows = [
        Row(c, n, "forward + backward, ms", statistics.median(t)) for (n, c), t in times.items()
    ]
    for name in layers:
        pairs = zip(times[name, "busy"], times[name, "alone"], strict=True)
        rows.append(
            Row("busy", name, "time over alone", statistics.median(b / a for b, a in pairs))
        )
    return rows


def huge_mebibytes() -> float:
    """The memory of this process that is on huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"AnonHugePages:\s+(\d+)", text)) / 1024


def fork() -> list[Row]:
    """A child is a copy of the process."""
    experts = EXPERTS // 4
    pool = peer.ExpertPool(DIM, num_experts=experts, sparse_grad=True)
    optimizer = peer.optim.RowwiseAdagrad(pool.parameters(), lr=1e-3)

    def step() -> float:
        x, weights = torch.randn(TOKENS, DIM), torch.rand(TOKENS, PER_TOKEN)
        indices = torch.randint(experts, (TOKENS, PER_TOKEN))
        start = time.perf_counter()
        pool(x, weights, indices).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1e3 * (time.perf_counter() - start)

    rows: list[Row] = []

    def measure(condition: str, steps: int) -> None:
        times = [step() for _ in range(steps)]
        for number in 0, 1:
            rows.append(Row(condition, "pool", f"step {number + 1}, ms", times[number]))
        last = statistics.median(times[-5:])
        rows.append(Row(condition, "pool", "median of the last five steps, ms", last))
        rows.append(Row(condition, "pool", "on huge pages, MiB", huge_mebibytes()))

    step()
    measure("before a fork", 20)
    child = os.fork()
    if child == 0:
        signal.pause()
    measure("while the child lives", 20)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    measure("after its end", 20)
    return rows


def main() -> None:
    """Prints the rows and writes them to the file that the command line names."""
    rows = busy() + fork()
    for row in rows:
        print(*row[:3], round(row.value, 2), sep=", ")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows([*row[:3], round(row.value, 2)] for row in rows)


if __name__ == "__main__":
    main()
