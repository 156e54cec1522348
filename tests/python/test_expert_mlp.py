"""The experts: out[t] = Σ_p weights[t,p]·act(<x[t], down_e>)·[<x[t], gate_e>]·up_e."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rounding import analyse_expert_mlp, assert_within
from torch import Tensor

import peer
from peer import reference

# x and weights in one dtype, the table in another.
MIXED_DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
]


def run(inputs, activation: str = "gelu", sparse_grad: bool = False) -> Tensor:
    return torch.ops.peer.expert_mlp(*inputs, activation, sparse_grad)[0]


def backward(inputs, grad_out: Tensor, activation="gelu", sparse_grad=False, mask=(True,) * 3):
    _, hidden, gate = torch.ops.peer.expert_mlp(*inputs, activation, sparse_grad)
    return torch.ops.peer.expert_mlp_backward(
        grad_out, *inputs, hidden, gate, activation, sparse_grad, mask
    )


def random_like(tensor: Tensor, seed: int = 7) -> Tensor:
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return values.to(tensor.dtype)


def assert_equal(ours, theirs) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_exact_up_to_rounding(inputs, activation: str) -> None:
    """Outputs and gradients are within the error bounds of the documented rounding."""
    leaves = inputs.requiring_grad()
    out, hidden, gate = torch.ops.peer.expert_mlp(*leaves, activation, False)
    grad_out = random_like(out)
    out.backward(grad_out)
    results = analyse_expert_mlp(*inputs, activation, grad_out)
    assert_within(out, *results.out)
    assert_within(hidden, *results.hidden)
    if results.gate is not None:
        assert_within(gate, *results.gate)
    for leaf, bounded in zip(leaves.differentiable(), results.gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert_within(leaf.grad, *bounded)


# --- values --------------------------------------------------------------------------------------


def test_a_case_worked_out_by_hand():
    # Expert 2: z = 1·2 + 3·1 = 5, relu(5) = 5, times 0.5 times row (1, -1) is (2.5, -2.5).
    # Expert 0: z = 1·1 + 3·-1 = -2, relu(-2) = 0. Expert 2 again, with weight 2: (10, -10).
    out, hidden, gate = torch.ops.peer.expert_mlp(
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[0.5, 7.0, 2.0]]),
        torch.tensor([[2, 0, 2]]),
        torch.tensor([[[1.0, -1.0], [4, 4]], [[9, 9], [9, 9]], [[2, 1], [1, -1]]]),
        "relu",
    )
    assert out.tolist() == [[12.5, -12.5]]
    assert hidden.tolist() == [[5.0, -2.0, 5.0]]
    assert gate.shape == (0,)


def test_a_gated_case_worked_out_by_hand():
    # z = 2·3 = 6, gate = 2·-1 = -2: 0.5·6·-2·10 = -60.
    out, hidden, gate = torch.ops.peer.expert_mlp(
        torch.tensor([[2.0]]),
        torch.tensor([[0.5]]),
        torch.tensor([[0]]),
        torch.tensor([[[3.0], [-1.0], [10.0]]]),
        "relu",
    )
    assert (out.item(), hidden.item(), gate.item()) == (-60.0, 6.0, -2.0)


def test_outputs_and_gradients_are_exact_up_to_rounding(make_expert_inputs, activation, glu, dtype):
    inputs = make_expert_inputs(tokens=7, per_token=13, dim=37, glu=glu, dtype=dtype)
    assert_exact_up_to_rounding(inputs, activation)


@pytest.mark.parametrize(("dtype", "table_dtype"), MIXED_DTYPES, ids=str)
def test_the_table_may_have_a_dtype_of_its_own(make_expert_inputs, dtype, table_dtype, glu):
    inputs = make_expert_inputs(dim=37, dtype=dtype, table_dtype=table_dtype, glu=glu)
    assert_exact_up_to_rounding(inputs, "silu")
    assert run(inputs).dtype == dtype


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_may_have_a_dtype_of_their_own(make_expert_inputs, dtype, weights_dtype):
    inputs = make_expert_inputs(dtype=dtype, weights_dtype=weights_dtype, glu=True)
    assert_exact_up_to_rounding(inputs, "gelu")


@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130])
def test_every_width_is_exact_up_to_rounding(make_expert_inputs, width, dtype):
    inputs = make_expert_inputs(dim=width, glu=True, dtype=dtype, seed=width)
    assert_exact_up_to_rounding(inputs, "gelu")


@pytest.mark.parametrize("per_token", [1, 2, 7, 8, 9, 16, 23, 64])
def test_any_number_of_experts_per_token_is_exact_up_to_rounding(make_expert_inputs, per_token):
    inputs = make_expert_inputs(per_token=per_token, experts=30, glu=True, seed=per_token)
    assert_exact_up_to_rounding(inputs, "silu")


def test_gradients_equal_autograd_through_the_reference(make_expert_inputs, activation, glu):
    inputs = make_expert_inputs(dtype=torch.float64, glu=glu)
    ours, theirs = inputs.requiring_grad(), inputs.requiring_grad()
    out = run(ours, activation)
    grad_out = random_like(out)
    out.backward(grad_out)
    expected = reference.expert_mlp(*theirs, activation)
    expected.backward(grad_out)
    torch.testing.assert_close(out, expected)
    for a, b in zip(ours.differentiable(), theirs.differentiable(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_functional_form_takes_any_leading_dimensions(make_expert_inputs, glu):
    x, weights, indices, table = inputs = make_expert_inputs(tokens=12, per_token=6, glu=glu)
    expected = run(inputs)
    out = peer.functional.expert_mlp(
        x.view(3, 4, -1), weights.view(3, 4, 2, 3), indices.view(3, 4, 2, 3), table
    )
    assert torch.equal(out, expected.view(3, 4, -1))
    flat = peer.functional.expert_mlp(
        x.view(3, 4, -1), weights.view(3, 4, 6), indices.view(3, 4, 6), table
    )
    assert torch.equal(flat, out)


def test_the_pre_activations_are_returned_in_the_accumulation_dtype(make_expert_inputs, dtype):
    inputs = make_expert_inputs(dtype=dtype, glu=True)
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, "gelu", False)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, hidden.dtype, gate.dtype) == (dtype, accumulation, accumulation)
    assert hidden.shape == gate.shape == inputs.indices.shape


def test_repeated_ids_accumulate_in_the_output(make_expert_inputs):
    x, _, _, table = make_expert_inputs(per_token=1)
    expert, weight = torch.full((5, 1), 3), torch.full((5, 1), 2.0)
    once = run((x, weight, expert, table))
    thrice = run((x, weight.repeat(1, 3) / 4, expert.repeat(1, 3), table))
    torch.testing.assert_close(thrice, once * 0.75)


def test_repeated_ids_accumulate_in_the_gradients():
    # One expert, three times for each of two tokens, identity: d out / d up = Σ w·z = Σ w·x.
    x = torch.tensor([[2.0], [5.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    indices = torch.zeros(2, 3, dtype=torch.long)
    table = torch.tensor([[[1.0], [10.0]]], requires_grad=True)
    run((x, weights, indices, table), "identity").sum().backward()
    assert table.grad.flatten().tolist() == [10 * (2 * 6 + 5 * 15), 2 * 6 + 5 * 15]
    assert x.grad.tolist() == [[60.0], [150.0]]


def test_only_retrieved_rows_are_read(make_expert_inputs, glu):
    inputs = make_expert_inputs(experts=40, glu=glu)
    expected = run(inputs)
    gradients = backward(inputs, random_like(expected))
    unused = torch.ones(40, dtype=torch.bool)
    unused[inputs.indices.unique()] = False
    inputs.table[unused] = math.nan
    assert torch.equal(run(inputs), expected)
    assert_equal(backward(inputs, random_like(expected)), gradients)


def test_nan_and_infinity_in_a_retrieved_row_reach_only_its_tokens(make_expert_inputs):
    inputs = make_expert_inputs(tokens=9, experts=20)
    inputs.indices[inputs.indices == 4] = 5
    inputs.indices[2, 1] = 4
    for value in (math.nan, math.inf):
        inputs.table[4, 1] = value
        finite = run(inputs).isfinite().all(dim=-1)
        assert finite.tolist() == [token != 2 for token in range(9)]


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_the_derivative_at_the_kink_is_zero(name):
    inputs = (
        torch.ones(1, 1),
        torch.ones(1, 1),
        torch.zeros(1, 1, dtype=torch.long),
        torch.tensor([[[0.0], [1.0]]]),
    )
    gradients = backward(inputs, torch.ones(1, 1), name)
    assert not any(gradient.any() for gradient in gradients)


def test_large_pre_activations_stay_finite(activation):
    # Outside the range in which exp and erf change, slopes are 1 above and 0 below.
    x = torch.tensor([[40.0], [-40.0], [1e4], [-1e4]], requires_grad=True)
    weights = torch.ones(4, 1)
    indices = torch.zeros(4, 1, dtype=torch.long)
    run((x, weights, indices, torch.ones(1, 2, 1)), activation).sum().backward()
    below = 1.0 if activation == "identity" else 0.0
    above = [80.0, 2e4] if activation == "relu2" else [1.0, 1.0]
    torch.testing.assert_close(
        x.grad.flatten(), torch.tensor([above[0], below, above[1], below]), rtol=0, atol=1e-6
    )


# --- shapes and layouts --------------------------------------------------------------------------


def test_zero_tokens_give_empty_outputs_and_zero_gradients(make_expert_inputs, glu, dtype):
    leaves = make_expert_inputs(tokens=0, glu=glu, dtype=dtype).requiring_grad()
    out, hidden, _ = torch.ops.peer.expert_mlp(*leaves, "gelu", False)
    assert out.shape == (0, 9)
    assert hidden.shape == (0, 6)
    out.sum().backward()
    for leaf in leaves.differentiable():
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


def test_zero_tokens_give_empty_sparse_gradients(make_expert_inputs):
    leaves = make_expert_inputs(tokens=0).requiring_grad()
    run(leaves, sparse_grad=True).sum().backward()
    assert leaves.table.grad.layout == torch.sparse_coo
    assert leaves.table.grad._nnz() == 0
    assert leaves.table.grad.shape == leaves.table.shape


def test_no_experts_per_token_give_zeros(make_expert_inputs):
    leaves = make_expert_inputs(per_token=0).requiring_grad()
    out = run(leaves)
    assert torch.equal(out, torch.zeros(5, 9))
    out.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves.differentiable())


def strided(table: Tensor, kind: str) -> Tensor:
    """The same values in other memory layouts."""
    if kind == "rows far apart":
        return torch.stack([table, table + 1], dim=1)[:, 0]
    if kind == "part after part":
        return table.transpose(0, 1).contiguous().transpose(0, 1)
    return table.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("kind", ["rows far apart", "part after part", "columns contiguous"])
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_a_table_of_any_strides_gives_the_same_result(
    make_expert_inputs, dtype, glu, kind, sparse_grad
):
    inputs = make_expert_inputs(dim=33, dtype=dtype, glu=glu)
    other = inputs._replace(table=strided(inputs.table, kind))
    assert not other.table.is_contiguous()
    expected = run(inputs)
    assert torch.equal(run(other), expected)
    grad_out = random_like(expected)
    ours, theirs = (backward(each, grad_out, sparse_grad=sparse_grad) for each in (other, inputs))
    assert_equal([t.to_dense() for t in ours], [t.to_dense() for t in theirs])


def test_parts_that_are_tensors_of_their_own_receive_their_gradients(make_expert_inputs, glu):
    inputs = make_expert_inputs(glu=glu)
    whole = inputs.requiring_grad()
    run(whole).square().sum().backward()
    parts = [part.clone().requires_grad_() for part in inputs.table.unbind(1)]
    run(inputs._replace(table=torch.stack(parts, dim=1))).square().sum().backward()
    assert_equal([part.grad for part in parts], whole.table.grad.unbind(1))


def test_one_vector_may_be_down_and_up(make_expert_inputs):
    inputs = make_expert_inputs()
    tied = inputs.table[:, 0].clone().requires_grad_()
    run(inputs._replace(table=tied[:, None].expand(-1, 2, -1))).square().sum().backward()
    apart = inputs._replace(table=inputs.table[:, [0, 0]]).requiring_grad()
    run(apart).square().sum().backward()
    torch.testing.assert_close(tied.grad, apart.table.grad.sum(dim=1))


def transposed(tensor: Tensor) -> Tensor:
    """The same values with a large stride in the last dimension."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def test_non_contiguous_inputs_give_the_same_result(make_expert_inputs, glu):
    inputs = make_expert_inputs(glu=glu)
    scattered = type(inputs)(*map(transposed, inputs))
    assert not any(tensor.is_contiguous() for tensor in scattered)
    expected = run(inputs)
    grad_out = random_like(expected)
    assert torch.equal(run(scattered), expected)
    assert_equal(backward(scattered, transposed(grad_out)), backward(inputs, grad_out))


