r"""What experts do: the text that makes them fire, and what changed since an earlier checkpoint.

The strength with which a token x makes an expert e fire is
:math:`g_e(x)\, \sigma(x^\top \text{down}_e)\, \lVert \text{up}_e \rVert`: the router's weight
times the hidden neuron times the length of what the neuron writes. Its absolute value is the length
of what e adds to the output of the layer. With `glu`, the neuron includes the gate.

All functions run the model in evaluation mode and without gradients. Except for `distances`, their
results are plain dicts and lists of numbers and strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peer._evaluate import Retrieval, find_layers, observe_layers, run_batches
from peer.modules import PEER, ExpertPool, ProductKeyRouter
from peer.modules.masks import Experts, as_ids
from peer.reference import ACTIVATIONS
from peer.usage import find_slots, is_counted

__all__ = ["changes", "distances", "experts_of", "top_tokens"]

Decode = Callable[[list[int]], str]


def top_tokens(
    model: nn.Module,
    data: Iterable[Any],
    experts: Experts | Mapping[str, Experts],
    *,
    decode: Decode | None = None,
    per_expert: int = 10,
    context: int = 8,
    token_ids: Callable[[Any], Tensor] | None = None,
) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Finds the tokens that make experts fire most strongly, with the text around them.

    A token that retrieves an expert with several heads counts once, with the sum of the weights.
    Padding does not count, and is not part of the text. Of tokens with the same text around them,
    only the strongest counts.

    The memory grows with the number of the experts times the tokens of a batch, and not with N.

    Args:
        model: a model with at least one `PEER` layer.
        data: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list of
            positional arguments, or any other object as the only argument.
        experts: ids or a mask, or a mapping of them by the name of the layer in
            `model.named_modules()`. With several layers, it is a mapping.
        decode: turns a list of ids of tokens into text, such as a tokenizer's `decode`. By default,
            the text is the ids.
        per_expert: the largest number of tokens for each expert.
        context: how many tokens of text stand before and after a token.
        token_ids: finds the ids of the tokens in a batch. By default, they are its first tensor of
            integers. They have the shape of the layer's input without its last dimension.

    Returns:
        For each layer by name, for each expert by id, its tokens in order of descending absolute
        strength. A token has "strength", "weight", "neuron", "token", "before", "after" (text),
        "id", "batch", "sequence" and "position".

    Raises:
        ValueError: the model has no layer, no layer of a name, the data has no ids, or their shape
            is not that of the layer's tokens.
        IndexError: an id is outside [0, N).

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(26, 8), layer)
        >>> letters = torch.randint(26, (4, 20))
        >>> decode = lambda ids: "".join(chr(97 + i) for i in ids)
        >>> found = peer.inspect.top_tokens(model, [letters], [3, 7], decode=decode)
        >>> sorted(found["1"]), len(found["1"][3][0]["token"])
        ([3, 7], 1)
    """
    layers = find_layers(model)
    chosen = {
        name: _ids(ids, layers[name], name) for name, ids in _by_layer(experts, layers).items()
    }
    batches = _Batches(data, token_ids)
    best: dict[str, dict[int, dict[Any, dict[str, Any]]]] = {
        name: {expert: {} for expert in ids.tolist()} for name, ids in chosen.items()
    }

    def see(name: str, call: Retrieval) -> None:
        ids = chosen[name].to(call.indices.device)
        texts = batches.texts(name, call)
        weight, neuron, strength = _fire(call, ids)
        values, tokens = strength.abs().topk(min(per_expert, len(strength)), dim=0)
        for column, expert in enumerate(ids.tolist()):
            found = best[name][expert]
            for value, token in zip(
                values[:, column].tolist(), tokens[:, column].tolist(), strict=True
            ):
                if weight[token, column] == 0:
                    break
                window = texts.window(token, context)
                # The last bits of a strength depend on the size of its batch.
                if window in found and abs(found[window]["strength"]) >= value * (1 - 1e-5):
                    continue
                found[window] = {
                    "strength": float(strength[token, column]),
                    "weight": float(weight[token, column]),
                    "neuron": float(neuron[token, column]),
                    **texts.place(token),
                }
            for window in sorted(found, key=lambda w: -abs(found[w]["strength"]))[per_expert:]:
                del found[window]

    with observe_layers({name: layers[name] for name in chosen}, see):
        run_batches(model, batches)
    text = _decoder(decode)
    return {
        name: {
            expert: [
                {**found[(before, token, after)], **_as_text(text, before, token, after)}
                for before, token, after in sorted(found, key=lambda w: -abs(found[w]["strength"]))
            ]
            for expert, found in by_expert.items()
        }
        for name, by_expert in best.items()
    }


