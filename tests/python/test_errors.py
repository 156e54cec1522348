"""Bad input raises an error that names the argument, the expected value and the actual one."""

from __future__ import annotations

import json
import re

import pytest
import torch

import peer

# Each case changes one argument and has the exception and its message. The meta device must make
# the same checks, because a traced program would otherwise fail later.
BOTH = pytest.mark.parametrize("device", ["cpu", "meta"])


def call_experts(inputs, device="cpu", activation="gelu", **changes):
    inputs = inputs._replace(**changes)
    return torch.ops.peer.expert_mlp(*(t.to(device) for t in inputs), activation, False)


def call_retrieval(inputs, device="cpu", k=4, **changes):
    inputs = inputs._replace(**changes)
    return torch.ops.peer.product_key_topk(*(t.to(device) for t in inputs), k)


# --- experts -------------------------------------------------------------------------------------

EXPERT_SHAPES = {
    "x without tokens": ({"x": torch.ones(9)}, r"x of shape \[tokens, dim\], got \[9\]"),
    "x of three dimensions": ({"x": torch.ones(5, 1, 9)}, r"x of shape .* got \[5, 1, 9\]"),
    "indices of other tokens": (
        {"indices": torch.zeros(4, 6, dtype=torch.long), "weights": torch.ones(4, 6)},
        r"indices of shape \[5, .*\] to match x, got \[4, 6\]",
    ),
    "indices of one dimension": (
        {"indices": torch.zeros(5, dtype=torch.long)},
        r"indices of shape \[5, .*\] to match x, got \[5\]",
    ),
    "weights of other experts": (
        {"weights": torch.ones(5, 7)},
        r"weights of indices' shape \[5, 6\], got \[5, 7\]",
    ),
    "x of another width": (
        {"x": torch.ones(5, 8)},
        r"table of shape \[experts, 2 or 3, 8\] to match x, got \[11, 2, 9\]",
    ),
    "table of another width": (
        {"table": torch.ones(11, 2, 8)},
        r"table of shape \[experts, 2 or 3, 9\] to match x, got \[11, 2, 8\]",
    ),
    "table of one part": ({"table": torch.ones(11, 1, 9)}, r"table of shape .* got \[11, 1, 9\]"),
    "table of four parts": ({"table": torch.ones(11, 4, 9)}, r"table .* got \[11, 4, 9\]"),
    "table without parts": ({"table": torch.ones(11, 9)}, r"table .* got \[11, 9\]"),
    "table of flat rows": ({"table": torch.ones(11, 18)}, r"table .* got \[11, 18\]"),
    "table of four dimensions": (
        {"table": torch.ones(11, 2, 9, 1)},
        r"table .* got \[11, 2, 9, 1\]",
    ),
}


@BOTH
@pytest.mark.parametrize("case", EXPERT_SHAPES)
def test_experts_name_the_shape_that_does_not_fit(make_expert_inputs, case, device):
    changes, message = EXPERT_SHAPES[case]
    with pytest.raises(ValueError, match="^peer::expert_mlp: expected " + message):
        call_experts(make_expert_inputs(), device, **changes)


EXPERT_DTYPES = {
    "x of integers": ({"x": torch.ones(5, 9, dtype=torch.int32)}, r"x of dtype float32.* got Int"),
    "x of complex numbers": ({"x": torch.ones(5, 9, dtype=torch.complex64)}, r"x of dtype float32"),
    "weights of booleans": (
        {"weights": torch.ones(5, 6, dtype=torch.bool)},
        r"weights of dtype float32.* got Bool",
    ),
    "indices of int32": (
        {"indices": torch.zeros(5, 6, dtype=torch.int32)},
        r"indices of dtype int64, got Int",
    ),
    "indices of floats": ({"indices": torch.zeros(5, 6)}, r"indices of dtype int64, got Float"),
    "a table of integers": (
        {"table": torch.ones(11, 2, 9, dtype=torch.int8)},
        r"table of dtype float32.* got Char",
    ),
}


@BOTH
@pytest.mark.parametrize("case", EXPERT_DTYPES)
def test_experts_name_the_dtype_that_does_not_fit(make_expert_inputs, case, device):
    changes, message = EXPERT_DTYPES[case]
    with pytest.raises(TypeError, match="^peer::expert_mlp: expected " + message):
        call_experts(make_expert_inputs(), device, **changes)


@BOTH
@pytest.mark.parametrize("double", ["x", "weights", "table"])
def test_double_goes_with_double_only(make_expert_inputs, double, device):
    inputs = make_expert_inputs()
    with pytest.raises(TypeError, match=r"peer::expert_mlp: float64 goes with float64 only"):
        call_experts(inputs, device, **{double: getattr(inputs, double).double()})


@BOTH
def test_an_unknown_activation_lists_the_known_ones(make_expert_inputs, device):
    with pytest.raises(ValueError, match=r"^peer::expert_mlp: expected activation ") as caught:
        call_experts(make_expert_inputs(), device, activation="tanh")
    for name in ("gelu", "gelu_tanh", "relu", "silu", "identity", "relu2", "'tanh'"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["GELU", "gel", "gelu ", ""])
