"""The operators that compute a backward pass and update the table by its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

ops = torch.ops.peer

RULES = ["rowwise_adagrad", "sgd", "rowwise_adam"]
PASS = ("grad_out", "x", "weights", "indices", "table", "hidden", "gate", "activation")


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


def fused(rule):
    return getattr(ops, f"expert_mlp_backward_{rule}_").default


def assert_same_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def arguments(rule, inputs, **changes):
    """The arguments of a fused operator by name; `changes` replaces some."""
    torch.manual_seed(0)
    table = inputs.table
    _, hidden, gate = ops.expert_mlp(*inputs, "gelu")
    moments = torch.ones(table.shape[:2], dtype=torch.promote_types(table.dtype, torch.float32))
    state = {
        "rowwise_adagrad": {"sum_of_squares": moments},
        "sgd": {"momentum_buffer": torch.randn_like(table)},
        "rowwise_adam": {
            "first_moment": torch.randn_like(table),
            "second_moment": moments,
            "row_steps": torch.ones(len(table), dtype=torch.int32),
        },
    }[rule]
    options = {
        "rowwise_adagrad": {"eps": 1e-8},
        "sgd": {"momentum": 0.5, "nesterov": True},
        "rowwise_adam": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
    }[rule]
    return {
        "grad_out": torch.randn_like(inputs.x),
        "x": inputs.x,
        "weights": inputs.weights,
        "indices": inputs.indices,
        "table": table.clone(),
        "hidden": hidden,
        "gate": gate,
        "activation": "gelu",
        **state,
        **options,
        "lr": 0.1,
        "weight_decay": 0.1,
        "seed": 3,
        "step": 4,
        "stream": 5,
        "frozen": None,
        **changes,
    }


def written(rule, given):
    schema = fused(rule)._schema.arguments
    return {e.name: given[e.name] for e in schema if e.alias_info and e.alias_info.is_write}


def with_single_and_hot(inputs):
    """Retrievals of which some are the only ones of their expert, and many are of one expert."""
    indices = torch.randperm(300)[: inputs.indices.numel()].view(inputs.indices.shape)
    indices[2:, 2:] = 299
    indices[:3, 0] = 298
    return inputs._replace(indices=indices)


def copies(given):
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in given.items()}


# --- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [None, 0.2, 1.0], ids=["no mask", "some frozen", "all frozen"])
def test_equals_a_gradient_and_an_update_bit_by_bit(make_expert_inputs, rule, dtype, glu, share):
    inputs = with_single_and_hot(
        make_expert_inputs(tokens=30, per_token=9, experts=300, dim=20, dtype=dtype, glu=glu)
    )
    frozen = None if share is None else torch.rand(300) < share
    given = arguments(rule, inputs, frozen=frozen)
    start, expected = copies(given), copies(given)
    grad_x, grad_weights, gradient = ops.expert_mlp_backward(
        *(given[key] for key in PASS), False, (True,) * 3, frozen
    )
    rest = {key: value for key, value in expected.items() if key == "table" or key not in PASS}
    getattr(ops, f"{rule}_")(indices=None, source=gradient, coefficients=None, **rest)
    results = fused(rule)(**given)
    assert_same_bits(results[0], grad_x)
    assert_same_bits(results[1], grad_weights)
    for key, tensor in written(rule, given).items():
        assert_same_bits(tensor, expected[key])
        assert torch.equal(tensor, start[key]) == (share == 1.0)


def test_the_same_bits_for_any_number_of_threads(make_expert_inputs, rule, dtype):
    inputs = with_single_and_hot(
        make_expert_inputs(tokens=30, per_token=9, experts=300, dim=20, dtype=dtype)
    )
    runs = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        given = arguments(rule, inputs)
        runs.append([*fused(rule)(**given), *written(rule, given).values()])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    "sizes", [{"tokens": 0}, {"per_token": 0}], ids=["no tokens", "no experts"]
)
def test_without_retrievals_nothing_is_updated(make_expert_inputs, rule, sizes):
    inputs = make_expert_inputs(**sizes)
    given = arguments(rule, inputs)
    start = copies(given)
    grad_x, grad_weights = fused(rule)(**given)
    assert not grad_x.any()
    assert grad_x.shape == inputs.x.shape
    assert grad_weights.shape == inputs.weights.shape
    for key, tensor in written(rule, given).items():
        assert_same_bits(tensor, start[key])


def test_rows_may_be_strided(make_expert_inputs, rule):
    inputs = make_expert_inputs()
    given, strided = arguments(rule, inputs), arguments(rule, inputs)
    wide = torch.randn(len(inputs.table), 3, inputs.table.shape[-1])
    strided["table"] = wide[:, 1:].copy_(inputs.table)
    before = wide[:, 0].clone()
    for a, b in zip(fused(rule)(**given), fused(rule)(**strided), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(given["table"], strided["table"])
    assert torch.equal(wide[:, 0], before)


# --- operators of torch --------------------------------------------------------------------------


def test_opcheck(make_expert_inputs, rule, dtype, glu):
    given = arguments(rule, make_expert_inputs(dtype=dtype, glu=glu))
    torch.library.opcheck(fused(rule), (), given)


def test_opcheck_with_frozen_rows(make_expert_inputs, rule):
    inputs = make_expert_inputs()
    frozen = torch.arange(len(inputs.table)) % 2 == 0
    torch.library.opcheck(fused(rule), (), arguments(rule, inputs, frozen=frozen, seed=None))


def test_tagged_for_the_compiler_and_refused_on_cuda(make_expert_inputs, rule):
    operator = fused(rule)
    assert torch.Tag.pt2_compliant_tag in operator.tags
    if '"cuda": null' not in ops.build_info():
        pytest.skip("this build has CUDA")
    given = arguments(rule, make_expert_inputs())
    positional = [given[each.name] for each in operator._schema.arguments]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"_: peer was built without CUDA"):
        operator.redispatch(cuda, *positional)


def test_what_is_written_gets_a_new_version(make_expert_inputs, rule):
    given = arguments(rule, make_expert_inputs())
    versions = {key: v._version for key, v in given.items() if isinstance(v, Tensor)}
    changed = written(rule, given)
    assert len(changed) == {"rowwise_adagrad": 2, "sgd": 2, "rowwise_adam": 4}[rule]
    fused(rule)(**given)
    for key, version in versions.items():
        assert given[key]._version == version + (key in changed)


# --- errors --------------------------------------------------------------------------------------


def assert_refused_unchanged(rule, given, error, message):
    before = copies(given)
    with pytest.raises(error, match=f"peer::expert_mlp_backward_{rule}_: .*{message}"):
        fused(rule)(**given)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(given[key], value)


BAD_ARGUMENTS = {
    "grad_out": (lambda g: {"grad_out": g["grad_out"][1:]}, ValueError, "expected grad_out of"),
    "hidden": (lambda g: {"hidden": g["hidden"][1:]}, ValueError, "expected hidden of"),
    "weights": (lambda g: {"weights": g["weights"][:, 1:]}, ValueError, "expected weights of"),
    "activation": (lambda g: {"activation": "tanh"}, ValueError, "expected activation gelu"),
    "columns": (
        lambda g: {"table": g["table"].transpose(0, 2).contiguous().transpose(0, 2)},
        ValueError,
        "expected table with contiguous rows that do not overlap",
    ),
    "one row": (
        lambda g: {"table": g["table"][:1].expand_as(g["table"])},
        ValueError,
        "expected table with contiguous rows that do not overlap",
    ),
    "frozen": (
        lambda g: {"frozen": torch.zeros(3, dtype=torch.bool)},
        ValueError,
        "expected frozen of shape",
    ),
}
STATE = [
    *(("rowwise_adagrad", "sum_of_squares"), ("sgd", "momentum_buffer")),
    *(("rowwise_adam", name) for name in ("first_moment", "second_moment", "row_steps")),
]


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_named_and_changes_nothing(make_expert_inputs, rule, case):
    change, error, message = BAD_ARGUMENTS[case]
    given = arguments(rule, make_expert_inputs())
    assert_refused_unchanged(rule, {**given, **change(given)}, error, message)


def test_a_bad_index_is_named_and_changes_nothing(make_expert_inputs, rule):
    given = arguments(rule, make_expert_inputs())
    given["indices"] = given["indices"].clone()
    given["indices"][-1, -1] = len(given["table"])
    assert_refused_unchanged(rule, given, IndexError, r"index 11 at position \[4, 5\] of indices")


@pytest.mark.parametrize(("rule", "name"), STATE)
def test_bad_state_is_named_and_changes_nothing(make_expert_inputs, rule, name):
    given = arguments(rule, make_expert_inputs())
    given[name] = given[name][1:]
    assert_refused_unchanged(rule, given, ValueError, f"expected {name} of")


def test_momentum_needs_its_buffer(make_expert_inputs):
    given = arguments("sgd", make_expert_inputs(), momentum_buffer=None)
    message = "expected momentum_buffer, because momentum is 0.5"
    assert_refused_unchanged("sgd", given, ValueError, message)


@pytest.mark.parametrize("name", ["grad_out", "table"])
def test_there_is_no_derivative(make_expert_inputs, rule, name):
    given = arguments(rule, make_expert_inputs())
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"has no derivative, but {name} requires grad"):
        fused(rule)(**given)
    with torch.no_grad():
        fused(rule)(**given)


@pytest.mark.parametrize("name", ["grad_out", "x", "weights", "table"])
def test_a_tangent_is_refused_by_name_and_changes_nothing(make_expert_inputs, rule, name):
    given = arguments(rule, make_expert_inputs())
    with forward_ad.dual_level():
        dual = {**given, name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))}
        before = copies(given)
        with pytest.raises(NotImplementedError, match=f"no derivative, but {name} has a tangent"):
            fused(rule)(**dual)
        for key, tensor in written(rule, given).items():
            assert torch.equal(tensor, before[key])
