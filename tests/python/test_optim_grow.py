"""The state of optimizers after their parameters grew."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import make_layer
from torch import nn

import peer

OLD, NEW = 30, 10  # experts of `make_layer`, and those of two more rows

TORCH = {
    "Adam": (torch.optim.Adam, {}),
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"foreach": False}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW, capturable": (torch.optim.AdamW, {"capturable": False, "maximize": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "ASGD": (torch.optim.ASGD, {"t0": 0}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
}
OURS = {
    "RowwiseAdagrad": (peer.optim.RowwiseAdagrad, {"initial_accumulator_value": 0.5}),
    "RowwiseAdam": (peer.optim.RowwiseAdam, {}),
    "peer.optim.SGD": (peer.optim.SGD, {"momentum": 0.9}),
}
OPTIMIZERS = {**TORCH, **OURS}
CORRECTED = [name for name in TORCH if "Adam" in name and name != "Adamax"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_optimizer(name, parameters):
    kind, options = OPTIMIZERS[name]
    return kind(parameters, **{"lr": 0.01, **options})


def train(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()


def gradients_of(parameter, steps=3):
    return [torch.randn(parameter.shape, dtype=torch.float32).to(parameter) for _ in range(steps)]


def rows_of(entry, rows):
    """The first rows of an entry that has rows, along the dimension of a grown table."""
    return entry[:rows] if isinstance(entry, torch.Tensor) and entry.dim() > 0 else entry


def same(ours, theirs):
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("table", ["paper", "bfloat16_tables", "float64"])
def test_old_rows_train_on_as_if_nothing_had_grown(name, table):
    if name not in OURS and table == "bfloat16_tables":
        pytest.skip("torch rounds the last elements of a piece in another way, and 16 bits show it")
    pool = make_layer(table).experts
    twin = copy.deepcopy(pool)
    optimizer, other = (make_optimizer(name, each.parameters()) for each in (pool, twin))
    first = gradients_of(twin.weight)
    train(optimizer, pool.weight, first)
    train(other, twin.weight, first)
    pool.grow(NEW)
    peer.optim.grow_(optimizer)
    later = gradients_of(pool.weight)
    train(optimizer, pool.weight, later)
    train(other, twin.weight, [gradient[:OLD] for gradient in later])
    ours = {**optimizer.state[pool.weight], "weight": pool.weight}
    theirs = {**other.state[twin.weight], "weight": twin.weight}
    assert ours.keys() == theirs.keys()
    for entry, value in theirs.items():
        if name in OURS:
            assert same(rows_of(ours[entry], OLD), value), entry
        else:  # torch rounds the last elements of a tensor in another way
            torch.testing.assert_close(rows_of(ours[entry], OLD), value)


# Adamax, Adadelta and Rprop keep a step count, but none that changes the update of a fresh row.
@pytest.mark.parametrize("name", [*OURS, "Adadelta", "Adagrad", "RMSprop", "Rprop", "SGD"])
def test_new_rows_train_like_those_of_a_new_optimizer(name):
    pool = make_layer().experts
    optimizer = make_optimizer(name, pool.parameters())
    train(optimizer, pool.weight, gradients_of(pool.weight))
    pool.grow(NEW)
    peer.optim.grow_(optimizer)
    fresh = nn.Parameter(pool.weight[OLD:].detach().clone())
    other = make_optimizer(name, [fresh])
    later = gradients_of(pool.weight)
    train(optimizer, pool.weight, later)
    train(other, fresh, [gradient[OLD:] for gradient in later])
    assert torch.equal(pool.weight[OLD:], fresh)


@pytest.mark.parametrize("name", CORRECTED)
def test_the_first_update_of_a_new_row_is_not_too_long(name):
    """A shared step count corrects no zero start of later rows."""
    pool = make_layer().experts
    optimizer = make_optimizer(name, pool.parameters())
    train(optimizer, pool.weight, gradients_of(pool.weight))
    state = optimizer.state[pool.weight]
    state["step"].fill_(10_000)
    state["exp_avg_sq"].uniform_(0.5, 1.5)
    pool.grow(NEW)
    peer.optim.grow_(optimizer)
    for entry in ("exp_avg_sq", "max_exp_avg_sq"):
        if entry in state:
            mean = state[entry][:OLD].mean(0, keepdim=True).expand(NEW, -1, -1)
            torch.testing.assert_close(state[entry][OLD:], mean)
    before = pool.weight.detach().clone()
    train(optimizer, pool.weight, [torch.ones_like(pool.weight)])
    length = (pool.weight - before).abs()[OLD:].max()
    assert 0.0003 < length < 0.004  # with zero second moments, Adam's would be 0.03
    assert state["exp_avg"][OLD:].abs().max() < 0.2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_old_state_is_an_error_that_names_the_call(name):
    layer = make_layer()
    parameters = [layer.router.row_keys, layer.experts.weight]
    optimizer = make_optimizer(name, parameters)
    layer.experts.weight.grad, layer.router.row_keys.grad = map(torch.ones_like, parameters[::-1])
    optimizer.step()
    optimizer.zero_grad()
    layer.grow(2)
    before = [parameter.detach().clone() for parameter in parameters]
    layer.experts.weight.grad, layer.router.row_keys.grad = map(torch.ones_like, parameters[::-1])
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_\(optimizer\) after growing"):
        optimizer.step()
    assert all(map(torch.equal, parameters, before))
    peer.optim.grow_(optimizer)
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))


@pytest.mark.parametrize("name", OURS)
def test_a_fused_update_with_old_state_is_an_error_that_names_the_call(name):
    layer = make_layer()
    optimizer = make_optimizer(name, layer.experts.parameters())
    x = torch.randn(5, 10)
    with optimizer.fuse_into_backward(layer):
        layer(x).sum().backward()
        layer.zero_grad()
        layer.grow(2)
        before = layer.experts.weight.detach().clone()
        loss = layer(x).sum()
        with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_\(optimizer\)"):
            loss.backward()
        assert torch.equal(layer.experts.weight, before)
        del loss
        peer.optim.grow_(optimizer)
        layer(x).sum().backward()
    assert not torch.equal(layer.experts.weight, before)


@pytest.mark.parametrize("name", OURS)
def test_a_fused_update_after_growth_equals_a_step(name):
    layers = [make_layer("sparse") for _ in range(2)]
    optimizers = [make_optimizer(name, layer.experts.parameters()) for layer in layers]
    handle = optimizers[0].fuse_into_backward(layers[0])
    keys = torch.randn(2, 4)
    for x in torch.randn(4, 6, 10):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer(x).square().sum().backward()
            optimizer.step()
            layer.zero_grad()
        for layer, optimizer in zip(layers, optimizers, strict=True):
            torch.manual_seed(layer.num_experts)
            layer.grow(2, keys)
            peer.optim.grow_(optimizer)
    handle.remove()
    assert torch.equal(layers[0].experts.weight, layers[1].experts.weight)


@pytest.mark.parametrize("name", [*TORCH, "Adafactor"])
def test_the_state_of_keys_per_head_grows(name):
    OPTIMIZERS["Adafactor"] = (torch.optim.Adafactor, {})
    router = make_layer("keys_per_head").router
    keys = router.row_keys
    optimizer = make_optimizer(name, [keys])
    train(optimizer, keys, gradients_of(keys))
    before = copy.deepcopy(optimizer.state[keys])
    router.grow(2)
    peer.optim.grow_(optimizer)
    for entry, value in optimizer.state[keys].items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and entry != "col_var":
            assert value.shape[:2] == (3, 8)
            assert torch.equal(value[:, :6], before[entry])
        else:
            assert same(value, before[entry])
    train(optimizer, keys, gradients_of(keys))


def test_factored_state_grows_by_its_rows():
    pool = make_layer().experts
    optimizer = torch.optim.Adafactor(pool.parameters())
    train(optimizer, pool.weight, gradients_of(pool.weight))
    pool.grow(NEW)
    peer.optim.grow_(optimizer)
    state = optimizer.state[pool.weight]
    assert state["row_var"].shape == (40, 2, 1)
    mean = state["row_var"][:OLD].mean(0, keepdim=True).expand(NEW, 2, 1)
    torch.testing.assert_close(state["row_var"][OLD:], mean)


def test_momentum_of_a_matrix_optimizer_grows():
    router = make_layer().router
    optimizer = torch.optim.Muon([router.row_keys])
    train(optimizer, router.row_keys, gradients_of(router.row_keys))
    router.grow(2)
    peer.optim.grow_(optimizer)
    train(optimizer, router.row_keys, gradients_of(router.row_keys))


@pytest.mark.parametrize("name", ["AdamW, fused", "RowwiseAdam"])
def test_the_state_of_a_single_row_grows(name):
    router = make_layer(num_experts=(1, 6)).router
    optimizer = make_optimizer(name, [router.row_keys])
    train(optimizer, router.row_keys, gradients_of(router.row_keys))
    router.grow(1)
    router.row_keys.grad = torch.ones_like(router.row_keys)
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_"):
        optimizer.step()
    peer.optim.grow_(optimizer)
    optimizer.step()
    for value in optimizer.state[router.row_keys].values():
        assert not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) == 2


def test_state_grows_over_several_growths_at_once_and_a_second_call_changes_nothing():
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer.grow(2)
    layer.grow(3)
    peer.optim.grow_(optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    peer.optim.grow_(optimizer)
    after = optimizer.state_dict()["state"]
    assert all(same(after[i][name], before[i][name]) for i in before for name in before[i])
    assert after[[id(p) for p in layer.parameters()].index(id(layer.experts.weight))][
        "exp_avg"
    ].shape == (55, 2, 10)


def test_optimizers_without_state_or_made_later_need_no_call():
    layer = make_layer()
    early = torch.optim.AdamW(layer.parameters(), fused=True)
    layer.grow(2)
    late = torch.optim.AdamW(layer.parameters(), fused=True)
    for optimizer in (early, late):
        layer(torch.randn(5, 10)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        peer.optim.grow_(optimizer)


def test_state_that_was_saved_before_growth_is_an_error_until_it_grows():
    layer = make_layer()
    optimizer = make_optimizer("AdamW, fused", layer.parameters())
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    layer.grow(2)
    peer.optim.grow_(optimizer)
    grown = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    layer(torch.randn(5, 10)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_"):
        optimizer.step()
    peer.optim.grow_(optimizer)
    optimizer.step()
    layer = make_layer()
    layer.grow(1)
    optimizer = make_optimizer("AdamW, fused", layer.parameters())
    optimizer.load_state_dict(grown)
    layer(torch.randn(5, 10)).sum().backward()
    with pytest.raises(RuntimeError, match="its state 'exp_avg' has the shape"):
        optimizer.step()
    with pytest.raises(ValueError, match="has more rows than its parameter of shape"):
        peer.optim.grow_(optimizer)


class Wrapper(torch.optim.Optimizer):
    """Like accelerate's: an optimizer that hands everything to another."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