def test_the_name_of_an_activation_is_matched_exactly(make_expert_inputs, name):
    with pytest.raises(ValueError, match=re.escape(f"got '{name}'")):
        call_experts(make_expert_inputs(), activation=name)


@pytest.mark.parametrize("bad", [11, 12, -1, -11, 2**31, 2**62, -(2**63)])
def test_an_id_out_of_range_is_named_with_its_position(make_expert_inputs, bad):
    inputs = make_expert_inputs()
    inputs.indices[3, 2] = bad
    with pytest.raises(IndexError, match=r"^peer::expert_mlp: ") as caught:
        call_experts(inputs)
    assert re.search(rf"index {bad} at position \[3, 2\] .*11 experts", str(caught.value))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_of_many_ids_out_of_range_the_first_is_named(make_expert_inputs, threads):
    torch.set_num_threads(threads)
    inputs = make_expert_inputs(tokens=5000, per_token=40, experts=7)
    for token in range(4999, 1200, -1):
        inputs.indices[token, 5] = 1000 + token
    with pytest.raises(IndexError, match=r"index 2201 at position \[1201, 5\]"):
        call_experts(inputs)


def test_an_id_out_of_range_is_found_in_a_transposed_tensor(make_expert_inputs):
    inputs = make_expert_inputs()
    inputs.indices[3, 2] = 99
    transposed = inputs.indices.t().contiguous().t()
    with pytest.raises(IndexError, match=r"index 99 at position \[3, 2\]"):
        call_experts(inputs, indices=transposed)


def test_the_backward_of_experts_checks_ids_too(make_expert_inputs):
    inputs = make_expert_inputs()
    out, hidden, gate = call_experts(inputs)
    inputs.indices[4, 5] = -3
    with pytest.raises(
        IndexError, match=r"peer::expert_mlp_backward: index -3 at position \[4, 5\]"
    ):
        torch.ops.peer.expert_mlp_backward(out, *inputs, hidden, gate, "gelu", False, (True,) * 3)


def test_a_call_after_an_error_is_right(make_expert_inputs):
    inputs = make_expert_inputs()
    expected = call_experts(inputs)[0]
    with pytest.raises(IndexError):
        call_experts(inputs, indices=inputs.indices + 11)
    assert torch.equal(call_experts(inputs)[0], expected)


@pytest.mark.parametrize("name", ["x", "weights", "indices", "table"])
def test_experts_refuse_tensors_on_different_devices(make_expert_inputs, name):
    inputs = make_expert_inputs(glu=True)
    mixed = inputs._replace(**{name: getattr(inputs, name).to("meta")})
    with pytest.raises(RuntimeError, match=r"^peer::expert_mlp: expected .* device"):
        torch.ops.peer.expert_mlp(*mixed, "gelu", False)


@pytest.mark.parametrize("wrong", ["tokens", "width", "dimensions"])
def test_the_backward_of_experts_names_a_gradient_that_does_not_fit(make_expert_inputs, wrong):
    inputs = make_expert_inputs()
    _, hidden, gate = call_experts(inputs)
    shape = {"tokens": (4, 9), "width": (5, 8), "dimensions": (45,)}[wrong]
    message = r"peer::expert_mlp_backward: expected grad_out of shape \[5, 9\], got "
    with pytest.raises(ValueError, match=message + re.escape(str(list(shape)))):
        torch.ops.peer.expert_mlp_backward(
            torch.ones(shape), *inputs, hidden, gate, "gelu", False, (True,) * 3
        )


# --- retrieval -----------------------------------------------------------------------------------

RETRIEVAL_SHAPES = {
    "a query without heads": (
        {"query": torch.ones(5, 8)},
        r"query of shape \[tokens, heads, dim_key\], got \[5, 8\]",
    ),
    "an odd dim_key": ({"query": torch.ones(5, 2, 7)}, r"query with an even dim_key .* got 7"),
    "a dim_key of zero": ({"query": torch.ones(5, 2, 0)}, r"query with an even dim_key .* got 0"),
    "row keys of another width": (
        {"row_keys": torch.ones(7, 5)},
        r"row_keys of width dim_key / 2 = 4, got shape \[7, 5\]",
    ),
    "column keys of another width": (
        {"col_keys": torch.ones(6, 3)},
        r"col_keys of width dim_key / 2 = 4, got shape \[6, 3\]",
    ),
    "row keys of one dimension": ({"row_keys": torch.ones(4)}, r"row_keys of shape .* got \[4\]"),
    "row keys for other heads": (
        {"row_keys": torch.ones(3, 7, 4), "col_keys": torch.ones(3, 6, 4)},
        r"row_keys for 2 heads as in query, got shape \[3, 7, 4\]",
    ),
    "shared row keys and column keys per head": (
        {"col_keys": torch.ones(2, 6, 4)},
        r"row_keys and col_keys both shared by the heads or both per head",
    ),
    "row keys per head and shared column keys": (
        {"row_keys": torch.ones(2, 7, 4)},
        r"row_keys and col_keys both shared by the heads or both per head",
    ),
    "no row keys": ({"row_keys": torch.ones(0, 4)}, r"at least one key in row_keys"),
    "no column keys": ({"col_keys": torch.ones(0, 4)}, r"at least one key in col_keys"),
}


