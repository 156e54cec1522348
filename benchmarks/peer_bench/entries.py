"""Facts about an entry before it runs: reasons not to run it, memory, and bytes moved.

Bytes moved are those that must move between memory and processor, whatever the implementation.
With T tokens, P = H · K experts per token, U distinct experts among them, N experts, D their width,
s bytes per element (of the table; elsewhere of the activations, see `Case.activation_dtype`) and
R = C = √N keys per half:

    experts-forward   T·P·2D·s                         rows of the table read
    experts-backward  T·P·2D·s + G·2D·s                rows read again, G rows of gradients written:
                                                       U if they are sparse, N if dense; if the
                                                       update is fused, U updated rows.
                                                       Only U' of the U experts are not frozen:
                                                       they take the place of U here and below
    router            D·H·dim_key·s + (R + C)·dim_key/2·s          query weights and keys read
    forward           router + experts-forward + 2·T·D·s           and x read, the output written
    backward          forward + experts-backward + 2·router + 2·T·D·s
    optimizer         2·U·2D·s + G·2D·s                touched rows read and written, gradients
                                                       read; if fused, see experts-backward;
                                                       dense Adam: 7·N·2D·s, since it reads
                                                       parameter, gradient and two moments, and
                                                       writes three of them
    step              backward + optimizer
    routing           router + T·D·s + 12·T·P                      x read, scores and ids written
    router, the mode  3·router + 3·T·D·s               and gradients written; x read twice
    retrieval         T·H·dim_key·s + (R + C)·dim_key/2·s + 12·T·P
    selection         4·T·H·(R + C) + 12·T·P           scores read, scores and ids written
    feed-forward      2·D·F·s forward, 3 times that with backward, 10 times with a step
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from peer_bench.cases import CHOICE, FREEZES, LAYER, WITHOUT_IDS, Case, Entry, Plan
from peer_bench.machine import CPU
from peer_bench.problem import count_inputs
from peer_bench.workloads import SETUPS

GIB = 2**30


def list_entries(plan: Plan, memory: int, cache: int | None = None) -> Iterator[Entry]:
    """The entries of a plan in the order in which they run.

    Args:
        plan: the plan.
        memory: bytes that the case and a provider may take together.
        cache: bytes of the last-level cache, None for this processor's.
    """
    base = estimate_case(plan.case, cache)
    for mode in plan.modes:
        for distribution in plan.distributions:
            for name in plan.providers:
                ignores_ids = mode in WITHOUT_IDS or name.startswith("dense")
                if mode not in SETUPS[name]:
                    continue
                if ignores_ids and distribution != plan.distributions[0]:
                    continue
                for variant in list_variants(name, mode):
                    entry = Entry(plan.case, mode, name, variant)
                    total = base + _estimate_provider(entry)
                    reason = unsupported_reason(name, plan.case, mode)
                    if not reason and total > memory:
                        reason = (
                            f"does not fit: needs about {total / GIB:.1f} GiB, "
                            f"{max(memory, 0) / GIB:.1f} GiB may be used"
                        )
                    yield Entry(plan.case, mode, name, variant, distribution, total, reason)


def list_variants(provider: str, mode: str) -> tuple[str, ...]:
    """The ways in which a provider does the same; each is a row.

    `embedding_bag` has only sparse gradients, because with dense ones each of its two uses of the
    rows would make a gradient of the whole table.
    """
    is_forward = "forward" in mode
    if provider == "eager" or (provider == "compiled" and mode in CHOICE):
        return ("einsum",)
    if provider == "embedding_bag":
        return ("bags",) if is_forward else ("bags, sparse",)
    if provider == "compiled":
        return ("einsum", "sum", "bags") if is_forward else ("einsum", "sum")
    return ("",)


def unsupported_reason(provider: str, case: Case, mode: str) -> str:
    """Why a provider cannot run, "" if it can."""
    if case.frozen and provider not in FREEZES:
        return "it freezes no experts"
    if provider == "peer-graph":
        return "" if case.device == "cuda" else "a CUDA graph needs --device cuda"
    if provider == "compiled" and case.routers > 1:
        return "not run with several routers in turn"  # compiling every copy would serve no purpose
    is_cpu_half = (case.device, case.dtype) == ("cpu", "float16")
    if provider == "embedding_bag" and is_cpu_half and "forward" not in mode:
        return "torch does not add sparse float16 gradients on a CPU"
    if provider == "PEER-pytorch":
        if case.activation_dtype.itemsize != case.itemsize:
            return "its tables have the dtype of its inputs"
        if any(importlib.util.find_spec(name) is None for name in ("PEER_pytorch", "einx")):
            return "not installed: pip install PEER-pytorch"
    normalises = provider != "PEER-pytorch" and not provider.startswith("dense")
    if normalises and case.tokens == 1 and mode in ("backward", "step", "router", "optimizer"):
        return "batch normalisation learns from two tokens or more"
    return ""


def estimate_case(case: Case, cache: int | None = None) -> int:
    """Bytes of the table, the routers, the inputs and their ids.

    Args:
        case: the sizes.
        cache: bytes of the last-level cache, None for this processor's.
    """
    tokens = count_inputs(case, cache or CPU.last_level_cache) * case.tokens
    inputs = tokens * (case.dim * case.activation_dtype.itemsize + 8 * case.per_token)
    return case.table_bytes + inputs + case.routers * router_bytes(case)


def _get_gradients(entry: Entry) -> str:
    """The gradients of the table: "sparse", "dense" or "fused" into the backward pass."""
    if entry.provider in ("peer-fused", "peer-fused-nearest"):
        return "fused"
    is_sparse = entry.provider in ("peer", "peer-graph") or "sparse" in entry.variant
    return "sparse" if is_sparse else "dense"


def _estimate_provider(entry: Entry) -> int:
    """An upper estimate of the bytes that a provider allocates beyond parameters and inputs."""
    case, mode, gradients = entry.case, entry.mode, _get_gradients(entry)
    if entry.provider.startswith("dense"):  # parameters, gradients, moments; the hidden layer
        return (
            (8 * case.dim + 6 * case.tokens) * _get_hidden(entry) * case.activation_dtype.itemsize
        )
    # Queries before and after normalisation, with gradients, and the router's optimizer.
    router = 6 * case.tokens * case.heads * case.dim_key * max(4, case.itemsize)
    router += 5 * router_bytes(case) + 40 * case.tokens * case.per_token
    # Gradients of the table; sparse ones exist twice while they are sorted.
    rows = min(case.num_experts, case.tokens * case.per_token)
    sparse = 2 * rows * 2 * case.dim * case.itemsize
    gradient = {"dense": case.table_bytes, "sparse": sparse, "fused": 0}[gradients]
    moments = 2 * case.table_bytes if mode in ("step", "optimizer") else 0
    if entry.provider == "products":  # all scores and their gradients
        return router + 16 * case.tokens * case.heads * case.root
    if mode == "router":
        return router
    learns = mode not in ("forward", "experts-forward", *CHOICE)
    if entry.provider.startswith("peer"):
        graphs = max(case.routers, 4) if entry.provider == "peer-graph" else 1
        if not learns:
            return graphs * router
        return router + gradient + 8 * case.num_experts + (moments if gradients == "dense" else 0)
    gathered = case.tokens * case.per_token * case.dim * case.activation_dtype.itemsize
    total = router + 12 * case.tokens * case.heads * (2 * case.root + 3 * case.k**2)
    if mode in CHOICE:
        return total
    if not learns:
        return total + 2 * gathered
    total += 3 * gathered + gradient + moments
    if case.device == "cuda":  # a gradient's partial sums, in float32
        total += 4 * case.tokens * case.per_token * case.dim
    return total


def _get_hidden(entry: Entry) -> int:
    """Hidden neurons of a dense provider."""
    return 4 * entry.case.dim if entry.provider == "dense-4d" else entry.case.per_token


def bytes_moved(entry: Entry, distinct: float) -> int:
    """Bytes by the formulas at the top of this file.

    Args:
        entry: of any mode and provider.
        distinct: U.
    """
    case, mode = entry.case, entry.mode
    if entry.provider.startswith("dense"):
        times = {"forward": 1, "backward": 3, "step": 10}[mode]
        return times * 2 * case.dim * _get_hidden(entry) * case.activation_dtype.itemsize
    if mode in CHOICE:
        return _choice_bytes(case, mode)
    if mode == "router":
        activations = case.tokens * case.dim * case.activation_dtype.itemsize
        return 3 * router_bytes(case) + 3 * activations
    gradients = _get_gradients(entry)
    if mode not in LAYER:
        return experts_bytes(case, mode, distinct, gradients)
    activations = 2 * case.tokens * case.dim * case.activation_dtype.itemsize
    total = router_bytes(case) + activations
    total += experts_bytes(case, "experts-forward", distinct, gradients)
    if mode != "forward":
        total += experts_bytes(case, "experts-backward", distinct, gradients)
        total += 2 * router_bytes(case) + activations
    if mode == "step":
        total += experts_bytes(case, "optimizer", distinct, gradients)
    return total


def experts_bytes(case: Case, mode: str, distinct: float, gradients: str) -> int:
    """Bytes of "experts-forward", "experts-backward" and "optimizer".

    Args:
        case: the sizes.
        mode: one of the three.
        distinct: U.
        gradients: "sparse", "dense" or "fused".
    """
    retrieved = case.tokens * case.per_token
    distinct *= 1 - case.frozen / 100
    written = {"sparse": distinct, "dense": case.num_experts, "fused": distinct}[gradients]
    optimizer = {"sparse": 3 * distinct, "dense": 7 * case.num_experts, "fused": 0}[gradients]
    rows = {
        "experts-forward": retrieved,
        "experts-backward": retrieved + written,
        "optimizer": optimizer,
    }[mode]
    return round(rows * 2 * case.dim * case.itemsize)


def router_bytes(case: Case) -> int:
    """Bytes of the query weights and the keys."""
    return (case.dim * case.heads + case.root) * case.dim_key * case.activation_dtype.itemsize


def _choice_bytes(case: Case, mode: str) -> int:
    written = 12 * case.tokens * case.per_token
    if mode == "selection":
        return 4 * case.tokens * case.heads * 2 * case.root + written
    if mode == "routing":
        inputs = case.tokens * case.dim * case.activation_dtype.itemsize
        return router_bytes(case) + inputs + written
    queries = (case.tokens * case.heads + case.root) * case.dim_key
    return queries * case.activation_dtype.itemsize + written
