"""The pool of experts and the functional form of the experts."""

from __future__ import annotations

import pytest
import torch

import peer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_pool(**options):
    return peer.ExpertPool(9, **{"num_experts": 20, "num_experts_per_token": 6, **options})


def draw_pairs(*leading, experts=20, per_head=(2, 3)):
    shape = (*leading, *per_head)
    return torch.randn(shape), torch.randint(experts, shape)


@pytest.mark.parametrize("dim_out", [None, 4])
def test_equals_the_reference(activation, glu, dim_out):
    pool = make_pool(activation=activation, glu=glu, dim_out=dim_out)
    x, (weights, indices) = torch.randn(5, 7, 9), draw_pairs(5, 7)
    y = pool(x, weights, indices)
    assert y.shape == (5, 7, dim_out or 9)
    tables = pool.w_down, pool.w_up, pool.w_gate
    expected = peer.reference.expert_mlp(x, weights, indices, *tables, activation)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_heads_may_be_flattened(leading):
    pool = make_pool(dim_out=4)
    x, (weights, indices) = torch.randn(*leading, 9), draw_pairs(*leading)
    y = pool(x, weights, indices)
    assert y.shape == (*leading, 4)
    assert torch.equal(y, pool(x, weights.flatten(-2), indices.flatten(-2)))


def test_an_expert_that_is_named_twice_counts_twice():
    pool, x = make_pool(), torch.randn(1, 9)
    once = pool(x, torch.tensor([[1.0]]), torch.tensor([[7]]))
    twice = pool(x, torch.tensor([[0.75, 1.25]]), torch.tensor([[7, 7]]))
    torch.testing.assert_close(twice, 2 * once)


def test_sparse_gradients_equal_the_dense_ones(glu):
    pool = make_pool(glu=glu)
    sparse = make_pool(glu=glu, sparse_grad=True)
    sparse.load_state_dict(pool.state_dict())
    x, (weights, indices) = torch.randn(5, 9), draw_pairs(5, experts=8)
    dense_gradients, sparse_gradients = (
        torch.autograd.grad(each(x, weights, indices).square().sum(), list(each.parameters()))
        for each in (pool, sparse)
    )
    for dense_gradient, gradient in zip(dense_gradients, sparse_gradients, strict=True):
        assert gradient.is_sparse
        assert gradient.is_coalesced()
        assert torch.equal(gradient.indices()[0], indices.unique())
        assert torch.equal(gradient.to_dense(), dense_gradient)