def test_an_expanded_gradient_gives_the_same_result(make_expert_inputs):
    inputs = make_expert_inputs()
    assert_equal(
        backward(inputs, torch.ones(1, 1).expand(5, 9)), backward(inputs, torch.ones(5, 9))
    )


def test_tables_beyond_two_to_the_31_elements_are_addressed_right():
    # 2^31 + 8192 elements. Only the pages of the first and last rows are written.
    dim = 4096
    experts = 2**31 // (2 * dim) + 1
    table = torch.empty(experts, 2, dim, dtype=torch.bfloat16)
    table[0], table[-1] = 1, 2
    x = torch.full((1, dim), 2.0**-12, requires_grad=True)
    weights = torch.tensor([[1.0, 1.0]])
    indices = torch.tensor([[0, experts - 1]])
    loss = run((x, weights, indices, table.requires_grad_()), "identity", True)
    assert torch.equal(loss, torch.full((1, dim), 1.0 + 4.0))
    (gradient,) = torch.autograd.grad(loss.sum(), table)
    assert gradient.indices().tolist() == [[0, experts - 1]]
    # d loss / d down = Σ up · x = (1, 2) · dim / dim, and d loss / d up is the hidden value.
    expected = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 2, dim)
    assert torch.equal(gradient.values().float(), expected)


