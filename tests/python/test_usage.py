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


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_token_that_is_not_finite_is_not_counted(number):
    layer, x = make_layer(), torch.randn(5, 10)
    kept = torch.tensor([0, 1, 3, 4])
    expected = sum_by_expert(*layer.router(x[kept]))
    x[2, 3] = number
    with peer.UsageTracker(layer) as tracker:
        layer(x)
    torch.testing.assert_close(tracker.mass, expected[0])
    assert torch.equal(tracker.counts, expected[1])
    assert torch.equal(peer.count_usage(layer, [x])["experts"], expected[1])


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


# ---- Counts of a model's pools.


def make_model(pool: peer.ExpertPool | None = None) -> nn.Sequential:
    """Three layers, the last two of which share a pool."""
    shared = peer.ExpertPool(10, num_experts=48)
    sizes = {"heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return nn.Sequential(
        peer.PEER(10, num_experts=(8, 6), dropout=0.5, **sizes),
        peer.PEER(10, num_experts=(8, 6), experts=shared, **sizes),
        peer.PEER(10, num_experts=(8, 6), experts=shared, **sizes),
    )


def count_by_hand(model: nn.Sequential, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The retrievals of each layer."""
    counts = [torch.zeros(48, dtype=torch.int64) for _ in model]
    for x in batches:
        for layer, count in zip(model, counts, strict=True):
            count += layer.router(x)[1].flatten().bincount(minlength=48)
            x = layer(x)
    return counts


def test_counts_of_a_model_are_those_of_its_pools():
    model, batches = make_model(), [torch.randn(20, 10), torch.randn(2, 7, 10)]
    first, second, third = count_by_hand(model.eval(), batches)
    counts = peer.count_usage(model, batches)
    assert list(counts) == ["0.experts", "1.experts"]
    assert torch.equal(counts["0.experts"], first)
    assert torch.equal(counts["1.experts"], second + third)


def test_counting_changes_nothing_of_a_model_in_training():
    model = make_model().train()
    model[1].eval()
    model[2].router.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    peer.count_usage(model, [torch.randn(20, 10)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_and_hooks_are_restored_after_an_error():
    model = make_model().train()
    with pytest.raises(ValueError, match="expected x of shape"):
        peer.count_usage(model, [torch.randn(20, 10), torch.randn(20, 9)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class TwoInputs(nn.Module):
    """Passes a mask on to its layer."""

    def __init__(self, by_keyword: bool):
        super().__init__()
        self.layer, self.by_keyword = make_layer(), by_keyword

    def forward(self, x, mask=None):
        return self.layer(x, padding_mask=mask) if self.by_keyword else self.layer(x, mask)


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("form", ["positional", "keywords"])
def test_padding_is_not_counted_in_a_model(by_keyword, form):
    model, x = TwoInputs(by_keyword), torch.randn(4, 7, 10)
    mask = torch.arange(7) >= torch.tensor([[7], [3], [0], [5]])
    x[mask] = float("nan")
    batch = {"x": x, "mask": mask} if form == "keywords" else (x, mask)
    counts = peer.count_usage(model, [batch])
    _, indices = model.layer.router(x)
    assert torch.equal(counts["layer.experts"], indices[~mask].flatten().bincount(minlength=48))


def test_the_mask_of_a_layer_does_not_reach_the_next():
    first, second, x = make_layer(), make_layer(), torch.randn(5, 10)
    both = nn.ModuleList([first, second])
    both.forward = lambda x: second(first(x, torch.ones(5, dtype=torch.bool)))
    counts = peer.count_usage(both, [x])
    assert counts["0.experts"].sum() == 0
    assert counts["1.experts"].sum() == 5 * 12


def test_the_mask_of_a_layer_does_not_reach_a_pool_without_a_layer():
    layer, pool, x = make_layer(), peer.ExpertPool(10, num_experts=48), torch.randn(5, 10)
    both = nn.ModuleList([layer, pool])
    indices = torch.randint(48, (5, 6))
    both.forward = lambda x: pool(
        layer(x, torch.ones(5, dtype=torch.bool)), torch.rand(5, 6), indices
    )
    assert peer.count_usage(both, [x])["1"].sum() == 5 * 6


def test_a_pool_without_a_layer_is_counted():
    pool = peer.ExpertPool(10, num_experts=48)
    indices = torch.randint(48, (20, 6))
    counts = peer.count_usage(
        pool, [{"x": torch.randn(20, 10), "weights": torch.rand(20, 6), "indices": indices}]
    )
    assert torch.equal(counts[""], indices.flatten().bincount(minlength=48))


def test_a_compiled_model_is_counted():
    model, x = make_model().eval(), torch.randn(20, 10)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    counts = peer.count_usage(compiled, [x])
    expected = peer.count_usage(model, [x])
    assert [c.tolist() for c in counts.values()] == [c.tolist() for c in expected.values()]


def test_a_model_without_pools_is_an_error():
    with pytest.raises(ValueError, match="expected a model with an ExpertPool"):
        peer.count_usage(nn.Linear(3, 3), [torch.randn(2, 3)])


# ---- Selection by counts.


def test_unused_experts_have_at_most_that_many_retrievals():
    counts = torch.tensor([0, 3, 1, 2])
    assert peer.select_rows.unused(counts).tolist() == [True, False, False, False]
    assert peer.select_rows.unused(counts, at_most=2).tolist() == [True, False, True, True]


def test_specific_experts_are_used_less_by_old_data_in_proportion_to_all_retrievals():
    old, new = torch.tensor([0, 10, 20, 70, 0]), torch.tensor([1, 2, 2, 5, 0])
    # Shares of old data: 0, 0.1, 0.2, 0.7, 0. Shares of new data: 0.1, 0.2, 0.2, 0.5, 0.
    assert peer.select_rows.specific(old, new, 0.5).tolist() == [True, False, False, False, False]
    assert peer.select_rows.specific(old, new, 0.51).tolist() == [True, True, False, False, False]
    assert peer.select_rows.specific(10 * old, new, 1.01).tolist() == [True] * 3 + [False] * 2


def test_selection_keeps_the_names_of_pools():
    old = {"a": torch.tensor([0, 9]), "b": torch.tensor([4, 4, 2])}
    new = {"a": torch.tensor([1, 1]), "b": torch.tensor([0, 0, 5])}
    unused = peer.select_rows.unused(old, at_most=2)
    assert {name: mask.tolist() for name, mask in unused.items()} == {
        "a": [True, False],
        "b": [False, False, True],
    }
    specific = peer.select_rows.specific(old, new, ratio=0.3)
    assert {name: mask.tolist() for name, mask in specific.items()} == {
        "a": [True, False],
        "b": [False, False, True],
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: peer.select_rows.unused(torch.ones(3), at_most=-1), "at least 0, got -1"),
        (lambda: peer.select_rows.unused(torch.ones(3, 2)), r"shape \(N,\), got \[3, 2\]"),
        (lambda: peer.select_rows.specific(torch.ones(3), torch.ones(3), 0), "positive ratio"),
        (lambda: peer.select_rows.specific(torch.ones(3), torch.ones(4), 1), "the same shape"),
        (
            lambda: peer.select_rows.specific({"a": torch.ones(3)}, {"b": torch.ones(3)}, 1),
            "same pools",
        ),
    ],
)
def test_wrong_arguments_of_a_selection_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: peer.select_rows.unused([1, 2]),
        lambda: peer.select_rows.specific({"a": torch.ones(3)}, torch.ones(3), 1),
        lambda: peer.select_rows.specific(torch.ones(3), {"a": torch.ones(3)}, 1),
    ],
)
def test_counts_in_another_form_are_errors(call):
    with pytest.raises(TypeError, match="as a tensor, or all as mappings"):
        call()


def test_without_retrievals_all_shares_are_zero():
    none, some = torch.zeros(3), torch.tensor([0, 1, 2])
    assert peer.select_rows.specific(none, some, 0.1).tolist() == [False, True, True]
    assert peer.select_rows.specific(some, none, 0.1).tolist() == [False, False, False]


class Merging(nn.Linear):
    """Changes its weight when its mode changes, as adapters do that merge for evaluation."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.add_(1)
        return super().train(mode)


def test_counting_does_not_call_train():
    model = nn.Sequential(Merging(10, 10), make_layer())
    before = model[0].weight.clone()
    peer.count_usage(model, [torch.randn(5, 10)])
    assert torch.equal(model[0].weight, before)


def test_counts_made_in_inference_mode_can_be_added_to():
    with torch.inference_mode():
        counts = peer.count_usage(make_layer(), [torch.randn(5, 10)])
    counts["experts"] += 1
    assert counts["experts"].sum() == 5 * 12 + 48
