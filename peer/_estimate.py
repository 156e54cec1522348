"""What a layer costs, computed from its options: parameters, FLOPs, bytes, memory, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peer._counts import count_peer
from peer.layer_config import PEERConfig
from peer.modules import PEER

__all__ = ["DEVICES", "Device", "Estimate", "estimate", "format_estimates"]


@dataclass(frozen=True)
class Device:
    """What limits a step on a device.

    Args:
        bandwidth: bytes per second that the memory delivers to many cores at once.
        flops: floating-point operations per second of large matrix products, in the dtype of the
            activations.
        name: a name for tables.
    """

    bandwidth: float
    flops: float
    name: str = "device"

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} to be positive, got {getattr(self, name)}")

    @classmethod
    def measure(
        cls, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Device:
        """Measures a device: the read of 256 MiB and a product of matrices, in about a second.

        Args:
            device: the device.
            dtype: dtype of the product.
        """
        device = torch.device(device)
        block = torch.ones(2**26, device=device)
        a = torch.ones(2048, 1024, dtype=dtype, device=device)
        b = torch.ones(1024, 2048, dtype=dtype, device=device)
        bandwidth = 4 * len(block) / _shortest(device, block.sum)
        flops = 2 * 2048 * 1024 * 2048 / _shortest(device, lambda: a @ b)
        return cls(bandwidth, flops, str(device))


def _shortest(device: torch.device, run: Any, times: int = 8) -> float:
    """The shortest of several times of a function, in seconds, after one to warm up."""

    def finish() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    seconds = []
    for _ in range(times + 1):
        start = finish()
        run()
        seconds.append(finish() - start)
    return min(seconds[1:])


# Bandwidths of a copy, and the rates of bfloat16 products that cuBLAS reaches. Both are assumptions
# for a plan; `Device.measure` tells those of a machine.
DEVICES = {
    "H100": Device(3.0e12, 7.9e14, "H100"),
    "H200": Device(4.3e12, 7.9e14, "H200"),
}


@dataclass(frozen=True)
class Estimate:
    """What a layer costs. `str` makes a table of it.

    Attributes:
        parameters: the number of all parameters.
        active_parameters: the number of parameters that a token uses: the router, and H * K rows.
        flops_per_token: of the forward pass; a multiply-add is two. A step has three times those of
            the experts and of the query projection, and those of the sub-scores once.
        tokens: T, the tokens of a step.
        distinct_experts: how many experts the tokens of a step retrieve by uniform retrieval. Real
            retrieval is more skewed and retrieves fewer.
        bytes_per_token: bytes that a token moves between memory and processor in the forward pass:
            its rows of the table.
        bytes_per_step: bytes that a step of T tokens moves, by the optimizer of the table.
        memory: bytes to train: parameters, gradients, optimizer state and what the backward pass
            keeps, by the optimizer of the table. The router is trained by AdamW.
        seconds_per_forward: the forward pass of T tokens, or None without a device.
        seconds_per_step: a training step of T tokens by the optimizer of the table; empty without a
            device.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    tokens: int
    distinct_experts: int
    bytes_per_token: int
    bytes_per_step: Mapping[str, int]
    memory: Mapping[str, int]
    seconds_per_forward: float | None = None
    seconds_per_step: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return format_estimates({"": self})


# How each optimizer of the table trains: whether its gradients are "sparse", "dense" or "fused"
# into the backward pass; its state, as multiples of the table, of float32 numbers for each part of
# an expert, and of 4-byte numbers for each expert; and what it moves in a step, as multiples of the
# rows that it updates, besides the gradient and the parameter itself.
_OPTIMIZERS: dict[str, tuple[str, tuple[int, int, int], int]] = {
    "peer RowwiseAdagrad, fused": ("fused", (0, 1, 0), 0),
    "peer RowwiseAdagrad, sparse gradients": ("sparse", (0, 1, 0), 0),
    "peer RowwiseAdam, fused": ("fused", (1, 1, 1), 2),
    "peer RowwiseAdam, sparse gradients": ("sparse", (1, 1, 1), 2),
    "peer SGD, fused": ("fused", (0, 0, 0), 0),
    "torch AdamW, dense gradients": ("dense", (2, 0, 0), 4),
}