def test_inputs_are_left_as_they_were_and_outputs_are_fresh(make_expert_inputs):
    inputs = make_expert_inputs(glu=True)
    copies = [tensor.clone() for tensor in inputs]
    outputs = torch.ops.peer.expert_mlp(*inputs, "identity", False)
    gradients = backward(inputs, random_like(outputs[0]), "identity")
    for output in (*outputs, *gradients):
        output.fill_(0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


# --- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_each_gradient_can_be_asked_for_alone(make_expert_inputs, sparse_grad):
    inputs = make_expert_inputs(glu=True)
    grad_out = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    everything = backward(inputs, grad_out, sparse_grad=sparse_grad)
    for position in range(3):
        mask = tuple(i == position for i in range(3))
        alone = backward(inputs, grad_out, sparse_grad=sparse_grad, mask=mask)
        assert [gradient is None for gradient in alone] == [not wanted for wanted in mask]
        assert torch.equal(alone[position].to_dense(), everything[position].to_dense())


def test_frozen_inputs_get_no_gradient(make_expert_inputs):
    inputs = make_expert_inputs(glu=True)
    for position in (0, 1, 3):
        leaves = [t.clone().requires_grad_() if i == position else t for i, t in enumerate(inputs)]
        run(leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == position for i in range(4)]


def test_a_table_gradient_in_16_bits_is_rounded_once():
    # 1000 pairs have the same expert. A running sum in bfloat16 would stop at 256.
    x = torch.ones(100, 1, dtype=torch.bfloat16)
    weights = torch.ones(100, 10, dtype=torch.bfloat16)
    indices = torch.zeros(100, 10, dtype=torch.long)
    table = torch.ones(1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    run((x, weights, indices, table), "identity").sum().backward()
    assert table.grad.flatten().tolist() == [1000, 1000]


def test_an_output_in_16_bits_is_rounded_once():
    # 600 experts add 1 each.
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    weights = torch.ones(1, 600, dtype=torch.bfloat16)
    table = torch.ones(1, 2, 1, dtype=torch.bfloat16)
    indices = torch.zeros(1, 600, dtype=torch.long)
    assert run((x, weights, indices, table), "identity").item() == 600


@pytest.mark.parametrize("pairs", [127, 128, 129, 256, 257, 1000])
def test_a_hot_expert_collects_every_pair(pairs):
    # Every partial sum is an integer below 2^24, so any summation order gives the same result.
    x = torch.arange(1.0, pairs + 1)[:, None].remainder(50)
    weights = torch.ones(pairs, 1)
    indices = torch.zeros(pairs, 1, dtype=torch.long)
    inputs = (x, weights, indices, torch.ones(3, 2, 1))
    gradient = backward(inputs, torch.ones(pairs, 1), "identity")[2]
    assert gradient.flatten(1).tolist() == [[x.sum().item()] * 2, [0, 0], [0, 0]]


def test_a_sparse_gradient_is_coalesced_and_holds_the_retrieved_rows(
    make_expert_inputs, dtype, glu
):
    leaves = make_expert_inputs(experts=50, glu=glu, dtype=dtype).requiring_grad()
    (gradient,) = torch.autograd.grad(run(leaves, sparse_grad=True).sum(), leaves.table)
    retrieved = leaves.indices.unique()
    assert gradient.layout == torch.sparse_coo
    assert gradient.is_coalesced()
    assert gradient.dtype == dtype
    assert gradient.shape == leaves.table.shape
    # One dimension of ids, and values that are whole rows.
    assert (gradient.sparse_dim(), gradient.dense_dim()) == (1, 2)
    assert torch.equal(gradient.indices(), retrieved[None])
    assert gradient.values().shape == (len(retrieved), 3 if glu else 2, 9)


def test_sparse_gradients_equal_the_dense_ones(make_expert_inputs, activation, glu, dtype):
    inputs = make_expert_inputs(tokens=40, experts=300, glu=glu, dtype=dtype)
    dense, sparse = inputs.requiring_grad(), inputs.requiring_grad()
    run(dense, activation).square().sum().backward()
    run(sparse, activation, sparse_grad=True).square().sum().backward()
    for a, b in zip(dense.differentiable(), sparse.differentiable(), strict=True):
        assert torch.equal(a.grad, b.grad.to_dense())


def test_a_step_of_sparse_adam_changes_the_retrieved_rows_only(make_expert_inputs):
    leaves = make_expert_inputs(experts=40).requiring_grad()
    before = leaves.table.detach().clone()
    run(leaves, sparse_grad=True).square().sum().backward()
    torch.optim.SparseAdam([leaves.table], lr=0.1).step()
    changed = (leaves.table != before).any(dim=-1)
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert torch.equal(changed[:, 0].nonzero().flatten(), leaves.indices.unique())


def test_gradients_accumulate_over_two_backward_passes(make_expert_inputs):
    inputs = make_expert_inputs(glu=True)
    once, twice = inputs.requiring_grad(), inputs.requiring_grad()
    run(once).sum().backward()
    run(twice).sum().backward()
    run(twice).sum().backward()
    for a, b in zip(once.differentiable(), twice.differentiable(), strict=True):
        assert torch.equal(b.grad, 2 * a.grad)


def test_gradients_reach_the_router_through_the_weights(make_expert_inputs):
    # As in the layer, weights are the softmax of scores, and only the weights have a gradient.
    inputs = make_expert_inputs(dtype=torch.float64)
    logits = inputs.weights.clone().requires_grad_()
    run(inputs._replace(weights=logits.softmax(-1))).square().sum().backward()
    expected = inputs.weights.clone().requires_grad_()
    weights = expected.softmax(-1)
    reference.expert_mlp(*inputs._replace(weights=weights), "gelu").square().sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad)


ON_ANOTHER_CAPABILITY = """
import json, sys, torch, peer
results = []
for inputs, grad_out in torch.load(sys.argv[1]):
    outputs = torch.ops.peer.expert_mlp(*inputs, "gelu", False)
    gradients = torch.ops.peer.expert_mlp_backward(
        grad_out, *inputs, *outputs[1:], "gelu", False, [True] * 3)
    results.append((*outputs, *gradients))
torch.save(results, sys.argv[2])
print(json.dumps(torch.ops.peer.cpu_capability()))
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.long
def test_every_cpu_capability_is_exact_up_to_rounding(
    make_expert_inputs, run_python, tmp_path, capability
):
    offered = json.loads(torch.ops.peer.build_info())["cpu_capabilities"].split()
    here = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if capability not in offered or ["default", "avx2", "avx512"].index(capability) > here:
        pytest.skip(f"{capability} cannot run here")
    cases = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        inputs = make_expert_inputs(dim=45, per_token=11, glu=True, dtype=dtype)
        cases.append((tuple(inputs), random_like(torch.empty(5, 45, dtype=dtype))))
    torch.save(cases, tmp_path / "cases.pt")
    used = run_python(
        ON_ANOTHER_CAPABILITY,
        tmp_path / "cases.pt",
        tmp_path / "results.pt",
        environment={"PEER_CPU_CAPABILITY": capability},
    )
    assert used == capability
    for (inputs, grad_out), actual in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        exact = analyse_expert_mlp(*inputs, "gelu", grad_out)
        expected = (exact.out, exact.hidden, exact.gate, *exact.gradients)
        for tensor, bounded in zip(actual, expected, strict=True):
            assert_within(tensor, *bounded)
