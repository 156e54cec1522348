"""Derivatives against finite differences in float64, and errors that autograd must raise."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck


def expert_function(inputs, activation: str, sparse_grad: bool = False):
    """`expert_mlp` as a function of the tensors that have gradients."""

    def function(x, weights, table):
        arguments = (x, weights, inputs.indices, table, activation, sparse_grad)
        return torch.ops.peer.expert_mlp(*arguments)[0]

    return function


@pytest.fixture
def small_experts(make_smooth_inputs):
    return make_smooth_inputs(tokens=4, per_token=3, experts=6, dim=4).requiring_grad()


def test_expert_mlp_passes_gradcheck(small_experts, activation):
    function = expert_function(small_experts, activation)
    assert gradcheck(function, small_experts.differentiable())


def test_expert_mlp_passes_gradgradcheck(small_experts, activation):
    function = expert_function(small_experts, activation)
    assert gradgradcheck(function, small_experts.differentiable())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu2"])
def test_expert_mlp_has_right_third_derivatives(small_experts, activation):
    function = expert_function(small_experts, activation)
    inputs = small_experts.differentiable()

    def first_derivatives(*inputs):
        return torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)

    assert gradgradcheck(first_derivatives, inputs)


def test_expert_mlp_passes_gradcheck_where_one_vector_is_down_and_up(make_expert_inputs):
    inputs = make_expert_inputs(tokens=3, experts=4, dim=4, dtype=torch.float64)
    function = expert_function(inputs, "silu")

    def tied(x, weights, part):
        return function(x, weights, part[:, None].expand(-1, 2, -1))

    arguments = (inputs.x, inputs.weights, inputs.table[:, 0])
    arguments = [tensor.clone().requires_grad_() for tensor in arguments]
    assert gradcheck(tied, arguments)
    assert gradgradcheck(tied, arguments)


def test_expert_mlp_passes_gradgradcheck_for_each_subset_of_inputs(make_expert_inputs):
    inputs = make_expert_inputs(
        tokens=3, per_token=2, experts=4, dim=3, dtype=torch.float64, glu=True
    )
    function = expert_function(inputs, "gelu")
    for wanted in range(1, 2**3):
        arguments = [
            tensor.clone().requires_grad_(bool(wanted >> position & 1))
            for position, tensor in enumerate(inputs.differentiable())
        ]
        assert gradgradcheck(function, arguments), wanted


def test_sparse_gradients_pass_gradcheck(small_experts, activation):
    # The finite differences perturb dense tables, so the sparse gradient is compared as dense.
    function = expert_function(small_experts, activation, sparse_grad=True)
    inputs = small_experts.differentiable()
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad((function(*inputs) * weight).sum(), inputs)
    eps = 1e-6
    for tensor, gradient in zip(inputs, gradients, strict=True):
        numerical = torch.empty_like(tensor)
        with torch.no_grad():
            for place in range(tensor.numel()):
                flat, original = tensor.view(-1), tensor.view(-1)[place].item()
                flat[place] = original + eps
                above = (function(*inputs) * weight).sum()
                flat[place] = original - eps
                below = (function(*inputs) * weight).sum()
                flat[place] = original
                numerical.view(-1)[place] = (above - below) / (2 * eps)
        torch.testing.assert_close(gradient.to_dense(), numerical, rtol=1e-5, atol=1e-7)


def test_double_backward_through_a_sparse_gradient_is_refused(make_expert_inputs):
    inputs = make_expert_inputs(dtype=torch.float64).requiring_grad()
    out = torch.ops.peer.expert_mlp(*inputs, "gelu", True)[0]
    with pytest.raises(NotImplementedError, match=r"peer::expert_mlp.*sparse"):
        torch.autograd.grad(
            sum(
                gradient.to_dense().square().sum()
                for gradient in torch.autograd.grad(
                    out.square().sum(), inputs.differentiable(), create_graph=True
                )
            ),
            inputs.x,
        )


def test_double_backward_with_sparse_grad_and_a_frozen_table_is_right(make_expert_inputs):
    inputs = make_expert_inputs(tokens=3, experts=5, dim=4, dtype=torch.float64, glu=True)

    function = expert_function(inputs, "gelu", sparse_grad=True)
    arguments = (inputs.x.requires_grad_(), inputs.weights.requires_grad_(), inputs.table)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_product_key_topk_passes(make_retrieval_inputs, check, shared):
    inputs = make_retrieval_inputs(
        tokens=2, heads=2, rows=5, columns=4, dim_key=4, shared=shared, dtype=torch.float64
    ).requiring_grad()
    assert check(lambda *tensors: torch.ops.peer.product_key_topk(*tensors, 4)[0], tuple(inputs))


def test_product_key_topk_passes_gradcheck_when_k_exceeds_rows_and_columns(make_retrieval_inputs):
    inputs = make_retrieval_inputs(
        tokens=2, heads=2, rows=2, columns=3, dim_key=4, dtype=torch.float64
    ).requiring_grad()

    def function(*tensors):
        return torch.ops.peer.product_key_topk(*tensors, 6)[0]

    assert gradcheck(function, tuple(inputs))
    assert gradgradcheck(function, tuple(inputs))


def test_retrieval_and_experts_together_pass_gradcheck(make_retrieval_inputs, make_expert_inputs):
    retrieval = make_retrieval_inputs(
        tokens=2, heads=2, rows=3, columns=2, dim_key=4, dtype=torch.float64
    ).requiring_grad()
    experts = make_expert_inputs(tokens=2, experts=6, dim=3, dtype=torch.float64).requiring_grad()

    def layer(query, row_keys, col_keys, x, table):
        scores, indices = torch.ops.peer.product_key_topk(query, row_keys, col_keys, 3)
        weights = scores.softmax(-1).flatten(1)
        return torch.ops.peer.expert_mlp(x, weights, indices.flatten(1), table, "gelu", False)[0]

    arguments = (*retrieval, experts.x, experts.table)
    assert gradcheck(layer, arguments)
    assert gradgradcheck(layer, arguments)


def test_no_graph_is_recorded_without_need(make_expert_inputs, make_retrieval_inputs):
    assert torch.ops.peer.expert_mlp(*make_expert_inputs(), "gelu", False)[0].grad_fn is None
    with torch.no_grad():
        leaves = make_retrieval_inputs().requiring_grad()
        assert torch.ops.peer.product_key_topk(*leaves, 4)[0].grad_fn is None


def test_the_pre_activations_carry_no_gradient(make_expert_inputs):
    inputs = make_expert_inputs(glu=True).requiring_grad()
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "gelu", False)
    assert out.requires_grad
    assert not hidden.requires_grad
    assert not gate.requires_grad


def test_backward_twice_needs_retain_graph(make_expert_inputs, make_retrieval_inputs):
    experts = make_expert_inputs().requiring_grad()
    retrieval = make_retrieval_inputs().requiring_grad()
    for loss in (
        torch.ops.peer.expert_mlp(*experts, "gelu", False)[0].sum(),
        torch.ops.peer.product_key_topk(*retrieval, 4)[0].sum(),
    ):
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_changing_a_saved_tensor_before_backward_is_noticed(make_expert_inputs):
    inputs = make_expert_inputs().requiring_grad()
    loss = torch.ops.peer.expert_mlp(*inputs, "gelu", False)[0].sum()
    with torch.no_grad():
        inputs.table.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_the_keys_before_backward_is_noticed(make_retrieval_inputs):
    inputs = make_retrieval_inputs().requiring_grad()
    loss = torch.ops.peer.product_key_topk(*inputs, 4)[0].sum()
    with torch.no_grad():
        inputs.row_keys.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensors_pass_through_hooks(make_expert_inputs):
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    inputs = make_expert_inputs(glu=True)
    plain, hooked = inputs.requiring_grad(), inputs.requiring_grad()
    torch.ops.peer.expert_mlp(*plain, "gelu", False)[0].sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.ops.peer.expert_mlp(*hooked, "gelu", False)[0].sum().backward()
    assert inputs.x.shape in packed
    for a, b in zip(plain.differentiable(), hooked.differentiable(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_activation_checkpointing_gives_the_same_gradients(make_expert_inputs):
    inputs = make_expert_inputs()
    plain, recomputed = inputs.requiring_grad(), inputs.requiring_grad()
    torch.ops.peer.expert_mlp(*plain, "gelu", False)[0].sum().backward()
    out = torch.utils.checkpoint.checkpoint(
        lambda *tensors: torch.ops.peer.expert_mlp(*tensors, "gelu", False)[0],
        *recomputed,
        use_reentrant=False,
    )
    out.sum().backward()
    for a, b in zip(plain.differentiable(), recomputed.differentiable(), strict=True):
        assert torch.equal(a.grad, b.grad)
