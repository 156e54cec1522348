"""The pool of experts and the functional form of the experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_pool(dim=9, **options):
    return peer.ExpertPool(dim, **{"num_experts": 20, "num_experts_per_token": 6, **options})


def draw_pairs(*leading, experts=20, per_head=(2, 3)):
    shape = (*leading, *per_head)
    return torch.randn(shape), torch.randint(experts, shape)


def test_equals_the_reference(activation, glu):
    pool = make_pool(activation=activation, glu=glu)
    x, (weights, indices) = torch.randn(5, 7, 9), draw_pairs(5, 7)
    y = pool(x, weights, indices)
    assert y.shape == x.shape
    expected = peer.reference.expert_mlp(x, weights, indices, pool.weight, activation)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_heads_may_be_flattened(leading):
    pool = make_pool()
    x, (weights, indices) = torch.randn(*leading, 9), draw_pairs(*leading)
    y = pool(x, weights, indices)
    assert y.shape == (*leading, 9)
    assert torch.equal(y, pool(x, weights.flatten(-2), indices.flatten(-2)))


def test_an_expert_that_is_named_twice_counts_twice():
    pool, x = make_pool(), torch.randn(1, 9)
    once = pool(x, torch.tensor([[1.0]]), torch.tensor([[7]]))
    twice = pool(x, torch.tensor([[0.75, 1.25]]), torch.tensor([[7, 7]]))
    torch.testing.assert_close(twice, 2 * once)


def test_the_sparse_gradient_equals_the_dense_one(glu):
    pool = make_pool(glu=glu)
    sparse = make_pool(glu=glu, sparse_grad=True)
    sparse.load_state_dict(pool.state_dict())
    x, (weights, indices) = torch.randn(5, 9), draw_pairs(5, experts=8)
    (expected,), (gradient,) = (
        torch.autograd.grad(each(x, weights, indices).square().sum(), each.weight)
        for each in (pool, sparse)
    )
    assert gradient.is_sparse
    assert gradient.is_coalesced()
    assert gradient.dense_dim() == 2
    assert torch.equal(gradient.indices()[0], indices.unique())
    assert torch.equal(gradient.to_dense(), expected)


def test_sparse_adam_trains_the_table():
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


def test_the_state_is_one_table(glu):
    shapes = {k: tuple(v.shape) for k, v in make_pool(glu=glu).state_dict().items()}
    assert shapes == {"weight": (20, 3 if glu else 2, 9)}


# --- the parts of an expert ----------------------------------------------------------------------


def views_of(pool):
    """The parts by name, in their order in a row."""
    names = ("w_down", "w_gate", "w_up") if pool.glu else ("w_down", "w_up")
    return {name: getattr(pool, name) for name in names}


def test_the_parts_of_a_row_are_down_gate_and_up(glu):
    pool = make_pool(glu=glu)
    views = views_of(pool)
    assert torch.equal(torch.stack(list(views.values()), dim=1), pool.weight)
    assert (pool.w_gate is None) == (not glu)
    # The first part gives the hidden value, and the last part the output.
    x, e = torch.randn(9), 7
    hidden = nn.functional.gelu(x @ views["w_down"][e])
    hidden = hidden * (x @ views["w_gate"][e]) if glu else hidden
    y = pool(x, torch.tensor([[2.0]]), torch.tensor([[e]]))
    torch.testing.assert_close(y, 2 * hidden * views["w_up"][e])


def test_what_is_written_to_a_view_is_in_the_table(glu):
    pool = make_pool(glu=glu)
    with torch.no_grad():
        for number, view in enumerate(views_of(pool).values()):
            view[3] = number
            assert (pool.weight[3, number] == number).all()
    assert pool.weight.grad is None


def test_the_gradient_of_a_view_is_the_tables():
    pool = make_pool(glu=True)
    pool.w_gate[3].sum().backward()
    expected = torch.zeros(20, 3, 9)
    expected[3, 1] = 1
    assert torch.equal(pool.weight.grad, expected)


@pytest.mark.parametrize("name", ["w_down", "w_gate", "w_up"])
@pytest.mark.parametrize("make", [torch.zeros, lambda *size: nn.Parameter(torch.zeros(*size))])
def test_a_view_cannot_be_replaced(name, make):
    pool = make_pool(glu=True)
    before = pool.weight.detach().clone()
    with pytest.raises((AttributeError, KeyError), match=name):
        setattr(pool, name, make(20, 9))
    assert torch.equal(pool.weight, before)
    assert [name for name, _ in pool.named_parameters()] == ["weight"]


# --- initialisation ------------------------------------------------------------------------------


def test_parts_start_normal_with_the_documented_scales():
    pool = peer.ExpertPool(64, num_experts=5000, num_experts_per_token=16, glu=True)
    for part, scale in (pool.w_down, 1 / 8), (pool.w_gate, 1 / 8), (pool.w_up, 1 / 4):
        assert abs(part.mean()) < 0.01 * scale
        torch.testing.assert_close(part.std().item(), scale, rtol=0.01, atol=0)
        torch.testing.assert_close((part / scale).pow(4).mean().item(), 3.0, rtol=0.05, atol=0)


@pytest.mark.parametrize(("num_experts", "dim"), [(1, 1), (20, 9), (4097, 7), (5000, 24)])
def test_a_seed_draws_part_after_part(num_experts, dim, glu, dtype):
    options = {"num_experts": num_experts, "num_experts_per_token": 4}
    torch.manual_seed(3)
    pool = peer.ExpertPool(dim, glu=glu, dtype=dtype, **options)
    torch.manual_seed(3)
    for name, view in views_of(pool).items():
        std = 0.5 if name == "w_up" else dim**-0.5
        expected = torch.empty(num_experts, dim, dtype=dtype).normal_(std=std)
        assert torch.equal(view, expected), name


def test_zero_init_out_starts_at_zero_and_learns():
    pool = make_pool(zero_init_out=True)
    x, (weights, indices) = torch.randn(5, 9), draw_pairs(5)
    y = pool(x, weights, indices)
    assert torch.equal(y, torch.zeros(5, 9))
    (y - 1).square().sum().backward()
    assert pool.weight.grad[:, 1].abs().max() > 0
    nn.init.normal_(pool.weight)
    pool.reset_parameters()
    assert torch.equal(pool.w_up, torch.zeros(20, 9))


def test_a_pair_stands_for_its_product():
    assert make_pool(num_experts=(4, 5)).num_experts == 20


def test_factory_arguments_reach_the_table():
    pool = make_pool(glu=True, device="meta", dtype=torch.float16)
    assert pool.weight.device.type == "meta"
    assert pool.weight.dtype == torch.float16


def test_the_representation_names_the_options():
    assert repr(make_pool(glu=True, activation="relu2")) == (
        "ExpertPool(dim=9, num_experts=20, activation='relu2', glu=True, sparse_grad=False)"
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
    "no width": ({"dim": 0}, "dim to be positive, got 0"),
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
    # The number of tokens is right, so the operator cannot detect the error.
    with pytest.raises(ValueError, match=r"\[5, 7\] \+ .* to match x, got "):
        make_pool()(torch.randn(5, 7, 9), *draw_pairs(*leading))


def test_x_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"table of shape .*, 8\] to match x, got \[20, 2, 9\]"):
        make_pool()(torch.randn(5, 8), *draw_pairs(5))


def test_an_id_out_of_range_is_named():
    weights, indices = draw_pairs(5)
    indices[3, 1, 2] = 20
    with pytest.raises(IndexError, match="20"):
        make_pool()(torch.randn(5, 9), weights, indices)


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 25}, {"dim": 4}, {"glu": True}, {"num_experts": 25, "glu": True}],
    ids=str,
)
def test_a_checkpoint_of_other_options_says_what_it_holds(options):
    saved = make_pool(**options).state_dict()
    with pytest.raises(RuntimeError) as caught:
        make_pool().load_state_dict(saved)
    theirs, ours = str(caught.value).split("the checkpoint's pool has ")[1].split("this one")
    for option, value in options.items():
        assert f"{option}={value}" in theirs
        assert f"{option}={getattr(make_pool(), option)}" in ours


def test_a_checkpoint_with_a_table_for_each_part_is_refused_by_name():
    saved = {"w_down": torch.zeros(20, 9), "w_up": torch.zeros(20, 9)}
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"weight".*Unexpected.*"w_down", "w_up"'):
        make_pool().load_state_dict(saved)
