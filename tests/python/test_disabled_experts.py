"""Disabled experts: retrieval equals ranking all experts and striking out the disabled ones."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from layers import OPTIONS, draw, make_layer
from torch import Tensor
from torch.export import export
from torch.library import opcheck

import peer
from peer import reference

retrieve = torch.ops.peer.product_key_topk
PERCENT = [1, 10, 50, 90, 99, 100]


def make_mask(experts: int, k: int, percent: int, seed: int = 0) -> Tensor:
    """Disables some percent of the experts, but leaves at least k. With 100, exactly k."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator)
    disabled = torch.rand(experts, generator=generator) < percent / 100
    disabled[order[:k]] = False
    return disabled


def strike_out(
    query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int, disabled: Tensor
) -> tuple[Tensor, Tensor]:
    """All experts in order, without the disabled ones; the first k."""
    scores, indices = reference.product_key_topk(query, row_keys, col_keys, disabled.numel())
    shape = (*indices.shape[:-1], int((~disabled).sum()))
    enabled = ~disabled[indices]
    return scores[enabled].view(shape)[..., :k], indices[enabled].view(shape)[..., :k]


def assert_strikes_out(inputs: tuple[Tensor, ...], k: int, disabled: Tensor) -> None:
    """Asserts that scores and ids are equal; the sub-scores must be exact."""
    scores, indices = retrieve(*inputs, k, disabled)
    expected_scores, expected_indices = strike_out(*inputs, k, disabled)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=0, equal_nan=True)


