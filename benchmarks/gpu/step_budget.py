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
        kernel=f"add_partial_sums_kernel<float, {out}, SliceForm<4, 2, 32>>",
        blocks=min(SMS * 8, split_rows * -(-width // 256)) if split_rows else SMS * 8,
        threads=256,
        dynamic_shared=8 * 256 * 4,
        bytes=split_rows * width * (8 * 4 + 2),
        trips=((1 if split_rows else 0, (0, 1)),),
        launches=count,
    )


MAX_TERMS = 191  # of a tile
TERM_BYTES = 16
EXPERT_TILE = 62  # positions of a tile whose warp takes a row of 2 KiB: two waves of 64 warps
KEY_TILE = 31  # of a tile whose half warp takes a row of 256 bytes


def blocks_of(terms: int, positions: int) -> int:
    """The blocks of a kernel that sums a list of terms."""
    return -(-terms // positions)


def sum_experts() -> Counted:
    """The gradient of one part of the experts. A warp has a tile."""
    blocks = blocks_of(PAIRS, EXPERT_TILE)
    return Counted(
        kernel=f"sum_segments_kernel<{BF16}, float, SliceForm<8, 4, 32>>",
        blocks=blocks,
        threads=32,
        dynamic_shared=4 * ROW + MAX_TERMS * TERM_BYTES,
        bytes=DISTINCT * ROW + 2 * T * D + 12 * PAIRS,
        counted=114 * PAIRS + 83 * DISTINCT + 350 * blocks,
        launches=2,
    )


def sum_keys() -> Counted:
    """The gradient of one half of the keys, by partial sums. A warp has two tiles.

    A key has about 1024 pairs, so its sums start 128 positions apart. Of two neighbouring tiles,
    only one has a sum: half of the warp is idle.
    """
    chunks = PAIRS // 128
    blocks = blocks_of(PAIRS, 2 * KEY_TILE)
    return Counted(
        kernel=f"sum_segments_kernel<{BF16}, float, SliceForm<8, 1, 16>>",
        blocks=blocks,
        threads=32,
        dynamic_shared=2 * (4 * 256 + MAX_TERMS * TERM_BYTES),
        bytes=QUERY_BYTES / 2 + 4 * PAIRS + 12 * PAIRS,
        counted=61 * PAIRS + 23 * chunks + 750 * blocks,
        launches=2,
    )


def update(terms: int, source_bytes: float, term_bytes: int) -> Counted:
    """Row-wise Adagrad with stochastic rounding, of one part of the experts."""
    blocks = blocks_of(terms, EXPERT_TILE if terms == PAIRS else ROW_TILE)
    return Counted(
        kernel=update_name("BFloat16", 8, 4),
        blocks=blocks,
        threads=32,
        dynamic_shared=4 * ROW + MAX_TERMS * (TERM_BYTES + 8),  # a term has a key of random bits
        bytes=2 * DISTINCT * ROW + source_bytes + term_bytes * terms + 8 * DISTINCT,
        counted=148 * (terms - DISTINCT) + 799 * DISTINCT + 550 * blocks,
        launches=2,
    )


def update_name(source: str, vec_size: int, vecs: int) -> str:
    """The kernel of row-wise Adagrad for bfloat16 tables."""
    form = f"SliceForm<{vec_size}, {vecs}, 32>"
    return f"update_kernel<{source}, PartUpdate<BFloat16, {form}, Keeps<false, true>>, float>"


QUERY_BYTES = QUERIES * DIM_KEY * 2
ROW_TILE = DISTINCT // (SMS * 128)  # positions of a tile of an optimizer that is given rows
# Uniform experts have no split segments, so a block ends as soon as it knows.
SPLIT_UPDATE = Counted(update_name("float", 4, 4), 1016, 64, 0, counted=1016 * 2 * 500, launches=2)

# A warp has four of 64 queries, and two batches of 512 keys. 250 of its instructions are for the
# block, 768 for each batch, 69 for each step of the search for four bounds, 117 for each query of a
# batch, 41 for each round of collecting, and 303 for ranking a query's keys. Normally distributed
# scores take 6.0 steps and 2.65 rounds in the first batch, 3.5 and 1.86 in the second.
WARP_OF_BEST_KEYS = 250 + 2 * 768 + (6.0 + 3.5) * 69 + 4 * (2 * 117 + (2.65 + 1.86) * 41 + 303)
BEST_ITEMS = QUERIES * 2 * K * 8  # bytes
BEST_KEYS = Counted(
    kernel="best_keys_kernel<false, 64, BFloat16>",
    blocks=2 * QUERIES // 64,
    threads=512,
    dynamic_shared=206080,
    bytes=QUERY_BYTES + BEST_ITEMS,
    counted=2 * QUERIES // 64 * 16 * WARP_OF_BEST_KEYS,
)
# Of 50 pairs, 25 reach the bound on average. One query of nine has more than 32.
BEST_PAIRS = Counted(
    kernel="best_pairs_kernel<BFloat16>",
    blocks=6 * SMS,
    threads=256,
    dynamic_shared=5364,
    bytes=BEST_ITEMS + QUERIES * K * 12,
    counted=QUERIES * (476 + 630 / 9),
)

FORWARD: list[Launch | Other] = [
    Other("cuBLAS: query projection", 2 * T * D + QUERY_BYTES, 1, 2 * T * D * H * DIM_KEY),
    Other("torch: batch norm, 3 kernels", 3 * QUERY_BYTES, 3),
    BEST_KEYS,
    BEST_PAIRS,
    Other("torch: softmax", 8 * PAIRS, 1, fold="retrieval, which has the K scores in a warp"),
    experts("Forward", 4),
]
TO_TOKENS: list[Launch | Other] = [experts("Backward", 6)]
SUMS: list[Launch | Other] = [
    *segments(PAIRS, N),
    sum_experts(),
    partial_sums("BFloat16", 2),
    Other("torch: ids to int64", 12 * DISTINCT, 1, fold="write_targets, as int64"),
]
FUSED: list[Launch | Other] = [
    *segments(PAIRS, N),
    update(PAIRS, 2 * T * D, term_bytes=12),
    partial_sums("float", 2),
    SPLIT_UPDATE,
]
OPTIMIZER: list[Launch | Other] = [
    Launch("check_distinct_ids", blocks_of(DISTINCT, 512), 512, 8 * DISTINCT),
    update(DISTINCT, DISTINCT * ROW, term_bytes=8),
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
    sum_keys(),
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
    "experts forward": FORWARD[5:],
    "routing": FORWARD[:5],
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
        kernel = self.kernels.get(launch.kernel)
        if kernel is None:
            self.problems.append(f"{launch.kernel} is not in the table")
        if isinstance(launch, Counted):
            return launch.counted * launch.launches
        if kernel is None:
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
        lines += [
            f"| | launches | {' | '.join(cards)} | target, H200 | the bound allows it |",
            "| --- " * 6 + "|",
        ]
        for name, launches in SUMMARY.items():
            times = [sum(self.milliseconds(each, card) for each in launches) for card in cards]
            count = sum(each.launches for each in launches)
            text = " | ".join(f"{time:.2f}" for time in times)
            is_allowed = "yes" if times[0] <= float(targets[name]) else "no"
            lines.append(f"| {name} | {count} | {text} | {targets[name]} | {is_allowed} |")
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
