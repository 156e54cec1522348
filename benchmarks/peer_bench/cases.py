"""The sizes of a case, and the presets, which are lists of plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

DEVICES = ("cpu", "cuda")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LAYER = ("forward", "backward", "step")
EXPERTS = ("experts-forward", "experts-backward")
CHOICE = ("routing", "retrieval", "selection")  # these read no expert
WITHOUT_IDS = (*CHOICE, "router")  # in these, drawn ids replace nothing

# The whole layer, then its stages. "backward" is forward and backward; "step" adds the optimizer
# and zero_grad; "experts-backward" is the backward pass alone; "routing" is the product with the
# query weights, then retrieval; "router" is the whole router in training, forward and backward.
MODES = (*LAYER, *EXPERTS, *CHOICE, "router", "optimizer")

PROVIDERS = (
    "peer",
    "peer-dense-grad",
    "peer-fused",
    "peer-fused-nearest",
    "peer-graph",
    "eager",
    "embedding_bag",
    "compiled",
    "PEER-pytorch",
    "dense-4d",
    "dense-active",
    "products",
)
OURS = ("peer", "peer-fused")
FREEZES = (*OURS, "peer-fused-nearest", "peer-dense-grad")  # providers that can freeze experts
PLAIN = ("eager", "compiled")
ALL = tuple(name for name in PROVIDERS if name != "peer-graph")


@dataclass(frozen=True)
class Case:
    """Sizes of a layer and its input; by default the paper's layer, 1024 tokens and D = 512.

    Args:
        num_experts: N, a perfect square.
        tokens: T.
        dim: D, input and output width.
        heads: H.
        k: K, experts per head.
        dim_key: query width per head.
        dtype: of the table, a key of `DTYPES`. `activation_dtype` is the dtype of all else.
        threads: of torch.
        routers: copies of the router that take turns. With a single token, the query weights are
            most of the bytes, and one copy of them would stay in the caches.
        frozen: percent of the experts that are frozen.
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
    frozen: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("dtype", tuple(DTYPES)), ("device", DEVICES)):
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("num_experts", "tokens", "dim", "heads", "routers"):
            self._require(name, getattr(self, name) > 0, "positive")
        self._require("frozen", 0 <= self.frozen <= 100, "between 0 and 100")
        self._require("num_experts", self.root**2 == self.num_experts, "a square")
        self._require("k", 2 <= self.k <= self.root, f"between 2 and √N = {self.root}")
        self._require("dim_key", self.dim_key > 0 and self.dim_key % 2 == 0, "even and positive")

    def _require(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"expected {name} to be {expected}, got {getattr(self, name)}")

    @property
    def root(self) -> int:
        """√N, the number of row keys and of column keys."""
        return math.isqrt(self.num_experts)

    @property
    def per_token(self) -> int:
        return self.heads * self.k  # P

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of all but the table: the table's on a GPU, at least float32 on a CPU."""
        tables = DTYPES[self.dtype]
        return tables if self.device == "cuda" else torch.promote_types(tables, torch.float32)

    @property
    def table_bytes(self) -> int:
        return 2 * self.num_experts * self.dim * self.itemsize

    def describe(self) -> str:
        """The sizes in one line."""
        text = f"N={self.root}² T={self.tokens} D={self.dim} H={self.heads} K={self.k}"
        text += f" dim_key={self.dim_key} {self.dtype}"
        text += f", {self.frozen} % frozen" if self.frozen else ""
        return f"{text}, {self.threads} threads" if self.threads else text


@dataclass(frozen=True)
class Plan:
    """A case with the modes, providers and distributions that are measured side by side."""

    case: Case
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    distributions: tuple[str, ...] = ("uniform",)


@dataclass(frozen=True)
class Entry:
    """One measurement to make. `estimate` is in bytes; `skipped` says why it does not run."""

    case: Case
    mode: str
    provider: str
    variant: str = ""
    distribution: str = "uniform"
    estimate: int = 0
    skipped: str = ""

    @property
    def name(self) -> str:
        return f"{self.provider} {self.variant}".strip()

    def describe(self) -> str:
        return f"{self.name} {self.mode}, {self.distribution}, {self.case.describe()}"


def _targets() -> list[Plan]:
    plans = []
    for dim in (512, 1024):
        case = Case(dim=dim)
        reading_rows = ("experts-forward", "experts-backward", "step")
        plans += [
            Plan(case, ("experts-forward",), ("peer", "eager", "embedding_bag", "compiled")),
            Plan(case, ("selection",), ("peer", "eager")),
            Plan(case, ("backward",), ("peer", *PLAIN)),
            Plan(case, ("step",), (*OURS, *PLAIN, "dense-4d")),
            Plan(case, reading_rows, ("peer",), ("uniform", "zipf:1.0")),
            Plan(case, ("experts-backward",), OURS),
            Plan(case, ("router",), ("peer", "products")),
            Plan(
                replace(case, dtype="bfloat16"),
                reading_rows,
                (*OURS, "peer-fused-nearest"),
            ),
        ]
    for root in (256, 512, 1024, 2048):
        plans.append(Plan(Case(num_experts=root**2, dim=256), ("step",), OURS))
    plans.append(Plan(Case(tokens=1, routers=16), ("forward",), ("peer",), ("router",)))
    for dtype in ("float32", "bfloat16"):
        wide = Case(num_experts=512**2, dim=4096, dtype=dtype)
        plans.append(Plan(wide, ("experts-forward",), ("peer",)))
    return plans