def sub_scores(rows: list[float], columns: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """A query and keys of one token and head with these sub-scores."""
    return torch.ones(1, 1, 2), torch.tensor(rows)[:, None], torch.tensor(columns)[:, None]


# --- equal to ranking all ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("grid", [(1, 70), (70, 1), (9, 8), (16, 16), (3, 50), (33, 65)], ids=str)
@pytest.mark.parametrize("percent", PERCENT)
def test_equals_ranking_all_and_striking_out(make_retrieval_inputs, grid, shared, percent):
    rows, columns = grid
    inputs = make_retrieval_inputs(
        tokens=4, rows=rows, columns=columns, shared=shared, integers=True, seed=percent
    )
    for k in (1, 2, 16, 64):
        assert_strikes_out(inputs, k, make_mask(rows * columns, k, percent, seed=k))


@pytest.mark.parametrize("percent", PERCENT)
def test_equals_ranking_all_for_k_beyond_64(make_retrieval_inputs, percent):
    inputs = make_retrieval_inputs(tokens=3, rows=40, columns=50, integers=True)
    for k in (65, 300, 2000):
        assert_strikes_out(inputs, k, make_mask(2000, k, percent))


def test_equals_ranking_all_in_every_dtype(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(rows=20, columns=13, dtype=dtype, integers=True)
    for percent in (10, 90):
        assert_strikes_out(inputs, 16, make_mask(260, 16, percent))


@pytest.mark.parametrize("percent", [50, 99])
@pytest.mark.parametrize("tokens", [1, 2, 17, 50])
def test_equals_ranking_all_for_any_number_of_tokens(make_retrieval_inputs, tokens, percent):
    inputs = make_retrieval_inputs(tokens=tokens, heads=3, rows=30, columns=40, integers=True)
    assert_strikes_out(inputs, 8, make_mask(1200, 8, percent))


@pytest.mark.parametrize("percent", [10, 90, 99])
def test_equals_ranking_all_on_a_wide_grid(make_retrieval_inputs, percent):
    inputs = make_retrieval_inputs(tokens=3, rows=300, columns=260, integers=True)
    assert_strikes_out(inputs, 16, make_mask(78_000, 16, percent))


@pytest.mark.long
@pytest.mark.parametrize("percent", [50, 99, 100])
def test_equals_ranking_all_of_a_million_experts(make_retrieval_inputs, percent):
    inputs = make_retrieval_inputs(tokens=2, rows=1024, columns=1024, dim_key=64, integers=True)
    assert_strikes_out(inputs, 16, make_mask(2**20, 16, percent))


def test_the_reference_strikes_out(make_retrieval_inputs):
    inputs = make_retrieval_inputs(rows=9, columns=8, integers=True)
    for percent in PERCENT:
        disabled = make_mask(72, 12, percent)
        scores, indices = reference.product_key_topk(*inputs, 12, disabled)
        expected_scores, expected_indices = strike_out(*inputs, 12, disabled)
        assert torch.equal(scores, expected_scores)
        assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_disabling_what_was_retrieved_retrieves_what_comes_next(make_retrieval_inputs, k):
    inputs = make_retrieval_inputs(tokens=1, heads=1, rows=30, columns=20)
    disabled = torch.zeros(600, dtype=torch.bool)
    _, order = reference.product_key_topk(*inputs, 9 * k)
    for following in order.flatten().split(k):
        _, indices = retrieve(*inputs, k, disabled)
        assert torch.equal(indices.flatten(), following)
        disabled[following] = True


@pytest.mark.parametrize("k", [3, 16, 64])
def test_the_best_of_each_half_may_all_be_disabled_with_each_other(k):
    rows, columns = [float(-i) for i in range(80)], [float(-2 * i) for i in range(90)]
    for best in (k, 2 * k, 70):
        if best < 80:
            disabled = torch.zeros(80, 90, dtype=torch.bool)
            disabled[:best, :best] = True
            assert_strikes_out(sub_scores(rows, columns), k, disabled.flatten())


def test_rows_and_columns_may_be_disabled_as_a_whole(make_retrieval_inputs):
    inputs = make_retrieval_inputs(rows=40, columns=50, integers=True)
    for keep_row, keep_column in itertools.product((1, 2, 13, 39), (1, 3, 25)):
        enabled = torch.zeros(40, 50, dtype=torch.bool)
        enabled[::keep_row, ::keep_column] = True
        k = min(int(enabled.sum()), 20)
        assert_strikes_out(inputs, k, ~enabled.flatten())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_sub_scores_of_keys_in_and_out_of_use(value):
    rows, columns = [1.0, value, 3.0, value, 0.0], [value, 5.0, value, -1.0]
    inputs = sub_scores(rows, columns)
    for bits in range(1, 2**9):  # disables the first nine experts in every way
        disabled = torch.zeros(20, dtype=torch.bool)
        disabled[:9] = torch.tensor([bool(bits >> i & 1) for i in range(9)])
        assert_strikes_out(inputs, 6, disabled)
    for row in range(5):
        disabled = torch.zeros(5, 4, dtype=torch.bool)
        disabled[row] = True
        assert_strikes_out(inputs, 6, disabled.flatten())


def test_equal_scores_keep_their_order():
    disabled = torch.zeros(5, 5, dtype=torch.bool)
    disabled[0, 1:4] = disabled[1] = disabled[:, 0] = True
    _, indices = retrieve(*sub_scores([1.0] * 5, [1.0] * 5), 6, disabled.flatten())
    assert indices.flatten().tolist() == [4, 11, 12, 13, 14, 16]


def test_a_mask_that_disables_nothing_changes_no_bit(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(tokens=20, rows=90, columns=70, dim_key=64, dtype=dtype)
    scores, indices = retrieve(*inputs, 16, torch.zeros(6300, dtype=torch.bool))
    expected_scores, expected_indices = retrieve(*inputs, 16)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("percent", [10, 99])
def test_an_expert_has_the_same_score_with_and_without_a_mask(make_retrieval_inputs, percent):
    inputs = make_retrieval_inputs(tokens=5, rows=8, columns=8, dim_key=300)
    scores, indices = retrieve(*inputs, 64)
    disabled = make_mask(64, 9, percent)
    ours, ids = retrieve(*inputs, 9, disabled)
    of_all = torch.empty_like(scores).scatter(-1, indices, scores)
    assert torch.equal(ours, of_all.gather(-1, ids))


def test_a_mask_of_any_strides_gives_the_same_result(make_retrieval_inputs):
    inputs = make_retrieval_inputs(integers=True)
    disabled = make_mask(42, 5, 50)
    spread = torch.ones(42, 3, dtype=torch.bool)
    spread[:, 1] = disabled
    for a, b in zip(
        retrieve(*inputs, 5, spread[:, 1]), retrieve(*inputs, 5, disabled), strict=True
    ):
        assert torch.equal(a, b)


def test_zero_tokens_give_empty_outputs(make_retrieval_inputs):
    scores, indices = retrieve(*make_retrieval_inputs(tokens=0), 4, make_mask(42, 4, 50))
    assert scores.shape == indices.shape == (0, 2, 4)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [0, 1, 3])
def test_fewer_than_k_enabled_experts_are_refused_with_their_number(make_retrieval_inputs, enabled):
    inputs, disabled = make_retrieval_inputs(), make_mask(42, enabled, 100)
    message = f"expected at least k = 4 enabled experts, got {enabled}"
    with pytest.raises(ValueError, match=f"^peer::product_key_topk: {message}"):
        retrieve(*inputs, 4, disabled)
    with pytest.raises(ValueError, match=message):
        reference.product_key_topk(*inputs, 4, disabled)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(), (41,), (43,), (7, 6), (1, 42)], ids=str)
