"""Gradients in float32 of 16-bit tables, on request by `Tensor.grad_dtype`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

import peer

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[BFLOAT16, FLOAT16], ids=str)
def dtype(request):
    return request.param


def make_pool(dtype: torch.dtype, grad_dtype: torch.dtype | None = None, **options):
    pool = peer.ExpertPool(9, num_experts=20, dtype=dtype, **options)
    if grad_dtype is not None:
        pool.weight.grad_dtype = grad_dtype
    return pool


def draw(dtype: torch.dtype, tokens: int = 40):
    indices = torch.randint(20, (tokens, 4))
    return torch.randn(tokens, 9, dtype=dtype), torch.rand(tokens, 4), indices


def backward(pool, x: Tensor, weights: Tensor, indices: Tensor, scale: float = 1.0) -> Tensor:
    pool.zero_grad()
    (pool(x, weights, indices).float().square().sum() * scale).backward()
    return pool.weight.grad


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("given", ["16 bits", "float32"])
def test_the_sum_over_retrievals_is_not_rounded(dtype, glu, sparse_grad, given):
    wide = make_pool(dtype, torch.float32, glu=glu, sparse_grad=sparse_grad)
    wide.freeze_experts([3])
    narrow = make_pool(dtype, glu=glu, sparse_grad=sparse_grad)
    narrow.load_state_dict({"weight": wide.weight.detach()})
    narrow.freeze_experts([3])
    inputs = draw(dtype if given == "16 bits" else torch.float32)
    actual, rounded = backward(wide, *inputs), backward(narrow, *inputs)
    assert actual.dtype == torch.float32
    assert rounded.dtype == dtype
    assert actual.layout == rounded.layout == (torch.sparse_coo if sparse_grad else torch.strided)
    actual, rounded = actual.to_dense(), rounded.to_dense()
    assert torch.equal(actual.to(dtype), rounded)  # the only difference is the last rounding
    assert not torch.equal(actual, rounded.float())
    assert (actual[3] == 0).all()


def test_a_sum_beyond_the_range_of_float16_is_finite():
    _, weights, indices = draw(FLOAT16, tokens=4000)
    inputs = torch.ones(4000, 9, dtype=FLOAT16), weights, indices.fill_(3)
    wide, narrow = make_pool(FLOAT16, torch.float32), make_pool(FLOAT16)
    assert backward(wide, *inputs, scale=2.0**12).isfinite().all()
    assert not backward(narrow, *inputs, scale=2.0**12).isfinite().all()


def test_a_sparse_sum_that_torch_cannot_make_names_the_way_out():
    pool = make_pool(FLOAT16, sparse_grad=True)
    for _ in range(2):
        pool(*draw(FLOAT16)).float().square().sum().backward()
        pool.zero_grad()  # nothing to add to
    pool(*draw(FLOAT16)).float().square().sum().backward()
    loss = pool(*draw(FLOAT16)).float().square().sum()
    with (
        pytest.warns(UserWarning, match=r"set table\.grad_dtype = torch\.float32"),
        pytest.raises(RuntimeError, match="not implemented for 'Half'"),
    ):
        loss.backward()


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_other_tables_have_gradients_in_their_dtype(sparse_grad):
    for table_dtype in torch.float32, torch.float64, BFLOAT16:
        pool = make_pool(table_dtype, sparse_grad=sparse_grad)
        x, weights, indices = draw(table_dtype)
        assert backward(pool, x, weights.to(table_dtype), indices).dtype == table_dtype


def test_torch_converts_to_any_other_dtype():
    pool, inputs = make_pool(BFLOAT16, torch.float64), draw(BFLOAT16)
    expected = backward(make_pool_like(pool), *inputs)
    assert torch.equal(backward(pool, *inputs), expected.double())


def make_pool_like(pool, **options):
    like = make_pool(pool.weight.dtype, **options)
    like.load_state_dict(pool.state_dict())
    return like


def test_double_backward_and_vmap_take_the_gradient(dtype):
    pool = make_pool(dtype, torch.float32)
    x, weights, indices = draw(dtype)
    x.requires_grad_()
    loss = pool(x, weights, indices).float().square().sum()
    (gradient,) = torch.autograd.grad(loss, pool.weight, create_graph=True)
    assert gradient.dtype == torch.float32
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()
    assert second.abs().max() > 0

    def grads(grad_out, x, weights, indices):
        _, hidden, gate = torch.ops.peer.expert_mlp(x, weights, indices, pool.weight, "gelu")
        return torch.ops.peer.expert_mlp_backward(
            *(grad_out, x, weights, indices, pool.weight, hidden, gate, "gelu", False),
            *([True] * 3, None, torch.float32),
        )

    samples = [torch.randn(3, 5, 9, dtype=dtype) for _ in range(2)]
    samples += [torch.rand(3, 5, 4), torch.randint(20, (3, 5, 4))]
    with torch.no_grad():
        batched = torch.vmap(grads)(*samples)
        each = zip(*(grads(*sample) for sample in zip(*samples, strict=True)), strict=True)
    for together, one_by_one in zip(batched, each, strict=True):
        assert torch.equal(together, torch.stack(one_by_one))
    assert batched[2].dtype == torch.float32


@pytest.mark.parametrize("wanted", [FLOAT16, torch.float64])
def test_the_operator_refuses_other_dtypes(wanted):
    x, weights, indices = draw(BFLOAT16)
    table = torch.randn(20, 2, 9, dtype=BFLOAT16)
    out, hidden, gate = torch.ops.peer.expert_mlp(x, weights, indices, table, "gelu")
    arguments = (out, x, weights, indices, table, hidden, gate, "gelu", False, [True] * 3, None)
    for device in "cpu", "meta":
        moved = [each.to(device) if isinstance(each, Tensor) else each for each in arguments]
        with pytest.raises(TypeError, match="expected grad_table_dtype BFloat16 or Float"):
            torch.ops.peer.expert_mlp_backward(*moved, wanted)


def test_a_compiled_pool_has_gradients_in_float32(dtype):
    pool, inputs = make_pool(dtype, torch.float32), draw(dtype)
    expected = backward(pool, *inputs)
    actual = backward(torch.compile(pool, fullgraph=True, backend="aot_eager"), *inputs)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.01)


def deep_copied(pool):
    return copy.deepcopy(pool)


def pickled(pool):
    file = io.BytesIO()
    torch.save(pool, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def grown(pool):
    pool.grow(5)
    return pool


def assigned(pool):
    pool.load_state_dict(make_pool(pool.weight.dtype).state_dict(), assign=True)
    return pool


def materialised(pool):
    return pool.to("meta").to_empty(device="cpu")


def converted(pool):
    return pool.float().to(FLOAT16)


@pytest.mark.parametrize("change", [deep_copied, pickled, grown, assigned, materialised, converted])
def test_the_request_survives(change):
    pool = make_pool(BFLOAT16, torch.float32, sparse_grad=True)
    changed = change(pool)
    assert changed.weight.grad_dtype == torch.float32
    x, weights, indices = draw(changed.weight.dtype)
    assert backward(changed, x, weights, indices).dtype == torch.float32


def test_no_request_survives_conversions_either():
    pool = deep_copied(make_pool(BFLOAT16)).float()
    assert pool.weight.grad_dtype == torch.float32
    assert backward(pool, *draw(torch.float32)).dtype == torch.float32
    assert pickled(pool).to(BFLOAT16).weight.grad_dtype == BFLOAT16
