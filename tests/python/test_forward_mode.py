"""Forward mode: tangents against finite differences, reverse mode, the reference and loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import peer

pytestmark = pytest.mark.usefixtures("no_slow_fallback")

ops = torch.ops.peer

forward_check = {
    "check_forward_ad": True,
    "check_batched_forward_grad": True,
    "check_backward_ad": False,
    "check_undefined_grad": False,
    "check_batched_grad": False,
}

forward_over_reverse_check = {
    "check_fwd_over_rev": True,
    "check_rev_over_rev": False,
    "check_undefined_grad": False,
}


def draw_like(tensors, seed: int = 7):
    """Random tangents with the shapes and dtypes of the tensors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors
    )


def tangents_of(function, tensors, tangents):
    """The tangents of all outputs (or None) for the tangents of some inputs."""
    with forward_ad.dual_level():
        duals = [
            tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
            for tensor, tangent in zip(tensors, tangents, strict=True)
        ]
        outputs = function(*duals)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        return [
            None if output is None else forward_ad.unpack_dual(output).tangent for output in outputs
        ]


def inner(left, right):
    return sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))


def assert_tangents_of_subsets_equal_those_with_zeros(function, tensors):
    """An input without a tangent is one whose tangent is zero."""
    direction = draw_like(tensors)
    for chosen in itertools.product([True, False], repeat=len(tensors)):
        if not any(chosen):
            continue

        def with_others(make_other, chosen=chosen):
            pairs = zip(direction, chosen, strict=True)
            return [tangent if is_chosen else make_other(tangent) for tangent, is_chosen in pairs]

        expected = tangents_of(function, tensors, with_others(torch.zeros_like))
        assert any(tangent is not None and tangent.any() for tangent in expected), chosen
        # Some formulas of torch return zero tensors without memory.
        without = with_others(lambda tangent: None)
        efficient = with_others(lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype))
        for tangents in without, efficient:
            for ours, theirs in zip(
                tangents_of(function, tensors, tangents), expected, strict=True
            ):
                if theirs is not None:
                    ours = torch.zeros_like(theirs) if ours is None else ours
                    torch.testing.assert_close(ours, theirs, msg=str(chosen))


# --- experts -------------------------------------------------------------------------------------


def experts_of(indices, activation="gelu", sparse_grad=False):
    """`expert_mlp` as a function of the tensors that have derivatives."""

    def experts(x, weights, table):
        return ops.expert_mlp(x, weights, indices, table, activation, sparse_grad)[0]

    return experts


@pytest.fixture
def small(make_smooth_inputs):
    return make_smooth_inputs(tokens=3, per_token=3, experts=5, dim=3).requiring_grad()


def test_tangents_of_experts_pass_gradcheck(small, activation):
    assert gradcheck(experts_of(small.indices, activation), small.differentiable(), **forward_check)


def test_tangents_of_the_gradients_of_experts_pass_gradgradcheck(small, activation):
    assert gradgradcheck(
        experts_of(small.indices, activation),
        small.differentiable(),
        **forward_over_reverse_check,
    )


def test_tangents_of_experts_can_be_differentiated(small):
    # Reverse over forward: the tangent as a function of the inputs and their tangents.
    inputs = small.differentiable()
    function = experts_of(small.indices, "silu")
    direction = [tangent.requires_grad_() for tangent in draw_like(inputs)]

    def tangent(*arguments):
        half = len(arguments) // 2
        return tangents_of(function, arguments[:half], arguments[half:])[0]

    assert gradcheck(tangent, (*inputs, *direction))


def test_tangents_of_the_backward_operator_can_be_differentiated(make_expert_inputs):
    inputs = make_expert_inputs(tokens=2, per_token=2, experts=3, dim=2, dtype=torch.float64)
    arguments = (torch.ones_like(inputs.x).requires_grad_(), *inputs.differentiable())
    arguments = [tensor.detach().requires_grad_() for tensor in arguments]
    direction = [tangent.requires_grad_() for tangent in draw_like(arguments)]
    backward = experts_backward_of(inputs)

    def tangents(*tensors):
        half = len(tensors) // 2
        return tuple(tangents_of(backward, tensors[:half], tensors[half:]))

    assert gradcheck(tangents, (*arguments, *direction))


def experts_backward_of(inputs, activation="gelu", sparse_grad=False, output_mask=(True,) * 3):
    """The backward operator as a function of the tensors that have derivatives."""

    def backward(grad_out, x, weights, table):
        tensors = (x, weights, inputs.indices, table)
        _, hidden, gate = ops.expert_mlp(*tensors, activation)
        return ops.expert_mlp_backward(
            grad_out, *tensors, hidden, gate, activation, sparse_grad, list(output_mask)
        )

    return backward