def test_a_mask_must_have_one_element_per_expert(make_retrieval_inputs, shape, device):
    disabled = torch.zeros(shape, dtype=torch.bool, device=device)
    message = r"^peer::product_key_topk: expected disabled of shape \[42\], .* got "
    with pytest.raises(ValueError, match=message + re.escape(str(list(shape)))):
        retrieve(*(t.to(device) for t in make_retrieval_inputs()), 4, disabled)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mask_must_be_bool(make_retrieval_inputs, device):
    inputs = [t.to(device) for t in make_retrieval_inputs()]
    message = "^peer::product_key_topk: expected disabled of dtype bool, .* got Float"
    with pytest.raises(TypeError, match=message):
        retrieve(*inputs, 4, torch.zeros(42, device=device))


def test_a_mask_must_be_on_the_querys_device(make_retrieval_inputs):
    disabled = torch.zeros(42, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError, match=r"^peer::product_key_topk: expected disabled .* device"):
        retrieve(*make_retrieval_inputs(), 4, disabled)


# --- derivatives and transforms ------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("percent", [10, 90])
def test_gradients_equal_autograd_through_the_oracle(make_retrieval_inputs, shared, percent):
    inputs = make_retrieval_inputs(rows=9, columns=8, shared=shared, dtype=torch.float64)
    disabled = make_mask(72, 6, percent)

    def gradients(function):
        leaves = inputs.requiring_grad()
        scores, _ = function(*leaves, 6, disabled)
        return torch.autograd.grad(scores.sin().sum(), leaves)

    for a, b in zip(gradients(retrieve), gradients(strike_out), strict=True):
        torch.testing.assert_close(a, b)


def test_derivatives_of_every_order_and_mode(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=2, dtype=torch.float64).requiring_grad()
    disabled = make_mask(42, 4, 60)

    def scores(*inputs):
        return retrieve(*inputs, 4, disabled)[0]

    assert torch.autograd.gradcheck(scores, tuple(inputs), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scores, tuple(inputs))


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_opcheck(make_retrieval_inputs, dtype, shared):
    inputs = make_retrieval_inputs(dtype=dtype, shared=shared).requiring_grad()
    unit = 8 * torch.finfo(dtype).eps
    opcheck(retrieve.default, (*inputs, 4, make_mask(42, 4, 70)), atol=unit, rtol=unit)


