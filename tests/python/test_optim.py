"""The optimizers for tables against their formulas on a dense table in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import peer
from peer.optim import SGD, RowwiseAdagrad, RowwiseAdam

ROWS, WIDTH = 13, 9

# Every optimizer, with options that use each term of its update rule.
OPTIMIZERS = {
    "adagrad": (RowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.5, "initial_accumulator_value": 0.3}),
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.5}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.8}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.5}),
    "adam": (RowwiseAdam, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.5}),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    return request.param


def make_optimizer(kind, params, **options):
    optimizer, defaults = OPTIMIZERS[kind]
    return optimizer(params, **{**defaults, **options})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_table(dtype=torch.float32, shape=(ROWS, WIDTH)):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))


def sparse(ids, values, rows=ROWS):
    ids = torch.as_tensor(ids)[None]
    return torch.sparse_coo_tensor(ids, values, (rows, *values.shape[1:]), check_invariants=True)


def draw_gradient(dtype=torch.float32, row=(WIDTH,)):
    """Ten unordered ids with repetitions, without the last row."""
    return sparse(torch.randint(ROWS - 1, (10,)), torch.randn(10, *row).to(dtype))


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_bits(a, b):
    assert torch.equal(bits(a), bits(b))


class Reference:
    """The documented update rules in float64, one row at a time.

    The rows with a nonzero gradient are updated.
    """

    def __init__(self, kind: str, table: Tensor) -> None:
        self.optimizer, self.options = OPTIMIZERS[kind]
        self.table = table.detach().double().clone()
        self.m = torch.zeros_like(self.table)
        self.v = torch.full((len(table),), self.options.get("initial_accumulator_value", 0.0))
        self.v = self.v.double()
        self.t = [0] * len(table)

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double().to_dense()
        for row in gradient.flatten(1).any(1).nonzero().flatten().tolist():
            self.table[row] = self.update(row, self.table[row], gradient[row])

    def update(self, row: int, w: Tensor, g: Tensor) -> Tensor:
        lr = self.options["lr"]
        w = (1 - lr * self.options.get("weight_decay", 0.0)) * w
        if self.optimizer is RowwiseAdagrad:
            self.v[row] += g.square().mean()
            return w - lr * g / (self.v[row].sqrt() + 1e-10)
        if self.optimizer is SGD:
            momentum = self.options.get("momentum", 0.0)
            self.m[row] = momentum * self.m[row] + g
            if self.options.get("nesterov", False):
                return w - lr * (g + momentum * self.m[row])
            return w - lr * self.m[row]
        beta1, beta2 = self.options["betas"]
        self.t[row] += 1
        self.m[row] = beta1 * self.m[row] + (1 - beta1) * g
        self.v[row] = beta2 * self.v[row] + (1 - beta2) * g.square().mean()
        m = self.m[row] / (1 - beta1 ** self.t[row])
        v = self.v[row] / (1 - beta2 ** self.t[row])
        return w - lr * m / (v.sqrt() + 1e-8)


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_follows_its_mathematics(kind, dtype):
    table = make_table(dtype)
    optimizer, reference = make_optimizer(kind, [table]), Reference(kind, table)
    for _ in range(6):
        table.grad = draw_gradient(dtype)
        reference.step(table.grad)
        optimizer.step()
    torch.testing.assert_close(table.detach(), reference.table.to(dtype))


def test_a_dense_gradient_updates_the_rows_in_which_it_is_not_zero(kind):
    table = make_table(torch.float64)
    optimizer, reference = make_optimizer(kind, [table]), Reference(kind, table)
    for step in range(4):
        table.grad = torch.randn_like(table)
        table.grad[step % 3] = 0  # a row that has momentum and steps later
        reference.step(table.grad)
        optimizer.step()
    torch.testing.assert_close(table.detach(), reference.table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_16_bit_tables_stay_within_a_rounding_of_the_mathematics(kind, dtype, stochastic_rounding):
    table = make_table(dtype)
    optimizer = make_optimizer(kind, [table], stochastic_rounding=stochastic_rounding)
    reference = Reference(kind, table)
    gradient = draw_gradient(dtype)
    table.grad = gradient.clone()
    reference.step(gradient)
    optimizer.step()
    unit = torch.finfo(dtype).eps * (1 if stochastic_rounding else 0.5)
    torch.testing.assert_close(table.detach().double(), reference.table, rtol=unit, atol=1e-5)


def rows_of(optimizer, table):
    """The table and the state of its rows."""
    return [table] + [v for v in optimizer.state[table].values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("row", [(WIDTH,), (3, WIDTH)], ids=["flat", "parts"])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_dense_and_sparse_gradients_give_the_same_training(kind, dtype, row, stochastic_rounding):
    dense, sparse_ = (make_table(dtype, (ROWS, *row)) for _ in range(2))
    sparse_.data.copy_(dense.data)
    options = {"stochastic_rounding": stochastic_rounding, "seed": 3}
    optimizers = [make_optimizer(kind, [table], **options) for table in (dense, sparse_)]
    for _ in range(5):
        gradient = draw_gradient(dtype, row).coalesce()
        gradient.values()[0] = 0.0  # stored zeros of both signs
        gradient.values()[1] = -0.0
        dense.grad, sparse_.grad = gradient.to_dense(), gradient
        for optimizer in optimizers:
            optimizer.step()
    first, second = (rows_of(*each) for each in zip(optimizers, (dense, sparse_), strict=True))
    for ours, theirs in zip(first, second, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("form", ["dense", "coalesced", "repeated ids"])
def test_a_step_with_a_gradient_of_zeros_changes_nothing(kind, dtype, form):
    table = make_table(dtype, (ROWS, 2, WIDTH))
    optimizer = make_optimizer(kind, [table])
    table.grad = torch.randn_like(table)
    optimizer.step()
    before = [each.detach().clone() for each in rows_of(optimizer, table)]
    if form == "dense":
        table.grad = torch.zeros_like(table)
        table.grad[::2] = -0.0
    else:
        ids = [2, 5, 5] if form == "repeated ids" else [2, 5, 7]
        values = torch.randn(3, 2, WIDTH).to(dtype) * (form == "repeated ids")
        values[0] = 0
        values[1] = -values[2]  # cancel
        table.grad = sparse(ids, values)
    optimizer.step()
    for new, old in zip(rows_of(optimizer, table), before, strict=True):
        assert_same_bits(new, old)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 100])
def test_one_number_that_is_not_zero_updates_its_whole_row(dtype, width):
    numbers = [torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 3.0, torch.nan]
    for number in numbers:
        # Row i has the number in place i of its two parts.
        table = nn.Parameter(torch.ones(2 * width + 1, 2, width, dtype=dtype))
        table.grad = torch.zeros_like(table)
        table.grad.view(len(table), -1).fill_diagonal_(number)
        SGD([table], lr=0.5, weight_decay=1.0).step()
        assert (table[:-1] != 1).all()
        assert (table[-1] == 1).all()


def test_denormal_numbers_are_not_zero_where_arithmetic_takes_them_as_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        table = nn.Parameter(torch.ones(3, WIDTH))
        table.grad = torch.zeros_like(table)
        table.grad.view(torch.int32)[1, 4] = 1
        SGD([table], lr=0.5, weight_decay=1.0).step()
    finally:
        torch.set_flush_denormal(False)
    assert table[:, 0].tolist() == [1.0, 0.5, 1.0]


def test_reading_the_state_for_a_distributed_checkpoint_changes_no_row(kind):
    # Torch makes a step with gradients of zeros, so that the optimizer has a state.
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = peer.ExpertPool(WIDTH, num_experts=ROWS)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(kind, model.parameters())
    state_dict.get_optimizer_state_dict(model, optimizer)
    assert_same_bits(model.weight, before)
    trained = copy.deepcopy(model)
    fresh = make_optimizer(kind, trained.parameters())
    for each, its_optimizer in ((model, optimizer), (trained, fresh)):
        each.weight.grad = torch.ones_like(each.weight)
        its_optimizer.step()
    for ours, theirs in zip(
        rows_of(optimizer, model.weight), rows_of(fresh, trained.weight), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("row", [(WIDTH,), (2, WIDTH)], ids=["flat", "parts"])
def test_a_distributed_checkpoint_resumes_bit_by_bit(kind, dtype, row):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    gradients = [draw_gradient(dtype, row) for _ in range(4)]

    def make_model():
        model = nn.Module()
        model.table = make_table(dtype, (ROWS, *row))
        return model, make_optimizer(kind, model.parameters())

    def run(model, optimizer, gradients):
        for gradient in gradients:
            model.table.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()

    first, optimizer = make_model()
    run(first, optimizer, gradients[:2])
    model_state, state = checkpoint.get_state_dict(first, optimizer)
    model_state, state = saved_and_loaded((model_state, state))
    second, resumed = make_model()
    checkpoint.set_state_dict(second, resumed, model_state_dict=model_state, optim_state_dict=state)
    for each, its_optimizer in ((first, optimizer), (second, resumed)):
        run(each, its_optimizer, gradients[2:])
    assert_same_bits(first.table, second.table)
    assert_same_state(resumed.state[second.table], optimizer.state[first.table])


@pytest.mark.parametrize("whole_step", [False, True])
def test_a_compiled_step_is_compiled_once(kind, whole_step):
    torch._dynamo.reset()
    table, other = make_table(torch.bfloat16), make_table(torch.bfloat16)
    with torch.no_grad():
        other.copy_(table)
    optimizer, eager = make_optimizer(kind, [table]), make_optimizer(kind, [other])

    def train(scale):
        if whole_step:
            (table * scale).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(train, backend="aot_eager")
    for i in range(6):
        scale = torch.full((), 1.0 + i)
        if not whole_step:
            table.grad = 2 * scale**2 * table.detach()
        other.grad = None
        (other * scale).square().sum().backward()
        if not whole_step:
            other.grad = 2 * scale**2 * other.detach()
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            compiled(scale)
        eager.step()
        torch.testing.assert_close(table, other)
    torch._dynamo.reset()


def test_a_closure_may_be_compiled():
    torch._dynamo.reset()
    table = make_table()
    optimizer = SGD([table], lr=0.1)
    loss_of = torch.compile(lambda: table.square().sum(), backend="aot_eager", fullgraph=True)

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    expected = 0.8 * table.detach()
    optimizer.step(closure)
    torch.testing.assert_close(table.detach(), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_on_dense_gradients_is_torch_s(nesterov):
    table = make_table()
    other = nn.Parameter(table.detach().clone())
    optimizers = [
        SGD([table], 0.1, momentum=0.9, nesterov=nesterov),
        torch.optim.SGD([other], 0.1, momentum=0.9, nesterov=nesterov),
    ]
    for _ in range(5):
        table.grad = torch.randn_like(table)
        other.grad = table.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(table, other)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW"])
def test_at_width_one_on_dense_gradients_it_is_torch_s(name):
    # Row-wise state is then state per weight.
    table = make_table(shape=(ROWS, 1))
    other = nn.Parameter(table.detach().clone())
    decay = 0.3 if name == "AdamW" else 0.0
    optimizers = [
        (RowwiseAdagrad if name == "Adagrad" else RowwiseAdam)([table], 0.1, weight_decay=decay),
        getattr(torch.optim, name)([other], 0.1, weight_decay=decay),
    ]
    for _ in range(5):
        table.grad = torch.randn_like(table)
        other.grad = table.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(table, other)


def test_a_row_is_updated_as_if_other_steps_had_not_happened(kind):
    alone, table = make_table(), make_table()
    with torch.no_grad():
        alone[3] = table[3]
    gradients = torch.randn(4, 1, WIDTH)
    optimizer = make_optimizer(kind, [alone])
    for gradient in gradients:
        alone.grad = sparse([3], gradient)
        optimizer.step()
    optimizer = make_optimizer(kind, [table])
    for gradient in gradients:
        for _ in range(3):
            table.grad = sparse([1, 7], torch.randn(2, WIDTH))
            optimizer.step()
        table.grad = sparse([7, 3, 0], torch.cat([torch.ones(1, WIDTH), gradient, gradient]))
        optimizer.step()
    assert_same_bits(table[3], alone[3])


def test_the_first_touch_of_a_late_row_moves_by_the_learning_rate():
    table = nn.Parameter(torch.zeros(ROWS, WIDTH))
    optimizer = RowwiseAdam([table], lr=0.1)
    for _ in range(100):
        table.grad = sparse([0], torch.ones(1, WIDTH))
        optimizer.step()
    table.grad = sparse([5], torch.ones(1, WIDTH))
    optimizer.step()
    torch.testing.assert_close(table[5].detach(), torch.full((WIDTH,), -0.1))


@pytest.mark.parametrize("are_sorted", [False, True])
def test_repeated_ids_count_as_their_sum(kind, are_sorted):
    # Small integers: their sums are exact in any order.
    ids, values = torch.randint(ROWS, (300,)), torch.randint(-3, 4, (300, WIDTH)).float()
    ids = ids.sort().values if are_sorted else ids
    tables = [make_table() for _ in range(2)]
    with torch.no_grad():
        tables[1].copy_(tables[0])
    tables[0].grad = sparse(ids, values)
    tables[1].grad = sparse(ids, values).coalesce()
    for table in tables:
        make_optimizer(kind, [table]).step()
    assert_same_bits(*tables)


def test_gradients_that_accumulate_over_micro_batches_count_as_their_sum(kind):
    pools = [peer.ExpertPool(9, num_experts=20, sparse_grad=True) for _ in range(2)]
    pools[1].load_state_dict(pools[0].state_dict())
    x, weights, indices = torch.randn(6, 9), torch.rand(6, 4), torch.randint(20, (6, 4))
    for half in (slice(0, 3), slice(3, 6)):
        pools[0](x[half], weights[half], indices[half]).square().sum().backward()
    pools[1](x, weights, indices).square().sum().backward()
    for pool in pools:
        make_optimizer(kind, pool.parameters()).step()
    torch.testing.assert_close(pools[0].weight, pools[1].weight)


class TestFloat32GradientsOf16BitTables:
    """`grad_dtype`, with which sums over micro-batches do not round and losses can be scaled."""

    @pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
    def pool(self, request):
        pool = peer.ExpertPool(9, num_experts=20, sparse_grad=True, dtype=request.param)
        pool.weight.grad_dtype = torch.float32
        return pool

    def backward(self, pool, scaler=None):
        x, weights = torch.randn(6, 9, dtype=pool.weight.dtype), torch.rand(6, 4)
        loss = pool(x, weights.to(x.dtype), torch.randint(20, (6, 4))).float().square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()

    def test_micro_batches_add_without_rounding(self, kind, pool):
        total = torch.zeros(pool.weight.shape)
        for _ in range(16):
            before = 0 if pool.weight.grad is None else pool.weight.grad.to_dense()
            self.backward(pool)
            total += pool.weight.grad.to_dense() - before
        assert pool.weight.grad.dtype == torch.float32
        assert pool.weight.grad.layout == torch.sparse_coo
        torch.testing.assert_close(pool.weight.grad.to_dense(), total)
        before = pool.weight.detach().clone()
        make_optimizer(kind, pool.parameters()).step()
        assert not torch.equal(pool.weight, before)

    @pytest.mark.parametrize("number", [1.0, math.inf, math.nan])
    def test_a_scaler_steps_or_skips_the_step(self, kind, pool, number):
        optimizer = make_optimizer(kind, pool.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            self.backward(pool, scaler)
        pool.weight.grad._values()[0, 0, 0] = number
        scaler.unscale_(optimizer)
        peer.optim.clip_grad_norm_(pool.parameters(), 1.0)
        before = pool.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(pool.weight, before) == (number != 1.0)
        assert scaler.get_scale() == (8.0 if number == 1.0 else 4.0)
        assert bool(optimizer.state) == (number == 1.0)


def test_rows_without_a_gradient_keep_their_bits_and_state(kind):
    table = make_table(torch.bfloat16)
    optimizer = make_optimizer(kind, [table])
    table.grad = torch.ones_like(table)
    optimizer.step()
    before = [table.detach().clone()] + [
        value.clone() for value in optimizer.state[table].values() if isinstance(value, Tensor)
    ]
    table.grad = sparse([4, 2, 4], torch.randn(3, WIDTH).bfloat16())
    optimizer.step()
    after = [table.detach()] + [
        value for value in optimizer.state[table].values() if isinstance(value, Tensor)
    ]
    untouched = [row for row in range(ROWS) if row not in (2, 4)]
    for old, new in zip(before, after, strict=True):
        assert_same_bits(old[untouched], new[untouched])
        assert not torch.equal(old[[2, 4]], new[[2, 4]])


def test_a_million_rows(kind):
    rows = 1024**2
    table = nn.Parameter(torch.zeros(rows, 4))
    ids = torch.randperm(rows)[:5000]
    table.grad = sparse(ids, torch.ones(5000, 4), rows)
    make_optimizer(kind, [table]).step()
    moved = (table.detach() != 0).all(1).nonzero().squeeze(1)
    assert torch.equal(moved, ids.sort().values)
    assert len(table.detach()[ids].unique()) == 1


@pytest.mark.parametrize("row", [(WIDTH,), (2, WIDTH)], ids=["flat", "parts"])
def test_strided_tables_are_updated_in_place(kind, row):
    both = torch.randn(ROWS, 2, *row)
    before, other = both.clone(), nn.Parameter(both[:, 0].clone())
    table = nn.Parameter(both[:, 0])
    assert table.data_ptr() == both.data_ptr()
    table.grad = draw_gradient(row=row)
    other.grad = table.grad.clone()
    for each in (table, other):
        make_optimizer(kind, [each]).step()
    assert_same_bits(both[:, 0], other)
    assert_same_bits(both[:, 1], before[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot row"])
@pytest.mark.parametrize("row", [(11,), (3, 11)], ids=["flat", "parts"])
def test_the_same_bits_for_any_number_of_threads(kind, dtype, hot, row):
    ids = torch.randint(3000, (40000,))
    if hot:
        ids[torch.rand(40000) < 0.9] = 1234
    gradient = sparse(ids, torch.randn(40000, *row).to(dtype), 3000)
    start, results = make_table(dtype, (3000, *row)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        table = nn.Parameter(start.detach().clone())
        optimizer = make_optimizer(kind, [table])
        for _ in range(2):
            table.grad = gradient
            optimizer.step()
        results.append(table)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("shape", [(5, 0), (0, 4), (5, 2, 0), (0, 2, 4)], ids=str)
def test_nothing_to_update(kind, shape):
    for table, gradient in (
        (nn.Parameter(torch.ones(shape)), torch.ones(shape)),
        (make_table(), sparse(torch.empty(0, dtype=torch.long), torch.ones(0, WIDTH))),
        (
            nn.Parameter(torch.ones(shape)),
            sparse(torch.empty(0).long(), torch.ones(0, *shape[1:]), shape[0]),
        ),
    ):
        before = table.detach().clone()
        table.grad = gradient
        make_optimizer(kind, [table]).step()
        assert torch.equal(table, before)


# --- parts ---------------------------------------------------------------------------------------


def part_of(gradient, part):
    if not gradient.is_sparse:
        return gradient[:, part].clone()
    return sparse(gradient._indices()[0], gradient._values()[:, part].clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("form", ["repeated ids", "coalesced", "dense"])
def test_parts_are_updated_as_tables_of_their_own(kind, dtype, parts, form):
    table = make_table(dtype, (ROWS, parts, WIDTH))
    alone = [nn.Parameter(part.clone()) for part in table.detach().unbind(1)]
    optimizer = make_optimizer(kind, [table])
    for_alone = make_optimizer(kind, alone)
    for _ in range(4):
        if form == "dense":
            table.grad = torch.randn_like(table)
        else:
            table.grad = draw_gradient(dtype, (parts, WIDTH))
        if form == "coalesced":
            table.grad = table.grad.coalesce()
        for part, other in enumerate(alone):
            other.grad = part_of(table.grad, part)
        optimizer.step()
        for_alone.step()
    for part, other in enumerate(alone):
        assert_same_bits(table[:, part], other)
        for name, value in for_alone.state[other].items():
            whole = optimizer.state[table][name]
            if name in ("step", "row_steps"):  # of rows, for any number of parts
                assert torch.equal(torch.as_tensor(whole), torch.as_tensor(value))
            else:
                assert_same_bits(whole[:, part], value)


@pytest.mark.parametrize("row", [(WIDTH,), (2, WIDTH), (3, WIDTH)], ids=str)
def test_shapes_of_the_state(kind, row):
    table = make_table(torch.bfloat16, (ROWS, *row))
    optimizer = make_optimizer(kind, [table])
    table.grad = draw_gradient(torch.bfloat16, row)
    optimizer.step()
    found = {k: v.shape for k, v in optimizer.state[table].items() if isinstance(v, Tensor)}
    per_part, per_row = (ROWS, *row[:-1]), (ROWS,)
    momentum = {"momentum_buffer": table.shape} if kind in ("momentum", "nesterov") else {}
    assert found == {
        "adagrad": {"sum_of_squares": per_part},
        "adam": {"first_moment": table.shape, "second_moment": per_part, "row_steps": per_row},
    }.get(kind, momentum)


def test_a_pool_is_updated_as_its_parts_would_be(kind, glu):
    pool = peer.ExpertPool(9, num_experts=20, glu=glu, sparse_grad=True, dtype=torch.float64)
    alone = [nn.Parameter(part.clone()) for part in pool.weight.detach().unbind(1)]
    optimizers = [make_optimizer(kind, pool.parameters()), make_optimizer(kind, alone)]
    x, weights, indices = torch.randn(6, 9).double(), torch.rand(6, 4), torch.randint(20, (6, 4))
    for _ in range(3):
        pool(x, weights.double(), indices).square().sum().backward()
        table = torch.stack(alone, dim=1)
        peer.functional.expert_mlp(x, weights.double(), indices, table).square().sum().backward()
        for part, each in zip(pool.weight.grad.to_dense().unbind(1), alone, strict=True):
            assert_same_bits(part, each.grad)
            each.grad = sparse(indices.unique(), each.grad[indices.unique()], 20)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for part, each in zip(pool.weight.unbind(1), alone, strict=True):
        assert_same_bits(part, each)


# --- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_below_half_a_unit_arrive_on_average(dtype):
    """6 standard deviations: a correct optimizer fails once in 5 * 10^8 runs."""
    change = 0.1 * torch.finfo(dtype).eps
    tables = [nn.Parameter(torch.ones(200, 50, dtype=dtype)) for _ in range(2)]
    for table, stochastic_rounding in zip(tables, (False, True), strict=True):
        optimizer = SGD([table], lr=change, stochastic_rounding=stochastic_rounding)
        for _ in range(10):
            table.grad = torch.full_like(table, -1.0)
            optimizer.step()
    nearest, stochastic = (table.detach().double() - 1 for table in tables)
    assert (nearest == 0).all()
    unit = torch.finfo(dtype).eps
    deviation = unit * math.sqrt(10 * 0.1 * 0.9 / stochastic.numel())
    assert abs(stochastic.mean() - 10 * change) < 6 * deviation


def test_parts_of_a_row_have_random_bits_of_their_own():
    table = nn.Parameter(torch.ones(4, 2, 500).bfloat16())
    first = nn.Parameter(table.detach()[:, 0].clone())
    for each in (table, first):
        each.grad = torch.ones_like(each)
        SGD([each], lr=1e-3).step()
    assert not torch.equal(table[:, 0], table[:, 1])
    assert_same_bits(table[:, 0], first)


def test_random_bits_depend_on_seed_step_table_and_row():
    def run(seed, steps, place):
        tables = [nn.Parameter(torch.ones(4, 500).bfloat16()) for _ in range(2)]
        optimizer = SGD(tables, lr=1e-3, seed=seed)
        for _ in range(steps):
            for table in tables:
                table.data.fill_(1)
                table.grad = torch.ones_like(table)
            optimizer.step()
        return tables[place].detach()

    first = run(0, 1, 0)
    assert_same_bits(first, run(0, 1, 0))
    second = run(0, 2, 0)
    for other in (run(1, 1, 0), second, run(0, 1, 1), run(0, 3, 0)):
        assert not torch.equal(first, other)
    assert not torch.equal(second, run(0, 3, 0))
    assert not torch.equal(first[0], first[1])


def test_float_tables_ignore_stochastic_rounding(kind):
    tables = [nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)]
    for table, seed in zip(tables, (1, 2), strict=True):
        table.grad = torch.full_like(table, 0.3)
        make_optimizer(kind, [table], seed=seed).step()
    assert_same_bits(*tables)


# --- as a torch.optim.Optimizer ------------------------------------------------------------------


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_resumes_bit_by_bit(kind, dtype, way):
    row = (2, WIDTH)
    gradients = [draw_gradient(dtype, row) for _ in range(6)]
    start = make_table(dtype, (ROWS, *row))
    whole, first = (nn.Parameter(start.detach().clone()) for _ in range(2))

    def run(table, optimizer, gradients):
        for gradient in gradients:
            table.grad = gradient.clone()
            optimizer.step()

    run(whole, make_optimizer(kind, [whole], seed=5), gradients)
    optimizer = make_optimizer(kind, [first], seed=5)
    run(first, optimizer, gradients[:3])
    if way == "state_dict":
        second = nn.Parameter(first.detach().clone())
        resumed = make_optimizer(kind, [second], lr=7.0)
        resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    else:
        through = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        resumed = through(optimizer)
        (second,) = resumed.param_groups[0]["params"]
    run(second, resumed, gradients[3:])
    assert_same_bits(second, whole)


def test_the_float32_state_of_a_16_bit_table_survives_loading(kind):
    table = make_table(torch.bfloat16)
    optimizer = make_optimizer(kind, [table])
    for _ in range(3):
        table.grad = draw_gradient(torch.bfloat16)
        optimizer.step()
    other = make_optimizer(kind, [make_table(torch.bfloat16)])
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    (loaded,), saved = other.state.values(), optimizer.state[table]
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        if isinstance(value, Tensor):
            assert loaded[name].dtype == value.dtype
            assert_same_bits(loaded[name], value)
            wide = {"row_steps": torch.int32}.get(name, torch.float32)
            assert value.dtype == (wide if value.dim() == 1 else torch.bfloat16)
        else:
            assert loaded[name] == value


def trained_pair(kind, dtype=torch.bfloat16):
    """Two tables with different state, their names and their optimizer."""
    tables = {name: make_table(dtype, (ROWS, 2, WIDTH)) for name in ("b", "a")}
    optimizer = make_optimizer(kind, tables.items())
    for scale, table in enumerate(tables.values(), start=1):
        for _ in range(scale):
            table.grad = scale * torch.randn_like(table)
            optimizer.step()
            table.grad = None
    return tables, optimizer


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
            assert_same_bits(ours[name], value)
        else:
            assert ours[name] == value


def test_a_pre_hook_decides_which_state_is_loaded(kind):
    # The hook of torch's documentation: parameters are matched by their names.
    tables, optimizer = trained_pair(kind)
    others = {name: nn.Parameter(tables[name].detach().clone()) for name in ("a", "b")}
    other = make_optimizer(kind, others.items())

    def by_names(optimizer, state_dict):
        saved = {}
        for group in state_dict["param_groups"]:
            saved.update(zip(group["param_names"], group["params"], strict=True))
        (group,) = optimizer.state_dict()["param_groups"]
        names = zip(group["params"], group["param_names"], strict=True)
        state = {i: state_dict["state"][saved[name]] for i, name in names}
        groups = [{**state_dict["param_groups"][0], **{k: group[k] for k in ("params",)}}]
        return {"state": state, "param_groups": groups}

    other.register_load_state_dict_pre_hook(by_names)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for name, table in tables.items():
        assert_same_state(other.state[others[name]], optimizer.state[table])


def test_a_pre_hook_may_change_the_state_in_place_or_drop_it(kind):
    tables, optimizer = trained_pair(kind)
    state_dict = optimizer.state_dict()
    other = make_optimizer(kind, [nn.Parameter(each.detach().clone()) for each in tables.values()])
    hook = other.register_load_state_dict_pre_hook(
        lambda _, state_dict: state_dict.update(state={0: state_dict["state"][0]})
    )
    other.load_state_dict(state_dict)
    first, second = other.param_groups[0]["params"]
    assert_same_state(other.state[first], optimizer.state[tables["b"]])
    assert second not in other.state
    assert len(state_dict["state"]) == 2
    hook.remove()
    other.load_state_dict(state_dict)
    assert_same_state(other.state[second], optimizer.state[tables["a"]])


def test_a_post_hook_has_the_last_word(kind):
    tables, optimizer = trained_pair(kind)
    other = make_optimizer(kind, [nn.Parameter(each.detach().clone()) for each in tables.values()])
    seen = []

    def reset(optimizer):
        for table in optimizer.param_groups[0]["params"]:
            seen.append(dict(optimizer.state[table]))
            optimizer.state[table] = {"step": 7}

    other.register_load_state_dict_post_hook(reset)
    other.load_state_dict(optimizer.state_dict())
    for saved, table in zip(seen, tables.values(), strict=True):
        assert_same_state(saved, optimizer.state[table])
    assert all(state == {"step": 7} for state in other.state.values())


def test_hooks_of_a_load_are_those_of_the_user(kind):
    _, optimizer = trained_pair(kind)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_hooks_of_state_dict_run(kind):
    _, optimizer = trained_pair(kind)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append(optimizer))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mark": 1})
    assert optimizer.state_dict()["mark"] == 1
    assert calls == [optimizer]
    optimizer.load_state_dict(optimizer.state_dict())


def test_loaded_state_is_a_copy(kind):
    tables, optimizer = trained_pair(kind)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict["state"])
    others = [nn.Parameter(each.detach().clone()) for each in tables.values()]
    other = make_optimizer(kind, others)
    other.load_state_dict(state_dict)
    other.param_groups[0]["lr"] = 9.0
    for table in others:
        table.grad = torch.randn_like(table)
    other.step()
    for i, table in enumerate(tables.values()):
        assert_same_state(optimizer.state[table], kept[i])
    assert optimizer.param_groups[0]["lr"] != 9.0
    assert state_dict["param_groups"][0]["lr"] != 9.0


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_state_of_a_table_of_another_dtype_loads(kind, dtype, saved):
    tables, optimizer = trained_pair(kind, saved)
    others = [nn.Parameter(each.detach().to(dtype)) for each in tables.values()]
    other, fresh = make_optimizer(kind, others), make_optimizer(kind, copy.deepcopy(others))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for each in (other, fresh):
        for table in each.param_groups[0]["params"]:
            table.grad = torch.ones_like(table)
        each.step()
    for ours, theirs in zip(other.state.values(), fresh.state.values(), strict=True):
        kinds = [
            {k: v.dtype for k, v in s.items() if isinstance(v, Tensor)} for s in (ours, theirs)
        ]
        assert kinds[0] == kinds[1]


def test_state_that_is_not_contiguous_loads(kind):
    tables, optimizer = trained_pair(kind)
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = torch.stack([value, value], dim=-1)[..., 0]
    others = [nn.Parameter(each.detach().clone()) for each in tables.values()]
    other = make_optimizer(kind, others)
    other.load_state_dict(state_dict)
    for table in others:
        table.grad = torch.ones_like(table)
    other.step()


def test_state_of_other_kinds_loads():
    class Remembering(SGD):
        """Has state of all kinds beside its own."""

    table, other = make_table(torch.bfloat16), make_table(torch.bfloat16)
    optimizer, loaded = Remembering([table], lr=1.0), Remembering([other], lr=1.0)
    numbers = torch.randn(3)
    optimizer.state[table] = {"step": 1, "nested": {"a": [numbers, (numbers, 2)]}, "text": "b"}
    optimizer.state["of no table"] = {"numbers": numbers}
    loaded.load_state_dict(optimizer.state_dict())
    nested = loaded.state[other]["nested"]["a"]
    for value in (nested[0], nested[1][0]):
        assert_same_bits(value, numbers)
        assert value.data_ptr() != numbers.data_ptr()
    assert nested[1][1] == 2
    assert loaded.state[other]["text"] == "b"
    assert_same_bits(loaded.state["of no table"]["numbers"], numbers)


def test_tables_are_added_after_loading(kind):
    tables, optimizer = trained_pair(kind)
    others = [nn.Parameter(each.detach().clone()) for each in tables.values()]
    other = make_optimizer(kind, others)
    other.load_state_dict(optimizer.state_dict())
    added = make_table()
    other.add_param_group({"params": [("added", added)], "lr": 1.0})
    before = added.detach().clone()
    added.grad = torch.ones_like(added)
    other.step()
    assert not torch.equal(added, before)
    for ours, theirs in zip(others, tables.values(), strict=True):
        assert_same_state(other.state[ours], optimizer.state[theirs])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(optimizer.state_dict())


def test_the_state_appears_with_the_first_step():
    table, idle = make_table(torch.bfloat16), make_table()
    optimizer = RowwiseAdam([table, idle])
    assert not optimizer.state
    table.grad = draw_gradient(torch.bfloat16)
    optimizer.step()
    assert list(optimizer.state) == [table]


def test_a_closure_is_run_with_gradients_and_its_loss_returned(kind):
    table = make_table()
    optimizer = make_optimizer(kind, [table])

    def closure():
        optimizer.zero_grad()
        loss = table.square().sum()
        loss.backward()
        return loss

    before = table.square().sum()
    assert torch.equal(optimizer.step(closure), before)
    assert table.square().sum() < before


def test_a_scheduler_moves_the_learning_rate():
    table = nn.Parameter(torch.zeros(ROWS, WIDTH))
    optimizer = SGD([table], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (-1.0, -1.5, -1.75):
        table.grad = torch.ones_like(table)
        optimizer.step()
        scheduler.step()
        assert (table == expected).all()


def test_the_learning_rate_may_be_a_tensor():
    table = nn.Parameter(torch.zeros(ROWS, WIDTH))
    table.grad = torch.ones_like(table)
    SGD([table], lr=torch.tensor(0.5)).step()
    assert (table == -0.5).all()


def test_groups_have_options_of_their_own(kind):
    slow, fast = make_table(), make_table()
    with torch.no_grad():
        fast.copy_(slow)
    optimizer = make_optimizer(kind, [{"params": slow, "lr": 0.0}], weight_decay=0.0)
    optimizer.add_param_group({"params": [fast], "lr": 1.0, "weight_decay": 0.0})
    before = slow.detach().clone()
    for table in (slow, fast):
        table.grad = draw_gradient()
    optimizer.step()
    assert_same_bits(slow, before)
    assert not torch.equal(fast, before)


def test_named_parameters_are_taken(kind):
    pool = peer.ExpertPool(9, num_experts=20)
    optimizer = make_optimizer(kind, pool.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight"]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), ()], ids=str)
def test_only_tables_are_taken(kind, shape):
    expected = r"tables of shape \[rows, width\] or \[rows, parts, width\], got "
    with pytest.raises(ValueError, match=expected):
        make_optimizer(kind, [make_table(), nn.Parameter(torch.ones(shape))])
    optimizer = make_optimizer(kind, [make_table()])
    with pytest.raises(ValueError, match="bias"):
        optimizer.add_param_group({"params": [("bias", nn.Parameter(torch.ones(shape)))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("are_named", [False, True])
def test_a_table_given_twice_is_refused(kind, are_named):
    table = make_table()
    twice = [("a", table), ("b", table)] if are_named else [table, table]
    with pytest.raises(ValueError, match="every table of a group once"):
        make_optimizer(kind, twice)
    optimizer = make_optimizer(kind, [table])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [table]})


@pytest.mark.parametrize("forms", [(True, True), (True, False), (False, True), (False, False)])
def test_a_table_used_twice_in_a_graph_is_updated_by_the_sum(kind, forms):
    pools = [
        peer.ExpertPool(9, num_experts=20, sparse_grad=form, dtype=torch.float64) for form in forms
    ]
    pools[1].weight = pools[0].weight
    whole = copy.deepcopy(pools[0])
    x, weights, indices = (
        torch.randn(6, 9).double(),
        torch.rand(6, 4).double(),
        torch.randint(20, (6, 4)),
    )
    halves = [
        pool(x[i : i + 3], weights[i : i + 3], indices[i : i + 3])
        for pool, i in zip(pools, (0, 3), strict=True)
    ]
    torch.cat(halves).square().sum().backward()
    whole(x, weights, indices).square().sum().backward()
    for pool in (pools[0], whole):
        make_optimizer(kind, pool.parameters()).step()
    torch.testing.assert_close(pools[0].weight, whole.weight)


def test_complex_tables_are_refused(kind):
    with pytest.raises(TypeError, match="complex64"):
        make_optimizer(kind, [nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))])


BAD_OPTIONS = {
    "lr": (SGD, {"lr": -1.0}),
    "lr that is nan": (SGD, {"lr": math.nan}),
    "weight_decay": (RowwiseAdagrad, {"weight_decay": -0.1}),
    "eps": (RowwiseAdam, {"eps": -1e-8}),
    "betas": (RowwiseAdam, {"betas": (0.9, 1.0)}),
    "betas that is one": (RowwiseAdam, {"betas": (0.9,)}),
    "momentum": (SGD, {"lr": 1.0, "momentum": -0.5}),
    "momentum with nesterov": (SGD, {"lr": 1.0, "nesterov": True}),
    "initial_accumulator_value": (RowwiseAdagrad, {"initial_accumulator_value": -1.0}),
    "seed": (RowwiseAdagrad, {"seed": 2**63}),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_named(case):
    optimizer, options = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=f"{optimizer.__name__}: expected {case.split()[0]} to be"):
        optimizer([make_table()], **options)
    good = optimizer([make_table()], lr=1.0)
    with pytest.raises(ValueError, match=case.split()[0]):
        good.add_param_group({"params": [make_table()], **options})
    assert len(good.param_groups) == 1


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (ROWS, 2, WIDTH)], ids=["flat", "parts"])
def test_a_gradient_that_is_sparse_by_elements_is_refused(kind, shape):
    table = make_table(shape=shape)
    before = table.detach().clone()
    table.grad = torch.ones(shape).to_sparse(2)
    with pytest.raises(ValueError, match="sparse COO gradient with one sparse dimension, got "):
        make_optimizer(kind, [table]).step()
    assert_same_bits(table, before)


# --- the operators -------------------------------------------------------------------------------


def arguments(name, indices=..., coefficients=None, dtype=torch.float32, row=(WIDTH,), **changes):
    """The arguments of an operator by name; `changes` replaces some."""
    table = torch.randn(ROWS, *row).to(dtype)
    second_moments = torch.ones(ROWS, *row[:-1]).to(torch.promote_types(dtype, torch.float32))
    numbers = {"weight_decay": 0.1, "lr": 0.1, "seed": 3, "step": 4, "stream": 5}
    state = {
        "rowwise_adagrad_": {"sum_of_squares": second_moments, "eps": 1e-8},
        "sgd_": {"momentum_buffer": torch.randn_like(table), "momentum": 0.5, "nesterov": True},
        "rowwise_adam_": {
            "first_moment": torch.randn_like(table),
            "second_moment": second_moments,
            "row_steps": torch.ones(ROWS, dtype=torch.int32),
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
        },
    }[name]
    gradient = {
        "indices": torch.randint(ROWS, (4, 3)) if indices is ... else indices,
        "source": torch.randn(4, *row),
        "coefficients": coefficients,
    }
    return {"table": table, **state, **gradient, **numbers, "frozen": None, **changes}


NAMES = ["rowwise_adagrad_", "sgd_", "rowwise_adam_"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [(), (2,)], ids=["flat", "parts"])
def test_opcheck(name, dtype, parts):
    operator = getattr(torch.ops.peer, name).default
    row = (*parts, WIDTH)
    for changes in (
        {"coefficients": torch.randn(*parts, 4, 3)},
        {"indices": torch.tensor([5, 3, 5, 0]), "seed": None},
        {"indices": None, "source": torch.randn(ROWS, *row, dtype=dtype)},
    ):
        given = arguments(name, **{"dtype": dtype, "row": row, **changes})
        torch.library.opcheck(operator, (), given)


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_are_tagged_for_the_compiler_and_refuse_cuda(name):
    operator = getattr(torch.ops.peer, name).default
    assert torch.Tag.pt2_compliant_tag in operator.tags
    if '"cuda": null' not in torch.ops.peer.build_info():
        pytest.skip("this build has CUDA")
    given = arguments(name)
    positional = [given[each.name] for each in operator._schema.arguments]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"peer::{name}: peer was built without CUDA"):
        operator.redispatch(cuda, *positional)


BAD_ARGUMENTS = {
    "index too large": ({"indices": torch.full((4,), ROWS)}, IndexError, "index 13 at position"),
    "index negative": (
        {"indices": torch.tensor([0, 1, -1, 2])},
        IndexError,
        r"-1 at position \[2\]",
    ),
    "indices of other rows": (
        {"indices": torch.zeros(3).long()},
        ValueError,
        r"expected indices of shape \[4\] or \[4, experts per token\] to match source, got \[3\]",
    ),
    "indices of int32": ({"indices": torch.zeros(4).int()}, TypeError, "int64, got Int"),
    "source of another width": (
        {"source": torch.ones(4, 8)},
        ValueError,
        r"expected source of shape \[\*, 9\] to match table, got \[4, 8\]",
    ),
    "source of parts": (
        {"source": torch.ones(4, 2, 9)},
        ValueError,
        r"expected source of shape \[\*, 9\] to match table, got \[4, 2, 9\]",
    ),
    "source without parts": (
        {"row": (2, 9), "source": torch.ones(4, 9)},
        ValueError,
        r"expected source of shape \[\*, 2, 9\] to match table, got \[4, 9\]",
    ),
    "source of other parts": (
        {"row": (2, 9), "source": torch.ones(4, 3, 9)},
        ValueError,
        r"expected source of shape \[\*, 2, 9\] to match table, got \[4, 3, 9\]",
    ),
    "source of double": ({"source": torch.ones(4, 9).double()}, TypeError, "float64 goes with"),
    "source of integers": ({"source": torch.ones(4, 9).long()}, TypeError, "source of dtype float"),
    "source without indices": (
        {"indices": None},
        ValueError,
        r"source of table's shape \[13, 9\] without indices, got \[4, 9\]",
    ),
    "coefficients without indices": (
        {"indices": None, "source": torch.ones(ROWS, 9), "coefficients": torch.ones(ROWS)},
        ValueError,
        "no coefficients without indices",
    ),
    "coefficients of another shape": (
        {"coefficients": torch.ones(4, 2)},
        ValueError,
        r"coefficients of shape \[4, 3\] to match indices and table's parts, got \[4, 2\]",
    ),
    "coefficients of one part": (
        {"row": (2, 9), "coefficients": torch.ones(4, 3)},
        ValueError,
        r"coefficients of shape \[2, 4, 3\] to match indices and table's parts, got \[4, 3\]",
    ),
    "table of columns": (
        {"table": torch.ones(9, ROWS).T},
        ValueError,
        r"expected table with contiguous rows that do not overlap, got strides \[1, 13\]",
    ),
    "table of one row": (
        {"table": torch.ones(1, 9).expand(ROWS, 9)},
        ValueError,
        r"expected table with contiguous rows that do not overlap, got strides \[0, 1\]",
    ),
    "table of parts far apart": (
        {"row": (2, 9), "table": torch.ones(ROWS, 3, 9)[:, ::2]},
        ValueError,
        r"expected table with contiguous rows that do not overlap, got strides \[27, 18, 1\]",
    ),
    "table of one dimension": (
        {"table": torch.ones(9)},
        ValueError,
        r"\[rows, width\] or \[rows, parts, width\], got \[9\]",
    ),
}
BAD_STATE = {
    "sum_of_squares": ("rowwise_adagrad_", torch.ones(12), r"of shape \[13\] to match table, got"),
    "momentum_buffer": ("sgd_", torch.ones(12, 9), r"of table's shape \[13, 9\], got \[12, 9\]"),
    "first_moment": ("rowwise_adam_", torch.ones(13, 9).double(), "of table's dtype Float, got"),
    "second_moment": ("rowwise_adam_", torch.ones(26)[::2], r"to be contiguous, got strides \[2\]"),
    "row_steps": ("rowwise_adam_", torch.ones(13).long(), "of dtype Int, got Long"),
}
# State of a table without parts, for a table with two parts.
STATE_OF_ANOTHER_KIND = {
    "sum_of_squares": ("rowwise_adagrad_", torch.ones(13), r"of shape \[13, 2\] .* got \[13\]"),
    "momentum_buffer": (
        "sgd_",
        torch.ones(13, 18),
        r"of table's shape \[13, 2, 9\], got \[13, 18\]",
    ),
    "first_moment": ("rowwise_adam_", torch.ones(13, 9), r"of table's shape \[13, 2, 9\], got"),
    "second_moment": ("rowwise_adam_", torch.ones(13), r"of shape \[13, 2\] .* got \[13\]"),
    "row_steps": ("rowwise_adam_", torch.ones(13, 2).int(), r"of shape \[13\] .* got \[13, 2\]"),
}


def on_meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def assert_refused_unchanged(name, given, error, message):
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=f"^peer::{name}: .*{message}"):
        getattr(torch.ops.peer, name)(**given)
    for key, value in before.items():
        assert torch.equal(given[key], value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_named_and_changes_nothing(name, case):
    changes, error, message = BAD_ARGUMENTS[case]
    assert_refused_unchanged(name, arguments(name, **changes), error, message)
    if error is not IndexError:
        given = arguments(name, **changes)
        given = {k: on_meta(v) if isinstance(v, Tensor) else v for k, v in given.items()}
        with pytest.raises(error, match=f"^peer::{name}: .*{message}"):
            getattr(torch.ops.peer, name)(**given)


@pytest.mark.parametrize("state", BAD_STATE)
def test_bad_state_is_named_and_changes_nothing(state):
    name, tensor, message = BAD_STATE[state]
    given = arguments(name, **{state: tensor})
    assert_refused_unchanged(name, given, (ValueError, TypeError), f"expected {state} {message}")


@pytest.mark.parametrize("state", STATE_OF_ANOTHER_KIND)
def test_state_of_another_kind_of_table_is_named_and_changes_nothing(state):
    name, tensor, message = STATE_OF_ANOTHER_KIND[state]
    given = arguments(name, row=(2, WIDTH), **{state: tensor})
    assert_refused_unchanged(name, given, ValueError, f"expected {state} {message}")


def test_momentum_needs_its_buffer():
    given = arguments("sgd_", momentum_buffer=None)
    assert_refused_unchanged("sgd_", given, ValueError, "expected momentum_buffer, because")


def test_a_bad_gradient_in_a_step_changes_nothing(kind):
    table = make_table()
    before = table.detach().clone()
    with torch.sparse.check_sparse_tensor_invariants(False):
        table.grad = torch.sparse_coo_tensor([[3, ROWS]], torch.ones(2, WIDTH), (ROWS, WIDTH))
    with pytest.raises(IndexError, match="index 13 at position"):
        make_optimizer(kind, [table]).step()
    assert torch.equal(table, before)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_gets_a_new_version(name):
    given = arguments(name)
    written = list(getattr(torch.ops.peer, name).default._schema.arguments)
    written = [each.name for each in written if each.alias_info and each.alias_info.is_write]
    versions = {key: v._version for key, v in given.items() if isinstance(v, Tensor)}
    getattr(torch.ops.peer, name)(**given)
    for key, version in versions.items():
        assert given[key]._version == version + (key in written)
    assert len(written) == {"rowwise_adagrad_": 2, "sgd_": 2, "rowwise_adam_": 4}[name]


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_derivative(name):
    given = arguments(name)
    given["source"].requires_grad_()
    with pytest.raises(RuntimeError, match=f"peer::{name}: has no derivative, but source requires"):
        getattr(torch.ops.peer, name)(**given)
    with torch.no_grad():
        getattr(torch.ops.peer, name)(**given)


@pytest.mark.parametrize("name", NAMES)
def test_works_on_inference_tensors(name):
    with torch.inference_mode():
        given = arguments(name)
        before = given["table"].clone()
        getattr(torch.ops.peer, name)(**given)
        assert not torch.equal(given["table"], before)


# --- clipping ------------------------------------------------------------------------------------


def dense_and_sparse(row=(WIDTH,)):
    parameters = [make_table(shape=(ROWS, *row)) for _ in range(4)]
    parameters[0].grad = torch.randn_like(parameters[0])
    parameters[1].grad = draw_gradient(row=row)
    parameters[2].grad = draw_gradient(row=row).coalesce()
    return parameters


def densified(parameters):
    copies = []
    for parameter in parameters:
        copies.append(nn.Parameter(parameter.detach().clone()))
        if parameter.grad is not None:
            copies[-1].grad = parameter.grad.to_dense().clone()
    return copies


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("row", [(WIDTH,), (2, WIDTH)], ids=["flat", "parts"])
def test_clipping_equals_that_of_the_dense_gradients(norm_type, max_norm, row):
    parameters = dense_and_sparse(row)
    copies = densified(parameters)
    norm = peer.optim.clip_grad_norm_(parameters, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(copies, max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(parameters[:3], copies[:3], strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)
    assert parameters[3].grad is None


def test_clipping_takes_a_single_parameter_and_none():
    (table, *_) = dense_and_sparse()
    assert peer.optim.clip_grad_norm_(table, 1.0) > 1
    torch.testing.assert_close(table.grad.norm(), torch.tensor(1.0))
    assert peer.optim.clip_grad_norm_([], 1.0) == 0


def test_distinct_ascending_ids_are_not_sorted_again():
    table = make_table()
    flagged = sparse([1, 4, 6], torch.ones(3, WIDTH)).coalesce()
    table.grad = torch.sparse_coo_tensor(
        flagged.indices(), flagged.values(), flagged.shape, check_invariants=True
    )
    values = table.grad._values().data_ptr()
    peer.optim.clip_grad_norm_(table, 1.0)
    assert table.grad._values().data_ptr() == values


def test_a_norm_that_is_not_finite_may_be_an_error():
    parameters = dense_and_sparse()
    parameters[1].grad._values()[0, 0] = math.inf
    before = [parameter.grad.to_dense() for parameter in parameters[:3]]
    with pytest.raises(RuntimeError, match="non-finite"):
        peer.optim.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    for parameter, old in zip(parameters[:3], before, strict=True):
        assert torch.equal(parameter.grad.to_dense(), old)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, math.nan])
def test_norms_that_rows_of_zero_would_change_are_refused(norm_type):
    with pytest.raises(ValueError, match="norm_type to be positive"):
        peer.optim.clip_grad_norm_(dense_and_sparse(), 1.0, norm_type)


@pytest.mark.parametrize("form", ["dense", "sparse", "repeated ids", "sparse by elements"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
def test_norms_of_16_bit_gradients_do_not_overflow(dtype, form, norm_type):
    values = torch.full((1000, 100), 300.0, dtype=torch.float64)
    exact = torch.linalg.vector_norm(values, norm_type)
    table = nn.Parameter(torch.zeros(1000, 100, dtype=dtype))
    table.grad = values.to(dtype, copy=True)
    if form == "sparse":
        table.grad = table.grad.to_sparse(1)
    elif form == "sparse by elements":
        table.grad = table.grad.to_sparse()
    elif form == "repeated ids":
        ids = torch.arange(1000).repeat(3)
        table.grad = sparse(ids, torch.full((3000, 100), 100.0, dtype=dtype), 1000)
    norm = peer.optim.clip_grad_norm_(table, 1.0, norm_type)
    wide = torch.promote_types(dtype, torch.float32)
    assert norm.dtype == wide
    torch.testing.assert_close(norm, exact.to(wide), rtol=1e-4, atol=0)
    expected = (values / exact).to(dtype)
    torch.testing.assert_close(table.grad.to_dense(), expected, rtol=1e-2, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_gradients_are_clipped():
    table = nn.Parameter(torch.ones(3, 4).to_sparse_csr())
    table.grad = torch.full((3, 4), 3.0).to_sparse_csr()
    torch.testing.assert_close(peer.optim.clip_grad_norm_(table, 1.0), torch.tensor(108**0.5))
    torch.testing.assert_close(table.grad.values(), torch.full((12,), 12**-0.5))


def test_gradients_of_several_dtypes_are_clipped_together():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    parameters = [make_table(each) for each in dtypes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1.5)
    parameters[0].grad = parameters[0].grad.to_sparse(1)
    norm = peer.optim.clip_grad_norm_(parameters, 1.0)
    expected = 1.5 * math.sqrt(4 * ROWS * WIDTH)
    torch.testing.assert_close(norm, torch.tensor(expected, dtype=torch.float64))
    for parameter in parameters:
        every = torch.full((ROWS, WIDTH), 1.5 / expected, dtype=torch.float64)
        torch.testing.assert_close(parameter.grad.to_dense(), every.to(parameter.dtype))


def test_norms_of_16_bit_gradients_are_computed_in_blocks(monkeypatch):
    monkeypatch.setattr("peer.optim.clip_grad._BLOCK", 4 * WIDTH)
    for shape in ((ROWS, WIDTH), (ROWS * WIDTH,), (), (1, ROWS * WIDTH)):
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        parameter.grad = torch.randn_like(parameter)
        norm = parameter.grad.double().norm().float()
        torch.testing.assert_close(peer.optim.clip_grad_norm_(parameter, 1.0), norm)


def test_a_parameter_given_twice_is_clipped_once():
    table, *_ = dense_and_sparse()
    (other,) = densified([table])
    norm = peer.optim.clip_grad_norm_([table, table], 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([other], 1.0))
    assert_same_bits(table.grad, other.grad)


@pytest.mark.parametrize("row", [(WIDTH,), (2, WIDTH)], ids=["flat", "parts"])
def test_clipping_by_value_equals_that_of_the_dense_gradients(row):
    parameters = dense_and_sparse(row)
    copies = densified(parameters)
    peer.optim.clip_grad_value_(parameters, 0.7)
    torch.nn.utils.clip_grad_value_(copies, 0.7)
    for ours, theirs in zip(parameters[:3], copies[:3], strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)
        assert ours.grad.to_dense().abs().max() <= 0.7
    assert parameters[3].grad is None
    peer.optim.clip_grad_value_(parameters[0], 0.1)
    assert parameters[0].grad.abs().max() <= 0.1


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_clipping_to_no_interval_is_refused(value):
    with pytest.raises(ValueError, match="clip_value to be not negative"):
        peer.optim.clip_grad_value_(dense_and_sparse(), value)


# --- parameter groups ----------------------------------------------------------------------------


def make_layer(**options):
    sizes = {"num_experts": 16, "heads": 2, "num_experts_per_head": 4, "dim_key": 4}
    return peer.PEER(8, **sizes, **options)


def test_every_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(8, 8), make_layer(glu=True), make_layer())
    dense, experts = peer.param_groups(
        model, lr=1e-3, expert_lr=1e-2, weight_decay=0.1, expert_weight_decay=0.2
    )
    assert (dense["name"], dense["lr"], dense["weight_decay"]) == ("dense", 1e-3, 0.1)
    assert (experts["name"], experts["lr"], experts["weight_decay"]) == ("experts", 1e-2, 0.2)
    grouped = [id(p) for p in dense["params"] + experts["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in experts["params"]] == [id(model[i].experts.weight) for i in (1, 2)]


def test_a_shared_pool_is_in_the_group_once():
    layer = make_layer()
    model = nn.Sequential(layer, make_layer(experts=layer.experts))
    _, experts = peer.param_groups(model, lr=1e-3, expert_lr=1e-2)
    assert len(experts["params"]) == 1


def test_a_table_that_two_pools_share_is_in_the_group_once():
    model = nn.Sequential(make_layer(), make_layer())
    model[1].experts.weight = model[0].experts.weight
    _, experts = peer.param_groups(model, lr=1e-3, expert_lr=1e-2)
    assert len(experts["params"]) == 1


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), make_layer())
    dense, _ = peer.param_groups(model, lr=1e-3, expert_lr=1e-2)
    assert not {id(p) for p in model[0].parameters()} & {id(p) for p in dense["params"]}


def test_a_model_without_a_pool_is_refused():
    with pytest.raises(ValueError, match="ExpertPool, got Linear"):
        peer.param_groups(nn.Linear(8, 8), lr=1e-3, expert_lr=1e-2)


@pytest.mark.parametrize("together", [False, True])
def test_a_model_is_trained_with_its_groups(together):
    model = nn.Sequential(nn.Linear(8, 8), make_layer(sparse_grad=not together))
    groups = peer.param_groups(model, lr=1e-2, expert_lr=1e-1)
    if together:
        optimizers = [torch.optim.AdamW(groups)]
    else:
        optimizers = [torch.optim.AdamW([groups[0]]), RowwiseAdagrad([groups[1]])]
    x, y, losses = torch.randn(32, 8), torch.randn(32, 8), []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
