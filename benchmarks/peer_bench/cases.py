"""What is measured: the sizes of a case, and the presets, lists of cases with their providers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

__all__ = [
    "DEVICES",
    "DTYPES",
    "MODES",
    "ONLY_ON",
    "PRESETS",
    "Case",
    "Plan",
    "canonical",
    "list_plans",
]

DEVICES = ("cpu", "cuda")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The whole layer, then its stages. "backward" is forward and backward; "step" adds the optimizer
# and zero_grad; "experts-backward" is the backward pass alone; "routing" is the product with the
# query weights and then retrieval.
MODES = (
    "forward",
    "backward",
    "step",
    "experts-forward",
    "experts-backward",
    "routing",
    "retrieval",
    "selection",
    "optimizer",
)


@dataclass(frozen=True)
class Case:
    """Sizes of one layer and of its input.

    Args:
        num_experts: N, a perfect square.
        tokens: T.
        dim: D, input and output width.
        heads: H.
        k: K, experts per head.
        dim_key: query width per head.
        dtype: of the tables, a key of `DTYPES`. `activation_dtype` is that of all else.
        threads: of torch.
        routers: how many copies of the router take turns. With a single token the query weights
            are most of the bytes, and one copy of them would stay in the caches.
        device: "cpu" or "cuda".
    """

    num_experts: int = 1024**2
    tokens: int = 1024
    dim: int = 512
    heads: int = 8
    k: int = 16
    dim_key: int = 256
    dtype: str = "float32"
    threads: int = 0
    routers: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.root**2 != self.num_experts:
            raise ValueError(f"expected num_experts to be a square, got {self.num_experts}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype out of {', '.join(DTYPES)}, got {self.dtype}")
        if self.device not in DEVICES:
            raise ValueError(f"expected device out of {', '.join(DEVICES)}, got {self.device}")
        for name in ("num_experts", "tokens", "dim", "heads", "k", "routers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be positive, got {getattr(self, name)}")
        if self.k > self.root:
            raise ValueError(f"expected k of at most {self.root}, the keys of a half, got {self.k}")
        if self.dim_key < 2 or self.dim_key % 2:
            raise ValueError(f"expected dim_key to be even and positive, got {self.dim_key}")

    @property
    def root(self) -> int:
        """Rows of the grid, and columns."""
        return math.isqrt(self.num_experts)

    @property
    def per_token(self) -> int:
        """P = H · K."""
        return self.heads * self.k

    @property
    def itemsize(self) -> int:
        """Bytes of one element of the tables."""
        return DTYPES[self.dtype].itemsize

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of inputs, router and dense layers.

        On a GPU the tables', as in a model that is trained in bfloat16; on a CPU float32 for 16-bit
        tables, which only save memory there.
        """
        tables = DTYPES[self.dtype]
        return tables if self.device == "cuda" else torch.promote_types(tables, torch.float32)

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        return 2 * self.num_experts * self.dim * self.itemsize

    def describe(self) -> str:
        """The sizes in one line."""
        text = (
            f"N={self.root}² T={self.tokens} D={self.dim} H={self.heads} K={self.k} "
            f"dim_key={self.dim_key} {self.dtype}"
        )
        return f"{text}, {self.threads} threads" if self.threads else text


@dataclass(frozen=True)
class Plan:
    """A case with the modes, providers and distributions that are measured side by side."""

    case: Case
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    distributions: tuple[str, ...] = ("uniform",)


OURS = ("peer", "peer-fused")
PLAIN = ("eager", "compiled")
ALL = (
    "peer",
    "peer-dense-grad",
    "peer-fused",
    "eager",
    "embedding_bag",
    "compiled",
    "PEER-pytorch",
    "dense-4d",
    "dense-active",
)


def canonical(**changes: int | str) -> Case:
    """The paper's layer with a million experts, 1024 tokens and D = 512, with changes."""
    return replace(Case(), **changes)  # type: ignore[arg-type]


def _targets() -> list[Plan]:
    plans = []
    for dim in (512, 1024):
        case = canonical(dim=dim)
        plans += [
            Plan(case, ("experts-forward",), ("peer", "eager", "embedding_bag", "compiled")),
            Plan(case, ("selection",), ("peer", "eager")),
            Plan(case, ("backward",), ("peer", *PLAIN)),
            Plan(case, ("step",), (*OURS, *PLAIN, "dense-4d")),
            Plan(
                case,
                ("experts-forward", "experts-backward", "step"),
                ("peer",),
                ("uniform", "zipf:1.0"),
            ),
            Plan(
                replace(case, dtype="bfloat16"),
                ("experts-forward", "step"),
                OURS,
            ),
        ]
    for root in (256, 512, 1024, 2048):
        plans.append(Plan(canonical(num_experts=root**2, dim=256), ("step",), OURS))
    plans.append(Plan(canonical(tokens=1, routers=16), ("forward",), ("peer",), ("router",)))
    for dtype in ("float32", "bfloat16"):
        wide = canonical(num_experts=512**2, dim=4096, dtype=dtype)
        plans.append(Plan(wide, ("experts-forward",), ("peer",)))
    return plans


def _stages() -> list[Plan]:
    return [Plan(canonical(dim=dim), MODES, ALL) for dim in (512, 1024)]