def test_wrappers_are_unwrapped():
    pool = make_layer().experts
    optimizer = make_optimizer("AdamW", pool.parameters())
    train(optimizer, pool.weight, gradients_of(pool.weight))
    pool.grow(NEW)
    peer.optim.grow_(Wrapper(Wrapper(optimizer)))
    assert len(optimizer.state[pool.weight]["exp_avg"]) == OLD + NEW
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got Linear"):
        peer.optim.grow_(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (torch.zeros(OLD * 20), r"of shape \[600\]"),
        (torch.zeros(OLD, 3, 10), r"of shape \[30, 3, 10\]"),
        (torch.zeros(OLD, 2, 10, 1), r"of shape \[30, 2, 10, 1\]"),
        ([torch.zeros(OLD, 2, 10)], "a collection"),
    ],
)
def test_state_of_unknown_shape_is_refused_and_nothing_is_changed(entry, found):
    layer = make_layer()
    optimizer = torch.optim.AdamW([layer.router.row_keys, layer.experts.weight])
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[layer.experts.weight]["special"] = entry
    layer.grow(2)
    message = rf"AdamW: the state 'special' of a parameter of shape \[40, 2, 10\] is {found}"
    with pytest.raises(ValueError, match=message):
        peer.optim.grow_(optimizer)
    assert optimizer.state[layer.router.row_keys]["exp_avg"].shape == (6, 4)
    assert optimizer.state[layer.experts.weight]["exp_avg"].shape == (30, 2, 10)


