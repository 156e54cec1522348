"""The operators on a GPU against the operators on the CPU."""

from __future__ import annotations

import pytest
import torch

import peer

EPSILON = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
ADVERSARIAL = ("nan", "inf", "opposite infinities", "zeros", "constant", "all -inf")


def assert_close(a, b, dtype):
    if a.is_sparse:
        assert a.is_coalesced()
        assert torch.equal(a.indices().cpu(), b.indices())
        a, b = a.values(), b.values()
    scale = max(1.0, float(b.double().abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a.cpu(), b, rtol=EPSILON[dtype], atol=EPSILON[dtype] * scale)


def run_experts(inputs, activation, sparse_grad, frozen=None):
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, activation, sparse_grad, frozen)
    grads = torch.ops.peer.expert_mlp_backward(
        out, *inputs, hidden, gate, activation, sparse_grad, (True,) * 3, frozen
    )
    return [out, hidden, gate, *grads]


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dim", [7, 64, 264, 1000, 1024, 2056])
def test_experts(make_expert_inputs, on_gpu, sized, dtype, glu, sparse_grad, dim):
    tokens, per_token, experts = sized((70, 40, 500), (5, 12, 50))
    inputs = make_expert_inputs(
        tokens=tokens, per_token=per_token, experts=experts, dim=dim, dtype=dtype, glu=glu
    )
    expected = run_experts(inputs, "gelu", sparse_grad)
    for a, b in zip(run_experts(on_gpu(inputs), "gelu", sparse_grad), expected, strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot experts"])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_frozen_experts_have_no_gradient_and_the_others_keep_their_bits(
    make_expert_inputs, on_gpu, sized, dtype, glu, sparse_grad, hot, share
):
    tokens, per_token, experts = sized((700, 40, 500), (25, 12, 50))
    inputs = make_expert_inputs(
        tokens=tokens, per_token=per_token, experts=experts, dim=72, dtype=dtype, glu=glu
    )
    generator = torch.Generator().manual_seed(0)
    frozen = torch.rand(experts, generator=generator) < share
    if hot:  # one of them is frozen, but for the extreme shares
        inputs.indices[:, :5], inputs.indices[:, 5:10] = 7, 8
        frozen[7], frozen[8] = share == 1, share > 0
    there = on_gpu(inputs)
    found = run_experts(there, "gelu", sparse_grad, frozen.cuda())
    expected = run_experts(inputs, "gelu", sparse_grad, frozen)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, dtype)
    unmasked = run_experts(there, "gelu", False)
    for a, b in zip(found[:5], unmasked[:5], strict=True):
        assert torch.equal(a, b)
    gradient = found[5].to_dense().cpu()
    assert torch.equal(gradient[~frozen], unmasked[5].cpu()[~frozen])
    assert not gradient[frozen].any()


def test_every_activation(make_expert_inputs, on_gpu, activation, glu):
    inputs = make_expert_inputs(tokens=30, dim=64, glu=glu)
    expected = run_experts(inputs, activation, False)
    for a, b in zip(run_experts(on_gpu(inputs), activation, False), expected, strict=True):
        assert_close(a, b, torch.float32)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_activations_and_tables_of_different_dtypes(
    make_expert_inputs, on_gpu, x_dtype, table_dtype
):
    inputs = make_expert_inputs(tokens=20, dim=64, dtype=x_dtype, table_dtype=table_dtype)
    expected = run_experts(inputs, "silu", True)
    for a, b in zip(run_experts(on_gpu(inputs), "silu", True), expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, max(x_dtype, table_dtype, key=EPSILON.__getitem__))


@pytest.mark.parametrize("per_token", [1, 3, 16, 129, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 2, 500])
def test_few_and_many_tokens_and_experts(make_expert_inputs, on_gpu, sized, tokens, per_token):
    tokens = sized(tokens, min(tokens, 5))
    inputs = make_expert_inputs(tokens=tokens, per_token=per_token, experts=2000, dim=32)
    expected = run_experts(inputs, "gelu", True)
    for a, b in zip(run_experts(on_gpu(inputs), "gelu", True), expected, strict=True):
        assert_close(a, b, torch.float32)


def test_a_table_with_strided_parts_and_rows(make_expert_inputs, on_gpu):
    inputs = make_expert_inputs(tokens=40, experts=90, dim=72)
    expected = run_experts(inputs, "gelu", False)
    around = torch.zeros(90, 5, 80, device="cuda")
    around[:, 1:4:2, 4:76] = inputs.table.cuda()
    moved = on_gpu(inputs)._replace(table=around[:, 1:4:2, 4:76])
    for a, b in zip(run_experts(moved, "gelu", False), expected, strict=True):
        assert_close(a, b, torch.float32)


