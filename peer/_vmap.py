"""Batching rules of the operators for `torch.vmap`.

A rule folds the B samples of a batch into a dimension of the operator and calls the operator once:

* samples that share keys and tables become tokens;
* samples with their own keys become heads;
* samples with their own tables become experts.

Some rules compute one sample at a time: the gradient of a shared table, because every sample has a
gradient as large as the table, and samples with their own masks of frozen rows of a shared table,
or of disabled experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Results = tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]


def register() -> None:
    """Registers the batching rules. The library must be loaded."""
    for rule in product_key_topk, product_key_topk_backward, expert_mlp, expert_mlp_backward:
        torch.library.register_vmap(f"peer::{rule.__name__}", rule)


def product_key_topk(
    info: Any,
    in_dims: Sequence[Any],
    query: Tensor,
    row_keys: Tensor,
    col_keys: Tensor,
    k: int,
    disabled: Tensor | None = None,
) -> Results:
    """The batching rule of `torch.ops.peer.product_key_topk`."""
    operator = torch.ops.peer.product_key_topk
    query_dim, row_dim, col_dim = in_dims[:3]
    mask_dim = None if disabled is None else in_dims[4]
    query = _with_batch(query, query_dim, info)
    if disabled is not None and mask_dim is not None:
        samples = zip(
            query,
            _with_batch(row_keys, row_dim, info),
            _with_batch(col_keys, col_dim, info),
            disabled.movedim(mask_dim, 0),
            strict=True,
        )
        outputs = [operator(*keys, k, mask) for *keys, mask in samples]
        return _results(torch.stack(output) for output in zip(*outputs, strict=True))
    if row_dim is None and col_dim is None:
        outputs = operator(_fold(query), row_keys, col_keys, k, disabled)
        return _results(_unfold(output, query.shape) for output in outputs)
    row_keys = _with_batch(row_keys, row_dim, info)
    col_keys = _with_batch(col_keys, col_dim, info)
    heads = _Heads(query, row_keys)
    outputs = operator(
        heads.fold(query), heads.fold_keys(row_keys), heads.fold_keys(col_keys), k, disabled
    )
    return _results(heads.unfold(output) for output in outputs)


def product_key_topk_backward(
    info: Any,
    in_dims: Sequence[Any],
    grad_scores: Tensor,
    query: Tensor,
    row_keys: Tensor,
    col_keys: Tensor,
    indices: Tensor,
    output_mask: Sequence[bool],
) -> Results:
    """The batching rule of `torch.ops.peer.product_key_topk_backward`."""
    operator = torch.ops.peer.product_key_topk_backward
    grad_dim, query_dim, row_dim, col_dim, index_dim, _ = in_dims
    grad_scores = _with_batch(grad_scores, grad_dim, info)
    query = _with_batch(query, query_dim, info)
    indices = _with_batch(indices, index_dim, info)
    _, needs_row_keys, needs_col_keys = output_mask
    if row_dim is None and col_dim is None and not needs_row_keys and not needs_col_keys:
        grad_query, _, _ = operator(
            _fold(grad_scores), _fold(query), row_keys, col_keys, _fold(indices), output_mask
        )
        return _results([_unfold(grad_query, query.shape), None, None])
    # Every sample has its own key gradient, as if it had its own keys. Key matrices are small.
    row_keys = _with_batch(row_keys, row_dim, info)
    col_keys = _with_batch(col_keys, col_dim, info)
    heads = _Heads(query, row_keys)
    grad_query, grad_row_keys, grad_col_keys = operator(
        heads.fold(grad_scores),
        heads.fold(query),
        heads.fold_keys(row_keys),
        heads.fold_keys(col_keys),
        heads.fold(indices),
        output_mask,
    )
    key_grads = heads.unfold_keys(grad_row_keys), heads.unfold_keys(grad_col_keys)
    return _results([heads.unfold(grad_query), *key_grads])


def expert_mlp(
    info: Any,
    in_dims: Sequence[Any],
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    activation: str,
    sparse_grad: bool = False,
    frozen: Tensor | None = None,
) -> Results:
    """The batching rule of `torch.ops.peer.expert_mlp`."""
    x_dim, weight_dim, index_dim, table_dim = in_dims[:4]
    frozen_dim = in_dims[6] if len(in_dims) > 6 else None
    x = _with_batch(x, x_dim, info)
    weights = _with_batch(weights, weight_dim, info)
    indices = _with_batch(indices, index_dim, info)
    if table_dim is None and frozen is not None and frozen_dim is not None:
        masks = frozen.movedim(frozen_dim, 0)
        return _stack(
            torch.ops.peer.expert_mlp(*sample, table, activation, sparse_grad, mask)
            for *sample, mask in zip(x, weights, indices, masks, strict=True)
        )
    if table_dim is not None:
        table = table.movedim(table_dim, 0)
        indices = _offset_indices(indices, table.shape[1])
        table = _fold(table)
        frozen = None if frozen is None else _fold(_with_batch(frozen, frozen_dim, info))
    out, hidden, gate = torch.ops.peer.expert_mlp(
        _fold(x), _fold(weights), _fold(indices), table, activation, sparse_grad, frozen
    )
    outputs = [_unfold(out, x.shape), _unfold(hidden, x.shape)]
    if table.shape[1] == 2:
        return (*outputs, gate), (0, 0, None)  # gate is empty and has no batch
    return _results([*outputs, _unfold(gate, x.shape)])


def expert_mlp_backward(
    info: Any,
    in_dims: Sequence[Any],
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    table: Tensor,
    hidden: Tensor,
    gate: Tensor,
    activation: str,
    sparse_grad: bool,
    output_mask: Sequence[bool],
    frozen: Tensor | None = None,
    grad_table_dtype: torch.dtype | None = None,
) -> Results:
    """The batching rule of `torch.ops.peer.expert_mlp_backward`."""
    grad_dim, x_dim, weight_dim, index_dim, table_dim, hidden_dim, gate_dim = in_dims[:7]
    frozen_dim = in_dims[10] if len(in_dims) > 10 else None
    *token_mask, needs_table = output_mask
    if sparse_grad and needs_table:
        raise NotImplementedError(
            "peer::expert_mlp: sparse_grad=True does not work under vmap, because samples retrieve "
            "different numbers of experts; use sparse_grad=False"
        )
    grad_out = _with_batch(grad_out, grad_dim, info)
    x = _with_batch(x, x_dim, info)
    weights = _with_batch(weights, weight_dim, info)
    indices = _with_batch(indices, index_dim, info)
    hidden = _with_batch(hidden, hidden_dim, info)
    gate = _with_batch(gate, gate_dim, info)

    def call(
        samples: Sequence[Tensor], table: Tensor, output_mask: list[bool], frozen: Tensor | None
    ) -> list[Any]:
        *tokens, hidden, gate = samples
        # Without gates, `gate` is B empty tensors folded into one empty tensor.
        arguments = (*tokens, table, hidden, gate, activation, sparse_grad, output_mask, frozen)
        return list(torch.ops.peer.expert_mlp_backward(*arguments, grad_table_dtype))

    if table_dim is None and frozen is not None and frozen_dim is not None:
        masks = frozen.movedim(frozen_dim, 0)
        samples = [grad_out, x, weights, indices, hidden, gate]
        return _stack(
            call(sample, table, list(output_mask), mask)
            for *sample, mask in zip(*samples, masks, strict=True)
        )
    if table_dim is not None:
        table = table.movedim(table_dim, 0)
        indices = _offset_indices(indices, table.shape[1])
        samples = [_fold(each) for each in (grad_out, x, weights, indices, hidden, gate)]
        frozen = None if frozen is None else _fold(_with_batch(frozen, frozen_dim, info))
        *grads, grad_table = call(samples, _fold(table), list(output_mask), frozen)
        return _results([*(_unfold(g, x.shape) for g in grads), _unfold(grad_table, table.shape)])

    samples = [grad_out, x, weights, indices, hidden, gate]
    grads, grad_table = [None, None], None
    if any(token_mask):
        folded = [_fold(each) for each in samples]
        grads = [_unfold(g, x.shape) for g in call(folded, table, [*token_mask, False], frozen)[:2]]
    if needs_table:
        mask = [False, False, True]
        grad_tables = [call(each, table, mask, frozen)[2] for each in zip(*samples, strict=True)]
        grad_table = torch.stack(grad_tables)
    return _results([*grads, grad_table])


class _Heads:
    """Folds samples with their own keys into heads.

    If the heads of a sample share its keys (B, R, n), the B samples become the heads, and every
    (token, head) pair becomes a token. With keys per head (B, H, R, n), there are B * H heads.
    """

    def __init__(self, query: Tensor, keys: Tensor) -> None:
        self.samples, self.tokens, self.heads = query.shape[:3]
        self.are_keys_shared = keys.dim() == 3

    def fold(self, tensor: Tensor) -> Tensor:
        """(B, T, H, n) to (T * H, B, n) or (T, B * H, n)."""
        if self.are_keys_shared:
            return tensor.flatten(1, 2).movedim(0, 1)
        return tensor.movedim(0, 1).flatten(1, 2)

    def unfold(self, tensor: Tensor | None) -> Tensor | None:
        """The inverse of `fold`."""
        if tensor is None:
            return None
        width = tensor.shape[-1]
        if self.are_keys_shared:
            return tensor.view(self.tokens, self.heads, self.samples, width).movedim(2, 0)
        return tensor.view(self.tokens, self.samples, self.heads, width).movedim(1, 0)

    def fold_keys(self, keys: Tensor) -> Tensor:
        """(B, H, R, n) to (B * H, R, n); shared keys (B, R, n) are returned unchanged."""
        return keys if self.are_keys_shared else keys.flatten(0, 1)

    def unfold_keys(self, keys: Tensor | None) -> Tensor | None:
        """The inverse of `fold_keys`."""
        if keys is None or self.are_keys_shared:
            return keys
        return keys.view(self.samples, self.heads, *keys.shape[1:])


def _with_batch(tensor: Tensor, dim: int | None, info: Any) -> Tensor:
    """The tensor as (B, ...), expanded if the samples share it."""
    return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold(tensor: Tensor) -> Tensor:
    """(B, n, ...) to (B * n, ...)."""
    return tensor.flatten(0, 1)


def _unfold(tensor: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
    """(B * n, ...) to (B, n, ...); B and n are the first two `sizes`."""
    return None if tensor is None else tensor.view(*sizes[:2], *tensor.shape[1:])


def _stack(samples: Iterable[Sequence[Tensor | None]]) -> Results:
    """The results of a rule from those of each sample."""
    outputs = zip(*samples, strict=True)
    return _results(None if each[0] is None else torch.stack(each) for each in outputs)


def _offset_indices(indices: Tensor, num_experts: int) -> Tensor:
    """Turns the ids (B, T, P) in tables of N experts into ids in the folded table of B * N experts.

    An id outside [0, N) becomes one outside [0, B * N), so the operator rejects it.
    """
    samples = indices.shape[0]
    first = torch.arange(samples, device=indices.device).view(-1, 1, 1) * num_experts
    shift = torch.where(indices < num_experts, first, (samples - 1) * num_experts)
    return torch.where(indices < 0, indices, indices + shift)


def _results(outputs: Iterable[Tensor | None]) -> Results:
    """The results of a rule: outputs (B, ...), or None for a gradient that is not needed."""
    outputs = tuple(outputs)
    return outputs, tuple(None if output is None else 0 for output in outputs)
