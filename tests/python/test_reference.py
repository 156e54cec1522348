"""The oracle itself, against loops over single numbers and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

import peer
from peer import reference

NAN, INFINITY = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max


def test_retrieval_equals_a_loop_over_all_experts(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(
        tokens=3, rows=4, columns=5, shared=False, dtype=torch.float64
    )
    scores, indices = reference.product_key_topk(query, row_keys, col_keys, 7)
    for t in range(3):
        for h in range(2):
            pairs = sorted(
                (
                    (query[t, h, :4] @ row_keys[h, r] + query[t, h, 4:] @ col_keys[h, c]).item(),
                    5 * r + c,
                )
                for r in range(4)
                for c in range(5)
            )
            best = pairs[::-1][:7]
            assert indices[t, h].tolist() == [expert for _, expert in best]
            assert scores[t, h].tolist() == pytest.approx([score for score, _ in best])


def retrieve_with_scores(row_scores, col_scores, k):
    """One query whose sub-scores are the given numbers."""
    scores, indices = reference.product_key_topk(
        torch.ones(1, 2), torch.tensor(row_scores)[:, None], torch.tensor(col_scores)[:, None], k
    )
    return scores[0].tolist(), indices[0].tolist()


def test_equal_scores_go_to_the_smaller_row_rank_then_column_rank():
    # Rows rank 1, 0, 2 and columns 2, 0, 1: the pairs of score 4 are (1, 0) and (0, 2).
    scores, indices = retrieve_with_scores([2.0, 3.0, 0.0], [1.0, 0.0, 2.0], 4)
    assert scores == [5.0, 4.0, 4.0, 3.0]
    assert indices == [5, 3, 2, 4]


def test_equal_keys_rank_by_id():
    _, indices = retrieve_with_scores([1.0, 1.0], [0.0, 0.0, 0.0], 6)
    assert indices == [0, 1, 2, 3, 4, 5]


def test_negative_zero_equals_zero():
    _, indices = retrieve_with_scores([-0.0, 0.0], [0.0, -0.0], 4)
    assert indices == [0, 1, 2, 3]


def test_nan_ranks_highest_and_infinities_are_the_largest_finite_numbers():
    scores, indices = retrieve_with_scores([-INFINITY, 1.0, NAN, INFINITY], [0.0], 4)
    assert indices == [2, 3, 1, 0]
    assert math.isnan(scores[0])
    assert scores[1:] == [LARGEST, 1.0, -LARGEST]


def test_opposite_infinities_add_up_to_zero():
    scores, indices = retrieve_with_scores([INFINITY, 5.0], [-INFINITY, 0.0], 4)
    assert scores == [LARGEST, 5.0, 0.0, -LARGEST]
    assert indices == [1, 3, 0, 2]


def test_an_infinity_ties_with_the_largest_finite_number():
    scores, indices = retrieve_with_scores(
        [LARGEST, INFINITY, -INFINITY, -LARGEST], [0.0, INFINITY], 8
    )
    assert scores == [INFINITY, INFINITY, LARGEST, LARGEST, 0.0, 0.0, -LARGEST, -LARGEST]
    assert indices == [1, 3, 0, 2, 5, 7, 4, 6]


def test_scores_that_round_to_the_same_number_are_equal():
    tiny = 2.0**-30
    _, indices = retrieve_with_scores([0.0, 1.0], [0.0, tiny], 4)
    # 1 + tiny rounds to 1: columns rank 1, 0, and both pairs of row 1 have the score 1.
    assert indices == [3, 2, 1, 0]


@pytest.mark.parametrize("k", [0, 31])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and the number of experts 30, got {k}"):
        reference.product_key_topk(torch.ones(2, 4), torch.ones(5, 2), torch.ones(6, 2), k)


def test_any_leading_dimensions_are_retrieved_for(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=6, shared=False)
    expected = reference.product_key_topk(query, row_keys, col_keys, 5)
    shaped = reference.product_key_topk(query.view(2, 3, 2, 8), row_keys, col_keys, 5)
    single = reference.product_key_topk(query[4], row_keys, col_keys, 5)
    for all_scores, of_shaped, of_single in zip(expected, shaped, single, strict=True):
        torch.testing.assert_close(of_shaped.flatten(0, 1), all_scores)
        torch.testing.assert_close(of_single, all_scores[4])


@pytest.mark.parametrize("leading", [(2, 3), (1, 1, 6), ()], ids=str)
def test_the_functional_form_takes_the_same_leading_dimensions(make_retrieval_inputs, leading):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=math.prod(leading), integers=True)
    query = query.view(*leading, 2, 8)
    ours = peer.functional.product_key_topk(query, row_keys, col_keys, 5)
    expected = reference.product_key_topk(query, row_keys, col_keys, 5)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_experts_equal_a_loop_over_pairs(make_expert_inputs, activation, glu):
    inputs = make_expert_inputs(dtype=torch.float64, glu=glu)
    x, weights, indices, table = inputs
    functions = {
        "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
        "gelu_tanh": lambda z: (
            z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
        ),
        "relu": lambda z: max(z, 0.0),
        "silu": lambda z: z / (1 + math.exp(-z)),
        "identity": lambda z: z,
        "relu2": lambda z: max(z, 0.0) ** 2,
    }
    y = torch.zeros(5, 9, dtype=torch.float64)
    for t in range(5):
        for p in range(6):
            down, *gate, up = table[indices[t, p]]
            hidden = functions[activation]((x[t] @ down).item())
            if glu:
                hidden *= (x[t] @ gate[0]).item()
            y[t] += weights[t, p] * hidden * up
    torch.testing.assert_close(reference.expert_mlp(*inputs, activation), y)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_computed_in_float32_and_rounded_once(make_expert_inputs, low):
    inputs = make_expert_inputs(dtype=low)
    y = reference.expert_mlp(*inputs)
    assert y.dtype == low
    exact = reference.expert_mlp(*(t.float() if t.is_floating_point() else t for t in inputs))
    assert torch.equal(y, exact.to(low))


def test_gradients_of_the_oracle_are_right(make_expert_inputs, make_retrieval_inputs):
    experts = make_expert_inputs(dtype=torch.float64, tokens=2, glu=True).requiring_grad()
    assert torch.autograd.gradcheck(reference.expert_mlp, tuple(experts))
    retrieval = make_retrieval_inputs(dtype=torch.float64, tokens=2).requiring_grad()
    assert torch.autograd.gradcheck(
        lambda *inputs: reference.product_key_topk(*inputs, 4)[0], tuple(retrieval)
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_layers_oracle_moves_no_running_statistics(training):
    layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=3, dim_key=4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    reference.peer(layer.train(training), torch.randn(6, 8))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