def assert_same_retrieval(inputs, there, k, disabled=None):
    """Scores and ids of the same inputs here and on the GPU are equal."""
    scores, indices = torch.ops.peer.product_key_topk(*inputs, k, disabled)
    mask = None if disabled is None else disabled.cuda()
    scores_there, indices_there = torch.ops.peer.product_key_topk(*there, k, mask)
    assert torch.equal(scores_there.cpu(), scores)
    assert torch.equal(indices_there.cpu(), indices)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize(
    ("rows", "columns", "k", "dim_key"),
    [(7, 6, 4, 8), (64, 64, 16, 64), (300, 280, 64, 46), (1024, 1024, 16, 256), (5000, 3, 20, 32)],
)
def test_retrieval_of_exact_scores(
    make_retrieval_inputs, on_gpu, sized, dtype, shared, rows, columns, k, dim_key
):
    inputs = make_retrieval_inputs(
        tokens=sized(45, 4),
        heads=3,
        rows=rows,
        columns=columns,
        dim_key=dim_key,
        shared=shared,
        dtype=dtype,
        integers=True,
    )
    assert_same_retrieval(inputs, on_gpu(inputs), k)


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_retrieval_of_special_values(make_retrieval_inputs, sized, kind):
    query, row_keys, col_keys = make_retrieval_inputs(
        tokens=sized(40, 6), rows=200, columns=150, dim_key=2, integers=True
    )
    if kind == "nan":
        row_keys[3::7] = float("nan")
    elif kind == "inf":
        row_keys[3::7], col_keys[5::9] = float("inf"), float("inf")
    elif kind == "opposite infinities":
        row_keys[3::7], col_keys[5::9] = float("inf"), -float("inf")
    elif kind == "zeros":
        query[::2] = -0.0
    elif kind == "constant":
        row_keys[:], col_keys[:] = 1.0, 1.0
    else:
        row_keys[:], query[:] = -float("inf"), 1.0
    inputs = query, row_keys, col_keys
    scores, indices = torch.ops.peer.product_key_topk(*inputs, 16)
    there = torch.ops.peer.product_key_topk(*(t.cuda() for t in inputs), 16)
    torch.testing.assert_close(there[0].cpu(), scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(there[1].cpu(), indices)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("percent", [10, 90, 99.9])
@pytest.mark.parametrize("k", [4, 16, 64])
def test_retrieval_without_disabled_experts(
    make_retrieval_inputs, on_gpu, sized, dtype, shared, percent, k
):
    rows, columns = sized((300, 280), (40, 50))
    inputs = make_retrieval_inputs(
        tokens=sized(45, 2),
        heads=3,
        rows=rows,
        columns=columns,
        shared=shared,
        dtype=dtype,
        integers=True,
    )
    generator = torch.Generator().manual_seed(0)
    disabled = torch.rand(rows * columns, generator=generator) < percent / 100
    disabled[columns : 3 * columns] = True  # two rows
    disabled[-k:] = False
    assert_same_retrieval(inputs, on_gpu(inputs), k, disabled)


def test_retrieval_of_random_scores(make_retrieval_inputs, on_gpu, sized, dtype):
    inputs = make_retrieval_inputs(
        tokens=sized(200, 6), heads=4, rows=1024, columns=1024, dim_key=256, dtype=dtype
    )
    scores, _ = torch.ops.peer.product_key_topk(*inputs, 16)
    there, indices = torch.ops.peer.product_key_topk(*on_gpu(inputs), 16)
    assert_close(there, scores, torch.float32 if dtype != torch.float64 else dtype)
    assert all(len(ids.unique()) == 16 for ids in indices.flatten(0, 1).cpu())


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_retrieval_backward(make_retrieval_inputs, on_gpu, sized, dtype, shared):
    inputs = make_retrieval_inputs(
        tokens=sized(300, 20), heads=3, rows=40, columns=50, dim_key=46, dtype=dtype, shared=shared
    )
    scores, indices = torch.ops.peer.product_key_topk(*inputs, 16)
    arguments = (scores.sin(), *inputs, indices)
    expected = torch.ops.peer.product_key_topk_backward(*arguments, (True,) * 3)
    moved = (t.cuda() for t in arguments)
    for a, b in zip(
        torch.ops.peer.product_key_topk_backward(*moved, (True,) * 3), expected, strict=True
    ):
        assert_close(a, b, dtype)


OPTIMIZERS = {
    "adagrad": (peer.optim.RowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (peer.optim.SGD, {"lr": 0.1}),
    "nesterov": (peer.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (peer.optim.RowwiseAdam, {"lr": 0.1}),
}


@pytest.mark.parametrize("shape", [(9,), (1024,), (2, 64), (3, 9), (2, 3000)], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind, dtype, shape):
    """With the same sparse gradients, results are equal up to rounding."""
    optimizer_class, options = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, *shape, generator=generator).to(dtype)
    table = torch.nn.Parameter(values.clone())
    there = torch.nn.Parameter(values.cuda())
    optimizer = optimizer_class([table], stochastic_rounding=False, **options)
    optimizer_there = optimizer_class([there], stochastic_rounding=False, **options)
    for _ in range(3):
        ids = torch.randint(50, (200,), generator=generator)
        rows = torch.randn(200, *shape, generator=generator).to(dtype)
        table.grad = torch.sparse_coo_tensor(ids[None], rows, values.shape)
        there.grad = torch.sparse_coo_tensor(ids[None].cuda(), rows.cuda(), values.shape)
        optimizer.step()
        optimizer_there.step()
    epsilon = EPSILON[dtype] * 4
    torch.testing.assert_close(there.detach().cpu(), table.detach(), rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("form", ["dense", "pairs"])
@pytest.mark.parametrize("shape", [(9,), (3, 264), (2, 3000)], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rows_of_zeros_in_a_gradient_change_no_bit(kind, dtype, shape, form):
    """The other rows are updated as if there were no zeros."""
    optimizer_class, options = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(70, *shape, generator=generator).to(dtype)
    ids = torch.randint(60, (500,), generator=generator)
    ids[:200] = 9
    zero = torch.arange(70) % 5 == 2
    gradient = torch.randn(70 if form == "dense" else 500, *shape, generator=generator).to(dtype)

    def update(device, zero=None):
        table = torch.nn.Parameter(values.clone().to(device))
        optimizer = optimizer_class([table], stochastic_rounding=False, **options)
        for step in range(3):
            rows = gradient * (step + 1)
            if step > 0 and zero is not None:
                rows[zero if form == "dense" else zero[ids]] = -0.0
            rows = rows.to(device)
            if form == "pairs":
                rows = torch.sparse_coo_tensor(ids[None].to(device), rows, values.shape)
            table.grad = rows
            optimizer.step()
            if step == 0:
                before = [table.detach().clone(), *state_of(optimizer, table)]
        return before, [table.detach(), *state_of(optimizer, table)]

    def state_of(optimizer, table):
        return [v.clone() for v in optimizer.state[table].values() if isinstance(v, torch.Tensor)]

    before, found = update("cuda", zero=zero)
    _, expected = update("cpu", zero=zero)
    _, everywhere = update("cuda")
    epsilon = EPSILON[dtype] * 4
    for a, b, start, every in zip(found, expected, before, everywhere, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=epsilon, atol=epsilon)
        assert torch.equal(a.cpu()[zero], start.cpu()[zero])
        assert torch.equal(a.cpu()[~zero], every.cpu()[~zero])


@pytest.mark.parametrize("form", ["dense", "pairs"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_updates_write_no_frozen_row(dtype, form, share):
    """The other rows are updated as if there were no mask."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    frozen = torch.rand(70, generator=generator) < share
    indices = torch.randint(60, (50, 8), generator=generator) if form == "pairs" else None
    rows = 70 if indices is None else 50
    state = [
        torch.randn(70, 2, 264, generator=generator).to(dtype),
        torch.randn(70, 2, 264, generator=generator).to(dtype),
        torch.rand(70, 2, generator=generator).to(wide),
        torch.arange(70, dtype=torch.int32),
    ]
    gradient = [
        indices,
        torch.randn(rows, 2, 264, generator=generator).to(dtype),
        None if indices is None else torch.randn(2, 50, 8, generator=generator).to(wide),
    ]

    def update(device, frozen):
        def move(tensors):
            return [None if t is None else t.clone().to(device) for t in tensors]

        moved = move(state)
        torch.ops.peer.rowwise_adam_(
            *moved, *move(gradient), 0.1, 0.9, 0.99, 1e-8, 0.1, frozen=frozen
        )
        return [t.cpu() for t in moved]

    found, expected = update("cuda", frozen.cuda()), update("cpu", frozen)
    epsilon = EPSILON[dtype] * 4
    for a, b, start, every in zip(found, expected, state, update("cuda", None), strict=True):
        torch.testing.assert_close(a, b, rtol=epsilon, atol=epsilon)
        assert torch.equal(a[frozen], start[frozen])
        assert torch.equal(a[~frozen], every[~frozen])


@pytest.mark.parametrize("shape", [(500, 40), (500, 3, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_draws_the_same_bits(dtype, shape):
    """With SGD and a power of two as learning rate, rounding is the only inexact step."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    rows = torch.randn(shape, generator=generator).to(dtype)
    tables = [values.clone(), values.cuda()]
    for table in tables:
        torch.ops.peer.sgd_(
            table, None, None, rows.to(table.device), None, 2.0**-7, 0.0, False, 0.0, 5, 3, 1
        )
    assert torch.equal(tables[1].cpu(), tables[0])
    nearest = (values.float() - 2.0**-7 * rows.float()).to(dtype)
    assert not torch.equal(tables[0], nearest)
