"""Batching rules: every mix of batched and shared arguments equals a loop over the samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("no_slow_fallback")

SAMPLES = 3
retrieve = torch.ops.peer.product_key_topk
retrieve_backward = torch.ops.peer.product_key_topk_backward
apply_experts = torch.ops.peer.expert_mlp
apply_experts_backward = torch.ops.peer.expert_mlp_backward


def batch(tensor: Tensor, dim: int, seed: int) -> Tensor:
    """Distinct variations of a tensor, stacked at `dim`."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.is_floating_point():
        samples = [
            tensor + torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            for _ in range(SAMPLES)
        ]
    else:  # ids: a permutation of the tokens' ids keeps them in range
        samples = [tensor[torch.randperm(len(tensor), generator=generator)] for _ in range(SAMPLES)]
    return torch.stack(samples, dim)


def loop(function, in_dims, *arguments):
    """The definition of vmap."""

    def select(argument, dim, sample):
        return argument if dim is None else argument.select(dim, sample)

    results = [
        function(*(select(a, d, sample) for a, d in zip(arguments, in_dims, strict=True)))
        for sample in range(SAMPLES)
    ]
    return [torch.stack(outputs) for outputs in zip(*results, strict=True)]


def assert_equals_loop(function, in_dims, *arguments):
    ours = torch.vmap(function, in_dims)(*arguments)
    expected = loop(function, in_dims, *arguments)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def mixtures(count: int) -> list[tuple[int | None, ...]]:
    """All subsets of `count` arguments to batch, at alternating dimensions."""
    choices = itertools.product([True, False], repeat=count)
    return [
        tuple((position % 2 if chosen else None) for position, chosen in enumerate(choice))
        for choice in choices
        if any(choice)
    ]


