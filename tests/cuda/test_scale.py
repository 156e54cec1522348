"""Sizes at which errors in 32-bit offsets, long segments and temporary memory would show."""

from __future__ import annotations

import pytest
import torch
from conftest import free_memory

import peer

GIB = 2**30


def test_tables_of_more_than_two_to_the_31_elements(sized):
    rows, width = sized(2**21 + 5, 2**11 + 5), 1032
    if free_memory() < 14 * GIB:
        pytest.skip("needs 14 GiB")
    table = torch.empty(rows, 2, width, dtype=torch.bfloat16, device="cuda").normal_(std=0.03)
    indices = torch.tensor([[rows - 1, 0, rows - 2, rows - rows // 100]], device="cuda")
    x = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(1, 4, device="cuda")
    small = torch.arange(4, device="cuda")[None]
    inputs = x, weights, indices, table
    few = x, weights, small, table[indices[0]]
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "gelu")
    expected, _, _ = torch.ops.peer.expert_mlp(*few, "gelu")
    assert torch.equal(out, expected)
    mask = (True, True, True)
    grads = torch.ops.peer.expert_mlp_backward(out, *inputs, hidden, gate, "gelu", True, mask)
    others = torch.ops.peer.expert_mlp_backward(out, *few, hidden, gate, "gelu", False, mask)
    assert torch.equal(grads[0], others[0])
    order = indices[0].argsort()
    assert torch.equal(grads[2].indices()[0], indices[0][order])
    assert torch.equal(grads[2].values(), others[2][order])
    state = torch.zeros(rows, 2, device="cuda")
    before = table[rows - 1].clone()
    source, coefficients = torch.stack([x, out], dim=1), torch.stack([weights, weights])
    torch.ops.peer.rowwise_adagrad_(table, state, indices, source, coefficients, 0.1, 1e-10, 0.0)
    assert int(state.count_nonzero()) == 8
    assert (table[rows - 1] != before).any(1).all()


@pytest.mark.needs_gpu("allocates a table of 4 GiB")
def test_more_rows_than_can_be_numbered_are_refused():
    if free_memory() < 5 * GIB:
        pytest.skip("needs 5 GiB")
    table = torch.empty(2**31, 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="at most 2147483647"):
        torch.ops.peer.sgd_(table, None, None, table, None, 0.1, 0.0, False, 0.0)


def test_eight_million_pairs_with_hot_experts(sized):
    tokens, per_token, experts, width = sized(2**16, 2**5), 128, 2**20, 64
    generator = torch.Generator("cuda").manual_seed(0)
    indices = torch.randint(experts, (tokens, per_token), device="cuda", generator=generator)
    indices.view(-1)[1::120] = 12345  # 70,000 pairs of one expert
    coefficients = torch.randn(tokens, per_token, device="cuda", generator=generator)
    x = torch.randn(tokens, width, device="cuda", generator=generator)
    table = torch.zeros(experts, width, device="cuda")
    torch.ops.peer.sgd_(table, None, indices, x, coefficients, -1.0, 0.0, False, 0.0)
    for expert in (12345, 0, experts - 1, 777):
        token, place = (indices == expert).nonzero(as_tuple=True)
        expected = (coefficients[token, place].double()[:, None] * x[token].double()).sum(0)
        torch.testing.assert_close(table[expert].double(), expected, rtol=1e-4, atol=1e-2)


def test_forward_needs_no_gathered_rows(sized):
    """T·P·D elements would take 2 GiB. Only outputs and a few scalars per pair are allocated."""
    tokens, per_token, width = sized(4096, 4), 128, 1024
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(tokens, per_token, device="cuda")
    indices = torch.randint(5000, (tokens, per_token), device="cuda")
    table = torch.randn(5000, 2, width, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _, _ = torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu")
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= out.numel() * 2 + 6 * tokens * per_token * 4


def test_a_fused_update_makes_no_gradient_of_the_table(sized):
    tokens, per_token, experts, width = sized((2048, 128, 2**18, 1024), (8, 128, 2**10, 1024))
    pool = peer.ExpertPool(
        width,
        num_experts=experts,
        num_experts_per_token=per_token,
        sparse_grad=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
    peer.optim.RowwiseAdagrad(pool.parameters(), lr=0.1).fuse_into_backward(pool)
    peaks = []
    for _ in range(2):  # the first round allocates the optimizer's state
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weights = torch.rand(tokens, per_token, device="cuda")
        indices = torch.randint(experts, (tokens, per_token), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pool(x, weights, indices).float().square().sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # At most a fifth of the retrieved rows, which take 600 MiB on a GPU.
    rows = len(indices.unique())
    assert peaks[1] <= 2 * rows * width * 2 // 5