def test_an_input_of_experts_without_a_tangent_counts_as_constant(make_expert_inputs):
    inputs = make_expert_inputs(tokens=3, dtype=torch.float64, glu=True)
    assert_tangents_of_subsets_equal_those_with_zeros(
        experts_of(inputs.indices), inputs.differentiable()
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_input_of_the_backward_of_experts_without_a_tangent_counts_as_constant(
    make_expert_inputs, activation
):
    inputs = make_expert_inputs(tokens=3, per_token=3, dim=4, dtype=torch.float64, glu=True)
    (grad_out,) = draw_like((inputs.x,), seed=3)
    assert_tangents_of_subsets_equal_those_with_zeros(
        experts_backward_of(inputs, activation), (grad_out, *inputs.differentiable())
    )


@pytest.mark.parametrize("position", range(3))
def test_a_gradient_wanted_alone_has_the_same_tangent(make_expert_inputs, position):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    tensors = (inputs.x.sin(), *inputs.differentiable())
    direction = draw_like(tensors)
    mask = [other == position for other in range(3)]
    alone = tangents_of(experts_backward_of(inputs, output_mask=mask), tensors, direction)
    every = tangents_of(experts_backward_of(inputs), tensors, direction)
    assert [tangent is not None for tangent in alone] == mask
    torch.testing.assert_close(alone[position], every[position], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "table_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.float16, torch.float16, 2e-3),
    ],
    ids=str,
)
def test_tangents_have_the_dtype_of_their_values_and_are_the_reference_s(
    make_expert_inputs, dtype, table_dtype, tolerance, glu
):
    inputs = make_expert_inputs(
        dtype=dtype, weights_dtype=torch.float32, table_dtype=table_dtype, glu=glu
    )
    tensors = inputs.differentiable()
    direction = draw_like(tensors)

    def reference(x, weights, table):
        return peer.reference.expert_mlp(x, weights, inputs.indices, table)

    value, tangent = torch.func.jvp(experts_of(inputs.indices), tuple(tensors), direction)
    assert tangent.dtype == value.dtype == dtype
    exact = torch.func.jvp(
        reference, tuple(t.double() for t in tensors), tuple(t.double() for t in direction)
    )[1]
    torch.testing.assert_close(tangent.double(), exact, rtol=tolerance, atol=tolerance)


def test_tangents_of_gradients_have_their_dtypes(make_expert_inputs):
    inputs = make_expert_inputs(
        dtype=torch.bfloat16, weights_dtype=torch.float16, table_dtype=torch.float32, glu=True
    )
    tensors = (inputs.x, *inputs.differentiable())
    tangents = tangents_of(experts_backward_of(inputs), tensors, draw_like(tensors))
    assert [t.dtype for t in tangents] == [t.dtype for t in tensors[1:]]


def test_forward_mode_is_the_transpose_of_reverse_mode(make_expert_inputs, activation, glu):
    inputs = make_expert_inputs(dtype=torch.float64, glu=glu)
    tensors = tuple(inputs.differentiable())
    function = experts_of(inputs.indices, activation)
    out, pull_back = torch.func.vjp(function, *tensors)
    direction, cotangent = draw_like(tensors), draw_like((out,), seed=8)
    tangent = torch.func.jvp(function, tensors, direction)[1]
    torch.testing.assert_close(
        inner(cotangent, (tangent,)), inner(pull_back(cotangent[0]), direction)
    )


def test_pre_activations_have_no_tangent(make_expert_inputs):
    inputs = make_expert_inputs(glu=True)
    tangents = tangents_of(
        lambda x: ops.expert_mlp(x, *inputs[1:], "gelu"), (inputs.x,), (inputs.x,)
    )
    assert [tangent is not None for tangent in tangents] == [True, False, False]


