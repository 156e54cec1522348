"""The usage tracker."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_layer(**options):
    sizes = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return peer.PEER(10, **{**sizes, **options}).eval()


def sum_by_expert(weights, indices):
    """The definition, computed one retrieval at a time."""
    mass, counts = [0.0] * 48, [0] * 48
    for weight, index in zip(weights.flatten().tolist(), indices.flatten().tolist(), strict=True):
        mass[index] += weight
        counts[index] += 1
    return torch.tensor(mass, dtype=torch.float64), torch.tensor(counts)


def test_mass_and_counts_are_sums_over_all_that_passed():
    layer, batches = make_layer(), [torch.randn(20, 10), torch.randn(2, 7, 10)]
    with peer.UsageTracker(layer) as tracker:
        for x in batches:
            layer(x)
    expected = [sum_by_expert(*layer.router(x)) for x in batches]
    torch.testing.assert_close(tracker.mass, expected[0][0] + expected[1][0])
    assert torch.equal(tracker.counts, expected[0][1] + expected[1][1])


@pytest.mark.parametrize("by_keyword", [True, False])
def test_padding_is_not_counted(by_keyword):
    layer, x = make_layer(), torch.randn(4, 7, 10)
    mask = torch.arange(7) >= torch.tensor([[7], [3], [0], [5]])
    x[mask] = float("nan")
    with peer.UsageTracker(layer) as tracker:
        layer.router(x, padding_mask=mask) if by_keyword else layer(x, mask)
    mass, counts = sum_by_expert(*(result[~mask] for result in layer.router(x)))
    torch.testing.assert_close(tracker.mass, mass)
    assert torch.equal(tracker.counts, counts)


def test_usage_is_the_fraction_of_experts_with_weight():
    layer = make_layer(scores="relu", num_experts_per_head=40)
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(1, 10))
    assert tracker.usage() == (tracker.mass > 0).sum().item() / 48
    assert tracker.usage() < (tracker.counts > 0).sum().item() / 48  # ReLU gave some of them 0


def test_unevenness_is_the_divergence_from_uniform():
    layer = make_layer()
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(50, 10))
    z = (tracker.mass / tracker.mass.sum()).tolist()
    expected = sum(p * math.log(p * 48) for p in z if p > 0)
    assert tracker.unevenness() == pytest.approx(expected)


def test_nothing_seen_is_no_usage_and_an_undefined_unevenness():
    tracker = peer.UsageTracker(make_layer())
    assert tracker.usage() == 0
    assert math.isnan(tracker.unevenness())


def test_layers_that_share_a_pool_are_tracked_together():
    first = make_layer()
    second = make_layer(experts=first.experts)
    x = torch.randn(20, 10)
    with peer.UsageTracker(first, second) as tracker:
        second(first(x))
    y = first(x)
    expected = [sum_by_expert(*layer.router(z)) for layer, z in ((first, x), (second, y))]
    torch.testing.assert_close(tracker.mass, expected[0][0] + expected[1][0])
    assert torch.equal(tracker.counts, expected[0][1] + expected[1][1])


def test_a_layer_that_is_used_twice_or_named_twice_counts_what_it_sees():
    layer, x = make_layer(), torch.randn(20, 10)
    with peer.UsageTracker(layer, layer.router) as tracker:
        nn.Sequential(layer, layer)(x)
    assert tracker.counts.sum() == 2 * 20 * 12


def test_dropout_is_not_seen():
    layer = make_layer(dropout=0.5, query_norm=None).train()
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(20, 10))
    assert tracker.mass.sum().item() == pytest.approx(20 * 3)


def test_reset_forgets():
    layer = make_layer()
    tracker = peer.UsageTracker(layer)
    layer(torch.randn(20, 10))
    tracker.reset()
    assert tracker.mass.sum() == 0
    assert tracker.counts.sum() == 0
    layer(torch.randn(5, 10))
    assert tracker.counts.sum() == 5 * 12


def test_a_removed_tracker_sees_nothing_more():
    layer = make_layer()
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(5, 10))
    layer(torch.randn(5, 10))
    tracker.remove()
    assert tracker.counts.sum() == 5 * 12
    assert not layer.router._forward_hooks


def test_tracking_does_not_change_outputs_or_gradients():
    layer, x = make_layer(), torch.randn(5, 10, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    with peer.UsageTracker(layer) as tracker:
        assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], expected)
    assert not tracker.mass.requires_grad


def test_a_tracker_outlives_inference_mode():
    layer = make_layer()
    with torch.inference_mode():
        tracker = peer.UsageTracker(layer)
        layer(torch.randn(5, 10))
    layer(torch.randn(5, 10))
    assert tracker.counts.sum() == 2 * 5 * 12


def test_a_tracked_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    layer = make_layer()
    with peer.UsageTracker(layer) as tracker:
        torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(5, 10))
    assert tracker.counts.sum() == 5 * 12


def test_a_layer_that_was_made_on_the_meta_device_can_be_tracked():
    layer = make_layer(device="meta")
    tracker = peer.UsageTracker(layer.to_empty(device="cpu"))
    layer.reset_parameters()
    layer(torch.randn(5, 10))
    assert tracker.counts.sum() == 5 * 12


def test_something_else_than_a_layer_is_refused():
    with pytest.raises(TypeError, match="PEER layers or ProductKeyRouters, got Linear"):
        peer.UsageTracker(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got RecursiveScriptModule"):
        peer.UsageTracker(torch.jit.script(make_layer()))


def test_layers_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"same number of experts, got \[36, 48\]"):
        peer.UsageTracker(make_layer(), make_layer(num_experts=36))


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        peer.UsageTracker()
