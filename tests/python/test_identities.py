"""Identities that follow from the definition in the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import peer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(**options):
    sizes = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return peer.PEER(10, **{**sizes, **options}).double()


@pytest.fixture
def x():
    return torch.randn(20, 10, dtype=torch.float64)


# --- 1: retrieval by product keys is retrieval ---------------------------------------------------


@pytest.mark.parametrize("share_keys", [True, False])
def test_product_keys_retrieve_the_best_of_all_full_keys(x, share_keys):
    router = make_layer(share_keys=share_keys, query_norm=None).router
    _, indices = router(x)
    query = router.query(x).view(20, 3, 8)
    rows, columns = router.row_keys, router.col_keys
    if share_keys:
        rows, columns = rows.expand(3, -1, -1), columns.expand(3, -1, -1)
    full_keys = torch.cat(  # (H, R, C, dim_key): every concatenation [row key; column key]
        [rows[:, :, None].expand(-1, -1, 6, -1), columns[:, None].expand(-1, 8, -1, -1)], dim=-1
    ).flatten(1, 2)
    scores = torch.einsum("thd,hnd->thn", query, full_keys)
    assert torch.equal(indices, scores.topk(4).indices)


# --- 2: one expert per head under softmax --------------------------------------------------------


def test_the_softmax_over_one_expert_is_exactly_one_and_the_layer_an_mlp(x):
    layer = make_layer(scores="sigmoid", num_experts_per_head=1, query_norm=None)
    router, pool = layer.router, layer.experts
    query = router.query(x).view(20, 3, 8)
    scores, indices = peer.functional.product_key_topk(query, router.row_keys, router.col_keys, 1)
    weights = peer.functional.router_weights(scores, "softmax")
    assert torch.equal(weights, torch.ones_like(weights))
    y = pool(x, weights, indices)
    for t in range(20):
        ids = indices[t].flatten()
        mlp = F.gelu(pool.w_down[ids] @ x[t]) @ pool.w_up[ids]  # three hidden neurons
        torch.testing.assert_close(y[t], mlp)


def test_the_softmax_over_one_expert_gives_the_scores_no_gradient():
    scores = torch.randn(20, 3, 1, requires_grad=True)
    weights = peer.functional.router_weights(scores, "softmax")
    (gradient,) = torch.autograd.grad((weights * torch.randn(20, 3, 1)).sum(), scores)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_so_the_softmax_over_one_expert_is_refused():
    with pytest.raises(ValueError, match="the router would get no gradient"):
        make_layer(num_experts_per_head=1)


# --- 3: distinct within a head, repeated across heads --------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 47, 48])
def test_the_experts_of_a_head_are_distinct(x, k):
    _, indices = make_layer(num_experts_per_head=k).router(x)
    ordered = indices.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()


def test_heads_that_agree_add_up_in_output_and_gradients(x):
    one, two = make_layer(heads=1, query_norm=None), make_layer(heads=2, query_norm=None)
    state = one.state_dict()
    state["router.query.weight"] = torch.cat(2 * [state["router.query.weight"]])
    two.load_state_dict(state)
    assert torch.equal(*two.router(x)[1].unbind(1))
    y, doubled = one(x), two(x)
    torch.testing.assert_close(doubled, 2 * y)
    y.sum().backward()
    doubled.sum().backward()
    for name in "router.row_keys", "router.col_keys", "experts.weight":
        once, twice = one.get_parameter(name).grad, two.get_parameter(name).grad
        assert once.abs().max() > 0
        torch.testing.assert_close(twice, 2 * once)


# --- 4: heads have no order ----------------------------------------------------------------------


@pytest.mark.parametrize("query_norm", ["batch", "layer", "rms", None])
@pytest.mark.parametrize("share_keys", [True, False])
def test_permuting_heads_leaves_the_output_unchanged(x, query_norm, share_keys):
    layer = make_layer(query_norm=query_norm, share_keys=share_keys)
    for parameter in layer.router.norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0)
    permuted = make_layer(query_norm=query_norm, share_keys=share_keys)
    state, heads = layer.state_dict(), torch.tensor([2, 0, 1])
    for name, tensor in state.items():
        if name == "router.query.weight" or (name.startswith("router.norm.") and tensor.dim()):
            state[name] = tensor.unflatten(0, (3, 8))[heads].flatten(0, 1)
        elif name.endswith("_keys") and not share_keys:
            state[name] = tensor[heads]
    permuted.load_state_dict(state)
    assert torch.equal(permuted.router(x)[1], layer.router(x)[1][:, heads])
    torch.testing.assert_close(permuted(x), layer(x))


def test_permuting_weights_and_indices_together_leaves_the_output_unchanged(x):
    layer = make_layer()
    weights, indices = layer.router(x)
    heads = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        layer.experts(x, weights[:, heads], indices[:, heads]), layer.experts(x, weights, indices)
    )


# --- 5: a constant added to all scores of a head -------------------------------------------------


def test_a_constant_added_to_the_scores_changes_nothing_under_softmax():
    scores, constant = torch.randn(20, 3, 4).double(), torch.randn(20, 3, 1).double()
    weigh = peer.functional.router_weights
    torch.testing.assert_close(weigh(scores + constant), weigh(scores))


@pytest.mark.parametrize("function", ["sigmoid", "relu"])
def test_a_constant_added_to_the_scores_changes_the_other_weights(function):
    scores = torch.rand(20, 3, 4).double()
    weigh = peer.functional.router_weights
    assert ((weigh(scores + 1, function) - weigh(scores, function)) > 0.1).all()


# --- 6: all experts selected ---------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "relu"])
def test_a_head_that_retrieves_all_experts_is_a_dense_gated_mlp(x, scores):
    layer = make_layer(heads=1, num_experts_per_head=48, scores=scores, query_norm=None)
    router, pool = layer.router, layer.experts
    row_query, col_query = router.query(x).chunk(2, dim=-1)
    row_scores, col_scores = row_query @ router.row_keys.T, col_query @ router.col_keys.T
    all_scores = (row_scores[:, :, None] + col_scores[:, None, :]).flatten(1)  # (T, N)
    gates = {
        "softmax": lambda s: s.softmax(-1),
        "sigmoid": torch.sigmoid,
        "relu": torch.relu,
    }[scores](all_scores)
    dense = (gates * F.gelu(x @ pool.w_down.T)) @ pool.w_up
    torch.testing.assert_close(layer(x), dense)


# --- 7: batch normalisation is linear in evaluation ----------------------------------------------


@pytest.mark.parametrize("query_bias", [True, False])
def test_batch_norm_folds_into_the_projection_without_changing_outputs(x, query_bias):
    layer = make_layer(query_bias=query_bias)
    for parameter in layer.router.norm.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(5):
        layer(torch.randn_like(x) * 2 + 1)
    before = layer.eval()(x)
    names = set(layer.state_dict())
    peer.fold_query_norm_(layer)
    torch.testing.assert_close(layer(x), before)
    assert {name for name in names if ".norm." in name}.isdisjoint(layer.state_dict())


# --- 8: bounds of usage and unevenness -----------------------------------------------------------


class Routed(peer.ProductKeyRouter):
    """A router that retrieves the given experts."""

    def forward(self, x, padding_mask=None):
        indices = x.long()
        return torch.full(indices.shape, 1 / 3), indices


def track(indices):
    router = Routed(10, num_experts=(8, 6), heads=3, num_experts_per_head=4)
    with peer.UsageTracker(router) as tracker:
        router(indices)
    return tracker


def test_all_experts_equally_used_have_usage_one_and_unevenness_zero():
    tracker = track(torch.arange(48).view(4, 3, 4))
    assert tracker.usage() == 1.0
    assert tracker.unevenness() == pytest.approx(0.0, abs=1e-12)


def test_a_single_used_expert_has_unevenness_log_n():
    tracker = track(torch.full((4, 3, 1), 17))
    assert tracker.usage() == 1 / 48
    assert tracker.unevenness() == pytest.approx(math.log(48))


def test_half_of_the_experts_equally_used_have_unevenness_log_two():
    tracker = track(torch.arange(24).view(2, 3, 4))
    assert tracker.usage() == 0.5
    assert tracker.unevenness() == pytest.approx(math.log(2))


def test_usage_and_unevenness_of_a_layer_lie_within_their_bounds(x):
    layer = make_layer()
    with peer.UsageTracker(layer) as tracker:
        layer(x)
    assert 0 < tracker.usage() <= 1
    assert 0 < tracker.unevenness() < math.log(48)
