"""Training steps of the million-expert layer in bfloat16 on a GPU, kernel by kernel.

    python steps.py --out OUT                 # times; OUT/kernels.csv: what each kernel took
    python steps.py --once sparse             # one step, for a profiler
    python steps.py --largest 5 OUT/kernels.csv

It measures the installed `peer`: start it outside the root of a checkout.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import peer

KINDS = ("sparse", "fused")
COLUMNS = ("step", "kernel", "calls", "total_ms")


def make_step(kind: str, options: argparse.Namespace) -> tuple[Callable[[], None], ExitStack]:
    """A training step with sparse gradients, or with the tables' update fused into backward.

    Returns:
        The step, and a stack that must stay open while the step is in use.
    """
    torch.manual_seed(0)
    layer = peer.PEER(
        options.dim,
        num_experts=options.num_experts,
        heads=options.heads,
        num_experts_per_head=options.k,
        sparse_grad=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
    dense, tables = peer.param_groups(layer, lr=1e-4, expert_lr=1e-4)
    adam, rows = torch.optim.AdamW([dense], fused=True), peer.optim.RowwiseAdagrad([tables])
    resources = ExitStack()
    if kind == "fused":
        resources.enter_context(rows.fuse_into_backward(layer))
    optimizers = (adam,) if kind == "fused" else (adam, rows)
    shape = options.tokens, options.dim
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        layer(x).backward(grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step, resources


def time_step(step: Callable[[], None], count: int) -> float:
    """Milliseconds of a step, queued back to back with others."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def profile_step(step: Callable[[], None]) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of each kernel of one step, the longest first.

    An emulated device has no kernels of its own; there, they are the operators.
    """
    is_emulated = torch.cuda.get_device_name() == "emulated"
    activity = ProfilerActivity.CPU if is_emulated else ProfilerActivity.CUDA
    with profile(activities=[activity]) as result:
        step()
        torch.cuda.synchronize()
    column = "self_cpu_time_total" if is_emulated else "self_device_time_total"
    kernels = [(e.key, e.count, getattr(e, column) / 1e3) for e in result.key_averages()]
    return sorted((kernel for kernel in kernels if kernel[2] > 0), key=lambda kernel: -kernel[2])


def largest(path: Path, count: int) -> list[str]:
    """Base names of the kernels of peer that take longest, each once."""
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["total_ms"]))
    names = (
        re.search(r"peer::(?:\w+::|\(anonymous namespace\)::)*(\w+)", row["kernel"]) for row in rows
    )
    return list(dict.fromkeys(name[1] for name in names if name))[:count]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for kernels.csv")
    parser.add_argument("--once", choices=KINDS, help="two steps of this kind, and nothing else")
    parser.add_argument("--largest", type=int, help="print names out of a kernels.csv")
    parser.add_argument("csv", nargs="?", type=Path)
    for name, value in (
        ("tokens", 8192),
        ("dim", 1024),
        ("num-experts", 1024**2),
        ("heads", 8),
        ("k", 16),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.largest:
        print("|".join(largest(options.csv, options.largest)))
        return
    kernels = []
    for kind in KINDS if options.once is None else (options.once,):
        step, resources = make_step(kind, options)
        with resources:
            if options.once:
                time_step(step, 2)
                continue
            time_step(step, 5)
            print(f"{kind}: {time_step(step, 20):.3f} ms a step")
            found = profile_step(step)
            print(f"{kind}: {sum(count for _, count, _ in found)} kernels")
            for name, count, total in found[:20]:
                print(f"{total:9.3f} ms {count:4d} {name[:110]}")
            kernels += [(kind, name, count, f"{total:.6f}") for name, count, total in found]
    if options.out:
        with (options.out / "kernels.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kernels])


if __name__ == "__main__":
    main()
