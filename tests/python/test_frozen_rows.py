"""Frozen rows of a table: constants for every derivative, and never written by an update.

The oracle of a mask is the same operator without it, on a table whose frozen rows are detached.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import peer
from peer.optim import SGD, RowwiseAdagrad, RowwiseAdam

ops = torch.ops.peer

# Masks of eleven experts.
MASKS = {
    "some": torch.arange(11) % 3 != 1,
    "one": torch.arange(11) == 4,
    "all": torch.ones(11, dtype=torch.bool),
    "none": torch.zeros(11, dtype=torch.bool),
}


@pytest.fixture(params=MASKS)
def frozen(request):
    """Masks of some, one, all and no experts."""
    return MASKS[request.param].clone()


@pytest.fixture(params=[False, True], ids=["dense", "sparse"])
def sparse_grad(request):
    """Both forms of gradient."""
    return request.param


def experts(x, weights, indices, table, frozen, activation="gelu", sparse_grad=False):
    """The operator with a mask."""
    return ops.expert_mlp(x, weights, indices, table, activation, sparse_grad, frozen)[0]


def constant_rows(table, frozen):
    """The table with constants in the frozen rows."""
    return torch.where(frozen[:, None, None], table.detach(), table)


def oracle(x, weights, indices, table, frozen, activation="gelu", sparse_grad=False):
    """The operator without a mask, on a table with constant rows."""
    return ops.expert_mlp(x, weights, indices, constant_rows(table, frozen), activation, False)[0]


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))


def draw_like(tensor, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def gradients(function, inputs, frozen, **options):
    """The output, and the gradients of x, weights and table."""
    leaves = inputs.requiring_grad()
    out = function(*leaves, frozen, **options)
    return out, *torch.autograd.grad(out, leaves.differentiable(), draw_like(out))


# --- gradients -----------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_mask(make_expert_inputs, dtype, glu, frozen):
    inputs = make_expert_inputs(dtype=dtype, glu=glu)
    assert_same_bits(
        ops.expert_mlp(*inputs, "gelu", False, frozen), ops.expert_mlp(*inputs, "gelu", False)
    )


def test_gradients_equal_those_of_a_table_with_constant_rows(
    make_expert_inputs, dtype, glu, frozen
):
    inputs = make_expert_inputs(dtype=dtype, glu=glu)
    assert_same_bits(gradients(experts, inputs, frozen), gradients(oracle, inputs, frozen))


def test_gradients_of_tokens_and_weights_do_not_depend_on_the_mask(
    make_expert_inputs, dtype, frozen, sparse_grad
):
    inputs = make_expert_inputs(dtype=dtype)
    masked = gradients(experts, inputs, frozen, sparse_grad=sparse_grad)
    assert_same_bits(masked[1:3], gradients(experts, inputs, None, sparse_grad=sparse_grad)[1:3])


def test_sparse_gradients_hold_the_retrieved_rows_that_are_not_frozen(
    make_expert_inputs, dtype, glu, frozen
):
    inputs = make_expert_inputs(dtype=dtype, glu=glu)
    ids = inputs.indices.unique()
    ids = ids[~frozen[ids]]
    dense = gradients(experts, inputs, frozen)[3]
    sparse = gradients(experts, inputs, frozen, sparse_grad=True)[3]
    assert sparse.is_coalesced()
    assert sparse.shape == dense.shape
    assert torch.equal(sparse.indices()[0], ids)
    assert_same_bits([sparse.values()], [dense[ids]])


def test_frozen_rows_have_a_zero_gradient_even_where_others_have_nan(make_expert_inputs, frozen):
    inputs = make_expert_inputs().requiring_grad()
    out = experts(*inputs, frozen)
    (gradient,) = torch.autograd.grad(out, inputs.table, torch.full_like(out, torch.nan))
    expected = torch.zeros(11)
    expected[inputs.indices.unique()] = torch.nan
    expected[frozen] = 0
    torch.testing.assert_close(
        gradient[:, 1], expected[:, None].expand(-1, 9), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot expert"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_many_pairs_give_the_same_bits_for_any_number_of_threads(
    make_expert_inputs, sparse_grad, hot, share
):
    inputs = make_expert_inputs(tokens=900, per_token=40, experts=300, dim=11)
    generator = torch.Generator().manual_seed(1)
    if hot:
        inputs.indices[torch.rand(inputs.indices.shape, generator=generator) < 0.8] = 17
    frozen = torch.rand(300, generator=generator) < share
    frozen[17] = False
    expected = gradients(oracle, inputs, frozen)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = gradients(experts, inputs, frozen, sparse_grad=sparse_grad)
        assert_same_bits([each.to_dense() for each in results], expected)


def test_a_mask_may_have_any_stride(make_expert_inputs, sparse_grad):
    inputs = make_expert_inputs()
    mask = MASKS["some"]
    every_second = torch.stack([mask, ~mask], dim=1)[:, 0]
    assert not every_second.is_contiguous()
    for each in (every_second, mask[:1].expand(11)):
        results = (
            gradients(experts, inputs, frozen, sparse_grad=sparse_grad)
            for frozen in (each, each.clone())
        )
        assert_same_bits(*([r.to_dense() for r in result] for result in results))


def test_no_tokens_and_no_experts_have_gradients(make_expert_inputs, sparse_grad, frozen):
    for empty in ({"tokens": 0}, {"per_token": 0}, {"dim": 0}):
        inputs = make_expert_inputs(**empty)
        result = gradients(experts, inputs, frozen, sparse_grad=sparse_grad)[3]
        assert not result.to_dense().any()
    inputs = make_expert_inputs(tokens=0, experts=1)._replace(table=torch.empty(0, 2, 9))
    gradients(experts, inputs, torch.empty(0, dtype=torch.bool), sparse_grad=sparse_grad)


def test_the_functional_form_and_the_reference_take_the_mask(make_expert_inputs, glu, frozen):
    inputs = make_expert_inputs(tokens=4, dtype=torch.float64, glu=glu)

    def run(function):
        def on_four_dimensions(x, weights, indices, table, frozen):
            weights, indices = weights.view(2, 2, 3, 2), indices.view(2, 2, 3, 2)
            out = function(x.view(2, 2, 9), weights, indices, table, "silu", frozen=frozen)
            return out.view(4, 9)

        return gradients(on_four_dimensions, inputs, frozen)

    for ours, theirs in zip(
        run(peer.functional.expert_mlp), run(peer.reference.expert_mlp), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_pool_hands_its_mask_to_the_operator(make_expert_inputs, glu, frozen, sparse_grad):
    inputs = make_expert_inputs(glu=glu)
    pool = peer.ExpertPool(9, num_experts=11, glu=glu, sparse_grad=sparse_grad)
    pool.frozen = frozen
    pool.load_state_dict({"weight": inputs.table, "frozen": frozen})
    out = pool(*inputs[:3])
    out.backward(draw_like(out))
    expected = gradients(experts, inputs, frozen, sparse_grad=sparse_grad)
    assert_same_bits([out, pool.weight.grad.to_dense()], [expected[0], expected[3].to_dense()])


def test_under_autocast_gradients_equal_those_of_a_table_with_constant_rows(
    make_expert_inputs, frozen
):
    with torch.autocast("cpu", torch.bfloat16):
        inputs = make_expert_inputs()
        assert_same_bits(gradients(experts, inputs, frozen), gradients(oracle, inputs, frozen))


# --- the mask that a backward pass uses ----------------------------------------------------------


def test_a_backward_pass_uses_the_mask_of_its_forward_pass(make_expert_inputs, sparse_grad):
    inputs = make_expert_inputs()
    frozen = MASKS["some"].clone()

    def change_after(*arguments, **options):
        out = experts(*arguments, **options)
        frozen.logical_not_()
        return out

    results = gradients(change_after, inputs, frozen, sparse_grad=sparse_grad)
    expected = gradients(oracle, inputs, MASKS["some"])
    assert_same_bits([each.to_dense() for each in results], expected)


def test_a_second_derivative_uses_the_mask_of_the_forward_pass(make_expert_inputs):
    def second(change):
        inputs = make_expert_inputs(dtype=torch.float64).requiring_grad()
        frozen = MASKS["some"].clone()
        out = experts(*inputs, frozen)
        frozen.logical_xor_(torch.tensor(change))
        first = torch.autograd.grad(out.sin().sum(), inputs.differentiable(), create_graph=True)
        frozen.logical_xor_(torch.tensor(change))
        return torch.autograd.grad(sum(g.sin().sum() for g in first), inputs.differentiable())

    assert_same_bits(second(True), second(False))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_backward_pass_never_uses_another_mask(make_expert_inputs, backend):
    torch._dynamo.reset()
    inputs = make_expert_inputs().requiring_grad()
    frozen = MASKS["some"].clone()
    out = torch.compile(experts, fullgraph=True, backend=backend)(*inputs, frozen)
    frozen.logical_not_()
    if backend == "inductor":  # removes copies, so autograd notices that the mask was written
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out, inputs.table, draw_like(out))
    else:
        (gradient,) = torch.autograd.grad(out, inputs.table, draw_like(out))
        assert_same_bits([gradient], [gradients(oracle, make_expert_inputs(), MASKS["some"])[3]])
    torch._dynamo.reset()


def test_activation_checkpoints_change_nothing(make_expert_inputs, frozen, sparse_grad):
    inputs = make_expert_inputs()

    def checkpointed(*arguments, **options):
        return checkpoint(experts, *arguments, use_reentrant=False, **options)

    results = (
        gradients(function, inputs, frozen, sparse_grad=sparse_grad)
        for function in (checkpointed, experts)
    )
    assert_same_bits(*([each.to_dense() for each in result] for result in results))


# --- higher orders and forward mode --------------------------------------------------------------


@pytest.fixture
def small(make_smooth_inputs):
    return make_smooth_inputs(tokens=3, per_token=3, experts=5, dim=3)


@pytest.fixture(params=["some", "all"])
def of_five(request):
    """A mask of five experts: three, of which two are retrieved, or all."""
    return torch.tensor([True, False, True, False, True]) | (request.param == "all")


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def differentiable_arguments(function, small, frozen, activation="silu"):
    """The function of the tensors that have derivatives."""

    def of_tensors(x, weights, table):
        return function(x, weights, small.indices, table, frozen, activation)

    return of_tensors


def test_derivatives_to_the_third_order_equal_the_oracle_s(small, activation, of_five):
    def derivatives(function):
        function = differentiable_arguments(function, small, of_five, activation)
        inputs = small.requiring_grad().differentiable()
        results = [function(*inputs)]
        every = []
        for _ in range(3):
            loss = sum((each * draw_like(each)).sin().sum() for each in results)
            results = torch.autograd.grad(loss, inputs, create_graph=True)
            every += results
        return every

    assert_close(derivatives(experts), derivatives(oracle))


def transforms(function, inputs):
    """Derivatives of a function of x, weights and table, by transforms in both modes."""
    x, weights, table = inputs
    direction = tuple(draw_like(each, seed) for seed, each in enumerate(inputs))

    def loss(*inputs):
        return function(*inputs).sin().sum()

    def tangent(*inputs):
        return torch.func.jvp(function, inputs, direction)[1]

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    of_table = (lambda table: function(x, weights, table)), table
    yield "jvp", [tangent(*inputs)]
    yield "jvp of jvp", [torch.func.jvp(tangent, inputs, direction)[1]]
    yield "grad", gradient(*inputs)
    yield "jvp of grad", torch.func.jvp(gradient, inputs, direction)[1]
    yield "grad of jvp", torch.func.grad(lambda *i: tangent(*i).sin().sum(), (0, 1, 2))(*inputs)
    yield (
        "jvp of jvp of grad",
        torch.func.jvp(lambda *i: torch.func.jvp(gradient, i, direction)[1], inputs, direction)[1],
    )
    yield (
        "grad of grad",
        torch.func.grad(lambda *i: sum(g.sin().sum() for g in gradient(*i)), (0, 1, 2))(*inputs),
    )
    yield "jacrev", [torch.func.jacrev(of_table[0])(of_table[1])]
    yield "jacfwd", [torch.func.jacfwd(of_table[0])(of_table[1])]
    hessian = torch.func.hessian(loss, argnums=(0, 2))(*inputs)
    yield "hessian", itertools.chain(*hessian)


@pytest.mark.usefixtures("no_slow_fallback")
def test_transforms_in_both_modes_equal_the_oracle_s(small, of_five):
    inputs = tuple(small.differentiable())
    every = [
        transforms(differentiable_arguments(function, small, of_five), inputs)
        for function in (experts, oracle)
    ]
    for (name, ours), (_, theirs) in zip(*every, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_tangents_of_dual_tensors_equal_the_oracle_s(small, of_five, activation):
    def tangent(function):
        function = differentiable_arguments(function, small, of_five, activation)
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(each, draw_like(each))
                for each in small.differentiable()
            ]
            return torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent

    torch.testing.assert_close(tangent(experts), tangent(oracle))


def test_a_direction_along_frozen_rows_alone_has_a_tangent_of_zeros(small, of_five):
    direction = draw_like(small.table) * of_five[:, None, None]

    def of_table(table):
        return experts(small.x, small.weights, small.indices, table, of_five)

    assert not torch.func.jvp(of_table, (small.table,), (direction,))[1].any()


# --- vmap ----------------------------------------------------------------------------------------

SAMPLES = 3


def batch(tensor, dim, seed):
    """Distinct variations of a tensor, stacked at `dim`."""
    generator = torch.Generator().manual_seed(seed)
    if tensor.is_floating_point():
        noise = torch.randn(SAMPLES, *tensor.shape, generator=generator, dtype=tensor.dtype)
        samples = tensor + noise
    else:  # ids and masks: permutations
        samples = torch.stack(
            [tensor[torch.randperm(len(tensor), generator=generator)] for _ in range(SAMPLES)]
        )
    return samples.movedim(0, dim)


def loop(function, in_dims, *arguments):
    """The definition of vmap."""
    results = [
        function(
            *(
                argument if dim is None else argument.select(dim, sample)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for sample in range(SAMPLES)
    ]
    return [torch.stack(outputs) for outputs in zip(*results, strict=True)]


def batched(inputs, frozen):
    """Every choice of batched arguments, at alternating dimensions, and the arguments."""
    for choice in itertools.product([True, False], repeat=5):
        in_dims = tuple(i % 2 if chosen else None for i, chosen in enumerate(choice))
        # A mask has one dimension before it is batched.
        if any(choice):
            yield (
                in_dims,
                [
                    tensor if dim is None else batch(tensor, dim, seed)
                    for seed, (tensor, dim) in enumerate(
                        zip((*inputs, frozen), in_dims, strict=True)
                    )
                ],
            )


@pytest.mark.usefixtures("no_slow_fallback")
def test_vmap_of_gradients_equals_a_loop_over_the_oracle(make_expert_inputs, glu):
    inputs = make_expert_inputs(tokens=4, dtype=torch.float64, glu=glu)

    def gradients_of(function):
        def loss(*arguments):
            out = function(*arguments)
            return out.sin().sum(), out

        def gradients(*arguments):
            grads, out = torch.func.grad(loss, argnums=(0, 1, 3), has_aux=True)(*arguments)
            return (*grads, out)

        return gradients

    for in_dims, arguments in batched(inputs, MASKS["some"]):
        ours = torch.vmap(gradients_of(experts), in_dims)(*arguments)
        assert_close(ours, loop(gradients_of(oracle), in_dims, *arguments))


@pytest.mark.usefixtures("no_slow_fallback")
def test_transforms_outside_of_vmap_equal_those_of_a_loop_over_the_oracle(make_expert_inputs, glu):
    inputs = make_expert_inputs(tokens=2, per_token=3, experts=5, dim=3, dtype=torch.float64)
    frozen = torch.tensor([True, False, True, False, True])

    def derivatives(run, arguments):
        """First and second derivatives by autograd, and a tangent."""
        x, weights, indices, table, mask = arguments
        inputs = tuple(each.detach().clone().requires_grad_() for each in (x, weights, table))

        def function(x, weights, table):
            return run(x, weights, indices, table, mask)

        first = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        direction = tuple(map(draw_like, inputs))
        return [*first, *second, torch.func.jvp(function, inputs, direction)[1]]

    for in_dims, arguments in batched(inputs, frozen):
        ours = derivatives(lambda *a, dims=in_dims: torch.vmap(experts, dims)(*a), arguments)
        theirs = derivatives(
            lambda *a, dims=in_dims: loop(lambda *b: (oracle(*b),), dims, *a)[0], arguments
        )
        assert_close(ours, theirs)


@pytest.mark.usefixtures("no_slow_fallback")
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("table_dim", [None, 1], ids=["shared table", "own tables"])
def test_unwanted_gradients_under_vmap_stay_undefined(make_expert_inputs, position, table_dim):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    out, hidden, gate = ops.expert_mlp(*inputs, "gelu")
    in_dims = (0, 1, None, 0, table_dim, 0, 1, 0)
    arguments = [
        each if dim is None else batch(each, dim, seed)
        for seed, (each, dim) in enumerate(
            zip((out, *inputs, hidden, gate, MASKS["some"]), in_dims, strict=True)
        )
    ]
    wanted = [other == position for other in range(3)]

    def backward(*arguments):
        *tensors, frozen = arguments
        grads = ops.expert_mlp_backward(*tensors, "gelu", False, wanted, frozen)
        assert [grad is not None for grad in grads] == wanted
        return [grad for grad in grads if grad is not None]

    assert_close(torch.vmap(backward, in_dims)(*arguments), loop(backward, in_dims, *arguments))


# --- compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_three_sizes(make_expert_inputs, backend, glu):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (10, 19, 23):
        for name in ("some", "all"):
            inputs = make_expert_inputs(tokens=tokens, glu=glu)
            ours = gradients(compiled, inputs, MASKS[name])
            assert_close(ours, gradients(oracle, inputs, MASKS[name]))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_pool_without_a_mask_is_compiled_again_with_one_and_then_for_every_mask():
    torch._dynamo.reset()
    pool = peer.ExpertPool(9, num_experts=11)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pool, fullgraph=True, backend=counter)
    x, weights, indices = torch.randn(4, 9), torch.rand(4, 5), torch.randint(11, (4, 5))
    for mask in (None, MASKS["some"], MASKS["all"], MASKS["none"], None):
        pool.frozen = mask
        pool.weight.grad = None
        compiled(x, weights, indices).square().sum().backward()
        (gradient,) = torch.autograd.grad(pool(x, weights, indices).square().sum(), pool.weight)
        torch.testing.assert_close(pool.weight.grad, gradient)
        assert mask is None or not gradient[mask].any()
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_script_takes_the_mask(make_expert_inputs, sparse_grad):
    pool = peer.ExpertPool(9, num_experts=11, sparse_grad=sparse_grad)
    pool.frozen = MASKS["some"].clone()
    scripted = torch.jit.script(copy.deepcopy(pool))
    inputs = make_expert_inputs()[:3]
    for each in (pool, scripted):
        each(*inputs).square().sum().backward()
    assert_same_bits([pool.weight.grad.to_dense()], [scripted.weight.grad.to_dense()])
    assert not pool.weight.grad.to_dense()[MASKS["some"]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_operator(make_expert_inputs, dtype, glu):
    inputs = make_expert_inputs(dtype=dtype, glu=glu).requiring_grad()
    unit = torch.finfo(dtype).eps
    opcheck(
        ops.expert_mlp.default,
        (*inputs, "gelu", False, MASKS["some"]),
        atol=8 * unit,
        rtol=8 * unit,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_backward_operator(make_expert_inputs, dtype, glu):
    inputs = make_expert_inputs(dtype=dtype, glu=glu).requiring_grad()
    out, hidden, gate = ops.expert_mlp(*inputs, "silu", False)
    grad_out = torch.ones_like(out).requires_grad_()
    unit = torch.finfo(dtype).eps
    opcheck(
        ops.expert_mlp_backward.default,
        (grad_out, *inputs, hidden, gate, "silu", False, (True,) * 3, MASKS["some"]),
        atol=8 * unit,
        rtol=8 * unit,
    )


# --- errors --------------------------------------------------------------------------------------

WRONG_MASKS = {
    "of other experts": (torch.zeros(10).bool(), ValueError, r"of shape \[11\] .*, got \[10\]"),
    "of parts": (torch.zeros(11, 2).bool(), ValueError, r"of shape \[11\] .*, got \[11, 2\]"),
    "of one expert": (torch.tensor(True), ValueError, r"of shape \[11\] .*, got \[\]"),
    "of integers": (torch.zeros(11).long(), TypeError, "of dtype bool, got Long"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WRONG_MASKS)
def test_a_mask_that_does_not_fit_is_named(make_expert_inputs, case, device):
    mask, error, message = WRONG_MASKS[case]
    inputs = [each.to(device) for each in make_expert_inputs()]
    out, hidden, gate = ops.expert_mlp(*inputs, "gelu", False)
    mask = mask.to(device)
    with pytest.raises(error, match=f"^peer::expert_mlp: expected frozen {message}"):
        experts(*inputs, mask)
    with pytest.raises(error, match=f"^peer::expert_mlp_backward: expected frozen {message}"):
        ops.expert_mlp_backward(out, *inputs, hidden, gate, "gelu", False, (True,) * 3, mask)


def test_a_mask_on_another_device_is_named(make_expert_inputs):
    inputs = make_expert_inputs()
    with pytest.raises(RuntimeError, match="expected frozen on table's device cpu, got meta"):
        experts(*inputs, MASKS["some"].to("meta"))


# --- updates -------------------------------------------------------------------------------------

# Every optimizer, with options that use each term of its rule.
OPTIMIZERS = {
    "adagrad": (RowwiseAdagrad, {"lr": 0.1, "weight_decay": 0.5, "initial_accumulator_value": 0.3}),
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.5}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.5}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (RowwiseAdam, {"lr": 0.1, "weight_decay": 0.5}),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request):
    """Every optimizer."""
    return request.param


def make_optimizer(kind, table):
    optimizer, options = OPTIMIZERS[kind]
    return optimizer([table], **options)


def state_of_rows(optimizer, table):
    return [value for value in optimizer.state[table].values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("form", ["stored dense", "stored sparse", "fused"])
def test_a_frozen_row_and_its_state_are_never_written(kind, dtype, form):
    torch.manual_seed(0)
    pool = peer.ExpertPool(
        9, num_experts=11, glu=True, dtype=dtype, sparse_grad=form == "stored sparse"
    )
    optimizer = make_optimizer(kind, pool.weight)

    def train(steps):
        for _ in range(steps):
            x, weights = torch.randn(5, 9, dtype=dtype), torch.rand(5, 6, dtype=dtype)
            pool(x, weights, torch.randint(11, (5, 6))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    if form == "fused":
        optimizer.fuse_into_backward(pool)
    train(2)  # momentum and steps exist before the rows are frozen
    mask = MASKS["some"]
    pool.frozen = mask.clone()
    before = [
        each.detach().clone() for each in (pool.weight, *state_of_rows(optimizer, pool.weight))
    ]
    train(4)
    after = [pool.weight, *state_of_rows(optimizer, pool.weight)]
    assert_same_bits([each[mask] for each in after], [each[mask] for each in before])
    assert all((a[~mask] != b[~mask]).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("hot", [False, True], ids=["spread", "hot expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fused_update_equals_a_stored_gradient_bit_by_bit(kind, dtype, frozen, hot):
    torch.manual_seed(0)
    stored = peer.ExpertPool(9, num_experts=11, glu=True, dtype=dtype, sparse_grad=True)
    stored.frozen = frozen
    fused = copy.deepcopy(stored)
    optimizer = make_optimizer(kind, stored.weight)
    make_optimizer(kind, fused.weight).fuse_into_backward(fused)
    for _ in range(3):
        x, weights = torch.randn(90, 9, dtype=dtype), torch.rand(90, 6, dtype=dtype)
        indices = torch.randint(11, (90, 6))
        if hot:
            indices[torch.rand(90, 6) < 0.8] = 7
        for pool in (stored, fused):
            pool(x, weights, indices).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits([stored.weight], [fused.weight])


def test_a_fused_update_gives_tokens_and_weights_the_gradients_of_every_expert(frozen):
    torch.manual_seed(0)
    pool = peer.ExpertPool(9, num_experts=11)
    x, weights = torch.randn(5, 9).requires_grad_(), torch.rand(5, 6).requires_grad_()
    indices = torch.randint(11, (5, 6))
    expected = torch.autograd.grad(pool(x, weights, indices).sin().sum(), (x, weights))
    pool.frozen = frozen
    make_optimizer("sgd", pool.weight).fuse_into_backward(pool)
    assert_same_bits(
        torch.autograd.grad(pool(x, weights, indices).sin().sum(), (x, weights)), expected
    )


def test_a_fused_update_uses_the_mask_of_its_forward_pass():
    torch.manual_seed(0)
    pool = peer.ExpertPool(9, num_experts=11)
    pool.frozen = MASKS["some"].clone()
    before = pool.weight.detach().clone()
    make_optimizer("sgd", pool.weight).fuse_into_backward(pool)
    loss = pool(torch.randn(9, 9), torch.rand(9, 6), torch.randint(11, (9, 6))).square().sum()
    pool.frozen.logical_not_()
    loss.backward()
    moved = (pool.weight != before).flatten(1).any(1)
    assert torch.equal(moved, ~MASKS["some"])


def test_a_fused_pool_names_a_mask_that_does_not_fit_in_its_forward_pass():
    pool = peer.ExpertPool(9, num_experts=11)
    pool.frozen = torch.zeros(10, dtype=torch.bool)
    make_optimizer("sgd", pool.weight).fuse_into_backward(pool)
    with pytest.raises(ValueError, match=r"expected frozen of shape \[11\]"):
        pool(torch.randn(5, 9), torch.rand(5, 6), torch.randint(11, (5, 6)))


class UpdateArguments:
    """The arguments of an operator that updates a table of eleven rows, by name."""

    def __init__(self, name, dtype, row, form):
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.operator = getattr(ops, name)
        wide = torch.promote_types(dtype, torch.float32)
        moments = torch.rand(11, *row[:-1], generator=generator, dtype=torch.float64).to(wide)
        self.state = {
            "rowwise_adagrad_": {"sum_of_squares": moments},
            "sgd_": {"momentum_buffer": draw(11, *row)},
            "rowwise_adam_": {
                "first_moment": draw(11, *row),
                "second_moment": moments,
                "row_steps": torch.arange(11, dtype=torch.int32),
            },
        }[name]
        self.state["table"] = draw(11, *row)
        self.options = {
            "rowwise_adagrad_": {"eps": 1e-8},
            "sgd_": {"momentum": 0.5, "nesterov": True},
            "rowwise_adam_": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
        }[name]
        indices, rows = {
            "dense": (None, 11),
            "ascending ids": (torch.tensor([0, 2, 3, 7, 8]), 5),
            "repeated ids": (torch.tensor([7, 2, 7, 0, 3]), 5),
            "pairs": (torch.randint(11, (5, 4), generator=generator), 5),
        }[form]
        self.gradient = {
            "indices": indices,
            "source": draw(rows, *row),
            "coefficients": draw(*row[:-1], 5, 4).to(wide) if form == "pairs" else None,
        }

    def run(self, frozen=None):
        """The table and its state after the update."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        rounding = {"seed": 3, "step": 4, "stream": 5}
        numbers = {"lr": 0.1, "weight_decay": 0.1, **self.options, **rounding}
        self.operator(**state, **self.gradient, **numbers, frozen=frozen)
        return state


