"""Layers of other packages as layers of peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peer.memory import empty_huge
from peer.modules import PEER

__all__ = ["from_peer_pytorch"]


class _Options(NamedTuple):
    """What a layer of PEER-pytorch does that its tensors do not tell, in our words."""

    activation: str
    scores: str
    num_experts_per_head: int
    product_key_topk: int
    dropout: float


# What PEER-pytorch assumes where nothing is said.
_DEFAULTS: dict[str, Any] = {
    "num_experts_per_head": 16,
    "activation": "gelu",
    "product_key_topk": None,
    "non_competing_scores": True,
    "dropout": 0.0,
}

_NAMES = ("weight_down_embed.weight", "weight_up_embed.weight", "to_queries.0.weight", "keys")
_NORM = "norm.gamma"


@torch.no_grad()
def from_peer_pytorch(
    source: nn.Module | Mapping[str, Tensor],
    *,
    prefix: str = "",
    num_experts_per_head: int | None = None,
    activation: str | None = None,
    product_key_topk: int | None = None,
    non_competing_scores: bool | None = None,
    dropout: float | None = None,
    sparse_grad: bool = False,
) -> PEER | nn.Sequential:
    r"""A layer that computes what a layer of the package PEER-pytorch computes.

    **Its default retrieves one expert per head.** `PEER_pytorch.PEER(dim)` has
    `non_competing_scores=True`, and with that the layer ignores `num_experts_per_head`: each head
    takes the one expert with the highest score s and weighs it by :math:`\max(s, 0)`. The result is
    therefore a layer with `num_experts_per_head=1, scores="relu"`, eight experts per token by
    default and not 8 · 16. Only a layer that was made with `non_competing_scores=False` has
    `num_experts_per_head` experts per head under a softmax, as in the paper.

    The result has `query_norm=None`, `share_keys=False`, and a `dim_key` of twice theirs, because
    they count the width of a half. Outputs and gradients are equal up to rounding, dropout under
    the same seed included. In 16-bit dtypes the choice of experts can differ where scores almost
    tie: they rank scores that are rounded to 16 bits, we do not.

    Args:
        source: a `PEER_pytorch.PEER`, or a `PEER_pytorch.ChunkedPEER` around one, whose chunks are
            a matter of memory and are dropped. Or the state of a `PEER_pytorch.PEER`; the other
            options say then what the state does not.
        prefix: of the layer's names in a state that holds more, "peer." for a `ChunkedPEER`.
        num_experts_per_head: that of the layer, 16 unless given. Without effect there, and so
            here, if scores do not compete, except that `product_key_topk` follows it.
        activation: of the experts, "gelu" unless given, by its name in `peer.PEER`.
        product_key_topk: the layer's candidates from each half of the keys, `num_experts_per_head`
            unless given.
        non_competing_scores: True unless given.
        dropout: 0 unless given.
        sparse_grad: whether the table of the result gets a sparse gradient, see `peer.ExpertPool`.

    Returns:
        A `peer.PEER` with tensors of its own, in the dtypes and on the devices of the source. If
        the source has `pre_rmsnorm`, that norm feeds the experts, too, so it stands before the
        layer: `torch.nn.Sequential(torch.nn.RMSNorm, peer.PEER)`, the weight being their gamma + 1.
        From a module it also takes over the training mode and which parameters require gradients;
        the table does if one of theirs did. What a state lacks is assumed: training mode, all
        parameters trained.

    Raises:
        ValueError: the layer computes what no `peer.PEER` does: it keeps so few candidates that it
            can miss the best experts (`product_key_topk` smaller than the number of experts per
            head and than the number of keys), it has tables per head, a softmax over one expert,
            or an unknown activation; or the state is not that of a `PEER_pytorch.PEER`.
        TypeError: the source is of another class or has methods of its own, or options are given
            beside a module.

    Example:
        >>> import torch, peer
        >>> state = {
        ...     "weight_down_embed.weight": torch.randn(16, 6),
        ...     "weight_up_embed.weight": torch.randn(16, 6),
        ...     "to_queries.0.weight": torch.randn(2 * 3 * 5, 6),
        ...     "keys": torch.randn(3, 4, 2, 5),
        ... }
        >>> layer = peer.convert.from_peer_pytorch(
        ...     state, num_experts_per_head=2, non_competing_scores=False
        ... )
        >>> layer.router.heads, layer.router.dim_key, layer.num_experts
        (3, 10, 16)
    """
    given = {
        "num_experts_per_head": num_experts_per_head,
        "activation": activation,
        "product_key_topk": product_key_topk,
        "non_competing_scores": non_competing_scores,
        "dropout": dropout,
    }
    given = {name: value for name, value in given.items() if value is not None}
    trained: Mapping[str, bool] = {}
    training = True
    if isinstance(source, nn.Module):
        if given or prefix:
            raise TypeError(
                f"from_peer_pytorch: a module tells its options itself, got "
                f"{', '.join([*given, *(['prefix'] if prefix else [])])}"
            )
        module = _unwrap(source)
        options = _options_of(module)
        training = module.training
        trained = {name: each.requires_grad for name, each in module.named_parameters()}
        state: Mapping[str, Any] = module.state_dict()
        source = state
    else:
        options = _options_from({**_DEFAULTS, **given})
        state = {
            name[len(prefix) :]: value
            for name, value in source.items()
            if isinstance(name, str) and name.startswith(prefix)
        }
    _check_names(state, prefix, source)
    _check_tensors(state)
    return _convert(state, options, sparse_grad, trained).train(training)


def _unwrap(module: Any) -> nn.Module:
    """The `PEER_pytorch.PEER` in a module that is one or chunks one."""
    try:
        import PEER_pytorch
    except ImportError:
        raise TypeError(
            f"from_peer_pytorch: expected a PEER_pytorch.PEER or its state_dict, got "
            f"{type(module).__name__}, and PEER-pytorch is not installed; give a copied layer's "
            f"state_dict()"
        ) from None
    if _is_a(module, PEER_pytorch.ChunkedPEER):
        module = module.peer
    if not _is_a(module, PEER_pytorch.PEER):
        raise TypeError(
            f"from_peer_pytorch: expected a PEER_pytorch.PEER, or a ChunkedPEER around one, got "
            f"{type(module).__module__}.{type(module).__qualname__}, which computes something else"
        )
    unwrapped: nn.Module = module
    return unwrapped


def _is_a(module: Any, kind: Any) -> bool:
    # A subclass that computes something else, or an instance that was patched, is not one.
    return isinstance(module, kind) and getattr(module.forward, "__func__", None) is kind.forward


def _options_of(module: Any) -> _Options:
    names: dict[Any, str] = {nn.ReLU: "relu", nn.Softmax: "softmax"}
    scores = names.get(type(module.score_activation))
    if scores is None:
        raise ValueError(
            f"from_peer_pytorch: expected scores under ReLU or Softmax, got "
            f"{module.score_activation}"
        )
    return _Options(
        activation=_name_of(module.activation),
        scores=scores,
        num_experts_per_head=int(module.num_experts_per_head_topk),
        product_key_topk=int(module.product_key_topk),
        dropout=float(module.dropout.p),
    )


def _name_of(activation: Any) -> str:
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names: dict[Any, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
    if kind not in names:
        raise ValueError(
            f"from_peer_pytorch: expected activation to be torch.nn's GELU, ReLU, SiLU or "
            f"Identity, got {activation}"
        )
    return names[kind]


def _options_from(given: Mapping[str, Any]) -> _Options:
    per_head = given["num_experts_per_head"]
    candidates = given["product_key_topk"]
    alone = given["non_competing_scores"]
    return _Options(
        activation=given["activation"],
        scores="relu" if alone else "softmax",
        num_experts_per_head=1 if alone else per_head,
        product_key_topk=per_head if candidates is None else candidates,
        dropout=given["dropout"],
    )


def _check_names(state: Mapping[str, Any], prefix: str, whole: Mapping[str, Any]) -> None:
    missing = [name for name in _NAMES if name not in state]
    unexpected = [name for name in state if name not in (*_NAMES, _NORM)]
    if not missing and not unexpected:
        return
    where = f" under the prefix {prefix!r}" if prefix else ""
    text = f"from_peer_pytorch: expected the state of a PEER_pytorch.PEER{where}"
    if missing:
        text += f"; missing: {', '.join(missing)}"
    if unexpected:
        text += f"; unexpected: {', '.join(map(repr, unexpected[:4]))}"
        if len(unexpected) > 4:
            text += f" and {len(unexpected) - 4} more"
    places = [
        name[: -len(_NAMES[0])]
        for name in whole
        if isinstance(name, str) and name.endswith(_NAMES[0]) and name != prefix + _NAMES[0]
    ]
    if missing and places:
        text += f"; such a layer is under prefix={' or '.join(map(repr, places[:4]))}"
    raise ValueError(text)


def _check_tensors(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"from_peer_pytorch: expected {name} to be a tensor, got {type(value).__name__}"
            )
        if not value.is_floating_point() or value.layout != torch.strided:
            raise TypeError(
                f"from_peer_pytorch: expected {name} to be a dense floating-point tensor, got "
                f"{value.dtype}, {value.layout}"
            )
    keys = state["keys"]
    if keys.dim() != 4 or keys.shape[2] != 2 or 0 in keys.shape:
        raise ValueError(
            f"from_peer_pytorch: expected keys of shape [heads, keys, 2, dim_key], got "
            f"{list(keys.shape)}"
        )
    heads, num_keys, _, half = keys.shape
    down = state["weight_down_embed.weight"]
    if down.dim() != 2:
        raise ValueError(
            f"from_peer_pytorch: expected weight_down_embed.weight of shape [experts, dim], got "
            f"{list(down.shape)}"
        )
    if heads > 1 and len(down) == heads * num_keys**2:
        raise ValueError(
            f"from_peer_pytorch: the layer has tables for each of its {heads} heads "
            f"(separate_embed_per_head=True), which share one pool in peer.PEER. The same function "
            f"is the sum of {heads} layers with heads=1, one for each head's rows of the tables "
            f"and of the queries"
        )
    dim = down.shape[1]
    expected = {
        "weight_down_embed.weight": [num_keys**2, dim],
        "weight_up_embed.weight": [num_keys**2, dim],
        "to_queries.0.weight": [2 * heads * half, dim],
        _NORM: [dim],
    }
    for name, shape in expected.items():
        if name in state and list(state[name].shape) != shape:
            raise ValueError(
                f"from_peer_pytorch: expected {name} of shape {shape} to match keys "
                f"{list(keys.shape)} and dim {dim}, got {list(state[name].shape)}"
            )


def _convert(
    state: Mapping[str, Tensor],
    options: _Options,
    sparse_grad: bool,
    trained: Mapping[str, bool],
) -> PEER | nn.Sequential:
    down, up, query, keys = (state[name] for name in _NAMES)
    heads, num_keys, _, half = keys.shape
    dim = down.shape[1]
    _check_candidates(options, num_keys)
    layer = PEER(
        dim,
        num_experts=num_keys**2,
        heads=heads,
        num_experts_per_head=options.num_experts_per_head,
        dim_key=2 * half,
        activation=options.activation,
        scores=options.scores,
        query_norm=None,
        share_keys=False,
        dropout=options.dropout,
        sparse_grad=sparse_grad,
        device="meta",
    )
    # Theirs orders a query's features by (half, head, feature).
    by_head = query.detach().reshape(2, heads, half, dim).transpose(0, 1)
    converted = {
        "experts.weight": _join(down, up),
        "router.query.weight": _copy(by_head).view(heads * 2 * half, dim),
        "router.row_keys": _copy(keys[:, :, 0]),
        "router.col_keys": _copy(keys[:, :, 1]),
    }
    layer.load_state_dict(converted, assign=True)
    is_trained = [trained.get(name, True) for name in _NAMES]
    layer.experts.requires_grad_(is_trained[0] or is_trained[1])
    layer.router.query.requires_grad_(is_trained[2])
    layer.router.row_keys.requires_grad_(is_trained[3])
    layer.router.col_keys.requires_grad_(is_trained[3])
    if _NORM not in state:
        return layer
    # They divide by max(|x|, 1e-12) and multiply by the square root of dim.
    norm = nn.RMSNorm(dim, eps=1e-24 / dim, device="meta")
    norm.weight = nn.Parameter(_copy(state[_NORM]) + 1, requires_grad=trained.get(_NORM, True))
    return nn.Sequential(norm, layer)


def _check_candidates(options: _Options, num_keys: int) -> None:
    per_head, candidates = options.num_experts_per_head, options.product_key_topk
    if candidates > num_keys:
        raise ValueError(
            f"from_peer_pytorch: the layer cannot take product_key_topk={candidates} of its "
            f"{num_keys} keys per half, so these options are not its own"
        )
    if candidates < min(per_head, num_keys):
        raise ValueError(
            f"from_peer_pytorch: with product_key_topk={candidates} the layer chooses {per_head} "
            f"experts per head among the pairs of {candidates} row and {candidates} column keys, "
            f"so it can miss some of the {per_head} best. peer.PEER always finds them and cannot "
            f"repeat that. With product_key_topk={min(per_head, num_keys)} set on the layer, or "
            f"given with its state, this converts it; outputs then differ where it missed some"
        )
    if options.scores == "softmax" and per_head == 1:
        raise ValueError(
            "from_peer_pytorch: the layer takes the softmax over one expert per head, which is 1 "
            "whatever its score: its router never had a gradient, and peer.PEER refuses that"
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _join(down: Tensor, up: Tensor) -> Tensor:
    dtype = torch.promote_types(down.dtype, up.dtype)
    table = empty_huge(len(down), 2, down.shape[1], dtype=dtype, device=down.device)
    table[:, 0], table[:, 1] = down, up
    return table
