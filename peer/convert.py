"""Converts layers of other packages to layers of peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peer.memory import empty_huge
from peer.modules import PEER

__all__ = ["from_peer_pytorch"]


class _Options(NamedTuple):
    """The options of a PEER-pytorch layer that its tensors do not show, in the terms of `PEER`."""

    activation: str
    scores: str
    num_experts_per_head: int
    product_key_topk: int
    dropout: float


# The defaults of PEER-pytorch.
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
    r"""Converts a layer of the package PEER-pytorch.

    **By default, PEER-pytorch retrieves one expert per head.** `PEER_pytorch.PEER(dim)` has
    `non_competing_scores=True`. With this option the layer ignores `num_experts_per_head`: each
    head takes the single expert with the highest score s and weights it by :math:`\max(s, 0)`. The
    converted layer then has `num_experts_per_head=1, scores="relu"`, so a token retrieves 8 experts
    by default and not 8 · 16. With `non_competing_scores=False` a layer has `num_experts_per_head`
    experts per head and a softmax, as in the paper.

    The converted layer has `query_norm=None` and `share_keys=False`. Its `dim_key` is twice that of
    PEER-pytorch, which counts the width of one half. Outputs and gradients are equal up to
    rounding, including dropout under the same seed. In 16-bit dtypes the two layers can choose
    different experts if scores almost tie, because PEER-pytorch ranks scores rounded to 16 bits.

    Args:
        source: a `PEER_pytorch.PEER`, or a `PEER_pytorch.ChunkedPEER` around one. Chunks save
            memory only and are dropped. Or the state of a `PEER_pytorch.PEER`; the options below
            then say what the state does not.
        prefix: prefix of the layer's names in a larger state, such as "peer." for a `ChunkedPEER`.
        num_experts_per_head: the layer's option, 16 if None. If scores do not compete, it only sets
            the default of `product_key_topk`.
        activation: the experts' activation by its name in `peer.PEER`, "gelu" if None.
        product_key_topk: the layer's number of candidates from each half of the keys,
            `num_experts_per_head` if None.
        non_competing_scores: the layer's option, True if None.
        dropout: the layer's option, 0 if None.
        sparse_grad: whether the table of the result gets a sparse gradient, see `peer.ExpertPool`.

    Returns:
        A `peer.PEER` with copies of the tensors, in their dtypes and on their devices. If the
        source has `pre_rmsnorm`, that norm also feeds the experts, so the result is
        `torch.nn.Sequential(torch.nn.RMSNorm, peer.PEER)` with the norm's weight set to gamma + 1.
        A converted module keeps its training mode and `requires_grad` flags; the table requires
        grad if either source table does. A converted state is in training mode and all of its
        parameters require grad.

    Raises:
        ValueError: no `peer.PEER` computes the same function, because the layer has so few
            candidates that it can miss the best experts (`product_key_topk` is smaller than the
            number of experts per head and the number of keys), tables per head, a softmax over one
            expert, or an unknown activation; or the state is not that of a `PEER_pytorch.PEER`.
        TypeError: the source is of another class or overrides methods, or options are given for a
            module.

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
                f"from_peer_pytorch: expected no options for a module, which has its own, got "
                f"{', '.join([*given, *(['prefix'] if prefix else [])])}"
            )
        module = _unwrap(source)
        options = _module_options(module)
        training = module.training
        trained = {name: each.requires_grad for name, each in module.named_parameters()}
        state: Mapping[str, Any] = module.state_dict()
        source = state
    else:
        options = _state_options({**_DEFAULTS, **given})
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
    if _is_instance(module, PEER_pytorch.ChunkedPEER):
        module = module.peer
    if not _is_instance(module, PEER_pytorch.PEER):
        raise TypeError(
            f"from_peer_pytorch: expected a PEER_pytorch.PEER, or a ChunkedPEER around one, got "
            f"{type(module).__module__}.{type(module).__qualname__}, which computes something else"
        )
    unwrapped: nn.Module = module
    return unwrapped