def experts_of(
    model: nn.Module,
    text_ids: Any,
    *,
    decode: Decode | None = None,
    per_token: int = 8,
    max_tokens: int | None = None,
    token_ids: Callable[[Any], Tensor] | None = None,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Finds the experts that a text uses.

    Args:
        model: a model with at least one `PEER` layer.
        text_ids: the ids of the tokens of a text: a list or a 1-D tensor, which the model gets as a
            tensor (1, L). Or the arguments of a call, as in the data of `top_tokens`.
        decode: turns a list of ids of tokens into text. By default, the text is the ids.
        per_token: the largest number of experts for each token.
        max_tokens: how many tokens are inspected, from the first; None for all.
        token_ids: as in `top_tokens`.

    Returns:
        For each layer by name, two lists. "tokens" has each token that is not padding, with "token"
        (text), "id", "batch", "sequence", "position" and "experts": its strongest ones, each with
        "expert", "strength" and "weight". "experts" has all experts that the text retrieves, each
        with "expert", "tokens" (how many retrieve it), and the sums "strength", of absolute values,
        and "weight", in order of descending strength.

    Raises:
        ValueError: the model has no layer, there are no ids, or their shape is not that of the
            layer's tokens.

    Example:
        >>> import torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(26, 8), layer)
        >>> found = peer.inspect.experts_of(model, [7, 4, 11, 11, 14], per_token=3)["1"]
        >>> [(token["token"], len(token["experts"])) for token in found["tokens"]]
        [('7', 3), ('4', 3), ('11', 3), ('11', 3), ('14', 3)]
    """
    layers = find_layers(model)
    is_list = isinstance(text_ids, (list, tuple)) and all(isinstance(i, int) for i in text_ids)
    if is_list or (isinstance(text_ids, Tensor) and text_ids.dim() == 1):
        device = next(iter(layers.values())).experts.weight.device
        text_ids = torch.as_tensor(text_ids, device=device)[None]
    batches = _Batches([text_ids], token_ids)
    text = _decoder(decode)
    tokens: dict[str, list[dict[str, Any]]] = {name: [] for name in layers}
    used: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in layers}

    def see(name: str, call: Retrieval) -> None:
        texts = batches.texts(name, call)
        for token, experts in enumerate(_experts_by_token(call)):
            if max_tokens is not None and token >= max_tokens:
                break
            if texts.is_padding(token):
                continue
            _, id_, _ = texts.window(token, 0)
            strongest = sorted(experts, key=lambda each: -abs(each["strength"]))[:per_token]
            place = {"token": text([id_]), "id": id_, **texts.place(token)}
            tokens[name].append({**place, "experts": strongest})
            for each in experts:
                total = used[name].setdefault(
                    each["expert"],
                    {"expert": each["expert"], "tokens": 0, "strength": 0.0, "weight": 0.0},
                )
                total["tokens"] += 1
                total["strength"] += abs(each["strength"])
                total["weight"] += each["weight"]

    with observe_layers(layers, see):
        run_batches(model, batches)
    return {
        name: {
            "tokens": tokens[name],
            "experts": sorted(used[name].values(), key=lambda each: -each["strength"]),
        }
        for name in layers
    }


def distances(model: nn.Module, before: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    r"""How far each expert has moved since an earlier checkpoint.

    Args:
        model: a model with at least one `ExpertPool`.
        before: an earlier state of the model, or a model with it. Its pools may be smaller.

    Returns:
        For each pool by its name in `model.named_modules()`,
        :math:`\lVert w_e - w'_e \rVert / \lVert w'_e \rVert` of the rows w of the table and
        their earlier values w', (N,) float64 on the CPU. NaN for experts that are new.

    Raises:
        ValueError: the model has no pool, or the state is not an earlier one of the model.

    Example:
        >>> import copy, peer
        >>> pool = peer.ExpertPool(8, num_experts=4)
        >>> before = copy.deepcopy(pool.state_dict())
        >>> pool.grow(1)
        >>> peer.inspect.distances(pool, before)[""]
        tensor([0., 0., 0., 0., nan], dtype=torch.float64)
    """
    pools = {n: part for n, part in model.named_modules() if isinstance(part, ExpertPool)}
    if not pools:
        raise ValueError("expected a model with an ExpertPool, such as that of a PEER layer")
    state = _state_of(before)
    moved = {}
    for name, pool in pools.items():
        new = pool.weight.detach()
        old = _earlier(state, f"{name}.weight" if name else "weight", new, dim=0)
        distance = torch.full((len(new),), torch.nan, dtype=torch.float64)
        for rows in torch.arange(len(old)).split(16384):
            first, last = int(rows[0]), int(rows[-1]) + 1
            was = old[first:last].flatten(1).double()
            difference = (new[first:last].flatten(1).double() - was.to(new.device)).norm(dim=1)
            length = was.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
            distance[first:last] = difference.cpu() / length.cpu()
        moved[name] = distance
    return moved


def changes(
    model: nn.Module, before: nn.Module | Mapping[str, Any], *, largest: int = 10
) -> dict[str, dict[str, Any]]:
    """What changed in a model since an earlier checkpoint.

    Args:
        model: a model with at least one `PEER` layer.
        before: an earlier state of the model, or a model with it.
        largest: how many of the experts that moved most are listed.

    Returns:
        For each layer by name: "experts", "grown" (experts that are new), "moved" and "unmoved"
        (old experts whose row differs, or does not differ by a bit), "mean" and "max", of the
        `distances` of old experts, "largest", a list of "expert" and "distance", "row_keys_moved"
        and "column_keys_moved". Layers that share a pool share these numbers of the pool.

    Raises:
        ValueError: the model has no layer, or the state is not an earlier one of the model.

    Example:
        >>> import copy, torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> before = copy.deepcopy(layer.state_dict())
        >>> layer.grow(2)
        >>> _ = layer.experts.weight.data[5].mul_(2)
        >>> found = peer.inspect.changes(layer, before)[""]
        >>> found["grown"], found["moved"], found["largest"]
        (8, 1, [{'expert': 5, 'distance': 1.0}])
    """
    layers = find_layers(model)
    state = _state_of(before)
    moved = distances(model, state)
    names = {id(part): name for name, part in model.named_modules()}
    found = {}
    for name, layer in layers.items():
        distance = moved[names[id(layer.experts)]]
        old = distance[~distance.isnan()]
        top = old.topk(min(largest, len(old)))
        found[name] = {
            "experts": len(distance),
            "grown": len(distance) - len(old),
            "moved": int((old > 0).sum()),
            "unmoved": int((old == 0).sum()),
            "mean": float(old.mean()) if len(old) > 0 else 0.0,
            "max": float(old.max()) if len(old) > 0 else 0.0,
            "largest": [
                {"expert": expert, "distance": value}
                for value, expert in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                if value > 0
            ],
            **_moved_keys(layer.router, names[id(layer.router)], state),
        }
    return found


def _moved_keys(router: ProductKeyRouter, name: str, state: Mapping[str, Any]) -> dict[str, int]:
    moved = {}
    for keys, here in zip(("row_keys", "col_keys"), router.effective_keys(), strict=True):
        old = _earlier(state, f"{name}.{keys}" if name else keys, here, dim=here.dim() - 2)
        now = here.detach().narrow(-2, 0, old.shape[-2])
        differs = (now != old.to(now.device)).any(-1)
        side = "row_keys_moved" if keys == "row_keys" else "column_keys_moved"
        moved[side] = int((differs if differs.dim() == 1 else differs.any(0)).sum())
    return moved


def _state_of(before: nn.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    return before.state_dict() if isinstance(before, nn.Module) else before


def _earlier(state: Mapping[str, Any], name: str, now: Tensor, dim: int) -> Tensor:
    """An earlier value of a parameter that may have grown since."""
    old = state.get(name)
    if not isinstance(old, Tensor):
        raise ValueError(f"the state has no tensor {name}; it is not one of this model")
    expected = list(now.shape)
    if old.dim() == now.dim():
        expected[dim] = min(expected[dim], old.shape[dim])
    if expected != list(old.shape):
        raise ValueError(
            f"the state is no earlier one of this model: {name} has the shape {list(now.shape)}, "
            f"and in the state {list(old.shape)}"
        )
    return old.detach()


def _by_layer(experts: Any, layers: Mapping[str, PEER]) -> Mapping[str, Experts]:
    if not isinstance(experts, Mapping):
        if len(layers) > 1:
            raise ValueError(
                f"expected experts as a mapping from the names of layers to ids, since the model "
                f"has several layers: {list(layers)}"
            )
        return dict.fromkeys(layers, experts)
    if unknown := experts.keys() - layers.keys():
        raise ValueError(f"experts names {sorted(unknown)}, but the layers are {list(layers)}")
    return experts


def _ids(experts: Experts, layer: PEER, name: str) -> Tensor:
    """Distinct ids, ascending."""
    ids = as_ids(experts, layer.num_experts, layer.experts.weight.device)
    if len(ids) == 0:
        raise ValueError(f"expected ids of experts of the layer {name!r}, got none")
    return ids


def _rows(call: Retrieval, ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Down vectors, gates and lengths of the up vectors of experts."""
    dtype = torch.promote_types(call.x.dtype, torch.float32)
    down, *gate, up = call.layer.experts.weight[ids].to(dtype).unbind(-2)
    return down, gate[0] if gate else None, up.norm(dim=-1)