def test_a_table_that_is_a_strided_view_has_tangents(make_expert_inputs, glu):
    inputs = make_expert_inputs(dtype=torch.float64, glu=glu)
    function = experts_of(inputs.indices)
    (direction,) = draw_like((inputs.table,))

    def tangent(lay_out):
        return torch.func.jvp(
            lambda table: function(inputs.x, inputs.weights, table),
            (lay_out(inputs.table),),
            (lay_out(direction),),
        )[1]

    part_after_part = tangent(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(part_after_part, tangent(torch.clone))


@pytest.mark.parametrize("empty", [{"tokens": 0}, {"per_token": 0}, {"dim": 0}])
def test_nothing_has_tangents_of_zeros(make_expert_inputs, empty):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True, **empty)
    tensors = inputs.differentiable()
    direction = draw_like(tensors)
    (tangent,) = tangents_of(experts_of(inputs.indices), tensors, direction)
    assert tangent.shape == inputs.x.shape
    assert not tangent.any()
    tensors = (tangent, *tensors)
    tangents = tangents_of(experts_backward_of(inputs), tensors, (tangent, *direction))
    for tensor, gradient in zip(tensors[1:], tangents, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_sparse_grad_does_not_change_a_tangent(make_expert_inputs):
    inputs = make_expert_inputs(dtype=torch.float64, glu=True)
    tensors = tuple(inputs.differentiable())
    direction = draw_like(tensors)
    sparse = torch.func.jvp(experts_of(inputs.indices, sparse_grad=True), tensors, direction)
    dense = torch.func.jvp(experts_of(inputs.indices), tensors, direction)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=0)


def test_tangents_of_sparse_gradients_are_refused(make_expert_inputs):
    inputs = make_expert_inputs(dtype=torch.float64)

    function = experts_of(inputs.indices, sparse_grad=True)
    gradient = torch.func.grad(lambda table: function(inputs.x, inputs.weights, table).sum())
    with pytest.raises(NotImplementedError, match=r"peer::expert_mlp: forward-mode.*sparse_grad"):
        torch.func.jvp(gradient, (inputs.table,), (inputs.table,))


def test_sparse_grad_does_not_hinder_tangents_of_other_gradients(make_expert_inputs):
    inputs = make_expert_inputs(dtype=torch.float64)

    def gradient(sparse_grad):
        function = experts_of(inputs.indices, sparse_grad=sparse_grad)
        return torch.func.grad(lambda x: function(x, inputs.weights, inputs.table).sin().sum())

    sparse, dense = (
        torch.func.jvp(gradient(sparse_grad), (inputs.x,), (inputs.x.cos(),))
        for sparse_grad in (True, False)
    )
    torch.testing.assert_close(sparse, dense, rtol=0, atol=0)


def test_under_autocast_a_tangent_has_the_dtype_of_the_output(make_expert_inputs):
    inputs = make_expert_inputs()
    tensors = tuple(inputs.differentiable())
    direction = draw_like(tensors)
    exact = torch.func.jvp(experts_of(inputs.indices), tensors, direction)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(experts_of(inputs.indices), tensors, direction)
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), exact, rtol=5e-2, atol=5e-2)


def test_forward_mode_records_no_graph_without_need(small):
    with torch.no_grad():
        tensors = small.differentiable()
        (tangent,) = tangents_of(experts_of(small.indices), tensors, draw_like(tensors))
    assert not tangent.requires_grad


# --- retrieval -----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["shared keys", "keys per head"])
def retrieval(make_retrieval_inputs, request):
    return make_retrieval_inputs(
        tokens=2, heads=2, rows=5, columns=3, dim_key=4, shared=request.param, dtype=torch.float64
    )


def scores_of(*tensors):
    return ops.product_key_topk(*tensors, 4)[0]


def retrieval_backward_of(retrieval, output_mask=(True,) * 3):
    indices = ops.product_key_topk(*retrieval, 4)[1]

    def backward(grad_scores, *tensors):
        return ops.product_key_topk_backward(grad_scores, *tensors, indices, list(output_mask))

    return backward


def test_tangents_of_scores_pass_gradcheck(retrieval):
    assert gradcheck(scores_of, tuple(retrieval.requiring_grad()), **forward_check)


def test_tangents_of_the_gradients_of_scores_pass_gradgradcheck(retrieval):
    arguments = tuple(retrieval.requiring_grad())
    assert gradgradcheck(scores_of, arguments, **forward_over_reverse_check)


def test_tangents_of_retrieval_can_be_differentiated(retrieval):
    scores = scores_of(*retrieval).sin()
    backward = retrieval_backward_of(retrieval)
    for function, point in (scores_of, tuple(retrieval)), (backward, (scores, *retrieval)):

        def tangents(*tensors, function=function):
            half = len(tensors) // 2
            return tuple(tangents_of(function, tensors[:half], tensors[half:]))

        leaves = [t.clone().requires_grad_() for t in (*point, *draw_like(point))]
        assert gradcheck(tangents, leaves)


def scores_and_indices(*tensors):
    return ops.product_key_topk(*tensors, 4)


def test_indices_have_no_tangent(retrieval):
    tangents = tangents_of(scores_and_indices, retrieval, draw_like(retrieval))
    assert [tangent is not None for tangent in tangents] == [True, False]


def test_an_input_of_retrieval_without_a_tangent_counts_as_constant(retrieval):
    assert_tangents_of_subsets_equal_those_with_zeros(scores_of, retrieval)


