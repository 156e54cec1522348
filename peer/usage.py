"""Expert usage and unevenness."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer._evaluate import padding_mask, run_batches
from peer._tracing import is_exporting
from peer.modules import PEER, ExpertPool, ProductKeyRouter
from peer.modules.masks import Experts, as_ids

__all__ = ["LayerUsage", "UsageTracker", "count_usage"]


class LayerUsage:
    r"""How often a layer retrieved each of its experts, and with what weights.

    :math:`z'_e = \sum_x g_e(x)` is the sum of the router weights of expert e over all tokens x that
    are not padding. An expert that x did not retrieve has :math:`g_e(x) = 0`.

    Attributes:
        mass: (N,) float64, the sums :math:`z'`.
        counts: (N,) int64, the number of retrievals of each expert.
        chosen: (E,) int64, ascending, the experts whose co-activation is counted.
        together: (E, E) int64. Entry (i, j) is the number of tokens that retrieved both the i-th
            and the j-th chosen expert, with any heads.
    """

    def __init__(self, num_experts: int, chosen: Experts, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.mass = torch.zeros(num_experts, dtype=torch.float64, device=device)
            self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
            self.chosen = as_ids(chosen, num_experts, device)
            size = len(self.chosen)
            self.together = torch.zeros(size, size, dtype=torch.int64, device=device)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.counts)

    def usage(self) -> float:
        """The fraction of experts with a nonzero sum of weights, in [0, 1]."""
        return float(_usage(self.mass))

    def unevenness(self) -> float:
        """KL(z || uniform) in nats, in [0, log N]. NaN if no expert was used."""
        return float(_unevenness(self.mass))

    def dead(self, at_most: int = 0) -> Tensor:
        """The ids of the experts that were retrieved at most a number of times, ascending."""
        return (self.counts <= at_most).nonzero()[:, 0]

    def as_dict(self) -> dict[str, float]:
        """The measures as numbers, under the names of `UsageTracker.as_dict`."""
        return _as_numbers(self._measures())

    def observe(
        self, num_experts: int, weights: Tensor, indices: Tensor, padding_mask: Tensor | None
    ) -> None:
        """Adds a forward pass of the router."""
        if torch.jit.is_tracing() or is_exporting():  # type: ignore[attr-defined]
            return
        self._fit(num_experts, indices.device)
        # In a compiled function, an operator keeps the question open until the function runs,
        # whether this is a recomputation.
        add = torch.ops.peer_usage.add_ if torch.compiler.is_compiling() else _add
        add(
            self.mass,
            self.counts,
            self.chosen,
            self.together,
            weights.detach(),
            indices,
            padding_mask,
        )

    def _fit(self, num_experts: int, device: torch.device) -> None:
        """Grows with the layer and follows it to another device."""
        added = num_experts - len(self.counts)
        if added > 0:
            with torch.inference_mode(False):
                self.mass = F.pad(self.mass, (0, added))
                self.counts = F.pad(self.counts, (0, added))
        if device != self.counts.device:
            with torch.inference_mode(False):
                self.mass, self.counts = self.mass.to(device), self.counts.to(device)
                self.chosen, self.together = self.chosen.to(device), self.together.to(device)

    def _measures(self) -> Tensor:
        """The numbers of `as_dict`, (5,) float64, on the device."""
        return torch.stack(
            [
                torch.full_like(self.mass[0], len(self.mass)),
                self.counts.sum().double(),
                _usage(self.mass),
                _unevenness(self.mass),
                (self.counts == 0).sum().double(),
            ]
        )

    def _reduced(self, group: Any) -> LayerUsage:
        """The sums over the processes of a group."""
        total = copy.copy(self)
        for name in ("mass", "counts", "together"):
            value = getattr(self, name).clone()
            torch.distributed.all_reduce(value, group=group)
            setattr(total, name, value)
        return total

    def _reset(self) -> None:
        for total in (self.mass, self.counts, self.together):
            total.zero_()


class UsageTracker:
    r"""Accumulates the router weight of each expert while data passes through a model.

    The tracker observes the routers of the layers. It sums the router weights of expert e over all
    tokens x that are not padding: :math:`z'_e = \sum_x g_e(x)`. An expert that x did not retrieve
    has :math:`g_e(x) = 0`. With :math:`z = z' / \lVert z' \rVert_1`,

    * usage is the fraction of experts with :math:`z_e \ne 0`;
    * unevenness is :math:`\mathrm{KL}(z \,\|\, \mathrm{uniform}) = \log N + \sum_e z_e \log z_e`
      in nats: 0 if all experts are used equally, log N if only one is used.

    The weights are those before dropout. Retrievals with a weight that is not finite do not count,
    and neither does what a backward pass computes again for an activation checkpoint. The sums stay
    on the device of the layers, and the forward pass never waits for them. If a layer grows, they
    grow in its next call. Nothing is stored in the model: its copies, files, scripts and exports
    are not tracked. As a context manager, the tracker stops at the end of the block.

    Args:
        layers: one model with `PEER` layers or routers, each of which is tracked by itself. Or
            `PEER` layers or routers with the same number of experts, or `PEER` layers that share a
            pool, over all of which `mass` and `counts` are summed.
        coactivation: experts, by ids or a mask, of which the tracker counts how often a token
            retrieves two of them, or a mapping of such experts by the name of the layer. Its memory
            grows with the square of their number.

    Attributes:
        layers: the `LayerUsage` of each layer, by its name in `model.named_modules()`. A router
            that several layers share has the name of the first. Layers that are given one by one
            have the names "0", "1" and so on; a single one has the name "".

    Raises:
        TypeError: an argument is not a layer or a router, or the model has none; scripted modules
            are not.
        ValueError: there is no layer, layers of different pools that are given one by one have
            different numbers of experts, or `coactivation` does not name a layer.
        IndexError: an id in `coactivation` is outside [0, N).

    Source: arXiv 2407.04153, table 2.

    Example:
        >>> import math, torch, peer
        >>> options = dict(num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> layer = peer.PEER(8, **options)
        >>> with peer.UsageTracker(layer) as tracker:
        ...     _ = layer(torch.randn(100, 8))
        >>> int(tracker.counts.sum()), tracker.unevenness() < math.log(16)
        (800, True)
        >>> model = torch.nn.Sequential(layer, peer.PEER(8, **options))
        >>> with peer.UsageTracker(model, coactivation={"1": [3, 7]}) as tracker:
        ...     for step in range(3):
        ...         _ = model(torch.randn(50, 8))
        ...         tracker.snapshot(step)
        >>> [(row["step"], row["1/retrievals"]) for row in tracker.history]
        [(0, 400), (1, 400), (2, 400)]
    """

    layers: dict[str, LayerUsage]

    def __init__(
        self,
        *layers: nn.Module,
        coactivation: Experts | Mapping[str, Experts] = (),
    ) -> None:
        routers = _find_routers(layers)
        if not isinstance(coactivation, Mapping):
            if torch.as_tensor(coactivation).numel() > 0 and len(routers) > 1:
                raise ValueError(
                    f"expected coactivation as a mapping from the names of layers to ids, since "
                    f"there are several layers: {sorted(routers)}"
                )
            coactivation = dict.fromkeys(routers, coactivation)
        if unknown := coactivation.keys() - routers.keys():
            raise ValueError(
                f"coactivation names {sorted(unknown)}, but the layers are {sorted(routers)}"
            )
        self._routers = routers
        self._has_total = _have_total(layers)
        self._history: list[tuple[float | None, dict[str, Tensor]]] = []
        self.layers = {
            name: LayerUsage(router.num_experts, coactivation.get(name, ()), router.row_keys.device)
            for name, router in routers.items()
        }
        self._removals = [
            router.add_observer(self.layers[name]) for name, router in routers.items()
        ]

    @property
    def mass(self) -> Tensor:
        """(N,) float64, the sums :math:`z'` over all layers.

        N is the largest number of experts of a layer. A model with several pools has no such sums:
        ValueError.
        """
        return self._total("mass")

    @property
    def counts(self) -> Tensor:
        """(N,) int64, the number of retrievals of each expert, over all layers as `mass`."""
        return self._total("counts")

    def _total(self, name: str) -> Tensor:
        if not self._has_total:
            raise ValueError(
                f"the layers have pools of their own; read tracker.layers[name].{name}, with a "
                f"name of {list(self.layers)}"
            )
        totals = [getattr(usage, name) for usage in self.layers.values()]
        if len(totals) == 1:
            return totals[0]
        size = max(map(len, totals))
        return torch.stack(
            [F.pad(total, (0, size - len(total))).to(totals[0].device) for total in totals]
        ).sum(0)

    def usage(self) -> float:
        """The fraction of experts with a nonzero sum of weights, in [0, 1], over all layers."""
        return float(_usage(self.mass))

    def unevenness(self) -> float:
        """KL(z || uniform) in nats, in [0, log N], over all layers. NaN if no expert was used."""
        return float(_unevenness(self.mass))

    def as_dict(self) -> dict[str, float]:
        """The measures of all layers since the last reset, for a logger.

        Returns:
            For each layer, under "name/measure": "experts" (N), "retrievals", "usage",
            "unevenness", and "dead", the number of experts without a retrieval.
        """
        return _flatten({name: usage._measures() for name, usage in self.layers.items()})

    def snapshot(
        self,
        step: float | None = None,
        *,
        reset: bool = True,
        reduce: bool = False,
        group: Any = None,
    ) -> None:
        """Adds the measures since the last reset to `history`, and resets.

        It waits for no device: `history` does when it is read.

        Args:
            step: what the entry is called, such as the step of training.
            reset: whether the next entry begins here. Otherwise it continues.
            reduce: whether the measures are those of all processes together. Every process of the
                group must call then.
            group: the group of processes for `reduce`, by default all.
        """
        layers = self.all_reduce(group) if reduce else self.layers
        self._history.append((step, {name: usage._measures() for name, usage in layers.items()}))
        if reset:
            self.reset()

    @property
    def history(self) -> list[dict[str, float | None]]:
        """The entries of `snapshot`, each with "step" and the names of `as_dict`."""
        return [{"step": step, **_flatten(values)} for step, values in self._history]

    def all_reduce(self, group: Any = None) -> dict[str, LayerUsage]:
        """Adds the sums of several processes.

        Every process of the group must call, with the same layers at the same sizes. The tracker
        does not change, and so can be reduced again.

        Args:
            group: the group of processes, by default all.

        Returns:
            The `LayerUsage` of each layer over all processes.
        """
        for name, router in self._routers.items():
            self.layers[name]._fit(router.num_experts, self.layers[name].counts.device)
        return {name: usage._reduced(group) for name, usage in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums and the history. The model's state has nothing of the tracker."""
        return {
            "layers": {
                name: {part: getattr(usage, part).clone() for part in _PARTS}
                for name, usage in self.layers.items()
            },
            "history": [
                {"step": step, "values": {name: value.clone() for name, value in values.items()}}
                for step, values in self._history
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from a state.

        Args:
            state_dict: what `state_dict` of a tracker of the same layers returned. The layers may
                have grown since.

        Raises:
            ValueError: the state is of other layers, of larger ones, or of another choice of
                experts for co-activation. Nothing is changed.
        """
        saved = state_dict["layers"]
        if saved.keys() != self.layers.keys():
            raise ValueError(
                f"expected the state of the layers {list(self.layers)}, got {list(saved)}"
            )
        for name, usage in self.layers.items():
            size = max(usage.num_experts, getattr(self._routers.get(name), "num_experts", 0))
            if len(saved[name]["counts"]) > size:
                raise ValueError(
                    f"expected a state of at most {size} experts of the layer {name!r}, got "
                    f"{len(saved[name]['counts'])}; call peer.grow_to_ on the model first"
                )
            if saved[name]["chosen"].tolist() != usage.chosen.tolist():
                raise ValueError(
                    f"expected the co-activation of the experts {usage.chosen.tolist()} of the "
                    f"layer {name!r}, got {saved[name]['chosen'].tolist()}"
                )
        with torch.inference_mode(False):
            for name, usage in self.layers.items():
                device, size = usage.counts.device, usage.num_experts
                for part in _PARTS:
                    setattr(usage, part, saved[name][part].detach().to(device, copy=True))
                usage._fit(size, device)
            self._history = [
                (row["step"], {name: value.clone() for name, value in row["values"].items()})
                for row in state_dict["history"]
            ]

    def reset(self) -> None:
        """Sets the sums to zero. `history` keeps its entries."""
        for usage in self.layers.values():
            usage._reset()

    def remove(self) -> None:
        """Stops. The sums and the history keep their values."""
        for remove in self._removals:
            remove()
        self._removals = []
        self._routers = {}

    def __enter__(self) -> UsageTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> Any:
        raise TypeError(
            "a UsageTracker belongs to the layers that it observes, so it cannot be copied or "
            "pickled; save tracker.state_dict()"
        )


_PARTS = ("mass", "counts", "chosen", "together")
_MEASURES = ("experts", "retrievals", "usage", "unevenness", "dead")


def _usage(mass: Tensor) -> Tensor:
    return (mass != 0).double().mean()


def _unevenness(mass: Tensor) -> Tensor:
    z = mass / mass.sum()
    divergence = math.log(len(z)) + torch.special.xlogy(z, z).sum()
    return divergence.clamp(min=0.0)  # rounding may give a negative sum


def _as_numbers(measures: Tensor) -> dict[str, float]:
    experts, retrievals, usage, unevenness, dead = measures.tolist()
    return {
        "experts": int(experts),
        "retrievals": int(retrievals),
        "usage": usage,
        "unevenness": unevenness,
        "dead": int(dead),
    }


def _flatten(measures: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        f"{name}/{measure}" if name else measure: value
        for name, values in measures.items()
        for measure, value in _as_numbers(values).items()
    }


def _find_routers(layers: Sequence[nn.Module]) -> dict[str, ProductKeyRouter]:
    """The routers to observe, by the names of their layers."""
    if not layers:
        raise ValueError("expected at least one layer")
    if len(layers) == 1 and not isinstance(layers[0], (PEER, ProductKeyRouter)):
        routers = dict(_named_routers(layers[0]))
        if not routers:
            raise TypeError(
                f"expected a model with PEER layers or ProductKeyRouters, got "
                f"{type(layers[0]).__name__}"
            )
        return routers
    given: list[ProductKeyRouter] = []
    for layer in layers:
        router = layer.router if isinstance(layer, PEER) else layer
        if not isinstance(router, ProductKeyRouter):
            raise TypeError(
                f"expected PEER layers or ProductKeyRouters, got {type(router).__name__}"
            )
        given.append(router)
    if not _have_total(layers):
        sizes = sorted({router.num_experts for router in given})
        raise ValueError(
            f"expected layers that share a pool or have the same number of experts, got {sizes}"
        )
    distinct = list(dict.fromkeys(given))
    return {"" if len(distinct) == 1 else str(i): router for i, router in enumerate(distinct)}


def _named_routers(model: Any) -> Iterator[tuple[str, ProductKeyRouter]]:
    """The routers of a model, each once, with the name of the first layer or its own."""
    seen = set()
    for name, module in model.named_modules():
        router = module.router if isinstance(module, PEER) else module
        if isinstance(router, ProductKeyRouter) and router not in seen:
            seen.add(router)
            yield name, router


def _have_total(layers: Sequence[nn.Module]) -> bool:
    """Whether the experts of all layers can be added: those of one pool, or as many of each."""
    if len(layers) == 1 and not isinstance(layers[0], (PEER, ProductKeyRouter)):
        found = [part for part in layers[0].modules() if isinstance(part, PEER)]
        owned = {layer.router for layer in found}
        bare = sum(router not in owned for _, router in _named_routers(layers[0]))
        pools = {layer.experts for layer in found}
        return len(pools) + bare == 1
    parts = [layer for layer in layers if isinstance(layer, PEER)]
    if len(parts) == len(layers) and len({layer.experts for layer in parts}) == 1:
        return True
    sizes = {layer.num_experts for layer in layers if isinstance(layer, (PEER, ProductKeyRouter))}
    return len(sizes) == 1


def count_usage(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Counts how often each expert is retrieved while data passes through a model.

    The model runs in evaluation mode and without gradients, and every module's mode is restored.
    A retrieval counts whatever its router weight is, if that is finite. Tokens that the
    `padding_mask` of a `PEER` layer marks do not count. Layers that share a pool add to the same
    counts.

    Args:
        model: a model with at least one `ExpertPool`, as in `PEER` layers. Compiled parts run
            eagerly.
        batches: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list
            of positional arguments, or any other object as the only argument.

    Returns:
        For each pool, by its name in `model.named_modules()`, the number of retrievals of each
        expert, (N,), int64, on the device of the table.

    Raises:
        ValueError: the model has no pool; scripted pools are not found.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> counts = peer.count_usage(layer, [torch.randn(100, 8), torch.randn(5, 20, 8)])
        >>> {name: int(count.sum()) for name, count in counts.items()}
        {'experts': 1600}
    """
    pools = {
        name: module for name, module in model.named_modules() if isinstance(module, ExpertPool)
    }
    if not pools:
        raise ValueError("expected a model with an ExpertPool, such as that of a PEER layer")
    with torch.inference_mode(False):
        counts = {
            name: torch.zeros(pool.num_experts, dtype=torch.int64, device=pool.weight.device)
            for name, pool in pools.items()
        }
    # A pool does not see the mask. So the layer notes its mask before the call, and drops it after.
    masks: dict[nn.Module, Tensor | None] = {}  # of the layers that are being called, in order

    def note_mask(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        masks[layer] = padding_mask(arguments, keywords)

    def drop_mask(layer: nn.Module, *_: object) -> None:
        masks.pop(layer, None)

    def count_in(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            weights = arguments[1] if len(arguments) > 1 else keywords["weights"]
            indices = arguments[2] if len(arguments) > 2 else keywords["indices"]
            mask = next(reversed(masks.values()), None)
            counts[name] = _add_uses(counts[name], indices, is_counted(weights, mask))

        return hook

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PEER):
                for handle in (
                    module.register_forward_pre_hook(note_mask, with_kwargs=True),
                    module.register_forward_hook(drop_mask, always_call=True),
                ):
                    stack.callback(handle.remove)
        for name, pool in pools.items():
            handle = pool.register_forward_pre_hook(count_in(name), with_kwargs=True)
            stack.callback(handle.remove)
        run_batches(model, batches)
    return counts


def is_counted(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Which retrievals count: those of tokens that are not padding, with finite weights.

    Args:
        weights: (..., H, K) or (..., P).
        mask: (...) bool, True for padding, or None.

    Returns:
        The shape of the weights, bool.
    """
    is_finite = weights.isfinite()
    if mask is None:
        return is_finite
    trailing = (1,) * (weights.dim() - mask.dim())
    return is_finite & ~mask.reshape(*mask.shape, *trailing)


def _add_uses(total: Tensor, indices: Tensor, uses: Tensor) -> Tensor:
    """Adds the uses of experts.

    Args:
        total: (N,), changed in place if it is on the device of the indices.
        indices: (..., H, K) or (..., P).
        uses: what each retrieval adds, in the shape of the indices.

    Returns:
        The total on the device of the indices.
    """
    total = total.to(indices.device)
    return total.index_add_(0, indices.flatten(), uses.flatten().to(total.dtype))


@torch.no_grad()
def _add(
    mass: Tensor,
    counts: Tensor,
    chosen: Tensor,
    together: Tensor,
    weights: Tensor,
    indices: Tensor,
    padding_mask: Tensor | None,
) -> None:
    """Adds a forward pass to the sums of a layer, in place, unless a backward pass repeats it."""
    if torch._C._current_graph_task_id() != -1:
        return  # an activation checkpoint computes again what has been counted
    counted = is_counted(weights, padding_mask)
    _add_uses(mass, indices, torch.where(counted, weights, 0))
    _add_uses(counts, indices, counted)
    if len(chosen) > 0:
        # Each token has a row of zeros and ones: which of the chosen experts it retrieved. The last
        # column takes all other retrievals.
        ids = indices.flatten(-2).flatten(0, -2)
        slots = find_slots(chosen, ids)
        slots = torch.where(counted.view_as(slots), slots, len(chosen))
        retrieved = weights.new_zeros(len(ids), len(chosen) + 1, dtype=torch.float32)
        retrieved = retrieved.scatter_(1, slots, 1.0)[:, :-1]
        together += (retrieved.T @ retrieved).round().long()


def find_slots(chosen: Tensor, indices: Tensor) -> Tensor:
    """The position of each id in an ascending list of ids, or the length of the list if it has not.

    It needs no memory in the number of experts.

    Args:
        chosen: (E,) int64, ascending, E > 0.
        indices: ids of any shape.

    Returns:
        The shape of the indices, int64, in [0, E].
    """
    slots = torch.searchsorted(chosen, indices)
    is_chosen = chosen[slots.clamp(max=len(chosen) - 1)] == indices
    return torch.where(is_chosen, slots, len(chosen))


_operators = torch.library.Library("peer_usage", "DEF")  # its end would remove the operator
_operators.define(
    "add_(Tensor(a!) mass, Tensor(b!) counts, Tensor chosen, Tensor(c!) together, Tensor weights, "
    "Tensor indices, Tensor? padding_mask) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operators.impl("add_", _add, "CompositeExplicitAutograd")
torch.library.register_fake("peer_usage::add_", lambda *arguments: None, lib=_operators)
