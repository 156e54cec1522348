"""What stands in the padding has no influence, whatever it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layers import OPTIONS, differing, draw, make_layer, step
from torch import Tensor, nn
from torch.export import export

import peer
from peer import reference
from peer.modules import BatchQueryNorm

JUNK = [float("nan"), float("inf"), 1e30]

FORMS: dict[str, Callable[[nn.Module, Tensor, Tensor], nn.Module]] = {
    "eager": lambda layer, *_: layer,
    "scripted": lambda layer, *_: torch.jit.script(layer),
    "traced": lambda layer, *inputs: torch.jit.trace(layer, inputs, check_trace=False),
    "compiled": lambda layer, *_: torch.compile(layer, fullgraph=True, backend="aot_eager"),
    "exported": lambda layer, *inputs: export(layer, inputs).module(),
}


def draw_padded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    x, mask = draw(layer, 7)
    assert mask is not None
    return x, mask


def assert_same_step(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """That all results are equal bit by bit, and finite."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].layout == tensor.layout, name
        assert tensor.to_dense().isfinite().all(), name
        assert torch.equal(ours[name].to_dense(), tensor.to_dense()), name


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_has_no_influence_on_a_step(name, training, junk):
    layer = make_layer(name).train(training)
    x, mask = draw_padded(layer)
    expected = step(copy.deepcopy(layer), x, mask)
    assert_same_step(step(layer, x.masked_fill(mask[..., None], junk), mask), expected)
    assert expected["out"][mask].count_nonzero() == 0
    assert expected["gradient of x"][mask].count_nonzero() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["paper", "rms", "gated", "bfloat16_tables"])
def test_padding_has_no_influence_in_any_form(name, form):
    layer = make_layer(name)
    x, mask = draw_padded(layer)
    junk = x.masked_fill(mask[..., None], float("nan"))
    expected, ours = (FORMS[form](copy.deepcopy(layer), x, mask) for _ in range(2))
    result = step(ours, junk, mask)
    assert all(tensor.isfinite().all() for tensor in result.values())
    # Two runs of a scripted layer can differ by rounding.
    assert differing(result, step(expected, x, mask)) == []


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_outputs_at_padding_have_no_influence(name):
    layer = make_layer(name)
    x, mask = draw_padded(layer)

    def gradients(junk: float) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = layer(leaf, mask)
        cotangent = torch.ones_like(out).masked_fill(mask[..., None], junk)
        inputs = [leaf, *layer.parameters()]
        return [each.to_dense() for each in torch.autograd.grad(out, inputs, cotangent)]

    for ours, theirs in zip(gradients(float("nan")), gradients(0.0), strict=True):
        assert theirs.isfinite().all()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["paper", "layer", "rms", "unnormalised"])
def test_padding_has_no_influence_on_a_router(name):
    router = make_layer(name).router
    x, mask = draw_padded(make_layer(name))
    results = []
    for tokens in x, x.masked_fill(mask[..., None], float("nan")):
        ours = copy.deepcopy(router)
        leaf = tokens.clone().requires_grad_()
        weights, indices = ours(leaf, mask)
        cotangent = torch.arange(weights.numel()).view_as(weights) + 1.0
        weights.backward(cotangent.masked_fill(mask[..., None, None], float("nan")))
        assert weights[mask].count_nonzero() == 0
        parameters = {name: p.grad for name, p in ours.named_parameters()}
        results.append({"weights": weights, "ids": indices, "x": leaf.grad, **parameters})
    assert_same_step(results[1], results[0])


def test_padding_has_no_influence_on_a_batch_norm():
    norm = BatchQueryNorm(4)
    query, mask = torch.randn(9, 4), torch.arange(9) >= 6
    query[mask] = float("nan")
    leaf = query.requires_grad_()
    normed = norm(leaf, mask)
    normed[~mask].square().sum().backward()
    for tensor in normed, leaf.grad, norm.weight.grad, norm.bias.grad:
        assert tensor.isfinite().all()
    assert leaf.grad[mask].count_nonzero() == 0


@pytest.mark.parametrize("name", ["paper", "gated"])
@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda tables: peer.optim.RowwiseAdagrad(tables, lr=0.1, weight_decay=0.1),
        lambda tables: peer.optim.RowwiseAdam(tables, lr=0.1, weight_decay=0.1),
        lambda tables: peer.optim.SGD(tables, lr=0.1, momentum=0.9),
    ],
    ids=["RowwiseAdagrad", "RowwiseAdam", "SGD"],
)
def test_optimizers_update_only_the_rows_of_real_tokens(make_optimizer, sparse, fused, name):
    layer = make_layer(name, sparse_grad=sparse)
    x, mask = draw_padded(layer)
    x, mask = x[2:], mask[2:].clone()
    mask[0, 2:] = mask[1] = True
    ids = layer.router(x, mask)[1]
    used = torch.zeros(layer.num_experts, dtype=torch.bool)
    used[ids[~mask].flatten()] = True
    assert not used[ids[mask].flatten()].all()
    results = []
    for tokens in x, x.masked_fill(mask[..., None], float("nan")):
        ours = copy.deepcopy(layer)
        optimizer = make_optimizer([ours.experts.weight])
        if fused:
            with optimizer.fuse_into_backward(ours):
                for _ in range(2):
                    ours(tokens, mask).square().sum().backward()
        else:
            for _ in range(2):
                ours(tokens, mask).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append({"table": ours.experts.weight.detach()})
    assert_same_step(results[1], results[0])
    changed = (results[0]["table"] != layer.experts.weight).flatten(1).any(1)
    # The query network and the keys stay, so the second step retrieves the same rows.
    assert torch.equal(changed, used)


def test_padding_is_not_counted_whatever_it_is():
    layer = make_layer()
    x, mask = draw_padded(layer)
    results = []
    for tokens in x, x.masked_fill(mask[..., None], float("nan")):
        ours = copy.deepcopy(layer)
        with peer.UsageTracker(ours) as tracker:
            ours(tokens, mask)
        counted = peer.count_usage(ours, [(tokens, mask)])["experts"]
        results.append({"mass": tracker.mass, "counts": tracker.counts, "counted": counted})
    assert_same_step(results[1], results[0])
    assert results[0]["counts"].sum() == int((~mask).sum()) * 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_table_that_is_not_finite_leaves_outputs_at_padding_zero(bad):
    layer = make_layer()
    with torch.no_grad():
        layer.experts.w_up.fill_(bad)
    x, mask = draw_padded(layer)
    assert layer(x, mask)[mask].count_nonzero() == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_has_the_same_outputs(name):
    layer = make_layer(name, dropout=0.0)
    x, mask = draw_padded(layer)
    x = x.masked_fill(mask[..., None], float("nan"))
    tolerance = {"rtol": 0.1, "atol": 0.1} if x.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x, mask), reference.peer(layer, x, mask), **tolerance)


def test_a_batch_of_padding_alone_does_nothing():
    layer = make_layer()
    x, mask = draw_padded(layer)
    before = copy.deepcopy(layer.state_dict())
    results = step(layer, torch.full_like(x, float("nan")), torch.ones_like(mask))
    assert results["out"].count_nonzero() == 0
    for name, tensor in results.items():
        if name.startswith("gradient"):
            assert tensor.count_nonzero() == 0, name
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
