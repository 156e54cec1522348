"""`torch.library.opcheck` of every operator: schema, autograd registration, fake tensors, AOT."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

OPERATORS = (
    "product_key_topk",
    "product_key_topk_backward",
    "expert_mlp",
    "expert_mlp_backward",
)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    """Compiled and eager runs call the same kernels; Torch composes second derivatives."""
    unit = torch.finfo(dtype).eps
    return {"atol": 8 * unit, "rtol": 8 * unit}


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_product_key_topk(make_retrieval_inputs, dtype, shared):
    inputs = make_retrieval_inputs(dtype=dtype, shared=shared).requiring_grad()
    opcheck(torch.ops.peer.product_key_topk.default, (*inputs, 4), **tolerances(dtype))


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, False)], ids=str)
def test_product_key_topk_backward(make_retrieval_inputs, dtype, shared, mask):
    inputs = make_retrieval_inputs(dtype=dtype, shared=shared).requiring_grad()
    scores, indices = torch.ops.peer.product_key_topk(*inputs, 4)
    grad = torch.ones_like(scores).requires_grad_()
    opcheck(
        torch.ops.peer.product_key_topk_backward.default,
        (grad, *inputs, indices, mask),
        **tolerances(dtype),
    )


def test_expert_mlp(make_expert_inputs, dtype, glu):
    inputs = make_expert_inputs(dtype=dtype, glu=glu).requiring_grad()
    opcheck(torch.ops.peer.expert_mlp.default, (*inputs, "gelu", False), **tolerances(dtype))


def test_expert_mlp_with_every_activation(make_expert_inputs, activation):
    inputs = make_expert_inputs(glu=True).requiring_grad()
    opcheck(torch.ops.peer.expert_mlp.default, (*inputs, activation, False))


def test_expert_mlp_with_tables_of_another_dtype(make_expert_inputs):
    inputs = make_expert_inputs(
        dtype=torch.bfloat16, weights_dtype=torch.float32, table_dtype=torch.float16, glu=True
    ).requiring_grad()
    opcheck(
        torch.ops.peer.expert_mlp.default,
        (*inputs, "gelu", False),
        **tolerances(torch.bfloat16),
    )


@pytest.mark.parametrize("mask", [(True,) * 3, (True, False, True)], ids=str)
def test_expert_mlp_backward(make_expert_inputs, dtype, glu, mask):
    inputs = make_expert_inputs(dtype=dtype, glu=glu).requiring_grad()
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "silu", False)
    grad_out = torch.ones_like(out).requires_grad_()
    opcheck(
        torch.ops.peer.expert_mlp_backward.default,
        (grad_out, *inputs, hidden, gate, "silu", False, mask),
        **tolerances(dtype),
    )


def test_sparse_gradients_follow_the_schema(make_expert_inputs, dtype):
    # The number of rows of a sparse gradient depends on data, so only eager checks apply.
    inputs = make_expert_inputs(dtype=dtype, glu=True)
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "gelu", True)
    opcheck(
        torch.ops.peer.expert_mlp_backward.default,
        (torch.ones_like(out), *inputs, hidden, gate, "gelu", True, (True,) * 3),
        test_utils=("test_schema", "test_autograd_registration"),
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_tagged_for_the_compiler(name):
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.peer, name).default.tags


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_functional_and_positional(name):
    schema = getattr(torch.ops.peer, name).default._schema
    assert not schema.is_mutable
    assert not any(argument.kwarg_only for argument in schema.arguments)
