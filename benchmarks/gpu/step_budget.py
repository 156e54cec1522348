"""What a training step costs by the numbers: bytes and warp instructions of every kernel.

`python benchmarks/gpu/step_budget.py` computes the table in docs/performance.md from kernels.csv,
the shapes below and the trip counts of loops; `--write` renews the table in the page. It needs
neither nvcc nor a GPU. The sizes are those of the targets: T = 8192, D = 1024, N = 1024², H = 8,
K = 16, dim_key = 256, bfloat16, uniform experts, row-wise Adagrad.

Bytes          those that must cross the memory bus if the L2 cache keeps what fits in it: rows of
               the tables and of gradients once per use, everything smaller once
Instructions   of all warps: the SASS of a kernel, with each loop as often as it runs for these
               sizes. Both sides of a branch count, and rare paths outside of loops count once, so
               the number is an upper bound. `by hand`: the path that these sizes take
Time           the larger of bytes / copy bandwidth and instructions / issue rate. Latency, the L2
               cache, gaps between launches and the tail of a grid are not in it

The trip counts belong to the loops that kernels.csv lists. If a kernel has other loops than its
entry here, its instructions are left out, and the script says so.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_budget import TABLE, Kernel, read_table

PAGE = Path(__file__).resolve().parents[2] / "docs/performance.md"
MARKS = ("<!-- step budget -->", "<!-- end of step budget -->")
ARCHITECTURE = "sm_90"
SMS, CLOCK, ISSUED_PER_CLOCK = 132, 1.98e9, 4
COPY_BANDWIDTH = {"H200": 4.3e12, "H100": 3.0e12}  # bytes per second
MATRIX_RATE = 790e12  # bfloat16 operations per second of a large matrix product

T, D, N, H, K, DIM_KEY = 8192, 1024, 1024**2, 8, 16, 256
KEYS = 1024  # of each half
PAIRS = T * H * K
QUERIES = T * H
DISTINCT = round(N * (1 - (1 - 1 / N) ** PAIRS))  # experts that the pairs meet
ROW = 2 * D  # bytes of one part of an expert

Trips = Sequence["float | tuple[float, Trips]"]


@dataclass(frozen=True)
class Launch:
    """Launches of one kernel in a step."""

    kernel: str
    blocks: int
    threads: int
    bytes: float  # of one launch
    trips: Trips = ()  # of each loop; (trips, those of the loops in it)
    dynamic_shared: int = 0
    launches: int = 1

    @property
    def warps(self) -> int:
        return self.blocks * self.threads // 32


def parse_loops(text: str) -> list[tuple[int, list]]:  # type: ignore[type-arg]
    """The loops of a column of kernels.csv: the instructions of each, and the loops in it."""
    stack: list[list[tuple[int, list]]] = [[]]  # type: ignore[type-arg]
    for token in re.findall(r"\d+|[()]", text):
        if token == "(":
            stack.append(stack[-1][-1][1])
        elif token == ")":
            stack.pop()
        else:
            stack[-1].append((int(token), []))
    return stack[0]


def count_executed(size: int, loops: list, trips: Trips) -> float:  # type: ignore[type-arg]
    """The instructions that a warp executes of `size` ones with these loops.

    Raises:
        ValueError: the kernel has other loops than the trip counts.
    """
    if len(loops) != len(trips):
        raise ValueError(f"{len(loops)} loops, and trip counts of {len(trips)}")
    executed = float(size)
    for (length, inner), trip in zip(loops, trips, strict=True):
        times, inner_trips = trip if isinstance(trip, tuple) else (trip, ())
        executed += times * count_executed(length, inner, inner_trips) - length
    return executed


def warp_instructions(kernel: Kernel, launch: Launch) -> float:
    """Those of one launch."""
    executed = count_executed(kernel.instructions, parse_loops(kernel.loops), launch.trips)
    return executed * launch.warps


# The step.


@dataclass(frozen=True)
class Other:
    """Launches of kernels that peer does not compile: of torch, cuBLAS and CUB."""

    kernel: str
    bytes: float  # of all launches
    launches: int = 1
    operations: float = 0  # of a matrix product
    fold: str = ""  # what could do this work instead


@dataclass(frozen=True)
class Counted(Launch):
    """A kernel whose branches differ so much that its instructions were counted by hand.

    The path that these sizes take was followed through the SASS.
    """

    counted: float = 0  # warp instructions of one launch


BF16 = "BFloat16, BFloat16"
# One warp for 16 pairs: four groups of four rows for the dot products, and again for the sums.
MLP_TRIPS: Trips = (1, (4, (1,)), 1, (1, (4, 0, (1, (2,)))))


def experts(direction: str, scalars: int) -> Launch:
    """The forward pass of the experts, or the backward pass to tokens."""
    return Launch(
        kernel=f"expert_mlp_kernel<RowTile<4, 4, true>, {BF16}, {direction}Coefficients<float>>",
        blocks=T,
        threads=256,
        dynamic_shared=8 * D * 4,
        bytes=PAIRS * (2 * ROW + 8 + 4 * scalars) + 2 * T * D * 2,
        trips=MLP_TRIPS,
    )


def segments(pairs: int, owners: int, count: int = 1) -> list[Launch | Other]:
    """Pairs sorted by owner."""
    passes = -(-(owners - 1).bit_length() // 8)
    blocks = -(-pairs // 512)
    return [
        Launch("make_pair_ids", blocks, 512, 16 * pairs, launches=count),
        Other("cub: radix sort", count * pairs * (4 + 16 * passes), count * (passes + 2)),
        Launch("count_ends", blocks, 512, 4 * pairs, (1, 1, 1, 1), launches=count),
        Launch("scan_tiles", 1, 256, 24 * blocks, ((-(-blocks // 256), (8,)),), launches=count),
        Launch("write_targets", blocks, 512, 12 * pairs, (1, 1, 1), launches=count),
    ]


def partial_sums(out: str, count: int, split_rows: int = 0, width: int = D) -> Launch:
    """The partial sums of segments of more than 128 pairs. Uniform experts have none."""
    return Launch(
        kernel=f"add_partial_sums_kernel<float, {out}>",
        blocks=min(SMS * 8, split_rows * -(-width // 256)) if split_rows else SMS * 8,
        threads=256,
        dynamic_shared=8 * 256 * 4,
        bytes=split_rows * width * (8 * 4 + 2),
        trips=((1 if split_rows else 0, (0, 1)),),
        launches=count,
    )


def tile_bytes(warps: int) -> int:
    """The dynamic shared memory of a block that sums segments."""
    return warps * 4096 + 191 * 16


def sums(positions: int, warps: int, rows: int, total_bytes: float) -> Counted:
    """The gradient of one part of the experts, or of one half of the keys."""
    return Counted(
        kernel=f"sum_segments_kernel<{BF16}, float, 8>",
        blocks=-(-PAIRS // positions),
        threads=32 * warps,
        dynamic_shared=tile_bytes(warps),
        bytes=total_bytes + 12 * PAIRS,
        counted=warps * (105 * PAIRS + 42 * rows),
        launches=2,
    )


def update(rows_with_pairs: int, terms: int, name: str, source_bytes: float) -> Counted:
    """The update of one part of the experts. A row has two warps."""
    return Counted(
        kernel=name,
        blocks=-(-terms // 64),
        threads=64,
        dynamic_shared=tile_bytes(2) + 1200,
        bytes=2 * rows_with_pairs * ROW + source_bytes + 12 * terms + 8 * rows_with_pairs,
        counted=2 * (110 * terms + 670 * rows_with_pairs),
        launches=2,
    )


QUERY_BYTES = QUERIES * DIM_KEY * 2
UPDATE = f"update_kernel<{BF16}, float, 8>"
SPLIT_UPDATE = Counted("update_kernel<BFloat16, float, float, 4>", 1, 128, 0, launches=2)

FORWARD: list[Launch | Other] = [
    Other("cuBLAS: query projection", 2 * T * D + QUERY_BYTES, 1, 2 * T * D * H * DIM_KEY),
    Other("torch: batch norm, 3 kernels", 3 * QUERY_BYTES, 3),
    Counted(
        kernel="product_key_topk_kernel<false, BFloat16>",
        blocks=QUERIES // 32,
        threads=256,
        dynamic_shared=83 << 10,
        bytes=QUERY_BYTES + QUERIES * K * 12,
        # Selection: 4,000 a query. Products: two halves of 32 tiles of 32 keys for 32 queries.
        counted=QUERIES * 4000 + QUERIES // 32 * 2 * 32 * 1000,
    ),
    Other("torch: softmax", 8 * PAIRS, 1, fold="retrieval, which has the K scores in a warp"),
    experts("Forward", 4),
]
TO_TOKENS: list[Launch | Other] = [experts("Backward", 6)]
SUMS: list[Launch | Other] = [
    *segments(PAIRS, N),
    sums(positions=64, warps=2, rows=DISTINCT, total_bytes=DISTINCT * ROW + 2 * T * D),
    partial_sums("BFloat16", 2),
    Other("torch: ids to int64", 12 * DISTINCT, 1, fold="write_targets, as int64"),
]
FUSED: list[Launch | Other] = [
    *segments(PAIRS, N),
    update(DISTINCT, PAIRS, UPDATE, 2 * T * D),
    partial_sums("float", 2),
    SPLIT_UPDATE,
]
OPTIMIZER: list[Launch | Other] = [
    *segments(DISTINCT, N),
    update(DISTINCT, DISTINCT, UPDATE, DISTINCT * ROW),
    partial_sums("float", 2),
    SPLIT_UPDATE,
]
ROUTER_BACKWARD: list[Launch | Other] = [
    Other("torch: softmax backward", 12 * PAIRS, 1, fold="the backward pass of retrieval"),
    Launch("key_owners_kernel", PAIRS // 256, 256, 24 * PAIRS),
    Other("torch: keys to float", 2 * KEYS * 128 * 6, 2, fold="gather_sum, which could widen them"),
    Launch(
        kernel="gather_sum_kernel<RowTile<16, 1, true>, float>",
        blocks=QUERIES // 8,
        threads=256,
        bytes=12 * PAIRS + QUERIES * 128 * 4,
        trips=((1, (1,)),),
        launches=2,
    ),
    Other(
        "torch: gradient of queries to bfloat16",
        QUERIES * DIM_KEY * 6,
        1,
        fold="gather_sum, which could round",
    ),
    *segments(PAIRS, KEYS, count=2),
    Other("torch: zeros of key gradients", 2 * KEYS * 256, 2),
    sums(positions=62, warps=1, rows=PAIRS // 128, total_bytes=QUERY_BYTES / 2 + 4 * PAIRS),
    partial_sums("BFloat16", 2, split_rows=KEYS, width=128),
    Other("torch: batch norm backward, 2 kernels", 5 * QUERY_BYTES, 2),
    Other(
        "cuBLAS: gradients of the projection",
        2 * QUERY_BYTES + 4 * T * D,
        2,
        4 * T * D * H * DIM_KEY,
    ),
    Other("torch: sum of the gradients of x", 6 * T * D, 1, fold="the product, with beta = 1"),
]
DENSE_ADAM: list[Launch | Other] = [
    Other("torch: fused AdamW of the router", 14 * (D * H * DIM_KEY + 2 * KEYS * 128), 1)
]

SECTIONS = {
    "forward": FORWARD,
    "experts backward, to tokens": TO_TOKENS,
    "experts backward, sparse gradients": SUMS,
    "experts backward, update fused": FUSED,
    "router backward": ROUTER_BACKWARD,
    "row-wise Adagrad, sparse gradients": OPTIMIZER,
    "dense parameters": DENSE_ADAM,
}
# What a target covers, by the name of the stage in predictions.csv, which has the target.
SUMMARY = {
    "experts forward": FORWARD[4:],
    "routing": FORWARD[:4],
    "experts backward with sparse gradients": TO_TOKENS + SUMS,
    "experts backward with fused update": TO_TOKENS + FUSED,
    "training step with sparse gradients": (
        FORWARD + TO_TOKENS + SUMS + ROUTER_BACKWARD + OPTIMIZER + DENSE_ADAM
    ),
    "training step with fused update": (FORWARD + TO_TOKENS + FUSED + ROUTER_BACKWARD + DENSE_ADAM),
}
PREDICTIONS = Path(__file__).with_name("predictions.csv")


class Budget:
    """The step, computed with the kernels of a table."""

    def __init__(self, rows: list[Kernel]) -> None:
        self.kernels = {row.kernel: row for row in rows if row.architecture == ARCHITECTURE}
        self.problems: list[str] = []

    def instructions(self, launch: Launch | Other) -> float | None:
        """Warp instructions of all launches, None if they are not known."""
        if isinstance(launch, Other):
            return None
        if isinstance(launch, Counted):
            return launch.counted * launch.launches
        kernel = self.kernels.get(launch.kernel)
        if kernel is None:
            self.problems.append(f"{launch.kernel} is not in the table")
            return None
        try:
            return warp_instructions(kernel, launch) * launch.launches
        except ValueError as error:
            self.problems.append(f"{launch.kernel}: {kernel.loops}: {error}")
            return None

    def milliseconds(self, launch: Launch | Other, card: str) -> float:
        """The larger of the times of bytes and of instructions."""
        if isinstance(launch, Other):
            return 1e3 * max(launch.bytes / COPY_BANDWIDTH[card], launch.operations / MATRIX_RATE)
        of_bytes = launch.bytes * launch.launches / COPY_BANDWIDTH[card]
        issued = (self.instructions(launch) or 0) / (SMS * CLOCK * ISSUED_PER_CLOCK)
        return 1e3 * max(of_bytes, issued)

    def row(self, launch: Launch | Other) -> str:
        """A line of the table."""
        name = launch.kernel if isinstance(launch, Other) else f"`{launch.kernel}`"
        total_bytes = launch.bytes * (1 if isinstance(launch, Other) else launch.launches)
        registers = warps = ""
        kernel = self.kernels.get(launch.kernel)
        if kernel is not None and isinstance(launch, Launch):
            registers = str(kernel.registers)
            warps = str(kernel.warps_of_sm(launch.threads, launch.dynamic_shared))
        executed = self.instructions(launch)
        count = "" if executed is None else f"{executed / 1e6:.3g}"
        if isinstance(launch, Counted):
            count += " (by hand)"
        times = " | ".join(f"{self.milliseconds(launch, card):.3f}" for card in COPY_BANDWIDTH)
        return (
            f"| {name} | {launch.launches} | {total_bytes / 1e6:.0f} | {count} | {registers} | "
            f"{warps} | {times} |"
        )

    def text(self) -> str:
        """The tables, in Markdown."""
        cards = list(COPY_BANDWIDTH)
        with PREDICTIONS.open(newline="") as file:
            targets = {row["stage"]: row["target_ms"] for row in csv.DictReader(file)}
        lines = ["Predicted, not yet run. Milliseconds:", ""]
        lines += [f"| | launches | {' | '.join(cards)} | target, H200 |", "| --- " * 5 + "|"]
        for name, launches in SUMMARY.items():
            times = [sum(self.milliseconds(each, card) for each in launches) for card in cards]
            count = sum(each.launches for each in launches)
            text = " | ".join(f"{time:.2f}" for time in times)
            lines.append(f"| {name} | {count} | {text} | {targets[name]} |")
        header = (
            f"launches | MB | M warp instructions | registers | warps per SM | {' | '.join(cards)}"
        )
        for name, launches in SECTIONS.items():
            lines += ["", f"| {name} | {header} |", "| --- " * 8 + "|"]
            lines += [self.row(launch) for launch in launches]
        lines += ["", "Launches that another kernel could take over:", ""]
        for launches in SECTIONS.values():
            for each in launches:
                if isinstance(each, Other) and each.fold:
                    lines.append(f"- {each.kernel} ({each.launches}): {each.fold}")
        return "\n".join(lines)


def main() -> None:
    """Prints the tables, or renews them in the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="renew the tables in the page")
    arguments = parser.parse_args()
    budget = Budget(read_table(TABLE)[1])
    text = budget.text()
    if arguments.write:
        page = PAGE.read_text()
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    else:
        print(text)
    if budget.problems:
        sys.exit("step_budget: count again:\n" + "\n".join(dict.fromkeys(budget.problems)))


if __name__ == "__main__":
    main()