@pytest.mark.usefixtures("no_slow_fallback")
@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("batched", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_vmap_equals_a_loop(make_retrieval_inputs, batched, shared):
    samples = [
        [
            *make_retrieval_inputs(integers=True, shared=shared, seed=seed),
            make_mask(42, 5, 70, seed),
        ]
        for seed in range(3)
    ]
    in_dims = tuple(position % 2 if each else None for position, each in enumerate(batched))
    in_dims = (*in_dims[:3], None if in_dims[3] is None else 1)
    arguments = [
        torch.stack(each, dim) if dim is not None else each[0]
        for each, dim in zip(zip(*samples, strict=True), in_dims, strict=True)
    ]

    def function(query, row_keys, col_keys, disabled):
        scores, indices = retrieve(query, row_keys, col_keys, 5, disabled)
        return (
            scores,
            indices,
            torch.func.grad(
                lambda q: retrieve(q, row_keys, col_keys, 5, disabled)[0].square().sum()
            )(query),
        )

    ours = torch.vmap(function, in_dims)(*arguments)
    for sample in range(3):
        own = [samples[sample if each else 0][position] for position, each in enumerate(batched)]
        for a, b in zip(ours, function(*own), strict=True):
            torch.testing.assert_close(a[sample], b)


def test_autocast_keeps_the_mask(make_retrieval_inputs):
    inputs, disabled = make_retrieval_inputs(integers=True), make_mask(42, 5, 80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, indices = retrieve(*inputs, 5, disabled)
    assert torch.equal(indices, strike_out(*inputs, 5, disabled)[1])


def test_compiled_retrieval_takes_masks_of_any_content(make_retrieval_inputs):
    inputs = make_retrieval_inputs(integers=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(query, row_keys, col_keys, disabled):
        return peer.functional.product_key_topk(query, row_keys, col_keys, 5, disabled)

    for percent in (10, 90):
        disabled = make_mask(42, 5, percent)
        _, indices = compiled(*inputs, disabled)
        assert torch.equal(indices, strike_out(*inputs, 5, disabled)[1])
    assert torch.equal(compiled(*inputs, None)[1], retrieve(*inputs, 5)[1])


def test_the_functional_form_takes_leading_dimensions(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=6, integers=True)
    disabled = make_mask(42, 5, 70)
    scores, indices = peer.functional.product_key_topk(
        query.view(2, 3, 2, 8), row_keys, col_keys, 5, disabled
    )
    expected = strike_out(query, row_keys, col_keys, 5, disabled)
    assert torch.equal(scores, expected[0].view(2, 3, 2, 5))
    assert torch.equal(indices, expected[1].view(2, 3, 2, 5))


# --- the modules ---------------------------------------------------------------------------------


def with_disabled(layer: peer.PEER, percent: int = 60, beyond: int = 0) -> peer.PEER:
    """The layer with a mask on its pool, which has places for `beyond` more experts."""
    disabled = make_mask(layer.num_experts, layer.router.num_experts_per_head, percent)
    layer.experts.disabled = torch.cat([disabled, torch.ones(beyond, dtype=torch.bool)])
    return layer


@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_retrieves_no_disabled_expert(name):
    layer = with_disabled(make_layer(name))
    x, padding = draw(layer, 6)
    _, indices = layer.router(x, padding, layer.experts.disabled)
    assert not layer.experts.disabled[indices].any()


def test_a_layer_equals_the_reference():
    layer = with_disabled(make_layer())
    x, padding = draw(layer, 6)
    torch.testing.assert_close(layer(x, padding), reference.peer(layer, x, padding))
    enabled = copy.deepcopy(layer)
    enabled.experts.disabled = None
    assert not torch.allclose(layer(x, padding), enabled(x, padding))


def test_a_layer_applies_the_part_of_the_mask_that_covers_its_grid():
    x, padding = draw(make_layer(), 6)
    layer, longer = with_disabled(make_layer()), with_disabled(make_layer(), beyond=12)
    assert torch.equal(layer(x, padding), longer(x, padding))
    assert torch.equal(reference.peer(layer, x, padding), reference.peer(longer, x, padding))


def test_disabled_experts_get_no_gradient():
    layer = with_disabled(make_layer())
    x, padding = draw(layer, 6)
    layer(x, padding).square().sum().backward()
    assert (layer.experts.weight.grad[layer.experts.disabled] == 0).all()
    assert (layer.experts.weight.grad[~layer.experts.disabled] != 0).any()


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_a_scripted_layer_equals_eager(masked, tmp_path):
    layer = make_layer().eval()
    if masked:
        with_disabled(layer)
    x, padding = draw(layer, 6)
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    loaded = torch.jit.load(str(tmp_path / "layer.pt"))
    torch.testing.assert_close(loaded(x, padding), layer(x, padding))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_an_exported_layer_equals_eager(masked):
    layer = make_layer().eval()
    if masked:
        with_disabled(layer)
    x, padding = draw(layer, 6)
    exported = export(layer, (x, padding)).module()
    torch.testing.assert_close(exported(x, padding), layer(x, padding))


def test_a_compiled_layer_follows_its_mask():
    layer = with_disabled(make_layer().eval())
    x, padding = draw(layer, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, padding), layer(x, padding))
    with_disabled(layer, percent=30)
    torch.testing.assert_close(compiled(x, padding), layer(x, padding))
    layer.experts.disabled = None
    torch.testing.assert_close(compiled(x, padding), layer(x, padding))


def test_a_router_refuses_a_mask_of_another_size():
    layer = make_layer()
    x, padding = draw(layer, 6)
    with pytest.raises(ValueError, match=r"expected disabled of shape \[30\]"):
        layer.router(x, padding, torch.zeros(31, dtype=torch.bool))