def test_an_input_of_the_backward_of_retrieval_without_a_tangent_counts_as_constant(retrieval):
    tensors = (scores_of(*retrieval).sin(), *retrieval)
    assert_tangents_of_subsets_equal_those_with_zeros(retrieval_backward_of(retrieval), tensors)


@pytest.mark.parametrize("position", range(3))
def test_a_gradient_of_retrieval_wanted_alone_has_the_same_tangent(retrieval, position):
    tensors = (scores_of(*retrieval).sin(), *retrieval)
    direction = draw_like(tensors)
    mask = [other == position for other in range(3)]
    alone = tangents_of(retrieval_backward_of(retrieval, mask), tensors, direction)
    every = tangents_of(retrieval_backward_of(retrieval), tensors, direction)
    assert [tangent is not None for tangent in alone] == mask
    torch.testing.assert_close(alone[position], every[position], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tangents_of_scores_have_the_dtype_of_the_sums(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(dtype=dtype)
    direction = draw_like(inputs)
    scores, tangent = torch.func.jvp(scores_of, tuple(inputs), direction)
    assert scores.dtype == tangent.dtype == torch.float32
    _, indices = ops.product_key_topk(*inputs, 4)

    def reference(query, row_keys, col_keys):
        row_query, col_query = query.chunk(2, dim=-1)
        pairs = (row_query @ row_keys.mT).unsqueeze(-1) + (col_query @ col_keys.mT).unsqueeze(-2)
        return pairs.flatten(-2).gather(-1, indices)

    exact = torch.func.jvp(
        reference, tuple(t.double() for t in inputs), tuple(t.double() for t in direction)
    )[1]
    torch.testing.assert_close(tangent.double(), exact, rtol=1e-5, atol=1e-5)


# --- torch.func ----------------------------------------------------------------------------------


@pytest.fixture
def whole(make_retrieval_inputs, make_expert_inputs, glu):
    """The layer as a function of a dictionary of all differentiable tensors."""
    retrieval = make_retrieval_inputs(
        tokens=2, heads=2, rows=3, columns=2, dim_key=4, dtype=torch.float64
    )
    experts = make_expert_inputs(tokens=2, experts=6, dim=2, dtype=torch.float64, glu=glu)
    tensors = {**retrieval._asdict(), "x": experts.x, "table": experts.table}

    def layer(tensors, implementation=peer.functional):
        keys = tensors["row_keys"], tensors["col_keys"]
        scores, indices = implementation.product_key_topk(tensors["query"], *keys, 3)
        weights = scores.softmax(-1)
        return implementation.expert_mlp(tensors["x"], weights, indices, tensors["table"])

    return layer, tensors


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_jvp_is_the_reference_s(whole):
    layer, tensors = whole
    direction = dict(zip(tensors, draw_like(tensors.values()), strict=True))
    ours = torch.func.jvp(layer, (tensors,), (direction,))
    assert_close(ours, torch.func.jvp(lambda t: layer(t, peer.reference), (tensors,), (direction,)))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's
def test_linearize_gives_the_tangents_of_jvp(whole):
    layer, tensors = whole
    out, linear = torch.func.linearize(layer, tensors)
    assert_close(out, layer(tensors))
    for seed in (1, 2):
        direction = dict(zip(tensors, draw_like(tensors.values(), seed), strict=True))
        assert_close(linear(direction), torch.func.jvp(layer, (tensors,), (direction,))[1])


def test_jacfwd_equals_jacrev(whole):
    layer, tensors = whole
    assert_close(torch.func.jacfwd(layer)(tensors), torch.func.jacrev(layer)(tensors))


def test_hessian_equals_jacrev_of_jacrev_and_the_reference_s(whole):
    layer, tensors = whole

    def loss(tensors, **options):
        return layer(tensors, **options).sin().sum()

    hessian = torch.func.hessian(loss)(tensors)
    assert_close(hessian, torch.func.jacrev(torch.func.jacrev(loss))(tensors))
    assert_close(
        hessian, torch.func.hessian(lambda t: loss(t, implementation=peer.reference))(tensors)
    )


def test_forward_over_forward_equals_reverse_over_forward(whole):
    layer, tensors = whole
    first, second = (
        dict(zip(tensors, draw_like(tensors.values(), seed), strict=True)) for seed in (1, 2)
    )

    def tangent(tensors):
        return torch.func.jvp(layer, (tensors,), (first,))[1].sum()

    ours = torch.func.jvp(tangent, (tensors,), (second,))[1]
    gradient = torch.func.grad(tangent)(tensors)
    assert_close(ours, sum((gradient[name] * second[name]).sum() for name in tensors))


def test_third_derivatives_by_forward_mode_equal_those_by_reverse_mode(make_expert_inputs):
    inputs = make_expert_inputs(
        tokens=1, per_token=3, experts=4, dim=2, dtype=torch.float64, glu=True
    )
    function = experts_of(inputs.indices, "gelu_tanh")

    def loss(x):
        return function(x, *inputs.differentiable()[1:]).sin().sum()

    assert_close(
        torch.func.jacfwd(torch.func.jacfwd(torch.func.jacrev(loss)))(inputs.x),
        torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(loss)))(inputs.x),
    )