NAMES = ["rowwise_adagrad_", "sgd_", "rowwise_adam_"]
FORMS = ["dense", "ascending ids", "repeated ids", "pairs"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", [(9,), (3, 9)], ids=["flat", "parts"])
def test_an_update_with_a_mask_equals_one_without_it_in_rows_that_are_not_frozen(
    name, form, row, dtype, frozen
):
    arguments = UpdateArguments(name, dtype, row, form)
    masked, every = arguments.run(frozen), arguments.run()
    for key, start in arguments.state.items():
        shape = (-1,) + (1,) * (start.dim() - 1)
        assert_same_bits([masked[key]], [torch.where(frozen.view(shape), start, every[key])])
        assert not torch.equal(every[key], start)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_updates(name, form):
    arguments = UpdateArguments(name, torch.bfloat16, (2, 9), form)
    given = {**arguments.state, **arguments.gradient, **arguments.options}
    given |= {"lr": 0.1, "weight_decay": 0.1, "frozen": MASKS["some"]}
    opcheck(arguments.operator.default, (), given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", WRONG_MASKS)
def test_an_update_names_a_mask_that_does_not_fit_and_changes_nothing(name, case):
    mask, error, message = WRONG_MASKS[case]
    arguments = UpdateArguments(name, torch.float32, (2, 9), "pairs")
    given = {**arguments.state, **arguments.gradient, **arguments.options}
    given |= {"lr": 0.1, "weight_decay": 0.1, "frozen": mask}
    before = {key: tensor.clone() for key, tensor in arguments.state.items()}
    with pytest.raises(error, match=f"^peer::{name}: expected frozen {message}"):
        arguments.operator(**given)
    assert_same_bits(arguments.state.values(), before.values())


def test_a_frozen_pool_in_a_model_learns_around_its_frozen_rows():
    torch.manual_seed(0)
    layer = peer.PEER(8, num_experts=64, heads=2, num_experts_per_head=4, dim_key=4)
    layer.experts.frozen = torch.rand(64) < 0.5
    model = nn.Sequential(nn.Linear(8, 8), layer)
    before = layer.experts.weight.detach().clone()
    optimizer = torch.optim.AdamW(peer.param_groups(model, lr=1e-2, expert_lr=1e-1)[:1])
    table_optimizer = RowwiseAdagrad([layer.experts.weight], lr=0.1, weight_decay=0.1)
    x, y, losses = torch.randn(32, 8), torch.randn(32, 8), []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        for each in (optimizer, table_optimizer):
            each.step()
            each.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    moved = (layer.experts.weight != before).flatten(1).any(1)
    assert moved.any()
    assert not (moved & layer.experts.frozen).any()