def test_sparse_adam_trains_the_tables():
    pool = make_pool(sparse_grad=True)
    x, target, (weights, indices) = torch.randn(20, 9), torch.randn(20, 9), draw_pairs(20)
    optimizer = torch.optim.SparseAdam(pool.parameters(), lr=0.01)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (pool(x, weights, indices) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_names_and_shapes_in_the_state():
    shapes = {k: tuple(v.shape) for k, v in make_pool(dim_out=4).state_dict().items()}
    assert shapes == {"w_down": (20, 9), "w_up": (20, 4)}
    shapes = {k: tuple(v.shape) for k, v in make_pool(dim_out=4, glu=True).state_dict().items()}
    assert shapes == {"w_down": (20, 9), "w_up": (20, 4), "w_gate": (20, 9)}


def test_tables_start_normal_with_the_documented_scales():
    pool = peer.ExpertPool(64, num_experts=5000, num_experts_per_token=16, dim_out=32, glu=True)
    for table, scale in (pool.w_down, 1 / 8), (pool.w_gate, 1 / 8), (pool.w_up, 1 / 4):
        assert abs(table.mean()) < 0.01 * scale
        torch.testing.assert_close(table.std().item(), scale, rtol=0.01, atol=0)
        torch.testing.assert_close((table / scale).pow(4).mean().item(), 3.0, rtol=0.05, atol=0)


def test_zero_init_out_starts_at_zero_and_learns():
    pool = make_pool(zero_init_out=True)
    x, (weights, indices) = torch.randn(5, 9), draw_pairs(5)
    y = pool(x, weights, indices)
    assert torch.equal(y, torch.zeros(5, 9))
    (y - 1).square().sum().backward()
    assert pool.w_up.grad.abs().max() > 0
    pool.w_up.data.normal_()
    pool.reset_parameters()
    assert torch.equal(pool.w_up, torch.zeros(20, 9))


def test_a_pair_stands_for_its_product():
    assert make_pool(num_experts=(4, 5)).num_experts == 20


def test_factory_arguments_reach_every_table():
    pool = make_pool(glu=True, device="meta", dtype=torch.float16)
    for table in pool.parameters():
        assert table.device.type == "meta"
        assert table.dtype == torch.float16


def test_the_representation_names_the_options():
    assert repr(make_pool(glu=True, activation="relu2")) == (
        "ExpertPool(dim=9, num_experts=20, dim_out=9, activation='relu2', glu=True, "
        "sparse_grad=False)"
    )


def test_the_known_activations_are_those_of_the_operator(make_expert_inputs):
    assert tuple(peer.reference.ACTIVATIONS) == peer.functional.ACTIVATIONS
    with pytest.raises(ValueError, match="none of these") as caught:
        torch.ops.peer.expert_mlp(*make_expert_inputs(), "none of these", False)
    for name in peer.functional.ACTIVATIONS:
        assert name in str(caught.value)
        torch.ops.peer.expert_mlp(*make_expert_inputs(), name, False)


# --- bad input -----------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown activation": (
        {"activation": "swish"},
        "one of 'gelu', 'gelu_tanh', 'relu', 'silu', 'identity', 'relu2', got 'swish'",
    ),
    "no experts": ({"num_experts": 0}, "num_experts to be positive, got 0"),
    "no output": ({"dim_out": 0}, "dim_out to be positive, got 0"),
    "no experts per token": (
        {"num_experts_per_token": 0},
        "num_experts_per_token to be positive, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_gets_a_sentence(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        make_pool(**options)


def test_weights_of_another_shape_than_indices_are_refused():
    weights, indices = draw_pairs(5)
    with pytest.raises(ValueError, match=r"indices' shape \[5, 2, 3\], got \[5, 6\]"):
        make_pool()(torch.randn(5, 9), weights.flatten(1), indices)


@pytest.mark.parametrize("leading", [(7, 5), (35,)], ids=str)
def test_weights_of_other_leading_dimensions_than_x_are_refused(leading):
    # The number of tokens agrees, so the operator could not tell.
    with pytest.raises(ValueError, match=r"\[5, 7\] \+ .* to match x, got "):
        make_pool()(torch.randn(5, 7, 9), *draw_pairs(*leading))


def test_x_of_another_width_is_named():
    with pytest.raises(ValueError, match="w_down"):
        make_pool()(torch.randn(5, 8), *draw_pairs(5))


def test_an_id_out_of_range_is_named():
    weights, indices = draw_pairs(5)
    indices[3, 1, 2] = 20
    with pytest.raises(IndexError, match="20"):
        make_pool()(torch.randn(5, 9), weights, indices)


@pytest.mark.parametrize(
    "options", [{"num_experts": 25}, {"dim_out": 4}, {"num_experts": 25, "glu": True}], ids=str
)
def test_a_checkpoint_of_other_options_says_what_it_holds(options):
    saved = make_pool(**options).state_dict()
    with pytest.raises(RuntimeError) as caught:
        make_pool().load_state_dict(saved)
    theirs, ours = str(caught.value).split("the checkpoint's pool has ")[1].split("this one")
    for option, value in options.items():
        assert f"{option}={value}" in theirs
        assert f"{option}={getattr(make_pool(), option)}" in ours


def test_a_checkpoint_with_or_without_gates_names_the_table_that_is_in_the_way():
    with pytest.raises(RuntimeError, match=r'Unexpected.*"w_gate"'):
        make_pool().load_state_dict(make_pool(glu=True).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing.*"w_gate"'):
        make_pool(glu=True).load_state_dict(make_pool().state_dict())


def test_a_checkpoint_without_gates_loads_where_strictness_is_waived():
    saved = make_pool().state_dict()
    pool = make_pool(glu=True)
    result = pool.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["w_gate"]
    assert torch.equal(pool.w_down, saved["w_down"])
