"""Autocast casts activations and keys, but not weights and tables."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def low(request) -> torch.dtype:
    """The dtype of the autocast region."""
    return request.param


def experts(inputs):
    return torch.ops.peer.expert_mlp(*inputs, "gelu", False)


def test_the_output_of_experts_has_the_dtype_of_the_region(make_expert_inputs, low, glu):
    with torch.autocast("cpu", dtype=low):
        out, hidden, _ = experts(make_expert_inputs(glu=glu))
    assert out.dtype == low
    assert hidden.dtype == torch.float32


def test_experts_equal_a_call_with_x_cast_and_tables_as_they_are(make_expert_inputs, low, glu):
    inputs = make_expert_inputs(glu=glu)
    with torch.autocast("cpu", dtype=low):
        result = experts(inputs)
    expected = experts(inputs._replace(x=inputs.x.to(low)))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_retrieval_equals_a_call_with_query_and_keys_cast(make_retrieval_inputs, low):
    inputs = make_retrieval_inputs(rows=40, columns=50)
    with torch.autocast("cpu", dtype=low):
        scores, indices = torch.ops.peer.product_key_topk(*inputs, 8)
    expected = torch.ops.peer.product_key_topk(*(tensor.to(low) for tensor in inputs), 8)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])


def test_a_query_of_another_dtype_than_the_keys_is_cast_to_match(make_retrieval_inputs, low):
    query, row_keys, col_keys = make_retrieval_inputs()
    with torch.autocast("cpu", dtype=low):
        scores, _ = torch.ops.peer.product_key_topk(query.to(low), row_keys, col_keys, 4)
    assert scores.dtype == torch.float32


def test_gradients_come_in_the_dtypes_of_the_parameters(
    make_expert_inputs, make_retrieval_inputs, low
):
    pool = make_expert_inputs(glu=True).requiring_grad()
    keys = make_retrieval_inputs().requiring_grad()
    with torch.autocast("cpu", dtype=low):
        loss = experts(pool)[0].float().square().sum()
        loss = loss + torch.ops.peer.product_key_topk(*keys, 4)[0].sum()
    loss.backward()
    for leaf in (*pool.differentiable(), *keys):
        assert leaf.grad.dtype == torch.float32


def test_gradients_are_the_same_when_backward_runs_inside_the_region(
    make_expert_inputs, make_retrieval_inputs, low
):
    def gradients(inside: bool):
        pool = make_expert_inputs(glu=True).requiring_grad()
        keys = make_retrieval_inputs().requiring_grad()
        with torch.autocast("cpu", dtype=low):
            loss = experts(pool)[0].float().sum()
            loss = loss + torch.ops.peer.product_key_topk(*keys, 4)[0].sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [leaf.grad for leaf in (*pool.differentiable(), *keys)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_double_is_left_alone(make_expert_inputs, make_retrieval_inputs, low):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    keys = make_retrieval_inputs(dtype=torch.float64)
    with torch.autocast("cpu", dtype=low):
        out = experts(inputs)[0]
        scores, indices = torch.ops.peer.product_key_topk(*keys, 4)
    assert torch.equal(out, experts(inputs)[0])
    expected = torch.ops.peer.product_key_topk(*keys, 4)
    assert torch.equal(scores, expected[0])
    assert torch.equal(indices, expected[1])


def test_a_disabled_region_changes_nothing(make_expert_inputs, low):
    inputs = make_expert_inputs()
    with torch.autocast("cpu", dtype=low), torch.autocast("cpu", enabled=False):
        assert torch.equal(experts(inputs)[0], experts(inputs)[0])
        assert experts(inputs)[0].dtype == torch.float32


PEAK = """
import json, torch, peer
from pathlib import Path

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if field in l)
    return int(line.split()[1]) * 1024

experts, dim = 2**20, 64
table = torch.empty(experts, 3, dim).fill_(0.5)
x, weights = torch.randn(16, dim), torch.rand(16, 8)

def run(indices):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu", False)[0]

run(torch.zeros(16, 8, dtype=torch.long))  # allocates what every call needs once
before = status("VmRSS")
out = run(torch.randint(experts, (16, 8)))
assert out.dtype == torch.bfloat16
print(json.dumps({"extra": status("VmHWM") - before, "table": table.nbytes}))
"""


@pytest.mark.long
def test_no_copy_of_the_table_is_made(run_python):
    # A bfloat16 copy of the table would have 384 MiB.
    peak = run_python(PEAK)
    assert peak["table"] == 3 * 2**28
    assert peak["extra"] < 2**23