def test_state_of_parameters_that_did_not_grow_may_have_any_shape():
    layer = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state[layer.router.col_keys]["special"] = torch.zeros(7)
    layer.grow(2)
    peer.optim.grow_(optimizer)
    layer(torch.randn(5, 10)).sum().backward()
    optimizer.step()


def test_a_compiled_step_checks_the_state_too():
    torch._dynamo.reset()
    pool = make_layer().experts
    optimizer = make_optimizer("AdamW", pool.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    pool.weight.grad = torch.ones_like(pool.weight)
    step()
    optimizer.zero_grad()
    pool.grow(NEW)
    pool.weight.grad = torch.ones_like(pool.weight)
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_"):
        step()
    peer.optim.grow_(optimizer)
    before = pool.weight.detach().clone()
    step()
    assert (pool.weight != before).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_experts_have_fresh_state(name):
    layer = make_layer()
    weight = layer.experts.weight
    optimizer = make_optimizer(name, [weight])
    train(optimizer, weight, gradients_of(weight))
    before = copy.deepcopy(optimizer.state[weight])
    ids = torch.tensor([4, 0, 20])
    kept = torch.ones(OLD, dtype=torch.bool)
    kept[ids] = False
    layer.reset_experts(ids, optimizer)
    for entry, value in optimizer.state[weight].items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            assert same(value, before[entry])
            continue
        assert torch.equal(value[kept], before[entry][kept])
        if entry in ("exp_avg_sq", "max_exp_avg_sq"):
            mean = value[kept].mean(0, keepdim=True)
            torch.testing.assert_close(value[ids], mean.expand(3, -1, -1))
        elif entry == "ax":
            assert torch.equal(value[ids], weight[ids])
        else:
            fresh = {"sum": 0.5, "sum_of_squares": 0.5, "step_size": 0.01}.get(entry, 0.0)
            assert (value[ids] == fresh).all()


def test_experts_are_not_reset_with_old_or_unknown_state():
    layer = make_layer()
    weight = layer.experts.weight
    optimizer = make_optimizer("AdamW", [weight])
    train(optimizer, weight, gradients_of(weight))
    layer.grow(2)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_"):
        layer.reset_experts([3], optimizer)
    peer.optim.grow_(optimizer)
    optimizer.state[weight]["special"] = torch.zeros(7)
    with pytest.raises(ValueError, match="the state 'special'"):
        layer.reset_experts([3], optimizer)
    assert torch.equal(weight, before)
