"""Frozen and disabled experts of layers: what stays, what learns, and what is saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import DIM, OPTIONS, draw, make_layer
from torch import Tensor, nn

import peer

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "RowwiseAdagrad": lambda tables: peer.optim.RowwiseAdagrad(tables, lr=0.1, weight_decay=0.1),
    "RowwiseAdam": lambda tables: peer.optim.RowwiseAdam(tables, lr=0.1, weight_decay=0.1),
    "SGD": lambda tables: peer.optim.SGD(tables, lr=0.1, momentum=0.9, weight_decay=0.1),
}
DENSE_OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, weight_decay=0.5),
}


def train(
    layer: peer.PEER,
    *optimizers: torch.optim.Optimizer,
    steps: int = 2,
    call: Callable[..., Tensor] | None = None,
) -> None:
    """Some steps on random tokens, with clipping and two micro-batches a step."""
    for number in range(steps):
        for length in (4, 5):
            x, mask = draw(layer, length + number)
            (call or layer)(x, mask).square().sum().backward()
        peer.optim.clip_grad_norm_(layer.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def split(layer: peer.PEER) -> tuple[list[Tensor], list[Tensor]]:
    table = layer.experts.weight
    return [table], [p for p in layer.parameters() if p is not table]


def is_kept(now: Tensor, before: Tensor) -> Tensor:
    """Which rows are equal bit by bit."""
    return (now == before).flatten(1).all(1)


HALF = torch.arange(30) % 3 == 0


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_frozen_rows_and_their_state_are_never_written(name, sparse_grad, fused, dtype):
    layer = make_layer(dtype=dtype, sparse_grad=sparse_grad)
    tables, _ = split(layer)
    optimizer = OPTIMIZERS[name](tables)
    if fused:
        optimizer.fuse_into_backward(layer)
    train(layer, optimizer)  # all rows have momentum
    layer.freeze_experts(HALF)
    before = layer.experts.weight.detach().clone()
    state = copy.deepcopy(optimizer.state[layer.experts.weight])
    train(layer, optimizer, steps=3)
    kept = is_kept(layer.experts.weight, before)
    assert kept[HALF].all()
    assert not kept[~HALF].all()
    for entry, value in optimizer.state[layer.experts.weight].items():
        if isinstance(value, Tensor) and value.dim() > 0:
            rows = (value == state[entry]).reshape(30, -1).all(1)
            assert rows[HALF].all(), entry


def test_a_frozen_expert_still_passes_gradients_to_tokens_and_router(glu):
    layer = make_layer(glu=glu)
    expected = copy.deepcopy(layer)
    layer.freeze_experts(keys=False, router=False)
    x, mask = draw(layer, 5)
    gradients = []
    for each in (layer, expected):
        leaf = x.clone().requires_grad_()
        each(leaf, mask).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in each.router.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert not layer.experts.weight.grad.any()
    assert expected.experts.weight.grad.any()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_freezing_clears_rows_of_a_gradient_that_exists(sparse_grad):
    layer = make_layer(sparse_grad=sparse_grad)
    layer(*draw(layer, 5)).square().sum().backward()
    before = layer.experts.weight.grad.to_dense().clone()
    row_keys = layer.router.row_keys.grad.clone()
    layer.freeze_experts([0, 7])
    gradient = layer.experts.weight.grad.to_dense()
    assert not gradient[[0, 7]].any()
    others = torch.ones(30, dtype=torch.bool).index_fill(0, torch.tensor([0, 7]), False)
    assert torch.equal(gradient[others], before[others])
    assert not layer.router.row_keys.grad[:2].any()
    assert torch.equal(layer.router.row_keys.grad[2:], row_keys[2:])


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
@pytest.mark.parametrize(
    "options", ["paper", "keys_per_head", "bfloat16", "key_norm", "key_norm_16_bits"]
)
def test_frozen_keys_hold_under_any_optimizer(name, options):
    layer = make_layer(options)
    tables, others = split(layer)
    optimizers = OPTIMIZERS["SGD"](tables), DENSE_OPTIMIZERS[name](others)
    train(layer, *optimizers)  # keys have momentum
    layer.freeze_experts([0, 7])  # experts (0, 0) and (1, 2) of a 6 x 5 grid
    rows, columns = (keys.detach().clone() for keys in layer.router.effective_keys())
    train(layer, *optimizers, steps=3)
    for now, before, frozen in (
        (layer.router.effective_keys()[0], rows, [True, True, False, False, False, False]),
        (layer.router.effective_keys()[1], columns, [True, False, True, False, False]),
    ):
        kept = (now == before).all(-1)
        kept = kept.all(0) if kept.dim() == 2 else kept
        assert kept.tolist() == frozen


@pytest.mark.parametrize("options", ["paper", "key_norm"])
def test_unfrozen_keys_go_on_from_their_kept_values(options):
    layer = make_layer(options)
    tables, others = split(layer)
    layer.freeze_experts([0, 7])
    kept = [keys.detach().clone() for keys in layer.router.effective_keys()]
    train(layer, OPTIMIZERS["SGD"](tables), DENSE_OPTIMIZERS["AdamW"](others))
    learned = [keys.detach().clone() for keys in (layer.router.row_keys, layer.router.col_keys)]
    layer.unfreeze_experts([7])  # row 0 and column 0 stay frozen, for expert 0
    assert layer.router.frozen_rows.tolist() == [True, False, False, False, False, False]
    assert layer.router.frozen_columns.tolist() == [True, False, False, False, False]
    assert torch.equal(layer.router.row_keys[1], kept[0][1])
    assert torch.equal(layer.router.col_keys[2], kept[1][2])
    assert torch.equal(layer.router.row_keys[2:], learned[0][2:])
    assert torch.equal(layer.router.col_keys[3:], learned[1][3:])
    layer.unfreeze_experts([0])
    assert layer.router.frozen_rows is None
    assert torch.equal(layer.router.row_keys[0], kept[0][0])
    assert not [name for name, _ in layer.named_buffers() if "frozen" in name or "kept" in name]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_layer_does_not_learn(options):
    layer = make_layer(options)
    layer.freeze_experts()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)  # an optimizer may have made these
    layer.freeze_experts()
    x, mask = draw(layer, 6)
    layer.dropout = 0.0
    y = layer(x, mask)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    if options == "sparse":
        layer.experts.weight.grad = None
    tables, others = split(layer)
    train(layer, OPTIMIZERS["RowwiseAdam"](tables), DENSE_OPTIMIZERS["AdamW"](others))
    assert torch.equal(layer(x, mask), y)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_with_masks_equals_the_reference(options):
    layer = make_layer(options, dropout=0.0)
    tables, others = split(layer)
    layer.freeze_experts(HALF, router=True)
    layer.disable_experts(range(1, 30, 4))
    train(layer, OPTIMIZERS["SGD"](tables), DENSE_OPTIMIZERS["AdamW"](others))
    x, mask = draw(layer, 6)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if "16" in options else {}
    torch.testing.assert_close(layer(x, mask), peer.reference.peer(layer, x, mask), **tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_a_frozen_batch_normalisation_uses_running_statistics_in_training(masked):
    layer = make_layer()
    train(layer)
    layer.freeze_experts()
    x, mask = draw(layer, 6, masked=masked)
    y = layer(x, mask)
    assert torch.equal(layer.eval()(x, mask), y)
    layer.unfreeze_experts()
    assert not torch.equal(layer.train()(x, mask), y)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_router_decides_alone_whether_the_query_network_is_frozen():
    layer = make_layer()
    layer.freeze_experts(router=False)
    assert layer.router.frozen is None
    layer.freeze_experts([3], router=True)
    assert not layer.router.query.weight.requires_grad
    layer.unfreeze_experts([3])
    assert not layer.router.query.weight.requires_grad
    layer.unfreeze_experts([3], router=True)
    assert layer.router.query.weight.requires_grad


@pytest.mark.parametrize(
    "experts",
    [7, [7], range(7, 8), torch.tensor(7), torch.tensor([7, 7], dtype=torch.int32), HALF],
    ids=["int", "list", "range", "scalar", "int32", "mask"],
)
def test_experts_are_ids_or_a_mask(experts):
    layer = make_layer()
    layer.freeze_experts(experts)
    expected = HALF if experts is HALF else torch.arange(30) == 7
    assert torch.equal(layer.experts.frozen, expected)
    layer.unfreeze_experts(experts)
    assert layer.experts.frozen is None
    layer.disable_experts(experts)
    assert torch.equal(layer.experts.disabled, expected)
    layer.enable_experts(experts)
    assert layer.experts.disabled is None


@pytest.mark.parametrize("method", ["freeze_experts", "unfreeze_experts", "disable_experts"])
@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        ([30], IndexError, r"ids in \[0, 30\), got 30"),
        ([-1], IndexError, r"ids in \[0, 30\), got -1"),
        (torch.ones(29, dtype=torch.bool), ValueError, r"mask of shape \[30\], got \[29\]"),
        ([0.5], TypeError, "integer ids or a bool mask"),
    ],
    ids=["too large", "negative", "shape", "dtype"],
)
def test_bad_experts_are_errors_and_change_nothing(method, experts, error, message):
    layer = make_layer()
    layer.freeze_experts([1])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match=message):
        getattr(layer, method)(experts)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_no_experts_freeze_nothing():
    layer = make_layer()
    names = layer.state_dict().keys()
    layer.freeze_experts([])
    layer.freeze_experts(torch.zeros(30, dtype=torch.bool))
    layer.unfreeze_experts()
    assert layer.state_dict().keys() == names
    assert layer.router.query.weight.requires_grad


def test_masks_are_saved_moved_and_copied():
    layer = make_layer()
    layer.freeze_experts(HALF, router=True)
    layer.disable_experts([4])
    other = make_layer()
    other.freeze_experts([29], router=True)
    other.disable_experts([29])
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, mask = draw(layer, 5)
    for each in (other, copy.deepcopy(layer), loaded):
        assert torch.equal(each.experts.frozen, HALF)
        assert torch.equal(each(x, mask), layer(x, mask))
        assert not each.router.query.weight.requires_grad
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.experts.frozen.dtype == torch.bool
    assert half.router.kept_row_keys.dtype == torch.bfloat16
    half(x.bfloat16(), mask).sum().backward()


def test_a_state_with_other_masks_loads_after_grow_to():
    layer, other = make_layer(), make_layer()
    layer.freeze_experts([3])
    for model, state in ((other, layer.state_dict()), (layer, make_layer().state_dict())):
        with pytest.raises(RuntimeError, match=r"experts\.frozen"):
            model.load_state_dict(state)
        model.load_state_dict(state, strict=False)
        peer.grow_to_(model, state).load_state_dict(state)
        assert model.state_dict().keys() == state.keys()


def test_repr_counts_frozen_and_disabled_experts():
    layer = make_layer()
    assert "frozen" not in repr(layer)
    layer.freeze_experts([0, 7])
    layer.disable_experts([1, 2, 3])
    assert "frozen=2, disabled=3" in repr(layer)
    assert "frozen_rows=2, frozen_columns=2" in repr(layer)


def test_resetting_parameters_unfreezes_and_enables():
    layer = make_layer()
    names = layer.state_dict().keys()
    layer.freeze_experts()
    layer.disable_experts([0])
    layer.reset_parameters()
    assert layer.state_dict().keys() == names
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_disabled_experts_are_never_retrieved_and_others_are_as_if_they_did_not_exist():
    layer = make_layer()
    x, _ = draw(layer, 6)
    _, indices = layer.router(x)
    used = indices.unique()[:10]
    layer.disable_experts(used)
    _, indices = layer.router(x, disabled=layer.experts.disabled)
    assert not torch.isin(indices, used).any()
    torch.testing.assert_close(layer(x), peer.reference.peer(layer, x))
    layer.enable_experts()
    assert "disabled" not in layer.state_dict()


def test_enough_experts_stay_enabled():
    layer = make_layer()
    layer.disable_experts(range(20))
    with pytest.raises(ValueError, match="at least num_experts_per_head=4 enabled experts, but 3"):
        layer.disable_experts(range(20, 27))
    assert int(layer.experts.disabled.sum()) == 20
    layer.disable_experts(range(20, 26))
    _, indices = layer.router(draw(layer, 6)[0], disabled=layer.experts.disabled)
    assert indices.unique().tolist() == [26, 27, 28, 29]


def frozen_layer(**options: Any) -> peer.PEER:
    layer = make_layer(**options)
    layer.freeze_experts(HALF)
    layer.disable_experts([1, 5])
    return layer


def test_compiled_layers_see_a_changed_mask():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = draw(layer, 5)
    for change in (lambda: None, lambda: layer.freeze_experts(HALF), layer.freeze_experts):
        change()
        layer.zero_grad()
        compiled(x, mask).square().sum().backward()
        actual = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad()
        layer(x, mask).square().sum().backward()
        for name, p in layer.named_parameters():
            if p.grad is None:
                assert actual[name] is None
            else:
                torch.testing.assert_close(actual[name], p.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripted_and_exported_copies_have_the_masks_they_were_made_with():
    layer = frozen_layer()
    x, mask = draw(layer, 5)
    scripted = torch.jit.script(layer)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    original = copy.deepcopy(layer).eval()
    exported = torch.export.export(original, (x, mask))
    for each in (scripted, torch.jit.load(file)):
        each.zero_grad()
        each(x, mask).square().sum().backward()
        gradient = dict(each.named_parameters())["experts.weight"].grad
        assert not gradient[HALF].any()
        assert gradient[~HALF].any()
    assert torch.equal(exported.module()(x, mask), original(x, mask))


def test_functional_call_takes_masks_as_buffers():
    layer = make_layer().eval()
    layer.freeze_experts([0])
    x, mask = draw(layer, 5)

    def loss(weight: Tensor, frozen: Tensor) -> Tensor:
        state = {"experts.weight": weight, "experts.frozen": frozen}
        return torch.func.functional_call(layer, state, (x, mask)).square().sum()

    weight = layer.experts.weight.detach()
    gradient = torch.func.grad(loss)(weight, HALF)
    assert not gradient[HALF].any()
    assert gradient[0].any() == HALF[0].logical_not()


def test_a_mask_of_another_graph_does_not_matter():
    """Buffers may be written in place between a forward pass and its backward pass."""
    layer = make_layer()
    layer.freeze_experts(HALF)
    loss = layer(*draw(layer, 5)).square().sum()
    for name, buffer in layer.named_buffers():
        if "frozen" in name or "kept" in name:
            buffer.copy_(buffer.clone().logical_not() if buffer.dtype == torch.bool else buffer)
    loss.backward()
    assert not layer.experts.weight.grad[HALF].any()
    assert layer.experts.weight.grad[~HALF].any()


def test_layers_that_share_a_pool_share_its_masks():
    first = make_layer()
    second = peer.PEER(
        DIM, num_experts=(6, 5), heads=3, num_experts_per_head=4, dim_key=8, experts=first.experts
    )
    first.freeze_experts([0])
    assert int(second.experts.frozen.sum()) == 1
    assert second.router.frozen_rows is None
    model = nn.Sequential(first, second)
    model(draw(first, 5)[0]).square().sum().backward()
    assert not first.experts.weight.grad[0].any()