def _is_instance(module: Any, kind: Any) -> bool:
    # A subclass or an instance that overrides `forward` may compute something else.
    return isinstance(module, kind) and getattr(module.forward, "__func__", None) is kind.forward


def _module_options(module: Any) -> _Options:
    names: dict[Any, str] = {nn.ReLU: "relu", nn.Softmax: "softmax"}
    scores = names.get(type(module.score_activation))
    if scores is None:
        raise ValueError(
            f"from_peer_pytorch: expected scores under ReLU or Softmax, got "
            f"{module.score_activation}"
        )
    return _Options(
        activation=_activation_name(module.activation),
        scores=scores,
        num_experts_per_head=int(module.num_experts_per_head_topk),
        product_key_topk=int(module.product_key_topk),
        dropout=float(module.dropout.p),
    )


def _activation_name(activation: Any) -> str:
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


def _state_options(given: Mapping[str, Any]) -> _Options:
    per_head = given["num_experts_per_head"]
    candidates = given["product_key_topk"]
    non_competing = given["non_competing_scores"]
    return _Options(
        activation=given["activation"],
        scores="relu" if non_competing else "softmax",
        num_experts_per_head=1 if non_competing else per_head,
        product_key_topk=per_head if candidates is None else candidates,
        dropout=given["dropout"],
    )


def _check_names(state: Mapping[str, Any], prefix: str, full_state: Mapping[str, Any]) -> None:
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
    prefixes = [
        name[: -len(_NAMES[0])]
        for name in full_state
        if isinstance(name, str) and name.endswith(_NAMES[0]) and name != prefix + _NAMES[0]
    ]
    if missing and prefixes:
        text += f"; such a layer is under prefix={' or '.join(map(repr, prefixes[:4]))}"
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
            f"(separate_embed_per_head=True), but the heads of a peer.PEER share one pool. The sum "
            f"of {heads} layers with heads=1 computes the same function: convert the rows of the "
            f"tables and of the queries of each head"
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
        key_norm=False,
        dropout=options.dropout,
        sparse_grad=sparse_grad,
        device="meta",
    )
    # PEER-pytorch orders the features of a query by (half, head, feature).
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
    # PEER-pytorch divides by max(|x|, 1e-12) and multiplies by sqrt(dim).
    norm = nn.RMSNorm(dim, eps=1e-24 / dim, device="meta")
    norm.weight = nn.Parameter(_copy(state[_NORM]) + 1, requires_grad=trained.get(_NORM, True))
    return nn.Sequential(norm, layer)


def _check_candidates(options: _Options, num_keys: int) -> None:
    per_head, candidates = options.num_experts_per_head, options.product_key_topk
    if candidates > num_keys:
        raise ValueError(
            f"from_peer_pytorch: expected product_key_topk of at most {num_keys}, the layer's "
            f"number of keys per half, got {candidates}; these are not the options of this layer"
        )
    if candidates < min(per_head, num_keys):
        raise ValueError(
            f"from_peer_pytorch: with product_key_topk={candidates} the layer chooses {per_head} "
            f"experts per head from the pairs of {candidates} row and {candidates} column keys, so "
            f"it can miss some of the {per_head} best experts. peer.PEER always finds them. To "
            f"convert the layer anyway, set product_key_topk={min(per_head, num_keys)} on it or "
            f"pass it with the state; outputs then differ for tokens that missed an expert"
        )
    if options.scores == "softmax" and per_head == 1:
        raise ValueError(
            "from_peer_pytorch: the layer takes a softmax over one expert per head, which is "
            "always 1. Its router has no gradient, and peer.PEER does not support that"
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _join(down: Tensor, up: Tensor) -> Tensor:
    dtype = torch.promote_types(down.dtype, up.dtype)
    table = empty_huge(len(down), 2, down.shape[1], dtype=dtype, device=down.device)
    table[:, 0], table[:, 1] = down, up
    return table