def _cuda_targets() -> list[Plan]:
    case = canonical(tokens=8192, dim=1024, dtype="bfloat16")
    one_token = replace(case, tokens=1, routers=32)
    modes = ("experts-forward", "routing", "retrieval", "backward", "experts-backward", "step")
    with_zipf = ("experts-forward", "experts-backward", "step")
    return [
        Plan(case, modes, (*OURS, "eager", "dense-4d")),
        Plan(case, with_zipf, OURS, ("uniform", "zipf:1.0")),
        Plan(one_token, ("forward",), ("peer", "peer-graph", "eager", "dense-4d"), ("router",)),
    ]


def _cuda_compiled() -> list[Plan]:
    half, single = (
        canonical(tokens=8192, dim=1024, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    by_dtype = ("routing", "experts-backward", "step")
    return [
        Plan(half, ("experts-forward", "backward"), ("peer", "compiled")),
        Plan(half, by_dtype, OURS),
        Plan(single, ("experts-forward", *by_dtype), OURS),
    ]


def _capability() -> list[Plan]:
    modes = ("experts-forward", "experts-backward", "selection", "step")
    return [Plan(canonical(dim=dim), modes, OURS) for dim in (512, 1024)]


def _quick() -> list[Plan]:
    small = canonical(num_experts=64**2, tokens=64, dim=64, heads=4, k=8, dim_key=32)
    eager = tuple(name for name in ALL if name != "compiled")
    return [
        Plan(small, MODES, eager),
        Plan(small, ("experts-forward",), ("peer", "compiled")),
        Plan(small, ("experts-forward", "experts-backward"), ("peer",), ("zipf:1.0", "router")),
    ]


def _sweep(field: str, values: tuple[int | str, ...]) -> Callable[[], list[Plan]]:
    def plans() -> list[Plan]:
        modes = ("experts-forward", "experts-backward", "retrieval", "forward", "step")
        providers = (*OURS, "eager", "dense-4d")
        return [Plan(canonical(**{field: value}), modes, providers) for value in values]

    return plans


def _threads() -> list[Plan]:
    most = torch.get_num_threads()
    counts = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, most})
    return [plan for count in counts if count <= most for plan in _sweep("threads", (count,))()]


def _distributions() -> list[Plan]:
    modes = ("experts-forward", "experts-backward", "step")
    distributions = ("uniform", "zipf:0.8", "zipf:1.0", "zipf:1.2", "router")
    return [Plan(canonical(), modes, ("peer", "peer-fused"), distributions)]


PRESETS: dict[str, Callable[[], list[Plan]]] = {
    "targets": _targets,
    "cuda-targets": _cuda_targets,
    "cuda-compiled": _cuda_compiled,
    "quick": _quick,
    "stages": _stages,
    "capability": _capability,
    "sweep-num-experts": _sweep(
        "num_experts", tuple(root**2 for root in (128, 256, 512, 1024, 2048))
    ),
    "sweep-tokens": _sweep("tokens", (2, 8, 32, 128, 512, 1024, 4096, 16384)),
    "sweep-dim": _sweep("dim", (128, 256, 512, 1024, 2048)),
    "sweep-heads": _sweep("heads", (1, 2, 4, 8, 16)),
    "sweep-k": _sweep("k", (4, 8, 16, 32)),
    "sweep-dtype": _sweep("dtype", tuple(DTYPES)),
    "sweep-threads": _threads,
    "sweep-distribution": _distributions,
}

# Presets that mean something on one device only.
ONLY_ON = {
    "targets": "cpu",
    "capability": "cpu",
    "sweep-threads": "cpu",
    "cuda-targets": "cuda",
    "cuda-compiled": "cuda",
}


def list_plans(
    preset: str,
    *,
    modes: tuple[str, ...] = (),
    providers: tuple[str, ...] = (),
    distributions: tuple[str, ...] = (),
    sizes: dict[str, tuple[int | str, ...]] | None = None,
    device: str | None = None,
) -> list[Plan]:
    """The plans of a preset, with what the command line says instead.

    Args:
        preset: a key of `PRESETS`.
        modes: instead of the preset's.
        providers: instead of the preset's.
        distributions: instead of the preset's.
        sizes: fields of `Case` with one value or several each; cases are their combinations. A
            plan for one token, whose latency it is about, keeps its number of tokens.
        device: of all cases, by default the preset's, which is "cpu" for most.

    Returns:
        Plans without repetitions.

    Raises:
        ValueError: a size is out of range, or the preset is for another device.
    """
    own = ONLY_ON.get(preset)
    if None not in (own, device) and own != device:
        raise ValueError(f"the preset {preset} is for --device {own}, got --device {device}")
    plans: dict[Plan, None] = {}
    names = list(sizes or {})
    for plan in PRESETS[preset]():
        for values in product(*(sizes or {}).values()):
            changes = dict(zip(names, values, strict=True))
            changes["device"] = device or own or "cpu"
            if plan.case.tokens == 1:
                changes.pop("tokens", None)
            plans[
                Plan(
                    replace(plan.case, **changes),  # type: ignore[arg-type]
                    modes or plan.modes,
                    providers or plan.providers,
                    distributions or plan.distributions,
                )
            ] = None
    return list(plans)