@BOTH
@pytest.mark.parametrize("case", RETRIEVAL_SHAPES)
def test_retrieval_names_the_shape_that_does_not_fit(make_retrieval_inputs, case, device):
    changes, message = RETRIEVAL_SHAPES[case]
    with pytest.raises(ValueError, match="^peer::product_key_topk: expected " + message):
        call_retrieval(make_retrieval_inputs(), device, **changes)


@BOTH
@pytest.mark.parametrize("k", [0, -1, 43, 2**40])
def test_k_must_lie_between_one_and_the_number_of_experts(make_retrieval_inputs, k, device):
    message = f"^peer::product_key_topk: expected k between 1 and the number of experts 42, got {k}"
    with pytest.raises(ValueError, match=message):
        call_retrieval(make_retrieval_inputs(), device, k=k)


@BOTH
@pytest.mark.parametrize("name", ["row_keys", "col_keys"])
def test_keys_must_have_the_dtype_of_the_query(make_retrieval_inputs, name, device):
    inputs = make_retrieval_inputs()
    message = f"^peer::product_key_topk: expected {name} of query's dtype Float, got Half"
    with pytest.raises(TypeError, match=message):
        call_retrieval(inputs, device, **{name: getattr(inputs, name).half()})


@BOTH
def test_retrieval_refuses_integers(make_retrieval_inputs, device):
    inputs = make_retrieval_inputs()
    with pytest.raises(
        TypeError, match=r"^peer::product_key_topk: expected query of dtype float32"
    ):
        torch.ops.peer.product_key_topk(*(t.int().to(device) for t in inputs), 4)


@pytest.mark.parametrize("name", ["query", "row_keys", "col_keys"])
def test_retrieval_refuses_tensors_on_different_devices(make_retrieval_inputs, name):
    inputs = make_retrieval_inputs()
    mixed = inputs._replace(**{name: getattr(inputs, name).to("meta")})
    with pytest.raises(RuntimeError, match=r"^peer::product_key_topk: expected .* device"):
        torch.ops.peer.product_key_topk(*mixed, 4)


@pytest.mark.parametrize("bad", [42, -1])
def test_the_backward_of_retrieval_names_an_id_out_of_range(make_retrieval_inputs, bad):
    inputs = make_retrieval_inputs()
    scores, indices = call_retrieval(inputs)
    indices[3, 1, 2] = bad
    message = rf"peer::product_key_topk_backward: index {bad} at position \[3, 1, 2\] .*42 experts"
    with pytest.raises(IndexError, match=message):
        torch.ops.peer.product_key_topk_backward(scores, *inputs, indices, (True,) * 3)


def test_the_backward_of_retrieval_names_a_gradient_that_does_not_fit(make_retrieval_inputs):
    inputs = make_retrieval_inputs()
    _, indices = call_retrieval(inputs)
    message = r"peer::product_key_topk_backward: expected grad_scores of indices' shape \[5, 2, 4\]"
    with pytest.raises(ValueError, match=message + r", got \[5, 2, 3\]"):
        torch.ops.peer.product_key_topk_backward(torch.ones(5, 2, 3), *inputs, indices, (True,) * 3)


# --- other devices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "product_key_topk",
        "product_key_topk_backward",
        "expert_mlp",
        "expert_mlp_backward",
    ],
)
def test_cuda_tensors_on_a_build_without_cuda_raise_a_clear_error(
    make_expert_inputs, make_retrieval_inputs, name
):
    if json.loads(torch.ops.peer.build_info())["cuda"]:
        pytest.skip("this build has CUDA")
    pool, keys = make_expert_inputs(), make_retrieval_inputs()
    out, hidden, gate = call_experts(pool)
    scores, indices = call_retrieval(keys)
    arguments = {
        "product_key_topk": (*keys, 4),
        "product_key_topk_backward": (scores, *keys, indices, (True,) * 3),
        "expert_mlp": (*pool, "gelu", False),
        "expert_mlp_backward": (out, *pool, hidden, gate, "gelu", False, (True,) * 3),
    }
    # Calls the kernel that the dispatcher calls for CUDA tensors. No GPU is needed.
    operator = getattr(torch.ops.peer, name).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"peer::{name}: peer was built without CUDA"):
        operator.redispatch(cuda, *arguments[name])


def test_the_functional_form_names_weights_that_do_not_fit(make_expert_inputs):
    inputs = make_expert_inputs()
    with pytest.raises(ValueError, match=r"^peer::expert_mlp: expected weights of indices' shape"):
        peer.functional.expert_mlp(inputs.x, inputs.weights[:, :3], *inputs[2:])
    with pytest.raises(
        ValueError, match=r"^peer::expert_mlp: expected weights of shape .* match x"
    ):
        peer.functional.expert_mlp(inputs.x[:4], *inputs[1:])