def test_vmap_of_jvp_and_jvp_of_vmap_equal_a_loop(whole):
    layer, tensors = whole
    samples = {name: torch.stack([t, t.sin(), -t]) for name, t in tensors.items()}
    directions = {name: torch.stack([t.cos(), t, t * t]) for name, t in tensors.items()}

    def jvp(tensors, tangents):
        return torch.func.jvp(layer, (tensors,), (tangents,))

    loop = [
        jvp({n: t[i] for n, t in samples.items()}, {n: t[i] for n, t in directions.items()})
        for i in range(3)
    ]
    expected = tuple(torch.stack(parts) for parts in zip(*loop, strict=True))
    assert_close(torch.vmap(jvp)(samples, directions), expected)
    assert_close(torch.func.jvp(torch.vmap(layer), (samples,), (directions,)), expected)


def compiled_loss(x, query, row_keys, table):
    scores, indices = ops.product_key_topk(query, row_keys, row_keys, 4)
    weights = scores.softmax(-1).flatten(1)
    out = ops.expert_mlp(x, weights, indices.flatten(1), table, "silu")[0]
    return out.square().sum()


def jvp_of_loss(primals, direction):
    return torch.func.jvp(compiled_loss, primals, direction)


def jvp_of_gradients(primals, direction):
    gradients = torch.func.grad(compiled_loss, argnums=(0, 1, 2, 3))
    return torch.func.jvp(gradients, primals, direction)


@pytest.fixture
def draw_loss(make_retrieval_inputs, make_expert_inputs):
    def draw(tokens, rows):
        retrieval = make_retrieval_inputs(
            tokens=tokens, rows=rows, shared=False, dtype=torch.float64
        )
        experts = make_expert_inputs(tokens=tokens, experts=rows**2, dtype=torch.float64)
        primals = (experts.x, retrieval.query, retrieval.row_keys, experts.table)
        return primals, draw_like(primals)

    return draw


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_jvp_is_one_graph_for_any_number_of_tokens_and_keys(draw_loss):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(jvp_of_loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens, rows in (10, 5), (19, 6), (23, 7):
        arguments = draw_loss(tokens, rows)
        assert_close(compiled(*arguments), jvp_of_loss(*arguments))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_jvp_of_gradients_equals_eager(draw_loss):
    compiled = torch.compile(jvp_of_gradients, fullgraph=True, backend="aot_eager")
    arguments = draw_loss(10, 5)
    assert_close(compiled(*arguments), jvp_of_gradients(*arguments))


# --- what has no derivative ----------------------------------------------------------------------

updates = {
    "rowwise_adagrad_": lambda t, s: ops.rowwise_adagrad_(
        t, torch.zeros(4), None, s, None, 0.1, 0.1, 0.0
    ),
    "sgd_": lambda t, s: ops.sgd_(t, None, None, s, None, 0.1, 0.0, False, 0.0),
    "rowwise_adam_": lambda t, s: ops.rowwise_adam_(
        t,
        torch.zeros(4, 3),
        torch.zeros(4),
        torch.zeros(4, dtype=torch.int32),
        None,
        s,
        None,
        0.1,
        0.9,
        0.99,
        0.1,
        0.0,
    ),
}


@pytest.mark.parametrize("name", updates)
@pytest.mark.parametrize("dual", ["table", "source"])
def test_an_update_refuses_a_tangent_by_name_and_changes_nothing(name, dual):
    tensors = {"table": torch.zeros(4, 3), "source": torch.ones(4, 3)}
    with forward_ad.dual_level():
        given = {**tensors, dual: forward_ad.make_dual(tensors[dual], torch.ones(4, 3))}
        expected = f"peer::{name}: has no derivative, but {dual} has a tangent"
        with pytest.raises(NotImplementedError, match=expected):
            updates[name](given["table"], given["source"])
        assert not tensors["table"].any()
        updates[name](given["table"].detach(), given["source"].detach())
        assert tensors["table"].all()