def _tokens(call: Retrieval) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens (T, D), their weights and their ids (T, P); uncounted retrievals weigh zero."""
    weights = torch.where(is_counted(call.weights, call.padding_mask), call.weights, 0)
    x = call.x.flatten(0, -2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = (len(x), -1)
    return x, weights.reshape(shape), call.indices.reshape(shape)


def _fire(call: Retrieval, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, neuron and strength of some experts for all tokens, each (T, E).

    Where a token does not retrieve an expert, or is padding, weight and strength are zero.
    """
    x, weights, indices = _tokens(call)
    slots = find_slots(ids, indices)
    weight = weights.new_zeros(len(x), len(ids) + 1).scatter_add_(1, slots, weights)[:, :-1]
    down, gate, length = _rows(call, ids)
    neuron = ACTIVATIONS[call.layer.experts.activation](x @ down.T)
    if gate is not None:
        neuron = neuron * (x @ gate.T)
    # Not by multiplication: padding may hold NaN.
    strength = torch.where(weight != 0, weight * neuron * length, 0)
    return weight, neuron, strength


def _experts_by_token(call: Retrieval) -> Iterator[list[dict[str, Any]]]:
    """The distinct experts of each token, with their strength and weight."""
    x, weights, indices = _tokens(call)
    for token, weight, index in zip(x, weights, indices, strict=True):
        ids, inverse = index.unique(return_inverse=True)
        total = weight.new_zeros(len(ids)).index_add_(0, inverse, weight)
        down, gate, length = _rows(call, ids)
        neuron = ACTIVATIONS[call.layer.experts.activation](down @ token)
        if gate is not None:
            neuron = neuron * (gate @ token)
        strength = torch.where(total != 0, total * neuron * length, 0)
        yield [
            {"expert": expert, "strength": one, "weight": other}
            for expert, one, other in zip(
                ids.tolist(), strength.tolist(), total.tolist(), strict=True
            )
        ]


