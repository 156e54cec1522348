"""The update inside the backward pass, against a gradient and an optimizer step."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peer
from peer.optim import SGD, RowwiseAdagrad, RowwiseAdam

OPTIMIZERS = {
    "adagrad": (RowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.5}),
    "sgd": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (RowwiseAdam, {"lr": 0.1}),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_pool(**options):
    return peer.ExpertPool(
        9, **{"num_experts": 30, "num_experts_per_token": 6, "sparse_grad": True, **options}
    )


def make_optimizer(kind, pool):
    optimizer, options = OPTIMIZERS[kind]
    return optimizer(pool.parameters(), **options)


def draw(tokens=(4, 5), dtype=torch.float32, hot=False):
    """x and weights, which require grad, and indices."""
    indices = torch.randint(30, (*tokens, 2, 3))
    if hot:
        indices[torch.rand(indices.shape) < 0.8] = 7
    x = torch.randn(*tokens, 9, dtype=dtype).requires_grad_()
    return x, torch.rand(*tokens, 2, 3).to(dtype).requires_grad_(), indices


def pair_of_pools(**options):
    pool = make_pool(**options)
    return pool, copy.deepcopy(pool)


def assert_same_bits(a, b):
    assert torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))


# --- equals a gradient and a step ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot expert"])
def test_equals_a_sparse_gradient_and_a_step_bit_by_bit(kind, dtype, glu, hot):
    pool, fused = pair_of_pools(glu=glu, dtype=dtype)
    optimizer, fused_optimizer = make_optimizer(kind, pool), make_optimizer(kind, fused)
    fused_optimizer.fuse_into_backward(fused)
    for _ in range(4):
        inputs = draw((20, 20), dtype, hot)
        copies = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        y, z = pool(*inputs), fused(*copies)
        assert_same_bits(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert fused.weight.grad is None
        assert_same_bits(inputs[0].grad, copies[0].grad)
        assert_same_bits(inputs[1].grad, copies[1].grad)
        assert_same_bits(pool.weight, fused.weight)
        fused_optimizer.step()  # has no gradient
        assert_same_bits(pool.weight, fused.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_whose_gradient_is_zero_are_not_updated(kind, dtype):
    pool = make_pool(dtype=dtype)
    make_optimizer(kind, pool).fuse_into_backward(pool)
    for _ in range(2):
        x, weights, indices = draw((20,), dtype)
        with torch.no_grad():
            weights[indices % 3 == 0] = 0  # experts 0, 3, 6, ... contribute nothing
        before = pool.weight.detach().clone()
        pool(x, weights, indices).square().sum().backward()
        moved = (pool.weight != before).flatten(1).any(1)
        assert torch.equal(moved.nonzero().flatten(), indices[indices % 3 != 0].unique())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_table_differs_by_the_rounding_of_the_gradient_alone(kind, dtype):
    pool, fused = pair_of_pools(dtype=dtype)
    inputs = draw((20,), dtype)
    optimizer = make_optimizer(kind, pool)
    pool(*inputs).square().sum().backward()
    optimizer.step()
    make_optimizer(kind, fused).fuse_into_backward(fused)
    fused(*inputs).square().sum().backward()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(pool.weight, fused.weight, rtol=3 * unit, atol=unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_table_equals_a_gradient_in_float32_and_a_step(kind, dtype):
    pool, fused = pair_of_pools(dtype=dtype)
    pool.weight.grad_dtype = torch.float32
    optimizer = make_optimizer(kind, pool)
    make_optimizer(kind, fused).fuse_into_backward(fused)
    for _ in range(3):
        inputs = draw((20,), dtype)
        for each in (pool, fused):
            each(*inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same_bits(pool.weight, fused.weight)


def test_under_autocast_it_equals_a_gradient_and_a_step(kind):
    pool, fused = pair_of_pools()
    inputs = draw((20,))
    with torch.autocast("cpu", torch.bfloat16):
        y = pool(*inputs)
    y.square().sum().backward()
    expected, inputs[0].grad = inputs[0].grad, None
    make_optimizer(kind, pool).step()
    make_optimizer(kind, fused).fuse_into_backward(fused)
    with torch.autocast("cpu", torch.bfloat16):
        z = fused(*inputs)
    assert z.dtype == torch.bfloat16
    assert_same_bits(y, z)
    z.square().sum().backward()
    assert_same_bits(inputs[0].grad, expected)
    assert_same_bits(pool.weight, fused.weight)


def test_the_same_bits_for_any_number_of_threads(kind, dtype):
    start, inputs, results = make_pool(dtype=dtype), draw((700, 10), dtype, hot=True), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pool = copy.deepcopy(start)
        make_optimizer(kind, pool).fuse_into_backward(pool)
        pool(*inputs).square().sum().backward()
        results.append(pool.weight)
    for table in results[1:]:
        assert_same_bits(table, results[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_change_nothing(kind, use_reentrant):
    pool, fused = pair_of_pools()
    for each in (pool, fused):
        make_optimizer(kind, each).fuse_into_backward(each)
    for _ in range(2):
        inputs = draw()
        pool(*inputs).square().sum().backward()
        y = checkpoint(fused, *inputs, use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert_same_bits(pool.weight, fused.weight)


def test_a_whole_model_learns():
    model = nn.Sequential(
        nn.Linear(8, 8),
        peer.PEER(8, num_experts=64, heads=2, num_experts_per_head=4, dim_key=4),
        peer.PEER(8, num_experts=64, heads=2, num_experts_per_head=4, dim_key=4),
    )
    dense, experts = peer.param_groups(model, lr=1e-2, expert_lr=1e-1)
    optimizer = torch.optim.AdamW([dense])
    x, y, losses = torch.randn(32, 8), torch.randn(32, 8), []
    with RowwiseAdagrad([experts]).fuse_into_backward(model) as fusion:
        assert len(fusion.pools) == 2
        for _ in range(30):
            loss = (model(x) - y).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


# --- what it needs -------------------------------------------------------------------------------


@pytest.mark.parametrize("x_requires", [False, True])
@pytest.mark.parametrize("weights_require", [False, True])
def test_runs_whatever_else_requires_grad(x_requires, weights_require):
    pool, fused = pair_of_pools(glu=True)
    x, weights, indices = draw()
    x.requires_grad_(x_requires)
    weights.requires_grad_(weights_require)
    optimizer = make_optimizer("adagrad", pool)
    pool(x, weights, indices).square().sum().backward()
    optimizer.step()
    x.grad = weights.grad = None
    make_optimizer("adagrad", fused).fuse_into_backward(fused)
    fused(x, weights, indices).square().sum().backward()
    assert (x.grad is not None) == x_requires
    assert (weights.grad is not None) == weights_require
    assert_same_bits(pool.weight, fused.weight)


def test_options_are_those_at_the_time_of_the_backward_pass():
    pool = make_pool()
    optimizer = SGD(pool.parameters(), lr=1.0)
    optimizer.fuse_into_backward(pool)
    loss, before = pool(*draw()).sum(), pool.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    loss.backward()
    assert torch.equal(pool.weight, before)


def make_scheduler(name, optimizer):
    schedulers = torch.optim.lr_scheduler
    step = schedulers.StepLR(optimizer, step_size=1, gamma=0.5)
    if name == "sequential":
        constant = schedulers.ConstantLR(optimizer, factor=0.5, total_iters=2)
        return schedulers.SequentialLR(optimizer, [constant, step], milestones=[2])
    if name == "chained":
        return schedulers.ChainedScheduler([step, schedulers.ExponentialLR(optimizer, 0.9)])
    if name == "plateau":
        return schedulers.ReduceLROnPlateau(optimizer, patience=0)
    if name == "one cycle":
        return schedulers.OneCycleLR(optimizer, max_lr=0.5, total_steps=9)
    if name == "cyclic":
        return schedulers.CyclicLR(optimizer, base_lr=0.1, max_lr=0.5, step_size_up=2)
    if name == "averaging":
        return torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
    return step


@pytest.mark.parametrize(
    "name", ["step", "sequential", "chained", "plateau", "one cycle", "cyclic", "averaging"]
)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_schedulers_act_on_fused_updates_as_on_steps(name, kind):
    pool, fused = pair_of_pools()
    optimizer, fused_optimizer = make_optimizer(kind, pool), make_optimizer(kind, fused)
    fused_optimizer.fuse_into_backward(fused)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        # "Detected call of `lr_scheduler.step()` before `optimizer.step()`"
        warnings.filterwarnings("error", message="Detected call of")
        scheduler = make_scheduler(name, optimizer)
        fused_scheduler = make_scheduler(name, fused_optimizer)
        rates = []
        for _ in range(5):
            inputs = draw((20,))
            for each in (pool, fused):
                each(*inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_same_bits(pool.weight, fused.weight)
            for each in (scheduler, fused_scheduler):
                each.step(*([1.0] if name == "plateau" else []))
            options = [
                dict(each.param_groups[0], params=None) for each in (optimizer, fused_optimizer)
            ]
            assert options[0] == options[1]
            rates.append(options[0]["lr"])
    assert len(set(rates)) > 1


def test_a_scheduler_before_the_first_fused_update_is_reported():
    pool = make_pool()
    optimizer = make_optimizer("sgd", pool)
    optimizer.fuse_into_backward(pool)
    scheduler = make_scheduler("step", optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_no_tokens_change_nothing():
    pool = make_pool()
    before = pool.weight.detach().clone()
    make_optimizer("sgd", pool).fuse_into_backward(pool)
    y = pool(*draw((0,)))
    assert y.shape == (0, 9)
    y.sum().backward()
    assert torch.equal(pool.weight, before)


def test_without_grad_mode_a_pool_works_as_always():
    pool, inputs = make_pool(), draw()
    expected = pool(*inputs)
    make_optimizer("sgd", pool).fuse_into_backward(pool)
    with torch.no_grad():
        y = pool(*inputs)
    assert not y.requires_grad
    assert_same_bits(y, expected)
    with torch.inference_mode():
        assert_same_bits(pool(*inputs), expected)


@pytest.mark.parametrize("way", ["remove", "context"])
def test_ends_with_its_handle(way):
    pool = make_pool()
    before = pool.weight.detach().clone()
    optimizer = make_optimizer("sgd", pool)
    if way == "remove":
        optimizer.fuse_into_backward(pool).remove()
    else:
        with optimizer.fuse_into_backward(pool):
            pass
    pool(*draw()).sum().backward()
    assert torch.equal(pool.weight, before)
    assert pool.weight.grad.is_sparse
    optimizer.fuse_into_backward(pool)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_not_fused(way):
    pool = make_pool()
    optimizer = make_optimizer("sgd", pool)
    optimizer.fuse_into_backward(pool)
    model = nn.Sequential(pool)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert b"peer.optim" not in buffer.getvalue()
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert pool.fused_update is not None
    other[0](*draw()).sum().backward()
    assert other[0].weight.grad.is_sparse


def test_resumes_bit_by_bit(kind, dtype):
    inputs = [draw((20,), dtype) for _ in range(4)]

    def run(pool, optimizer, inputs):
        with optimizer.fuse_into_backward(pool):
            for each in inputs:
                pool(*each).square().sum().backward()

    whole = make_pool(dtype=dtype)
    first = copy.deepcopy(whole)
    run(whole, make_optimizer(kind, whole), inputs)
    optimizer = make_optimizer(kind, first)
    run(first, optimizer, inputs[:2])
    second = copy.deepcopy(first)
    resumed = make_optimizer(kind, second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, resumed, inputs[2:])
    assert_same_bits(whole.weight, second.weight)


# --- what it excludes ----------------------------------------------------------------------------

CHANGED = "changed after this forward pass"


def fused_pool():
    pool = make_pool()
    make_optimizer("sgd", pool).fuse_into_backward(pool)
    return pool


def test_a_pool_used_twice_in_a_graph_is_refused():
    pool, (x, weights, indices) = fused_pool(), draw()
    y = pool(pool(x, weights, indices), weights, indices)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


@pytest.mark.parametrize("second", [None, False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_pool_used_twice_under_checkpoints_is_refused(first, second):
    pool, (x, weights, indices) = fused_pool(), draw()
    y = checkpoint(pool, x, weights, indices, use_reentrant=first)
    if second is None:
        y = pool(y, weights, indices)
    else:
        y = checkpoint(pool, y, weights, indices, use_reentrant=second)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def two_pools_with_one_table():
    first, second = make_pool(), make_pool()
    second.weight = first.weight
    return first, second


@pytest.mark.parametrize("order", [1, -1])
def test_two_fused_pools_with_one_table_in_a_graph_are_refused(order):
    first, second = two_pools_with_one_table()[::order]
    make_optimizer("sgd", first).fuse_into_backward(first, second)
    x, weights, indices = draw()
    with pytest.raises(RuntimeError, match=CHANGED):
        (first(x, weights, indices) + second(x, weights, indices)).sum().backward()


def test_two_fused_pools_with_one_table_in_two_graphs_take_two_steps():
    (first, second), pool = two_pools_with_one_table(), make_pool()
    with torch.no_grad():
        pool.weight.copy_(first.weight)
    optimizer = make_optimizer("sgd", pool)
    make_optimizer("sgd", first).fuse_into_backward(first, second)
    for each in (first, second):
        inputs = draw()
        each(*inputs).square().sum().backward()
        pool(*inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same_bits(each.weight, pool.weight)


# The last is autograd's, if the other use comes after the update.
GRADIENT = f"got a gradient in a backward pass that also updated it|{CHANGED}|inplace operation"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("form", ["sparse", "dense", "penalty"])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_gradient_beside_a_fused_update_is_refused(order, form, has_gradient):
    fused, other = two_pools_with_one_table()
    other.sparse_grad = form == "sparse"
    inputs = draw()
    if has_gradient:
        other(*inputs).sum().backward()
    make_optimizer("sgd", fused).fuse_into_backward(fused)

    def use_otherwise():
        return fused.weight.sum() if form == "penalty" else other(*inputs).sum()

    uses = [lambda: fused(*inputs).sum(), use_otherwise][::order]
    loss = uses[0]() + uses[1]()
    with pytest.raises(RuntimeError, match=GRADIENT):
        loss.backward()


def test_a_gradient_of_another_backward_pass_stays_beside_a_fused_update():
    fused, other = two_pools_with_one_table()
    make_optimizer("sgd", fused).fuse_into_backward(fused)
    for _ in range(2):
        other(*draw()).sum().backward()
        gradient = fused.weight.grad.to_dense().clone()
        fused(*draw()).sum().backward()
        assert_same_bits(fused.weight.grad.to_dense(), gradient)


def test_a_gradient_is_taken_again_after_the_end_of_the_fusion():
    fused, other = two_pools_with_one_table()
    fusion = make_optimizer("sgd", fused).fuse_into_backward(fused)
    fused(*draw()).sum().backward()
    fusion.remove()
    fusion.remove()
    (fused(*draw()).sum() + other(*draw()).sum()).backward()
    assert fused.weight.grad is not None


def test_a_fused_pool_grows():
    layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
    optimizer = make_optimizer("adam", layer.experts)
    optimizer.fuse_into_backward(layer)
    for _ in range(2):
        layer(torch.randn(5, 8)).square().sum().backward()
        layer.zero_grad()
        layer.grow(1)
        peer.optim.grow_(optimizer)


def test_a_forward_pass_before_the_last_update_is_refused():
    pool = fused_pool()
    first, second = pool(*draw()).sum(), pool(*draw()).sum()
    second.backward()
    before = pool.weight.detach().clone()
    with pytest.raises(RuntimeError, match=CHANGED):
        first.backward()
    assert torch.equal(pool.weight, before)


def test_a_graph_is_run_once():
    pool = fused_pool()
    loss = pool(*draw()).sum()
    loss.backward(retain_graph=True)
    before = pool.weight.detach().clone()
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()
    assert torch.equal(pool.weight, before)


def test_second_derivatives_are_refused():
    pool, (x, weights, indices) = fused_pool(), draw()
    y = pool(x, weights, indices).square().sum()
    (grad_x,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_no_table_at_all_is_refused():
    optimizer = SGD(make_pool().parameters(), lr=1.0)
    for modules in ([], [nn.Linear(3, 3)], [make_pool()]):
        with pytest.raises(ValueError, match="ExpertPool whose table the optimizer holds"):
            optimizer.fuse_into_backward(*modules)


def test_pools_of_other_optimizers_are_left_alone():
    mine, other = make_pool(), make_pool()
    fusion = make_optimizer("sgd", mine).fuse_into_backward(nn.Sequential(mine, other), mine)
    assert fusion.pools == [mine]
    assert other.fused_update is None


def test_a_pool_is_fused_once():
    pool = fused_pool()
    with pytest.raises(ValueError, match="already"):
        make_optimizer("adam", pool).fuse_into_backward(make_pool(), pool)


def test_a_frozen_table_is_refused_before_and_after():
    pool = make_pool().requires_grad_(False)
    optimizer = make_optimizer("sgd", pool)
    with pytest.raises(ValueError, match="weight does not require grad"):
        optimizer.fuse_into_backward(pool)
    pool.requires_grad_(True)
    optimizer.fuse_into_backward(pool)
    pool.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        pool(*draw())


# --- tracing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict):
    pool = fused_pool()
    inputs = tuple(each.detach() for each in draw())
    with pytest.raises(Exception, match=r"cannot be traced or exported|disable"):
        torch.export.export(pool, inputs, strict=strict)
    pool.fused_update.remove()
    torch.export.export(pool, inputs, strict=strict)


def test_tracing_is_refused():
    pool = fused_pool()
    inputs = tuple(each.detach() for each in draw())
    with pytest.raises(RuntimeError, match="cannot be traced or exported"):
        torch.jit.trace(pool, inputs)


def test_without_grad_mode_a_fused_pool_is_exported():
    pool = fused_pool()
    inputs = tuple(each.detach() for each in draw())
    with torch.no_grad():
        exported = torch.export.export(pool, inputs, strict=False).module()
        assert torch.equal(exported(*inputs), pool(*inputs))


def test_a_scripted_copy_is_not_fused():
    pool = fused_pool()
    scripted, before = torch.jit.script(pool), pool.weight.detach().clone()
    scripted(*draw()).sum().backward()
    assert torch.equal(pool.weight, before)
    assert pool.weight.grad.is_sparse


def test_compiled_code_breaks_its_graph_at_the_pool():
    torch._dynamo.reset()
    pool, fused = pair_of_pools()
    inputs = draw()
    for each in (pool, fused):
        make_optimizer("sgd", each).fuse_into_backward(each)

    def model(pool, x, weights, indices):
        return pool(2 * x, weights, indices).square().sum()

    model(pool, *inputs).backward()
    torch.compile(model, backend="aot_eager")(fused, *inputs).backward()
    assert_same_bits(pool.weight, fused.weight)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="fused into its backward pass"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(fused, *inputs)


def test_functional_transforms_are_refused():
    pool = fused_pool()
    x, weights, indices = (each.detach() for each in draw())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: pool(x, weights, indices).sum())(x)