def _stages() -> list[Plan]:
    return [Plan(Case(dim=dim), MODES, ALL) for dim in (512, 1024)]


def _cuda_targets() -> list[Plan]:
    case = Case(tokens=8192, dim=1024, dtype="bfloat16")
    one_token = replace(case, tokens=1, routers=32)
    modes = ("experts-forward", "routing", "retrieval", "backward", "experts-backward", "step")
    with_zipf = ("experts-forward", "experts-backward", "step")
    return [
        Plan(case, modes, (*OURS, "eager", "dense-4d")),
        Plan(case, with_zipf, OURS, ("uniform", "zipf:1.0")),
        Plan(one_token, ("forward",), ("peer", "peer-graph", "eager", "dense-4d"), ("router",)),
    ]


def _cuda_compiled() -> list[Plan]:
    half, single = (Case(tokens=8192, dim=1024, dtype=dtype) for dtype in ("bfloat16", "float32"))
    by_dtype = ("routing", "experts-backward", "step")
    return [
        Plan(half, ("experts-forward", "backward"), ("peer", "compiled")),
        Plan(half, by_dtype, OURS),
        Plan(single, ("experts-forward", *by_dtype), OURS),
    ]


def _capability() -> list[Plan]:
    modes = ("experts-forward", "experts-backward", "selection", "step")
    return [Plan(Case(dim=dim), modes, OURS) for dim in (512, 1024)]


def _quick() -> list[Plan]:
    small = Case(num_experts=64**2, tokens=64, dim=64, heads=4, k=8, dim_key=32)
    return [
        Plan(small, MODES, tuple(name for name in ALL if name != "compiled")),
        Plan(small, ("experts-forward",), ("peer", "compiled")),
        Plan(small, ("experts-forward", "experts-backward"), ("peer",), ("zipf:1.0", "router")),
    ]


def _frozen() -> list[Plan]:
    plans = []
    for percent in (0, 50, 90, 100):
        case = Case(frozen=percent)
        plans.append(Plan(case, ("experts-backward",), FREEZES))
        plans.append(Plan(case, ("step",), OURS))
    return plans


def _sweep(field: str, *values: int | str) -> Callable[[], list[Plan]]:
    modes = ("experts-forward", "experts-backward", "retrieval", "forward", "step")
    providers = (*OURS, "eager", "dense-4d")
    cases = [replace(Case(), **{field: value}) for value in values]  # type: ignore[arg-type]
    return lambda: [Plan(case, modes, providers) for case in cases]


def _threads() -> list[Plan]:
    available = torch.get_num_threads()
    counts = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, available})
    return _sweep("threads", *(count for count in counts if count <= available))()


def _distributions() -> list[Plan]:
    modes = ("experts-forward", "experts-backward", "step")
    return [Plan(Case(), modes, OURS, ("uniform", "zipf:0.8", "zipf:1.0", "zipf:1.2", "router"))]


PRESETS: dict[str, Callable[[], list[Plan]]] = {
    "targets": _targets,
    "cuda-targets": _cuda_targets,
    "cuda-compiled": _cuda_compiled,
    "quick": _quick,
    "stages": _stages,
    "capability": _capability,
    "frozen": _frozen,
    "sweep-num-experts": _sweep("num_experts", *(n**2 for n in (128, 256, 512, 1024, 2048))),
    "sweep-tokens": _sweep("tokens", 2, 8, 32, 128, 512, 1024, 4096, 16384),
    "sweep-dim": _sweep("dim", 128, 256, 512, 1024, 2048),
    "sweep-heads": _sweep("heads", 1, 2, 4, 8, 16),
    "sweep-k": _sweep("k", 4, 8, 16, 32),
    "sweep-dtype": _sweep("dtype", *DTYPES),
    "sweep-threads": _threads,
    "sweep-distribution": _distributions,
}

# Presets for one device only.
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
    """The plans of a preset, each once. Arguments replace what the preset says.

    `sizes` has fields of `Case` with one or several values each; the cases are their combinations.
    A plan for one token is about latency and keeps its number of tokens.

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
            changed = Plan(
                replace(plan.case, **changes),  # type: ignore[arg-type]
                modes or plan.modes,
                providers or plan.providers,
                distributions or plan.distributions,
            )
            plans[changed] = None
    return list(plans)