def estimate(
    config: PEERConfig | PEER,
    *,
    tokens: int,
    device: Device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    r"""Predicts what a layer costs, without making its table.

    A step has two parts that do not overlap: the router, which is limited by matrix products, and
    the experts, which are limited by memory. So the predicted time is

    .. math:: \frac{\text{bytes}}{\text{bandwidth}}
              + \frac{\text{FLOPs of the router}}{\text{FLOP/s}} .

    It is a lower bound for most devices, because launches, caches and latency are not counted.

    The bytes of the experts are those of T * H * K rows in the forward pass and again in the
    backward pass; of the gradients; and of reading and writing the rows that the step updates.

    Args:
        config: the options of a layer with its width, or a layer.
        tokens: T, the tokens of a step.
        device: a `Device`; "H100" or "H200"; "cpu" or "cuda", which is measured; None for no times.
        dtype: dtype of the table, the router and the activations, if `config` is no layer.

    Returns:
        The costs.

    Raises:
        ValueError: the configuration has no width, `tokens` is not positive, or the device is
            unknown.

    Example:
        >>> import peer
        >>> config = peer.PEERConfig(dim=2048)
        >>> costs = peer.estimate(config, tokens=8192, device=peer.Device(3e12, 6e14))
        >>> costs.parameters, costs.active_parameters
        (4299427840, 4984832)
        >>> round(costs.memory["peer RowwiseAdagrad, fused"] / 2**30)
        16
        >>> round(costs.memory["torch AdamW, dense gradients"] / 2**30)
        64
    """
    if tokens < 1:
        raise ValueError(f"expected tokens to be positive, got {tokens}")
    if isinstance(config, PEER):
        layer = config
    else:
        if config.dim is None:
            raise ValueError("expected a configuration with a width, such as PEERConfig(dim=1024)")
        layer = config.make(device="meta", dtype=dtype)
    sizes = _Sizes.of(layer, tokens)
    costs = {name: sizes.train(*facts) for name, facts in _OPTIMIZERS.items()}
    counts = count_peer(layer)
    seconds_per_forward, seconds_per_step = None, {}
    if device is not None:
        limits = _device(device, layer.router.query.weight.dtype)
        seconds_per_forward = sizes.forward_bytes / limits.bandwidth
        seconds_per_forward += sizes.router_flops / limits.flops
        seconds_per_step = {
            name: moved / limits.bandwidth + sizes.router_step_flops / limits.flops
            for name, (moved, _) in costs.items()
        }
    return Estimate(
        parameters=counts.parameters,
        active_parameters=counts.active,
        flops_per_token=counts.flops,
        tokens=tokens,
        distinct_experts=round(sizes.distinct),
        bytes_per_token=sizes.per_token * sizes.row,
        bytes_per_step={name: moved for name, (moved, _) in costs.items()},
        memory={name: memory for name, (_, memory) in costs.items()},
        seconds_per_forward=seconds_per_forward,
        seconds_per_step=seconds_per_step,
    )


def _device(device: Device | str, dtype: torch.dtype) -> Device:
    if isinstance(device, Device):
        return device
    if device in DEVICES:
        return DEVICES[device]
    try:
        return Device.measure(device, dtype)
    except RuntimeError as error:
        known = ", ".join(map(repr, DEVICES))
        raise ValueError(
            f"expected a Device, {known}, or a device of torch that is here, got {device!r}"
        ) from error


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a layer, in bytes where nothing else is said.

    Attributes:
        experts: N.
        parts: vectors of an expert.
        row: an expert.
        router: the parameters of the router.
        tokens: T.
        per_token: H * K.
        distinct: the number of experts that T tokens retrieve.
        kept: what the forward pass keeps for the backward pass.
        activations: an input or an output of the layer.
        router_flops: matrix products of the router in the forward pass.
        router_step_flops: the same in a step.
    """

    experts: int
    parts: int
    row: int
    router: int
    tokens: int
    per_token: int
    distinct: float
    kept: int
    activations: int
    router_flops: int
    router_step_flops: int

    @classmethod
    def of(cls, layer: PEER, tokens: int) -> _Sizes:
        router, table = layer.router, layer.experts.weight
        experts, parts, dim = table.shape
        itemsize = router.query.weight.dtype.itemsize
        heads, k = router.heads, router.num_experts_per_head
        queries = tokens * heads * router.dim_key
        pairs = tokens * heads * k
        # A head retrieves k distinct experts for a token, which T * H such draws miss with this
        # probability.
        missed = (
            tokens * heads * math.log1p(-k / layer.num_experts)
            if k < layer.num_experts
            else -math.inf
        )
        projection = 2 * tokens * router.query.weight.numel()
        sub_scores = tokens * heads * (router.rows + router.columns) * router.dim_key
        activations = tokens * dim * itemsize
        return cls(
            experts=experts,
            parts=parts,
            row=parts * dim * table.dtype.itemsize,
            router=sum(each.numel() * each.dtype.itemsize for each in router.parameters()),
            tokens=tokens,
            per_token=heads * k,
            distinct=-layer.num_experts * math.expm1(missed),
            # The input; queries before and after their normalisation; ids, scores and weights; and
            # the pre-activations.
            kept=activations
            + (1 if router.query_norm is None else 2) * queries * itemsize
            + pairs * (8 + 4 + 4 + 4 * (parts - 1)),
            activations=activations,
            router_flops=projection + sub_scores,
            router_step_flops=3 * projection + sub_scores,
        )

    @property
    def forward_bytes(self) -> int:
        return self.router + 2 * self.activations + self.tokens * self.per_token * self.row

    def train(self, gradients: str, state: Sequence[int], moved_state: int) -> tuple[int, int]:
        """Bytes that a step moves, and memory to train.

        Args:
            gradients: "sparse", "dense" or "fused".
            state: optimizer state, as in `_OPTIMIZERS`.
            moved_state: rows of state that are moved for each row that is updated.
        """
        is_dense = gradients == "dense"
        gradient = {"sparse": self.distinct, "dense": self.experts, "fused": 0}[gradients]
        updated = self.experts if is_dense else self.distinct
        # A stored gradient is written once and read once, and the update reads and writes the
        # parameters. A fused update writes what the backward pass has read.
        own = 1 if gradients == "fused" else 2
        rows = self.tokens * self.per_token + 2 * gradient + (own + moved_state) * updated
        moved = self.forward_bytes + 2 * self.router + 2 * self.activations + round(rows * self.row)
        of_tables, of_parts, of_experts = state
        table = self.experts * self.row
        memory = table + round(gradient * self.row) + of_tables * table
        memory += 4 * self.experts * (of_parts * self.parts + of_experts)
        memory += 4 * self.router + self.kept + self.activations
        return moved, memory


def format_estimates(estimates: Mapping[str, Estimate]) -> str:
    """A table with one column for each estimate.

    Args:
        estimates: the estimates by the names of their columns.
    """
    columns = list(estimates.values())
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: Sequence[str]) -> None:
        rows.append((name, list(values)))

    if any(estimates):
        add("", list(estimates))
    add("parameters", [_count(each.parameters) for each in columns])
    add("active parameters per token", [_count(each.active_parameters) for each in columns])
    add("forward FLOPs per token", [_count(each.flops_per_token) for each in columns])
    add("bytes of experts read per token", [_bytes(each.bytes_per_token) for each in columns])
    add("tokens per step", [f"{each.tokens:,}" for each in columns])
    add("experts that a step retrieves", [f"{each.distinct_experts:,}" for each in columns])
    add("memory to train", ["" for _ in columns])
    for name in columns[0].memory:
        add(f"  {name}", [_bytes(each.memory[name]) for each in columns])
    add("bytes moved per step", ["" for _ in columns])
    for name in columns[0].bytes_per_step:
        add(f"  {name}", [_bytes(each.bytes_per_step[name]) for each in columns])
    if columns[0].seconds_per_step:
        add("forward pass", [_seconds(each.seconds_per_forward or 0.0) for each in columns])
        add("training step", ["" for _ in columns])
        for name in columns[0].seconds_per_step:
            add(f"  {name}", [_seconds(each.seconds_per_step[name]) for each in columns])
    head = max(len(name) for name, _ in rows)
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            [name.ljust(head), *(v.rjust(w) for v, w in zip(values, widths, strict=True))]
        ).rstrip()
        for name, values in rows
    )


def _count(number: int) -> str:
    return _scaled(number, 1000, ("", " k", " M", " G", " T"))


def _bytes(number: int) -> str:
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < base:
            return f"{number:.3g}{unit}" if number < 100 else f"{number:.0f}{unit}"
        number /= base
    return f"{number:.3g}{units[-1]}" if number < 100 else f"{number:.0f}{units[-1]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
