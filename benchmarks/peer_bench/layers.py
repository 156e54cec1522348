"""The layers that are compared, on shared parameters.

Each maps x (T, D), and optionally ids (T, H, K) that replace those it retrieves, to its output and
the ids that its router chose; the router runs in full either way. `exact_queries` says in float64
what its router computes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peer
from peer.bench.shared import Router, Shared
from peer.bench.spellings import Experts, retrieve
from peer.modules import BatchQueryNorm

__all__ = ["DenseLayer", "Layer", "OurLayer", "PlainLayer", "PublishedLayer"]


class Layer(nn.Module):
    """What the check needs to know of a layer."""

    shared: Shared
    row_keys: Tensor  # (R, dim_key / 2), or (H, R, dim_key / 2)
    col_keys: Tensor

    def exact_queries(self, x: Tensor) -> Tensor:
        """Queries (T, H, 2, dim_key / 2) of float64 inputs."""
        raise NotImplementedError


class NormedLayer(Layer):
    """A layer with the shared router's parameters, linear and then batch normalisation."""

    def __init__(self, shared: Shared, router: Router) -> None:
        super().__init__()
        self.shared = shared
        self.parameters_of_router = router
        self.norm = BatchQueryNorm(
            len(router.norm_weight), device=shared.device, dtype=shared.dtype
        )
        self.norm.weight, self.norm.bias = router.norm_weight, router.norm_bias
        self.row_keys, self.col_keys = router.row_keys, router.col_keys

    def exact_queries(self, x: Tensor) -> Tensor:
        """Linear, batch normalisation, heads."""
        case, norm = self.shared.case, self.norm
        query = x @ self.parameters_of_router.query_weight.detach().double().T
        if self.training:
            mean, variance = query.mean(0), query.var(0, unbiased=False)
        else:
            mean, variance = _double(norm.running_mean), _double(norm.running_var)
        query = (query - mean) * (variance + norm.eps).rsqrt()
        query = query * norm.weight.detach().double() + norm.bias.detach().double()
        return query.unflatten(-1, (case.heads, 2, case.dim_key // 2))


def _double(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.double()


class OurLayer(NormedLayer):
    """`peer.PEER`."""

    def __init__(self, shared: Shared, router: Router, *, sparse_grad: bool) -> None:
        super().__init__(shared, router)
        case = shared.case
        layer = peer.PEER(
            case.dim,
            num_experts=(case.root, case.root),
            heads=case.heads,
            num_experts_per_head=case.k,
            dim_key=case.dim_key,
            sparse_grad=sparse_grad,
            device="meta",
            dtype=shared.dtype,
        )
        layer.experts.weight = shared.weight
        layer.router.query.weight = router.query_weight
        layer.router.norm = self.norm
        layer.router.row_keys, layer.router.col_keys = router.row_keys, router.col_keys
        self.peer = layer
        self._ids: Tensor | None = None
        self._chosen: Tensor | None = None

    def _replace(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> Any:
        self._chosen = output[1]
        return None if self._ids is None else (output[0], self._ids)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer. The hook is there for this call alone; `peer` is what users have."""
        self._ids = ids
        with self.peer.router.register_forward_hook(self._replace):
            out = self.peer(x)
        chosen, self._chosen = self._chosen, None
        return out, cast(Tensor, chosen)


class PlainLayer(NormedLayer):
    """The same layer in plain PyTorch, with one of the spellings of its experts."""

    def __init__(
        self, shared: Shared, router: Router, experts: Experts, table: nn.Parameter
    ) -> None:
        super().__init__(shared, router)
        self.query_weight = router.query_weight
        self.table = table
        self.heads, self.dim_key, self.k = shared.case.heads, shared.case.dim_key, shared.case.k
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer."""
        query = self.norm(F.linear(x, self.query_weight)).view(-1, self.heads, self.dim_key)
        scores, chosen = retrieve(query, self.row_keys, self.col_keys, self.k)
        weights = scores.softmax(-1).flatten(-2)
        used = (chosen if ids is None else ids).flatten(-2)
        return self.experts(x, weights, used, self.table), chosen


class PublishedLayer(Layer):
    """`PEER_pytorch.PEER` with competing scores.

    Its queries are not normalised, it orders their features (half, head, feature), and every head
    has keys of its own, here copies of the shared ones.
    """

    def __init__(self, shared: Shared, router: Router) -> None:
        super().__init__()
        from PEER_pytorch import PEER as PublishedPEER

        case = shared.case
        self.shared = shared
        self.query_weight = router.query_weight
        with torch.device("meta"):
            layer = PublishedPEER(
                case.dim,
                heads=case.heads,
                num_experts=case.num_experts,
                num_experts_per_head=case.k,
                dim_key=case.dim_key // 2,
                non_competing_scores=False,
            )
        layer.weight_down_embed.weight, layer.weight_up_embed.weight = shared.w_down, shared.w_up
        layer.to_queries[0].weight = router.query_weight
        keys = torch.stack([router.row_keys.detach(), router.col_keys.detach()], dim=1)
        layer.keys = nn.Parameter(keys.expand(case.heads, -1, -1, -1).contiguous())
        self.layer = layer
        self.row_keys, self.col_keys = layer.keys.detach().unbind(2)
        self._ids: Tensor | None = None
        self._chosen: Tensor | None = None
        for table in (layer.weight_down_embed, layer.weight_up_embed):
            table.register_forward_pre_hook(self._replace)

    def _replace(self, _: nn.Module, arguments: tuple[Tensor]) -> Any:
        self._chosen = arguments[0][0]
        return None if self._ids is None else (self._ids.unsqueeze(0),)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Applies the layer."""
        self._ids = ids
        out = self.layer(x.unsqueeze(0)).squeeze(0)
        chosen, self._chosen = self._chosen, None
        return out, cast(Tensor, chosen)

    def exact_queries(self, x: Tensor) -> Tensor:
        """Linear, then (half, head, feature)."""
        case = self.shared.case
        query = x @ self.query_weight.detach().double().T
        return query.unflatten(-1, (2, case.heads, case.dim_key // 2)).transpose(1, 2)


class DenseLayer(nn.Module):
    """The feed-forward layer that is replaced: linear, GELU, linear."""

    def __init__(self, shared: Shared, hidden: int) -> None:
        super().__init__()
        dim = shared.case.dim
        self.up = nn.Linear(dim, hidden, device=shared.device, dtype=shared.dtype)
        self.down = nn.Linear(hidden, dim, device=shared.device, dtype=shared.dtype)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, None]:
        """Applies the layer; it retrieves nothing."""
        return self.down(F.gelu(self.up(x))), None