class _Texts:
    """The ids of the tokens of a batch, as the layer sees them."""

    def __init__(self, ids: Tensor, mask: Tensor | None, batch: int) -> None:
        self.length = ids.shape[-1] if ids.dim() > 0 else 1
        self.ids = ids.reshape(-1).tolist()
        self.padding = [False] * len(self.ids) if mask is None else mask.reshape(-1).tolist()
        self.batch = batch

    def is_padding(self, token: int) -> bool:
        return bool(self.padding[token])

    def place(self, token: int) -> dict[str, int]:
        sequence, position = divmod(token, self.length)
        return {"batch": self.batch, "sequence": sequence, "position": position}

    def window(self, token: int, context: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """The ids before a token, its own, and those after it, of the same sequence."""
        start = token - token % self.length

        def part(first: int, last: int) -> tuple[int, ...]:
            return tuple(self.ids[i] for i in range(first, last) if not self.padding[i])

        before = part(max(token - context, start), token)
        after = part(token + 1, min(token + 1 + context, start + self.length))
        return before, self.ids[token], after


class _Batches:
    """Batches, and the ids of the one that the model is called with."""

    def __init__(self, data: Iterable[Any], token_ids: Callable[[Any], Tensor] | None) -> None:
        self.data, self.find = data, token_ids or first_integers
        self.number, self.ids = -1, torch.empty(0)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.data):
            self.number, self.ids = number, self.find(batch)
            yield batch

    def texts(self, name: str, call: Retrieval) -> _Texts:
        shape = call.x.shape[:-1]
        if self.ids.shape != shape and shape != (self.ids.numel(),):
            raise ValueError(
                f"expected ids of tokens of shape {list(shape)}, as the tokens of the layer "
                f"{name!r}, got {list(self.ids.shape)}; the argument token_ids can find them"
            )
        return _Texts(self.ids, call.padding_mask, self.number)


def first_integers(batch: Any) -> Tensor:
    """The first tensor of integers in the arguments of a call.

    Raises:
        ValueError: there is none.
    """
    parts: Iterable[Any] = (batch,)
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, (tuple, list)):
        parts = batch
    for part in parts:
        if isinstance(part, Tensor) and not (
            part.is_floating_point() or part.is_complex() or part.dtype == torch.bool
        ):
            return part
    raise ValueError(
        "expected data with the ids of tokens, but the batch has no tensor of integers; the "
        "argument token_ids can find them"
    )


def _decoder(decode: Decode | None) -> Decode:
    return decode or (lambda ids: " ".join(map(str, ids)))


def _as_text(
    text: Decode, before: tuple[int, ...], token: int, after: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "token": text([token]),
        "before": text(list(before)) if before else "",
        "after": text(list(after)) if after else "",
        "id": token,
    }
