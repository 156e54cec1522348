"""Results are bitwise equal in every run and for any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

THREADS = (1, 2, 3, 8)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns: -0 differs from 0, and NaN equals itself."""
    dense = tensor.coalesce().values() if tensor.is_sparse else tensor
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.contiguous().view(integers[dense.element_size()])


def assert_same_bits(function) -> None:
    """Runs `function` twice with each number of threads; all results have the same bits."""
    torch.set_num_threads(1)
    expected = [bits(tensor).clone() for tensor in function()]
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(2):
            for a, b in zip(function(), expected, strict=True):
                assert torch.equal(bits(a), b), threads


def large_inputs(make_expert_inputs, dtype, glu, hot: bool):
    """More pairs than one sort block, and a row width that is no multiple of a vector."""
    inputs = make_expert_inputs(
        tokens=640, per_token=64, experts=3000, dim=37, dtype=dtype, glu=glu
    )
    if hot:
        # Nine of ten pairs have expert 1234.
        chosen = torch.rand(640, 64, generator=torch.Generator().manual_seed(3)) < 0.9
        return inputs._replace(indices=inputs.indices.masked_fill(chosen, 1234))
    return inputs


def test_experts_forward(make_expert_inputs, dtype, glu):
    inputs = large_inputs(make_expert_inputs, dtype, glu, hot=False)

    def function():
        return torch.ops.peer.expert_mlp(*inputs, "gelu", False)

    assert_same_bits(function)


def test_experts_of_few_tokens(make_expert_inputs, dtype):
    inputs = make_expert_inputs(tokens=3, per_token=100, dim=37, dtype=dtype)

    def function():
        return torch.ops.peer.expert_mlp(*inputs, "gelu", False)

    assert_same_bits(function)


@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot expert"])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_experts_backward(make_expert_inputs, dtype, sparse_grad, hot):
    inputs = large_inputs(make_expert_inputs, dtype, glu=True, hot=hot)
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "silu", sparse_grad)

    def function():
        return torch.ops.peer.expert_mlp_backward(
            out, *inputs, hidden, gate, "silu", sparse_grad, (True,) * 3
        )

    assert_same_bits(function)


def test_experts_through_autograd(make_expert_inputs):
    inputs = large_inputs(make_expert_inputs, torch.float32, glu=True, hot=True)

    def function():
        leaves = inputs.requiring_grad()
        torch.ops.peer.expert_mlp(*leaves, "gelu", False)[0].square().sum().backward()
        return [leaf.grad for leaf in leaves.differentiable()]

    torch.set_num_threads(2)
    expected = function()
    for a, b in zip(function(), expected, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_retrieval_forward(make_retrieval_inputs, dtype, shared):
    inputs = make_retrieval_inputs(
        tokens=70, heads=3, rows=300, columns=280, dim_key=46, dtype=dtype, shared=shared
    )

    def function():
        return torch.ops.peer.product_key_topk(*inputs, 16)

    assert_same_bits(function)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_retrieval_backward(make_retrieval_inputs, dtype, shared):
    # 48,000 pairs on 15 keys per half: every key is hot.
    inputs = make_retrieval_inputs(
        tokens=1000, heads=3, rows=15, columns=11, dim_key=46, dtype=dtype, shared=shared
    )
    scores, indices = torch.ops.peer.product_key_topk(*inputs, 16)

    def function():
        return torch.ops.peer.product_key_topk_backward(scores.sin(), *inputs, indices, (True,) * 3)

    assert_same_bits(function)


def test_a_token_gets_the_same_bits_alone_and_in_a_batch(
    make_expert_inputs, make_retrieval_inputs, dtype
):
    # More experts per token than one part of a token has.
    inputs = make_expert_inputs(tokens=30, per_token=70, dim=37, dtype=dtype, glu=True)
    together = torch.ops.peer.expert_mlp(*inputs, "gelu", False)[0]
    x, weights, indices, table = inputs
    alone = [
        torch.ops.peer.expert_mlp(
            x[t : t + 1], weights[t : t + 1], indices[t : t + 1], table, "gelu", False
        )[0]
        for t in range(30)
    ]
    assert torch.equal(bits(torch.cat(alone)), bits(together))

    query, row_keys, col_keys = make_retrieval_inputs(tokens=30, dtype=dtype, dim_key=46)
    scores, _ = torch.ops.peer.product_key_topk(query, row_keys, col_keys, 8)
    alone = [
        torch.ops.peer.product_key_topk(query[t : t + 1], row_keys, col_keys, 8)[0]
        for t in range(30)
    ]
    assert torch.equal(bits(torch.cat(alone)), bits(scores))
