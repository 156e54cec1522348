"""How many experts do untrained keys retrieve, if their lengths differ and if they are equal?

`python benchmarks/key_lengths.py --csv rows.csv` draws routers of 1024² experts and gives them
normal queries, as batch normalisation makes them. `cube` draws keys uniformly from the cube
±1 / sqrt(dim_key / 2), `equal` as `peer.ProductKeyRouter` does. Both have the same root mean square
length. A row has the usage and the unevenness of `peer.UsageTracker`. Unevenness in nats is taken
of the sums of router weights, and of the numbers of retrievals.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import peer

COLUMNS = (
    "dim_key",
    "heads",
    "keys",
    "lengths",
    "seed",
    "num_experts",
    "queries",
    "k",
    "usage",
    "uniform_usage",
    "unevenness",
    "unevenness_of_counts",
)


def make_router(
    dim_key: int, heads: int, share_keys: bool, lengths: str, side: int
) -> peer.ProductKeyRouter:
    """Makes a router whose inputs are the normalised queries of all heads."""
    router = peer.ProductKeyRouter(
        1,
        num_experts=side**2,
        heads=heads,
        dim_key=dim_key,
        share_keys=share_keys,
        query_norm=None,
    )
    router.query = nn.Identity()
    router.dim = heads * dim_key
    if lengths == "cube":
        bound = (dim_key / 2) ** -0.5
        for keys in router.row_keys, router.col_keys:
            nn.init.uniform_(keys, -bound, bound)
    return router


@torch.no_grad()
def measure(
    dim_key: int, heads: int, share_keys: bool, lengths: str, seed: int, side: int, queries: int
) -> dict[str, object]:
    """Gives a router normal queries and returns the row."""
    torch.manual_seed(seed)
    router = make_router(dim_key, heads, share_keys, lengths, side)
    with peer.UsageTracker(router) as tracker:
        for part in torch.arange(queries // heads).split(1000):
            router(torch.randn(len(part), router.dim))
    k, experts = router.num_experts_per_head, router.num_experts
    share = tracker.counts / tracker.counts.sum()
    of_counts = math.log(experts) + float(torch.special.xlogy(share, share).sum())
    return {
        "dim_key": dim_key,
        "heads": heads,
        "keys": "shared" if share_keys else "per head",
        "lengths": lengths,
        "seed": seed,
        "num_experts": experts,
        "queries": queries // heads * heads,
        "k": k,
        "usage": round(tracker.usage(), 4),
        "uniform_usage": round(1 - (1 - k / experts) ** queries, 4),
        "unevenness": round(tracker.unevenness(), 4),
        "unevenness_of_counts": round(of_counts, 4),
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Measures all combinations."""
    for dim_key, heads, share_keys, lengths, seed in itertools.product(
        options.dim_key, options.heads, (True, False), ("cube", "equal"), range(options.seeds)
    ):
        yield measure(dim_key, heads, share_keys, lengths, seed, options.side, options.queries)


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim-key", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--side", type=int, default=1024, help="rows and columns of the grid")
    parser.add_argument("--queries", type=int, default=160_000, help="queries, of all heads")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--csv", type=Path, required=True, help="file of the rows; overwritten")
    options = parser.parse_args()
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows(options):
            writer.writerow(row)
            file.flush()
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