def batched(tensors, in_dims):
    return [
        tensor if dim is None else batch(tensor, dim, seed)
        for seed, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=True))
    ]


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("in_dims", mixtures(3), ids=str)
def test_retrieval_equals_a_loop(make_retrieval_inputs, in_dims, shared):
    inputs = batched(make_retrieval_inputs(shared=shared, dtype=torch.float64), in_dims)
    assert_equals_loop(lambda *args: retrieve(*args, 5), in_dims, *inputs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("in_dims", mixtures(3), ids=str)
def test_gradients_of_retrieval_equal_a_loop(make_retrieval_inputs, in_dims, shared):
    inputs = batched(make_retrieval_inputs(shared=shared, dtype=torch.float64), in_dims)
    cotangent = torch.randn(5, 2, 5, generator=torch.Generator().manual_seed(9)).double()

    def gradients(*args):
        return torch.func.grad(
            lambda *args: (retrieve(*args, 5)[0] * cotangent).sum(), argnums=(0, 1, 2)
        )(*args)

    assert_equals_loop(gradients, in_dims, *inputs)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("in_dims", [(0, 1, None, None, 0), (None, 0, 1, None, 1)], ids=str)
def test_unwanted_gradients_of_retrieval_stay_undefined(make_retrieval_inputs, in_dims, wanted):
    query, row_keys, col_keys = make_retrieval_inputs(dtype=torch.float64)
    scores, indices = retrieve(query, row_keys, col_keys, 4)
    inputs = batched((scores, query, row_keys, col_keys, indices), in_dims)

    def backward(*args):
        grads = retrieve_backward(*args, wanted)
        assert [grad is not None for grad in grads] == list(wanted)
        return [grad for grad in grads if grad is not None]

    assert_equals_loop(backward, in_dims, *inputs)


@pytest.mark.parametrize("in_dims", mixtures(4), ids=str)
def test_experts_and_their_gradients_equal_a_loop(make_expert_inputs, in_dims, glu):
    inputs = batched(make_expert_inputs(dtype=torch.float64, glu=glu), in_dims)
    cotangent = torch.randn(5, 9, generator=torch.Generator().manual_seed(9)).double()

    def value_and_gradients(*args):
        def loss(*args):
            out, hidden, gate = apply_experts(*args, "silu")
            return (out * cotangent).sum(), (out, hidden, gate) if glu else (out, hidden)

        gradients, values = torch.func.grad(loss, argnums=(0, 1, 3), has_aux=True)(*args)
        return (*gradients, *values)

    assert_equals_loop(value_and_gradients, in_dims, *inputs)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("table_dim", [None, 1], ids=["shared table", "own tables"])
def test_unwanted_gradients_of_experts_stay_undefined(make_expert_inputs, position, table_dim):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    out, hidden, gate = apply_experts(*inputs, "gelu")
    in_dims = (0, 1, None, 0, table_dim, 0, 1)
    arguments = batched((out, *inputs, hidden, gate), in_dims)
    wanted = [other == position for other in range(3)]

    def backward(*args):
        grads = apply_experts_backward(*args, "gelu", False, wanted)
        assert [grad is not None for grad in grads] == wanted
        return [grad for grad in grads if grad is not None]

    assert_equals_loop(backward, in_dims, *arguments)


@pytest.mark.parametrize("wrong", [-1, 11, 40])
def test_an_id_beyond_a_samples_own_table_is_refused(make_expert_inputs, wrong):
    x, weights, indices, table = make_expert_inputs(experts=11)
    indices = indices.clone()
    indices[2, 3] = wrong
    with pytest.raises(IndexError, match="peer::expert_mlp"):
        torch.vmap(lambda table: apply_experts(x, weights, indices, table, "gelu")[0])(
            batch(table, 0, 0)
        )


def test_nested_vmap_equals_nested_loops(make_expert_inputs):
    x, weights, indices, table = make_expert_inputs(dtype=torch.float64)
    x = torch.stack([batch(x, 1, seed) for seed in range(4)])  # (4, T, 3, D)
    tables = batch(table, 0, 7)  # (3, N, 2, D)

    def apply(x, table):
        return apply_experts(x, weights, indices, table, "gelu")[0]

    ours = torch.vmap(torch.vmap(apply, (1, 0)), (0, None))(x, tables)
    for outer, inner in itertools.product(range(4), range(3)):
        torch.testing.assert_close(ours[outer, inner], apply(x[outer, :, inner], tables[inner]))


def test_nested_vmap_of_retrieval_equals_nested_loops(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(dtype=torch.float64)
    query = torch.stack([batch(query, 1, seed) for seed in range(4)])
    row_keys = batch(row_keys, 0, 7)
    ours = torch.vmap(torch.vmap(lambda q, r: retrieve(q, r, col_keys, 3), (1, 0)), (0, None))(
        query, row_keys
    )
    for outer, inner in itertools.product(range(4), range(3)):
        expected = retrieve(query[outer, :, inner], row_keys[inner], col_keys, 3)
        torch.testing.assert_close(ours[0][outer, inner], expected[0])
        assert torch.equal(ours[1][outer, inner], expected[1])


def test_autograd_outside_of_vmap_equals_autograd_through_the_loop(make_expert_inputs):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    in_dims = (0, None, None, 1)

    def apply(*args):
        return (apply_experts(*args, "gelu")[0],)

    gradients = []
    for run in torch.vmap(apply, in_dims), lambda *args: loop(apply, in_dims, *args):
        arguments = [
            tensor.requires_grad_() if tensor.is_floating_point() else tensor
            for tensor in batched([t.detach().clone() for t in inputs], in_dims)
        ]
        run(*arguments)[0].square().sum().backward()
        gradients.append([t.grad for t in arguments if t.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_no_tokens_in_a_sample(make_expert_inputs, make_retrieval_inputs):
    inputs = batched(make_expert_inputs(tokens=0), (0, 0, 0, 0))
    out, hidden, _ = torch.vmap(lambda *args: apply_experts(*args, "gelu"), out_dims=(0, 0, None))(
        *inputs
    )
    assert out.shape == (3, 0, 9)
    assert hidden.shape == (3, 0, 6)
    inputs = batched(make_retrieval_inputs(tokens=0), (0, 0, 0))
    scores, _ = torch.vmap(lambda *args: retrieve(*args, 4))(*inputs)
    assert scores.shape == (3, 0, 2, 4)


def test_sparse_gradients_of_samples_are_refused(make_expert_inputs):
    x, weights, indices, table = make_expert_inputs()

    def loss(table, x):
        return apply_experts(x, weights, indices, table, "gelu", True)[0].sum()

    with pytest.raises(NotImplementedError, match="sparse_grad=True does not work under vmap"):
        torch.vmap(torch.func.grad(loss), (None, 0))(table, batch(x, 0, 0))


def test_sparse_grad_does_not_hinder_vmap_of_other_gradients(make_expert_inputs):
    x, weights, indices, table = make_expert_inputs(dtype=torch.float64)

    def gradient(x):
        def loss(x):
            return apply_experts(x, weights, indices, table, "gelu", True)[0].sum()

        return (torch.func.grad(loss)(x),)

    assert_equals_loop(gradient, (0,), batch(x, 0, 0))
