"""Retrieval by product keys: the k best of all R·C experts, in one order, for every input."""

from __future__ import annotations

import heapq
import json
import math

import pytest
import torch
from torch import Tensor

import peer
from peer import reference

INFINITY = math.inf
NAN = math.nan


def retrieve(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.ops.peer.product_key_topk(query, row_keys, col_keys, k)


def backward(
    grad_scores: Tensor,
    query: Tensor,
    row_keys: Tensor,
    col_keys: Tensor,
    indices: Tensor,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.peer.product_key_topk_backward(
        grad_scores, query, row_keys, col_keys, indices, output_mask
    )


# --- the oracle: every pair is scored, and a sort of tuples says what the order is ---------------


def descending(score: float) -> tuple[bool, float]:
    """Sorts NaN first, then from high to low; -0 and 0 compare equal."""
    return (False, 0.0) if math.isnan(score) else (True, -score)


def best_pairs(row_scores: Tensor, col_scores: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Scores and ids of the k best pairs of one token and head, from its sub-scores."""

    def ranks(scores: list[float]) -> dict[int, int]:
        order = sorted(range(len(scores)), key=lambda key: (descending(scores[key]), key))
        return {key: rank for rank, key in enumerate(order)}

    row_rank, column_rank = ranks(row_scores.tolist()), ranks(col_scores.tolist())
    sums = (row_scores[:, None] + col_scores[None, :]).tolist()  # rounded in their own dtype
    pairs = (
        (descending(score), row_rank[row], column_rank[column], row * len(column_rank) + column)
        for row, scores in enumerate(sums)
        for column, score in enumerate(scores)
    )
    ids = [pair[-1] for pair in heapq.nsmallest(k, pairs)]
    return [sums[i // len(column_rank)][i % len(column_rank)] for i in ids], ids


def accumulated(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sub_scores(query: Tensor, row_keys: Tensor, col_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sub-scores (T, H, R) and (T, H, C), in the accumulation dtype.

    An infinite one counts as the largest finite number of its sign.
    """
    row_query, col_query = accumulated(query).chunk(2, dim=-1)

    def score(half: Tensor, keys: Tensor) -> Tensor:
        scores = torch.einsum("thd,rd->thr" if keys.dim() == 2 else "thd,hrd->thr", half, keys)
        limits = torch.finfo(scores.dtype)
        return scores.clamp(limits.min, limits.max)

    return score(row_query, accumulated(row_keys)), score(col_query, accumulated(col_keys))


def assert_equals_brute_force(query: Tensor, row_keys: Tensor, col_keys: Tensor, k: int) -> None:
    """Asserts equal scores and ids; the sub-scores must be exact."""
    scores, indices = retrieve(query, row_keys, col_keys, k)
    row_scores, col_scores = sub_scores(query, row_keys, col_keys)
    for token in range(query.shape[0]):
        for head in range(query.shape[1]):
            want_scores, want_ids = best_pairs(row_scores[token, head], col_scores[token, head], k)
            assert indices[token, head].tolist() == want_ids, (token, head)
            expected = torch.tensor(want_scores, dtype=scores.dtype)
            assert torch.equal(scores[token, head].nan_to_num(1.5), expected.nan_to_num(1.5))
            assert torch.equal(scores[token, head].isnan(), expected.isnan())


def query_for_sub_scores(
    row_scores: Tensor, col_scores: Tensor, dim_key: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """A query and keys of one token and head whose sub-scores are the given ones, exactly."""
    half = dim_key // 2
    query = torch.zeros(1, 1, dim_key, dtype=row_scores.dtype)
    query[..., 0] = query[..., half] = 1
    row_keys = torch.zeros(row_scores.numel(), half, dtype=row_scores.dtype)
    col_keys = torch.zeros(col_scores.numel(), half, dtype=col_scores.dtype)
    row_keys[:, 0], col_keys[:, 0] = row_scores, col_scores
    return query, row_keys, col_keys


# --- equal to brute force -------------------------------------------------------------------------

GRIDS = [(1, 1), (1, 9), (9, 1), (4, 4), (5, 9), (16, 16), (3, 40), (40, 3), (33, 65)]


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_brute_force_on_every_grid_for_every_k(make_retrieval_inputs, grid, shared):
    rows, columns = grid
    inputs = make_retrieval_inputs(
        tokens=3, heads=2, rows=rows, columns=columns, shared=shared, integers=True
    )
    for k in (1, 2, 7, 8, 16, 32, 64, rows * columns):
        if k <= rows * columns:
            assert_equals_brute_force(*inputs, k)


@pytest.mark.parametrize("grid", [(300, 260), (260, 7), (7, 515)], ids=str)
@pytest.mark.parametrize("k", [1, 16, 64])
def test_equals_brute_force_on_grids_wide_enough_to_be_filtered(make_retrieval_inputs, grid, k):
    rows, columns = grid
    inputs = make_retrieval_inputs(
        tokens=2, heads=2, rows=rows, columns=columns, dim_key=4, integers=True, seed=k
    )
    assert_equals_brute_force(*inputs, k)


def test_equals_brute_force_in_every_dtype(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(rows=20, columns=13, dtype=dtype, integers=True)
    assert_equals_brute_force(*inputs, 16)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 50])
def test_equals_brute_force_for_any_number_of_tokens(make_retrieval_inputs, tokens):
    inputs = make_retrieval_inputs(tokens=tokens, heads=3, rows=9, columns=10, integers=True)
    assert_equals_brute_force(*inputs, 8)


@pytest.mark.parametrize("dim_key", [2, 4, 6, 30, 34, 258])
def test_equals_brute_force_for_any_even_dim_key(make_retrieval_inputs, dim_key):
    inputs = make_retrieval_inputs(rows=19, columns=18, dim_key=dim_key, integers=True)
    assert_equals_brute_force(*inputs, 16)


@pytest.mark.parametrize("k", [6, 20, 42])
def test_k_larger_than_rows_or_columns_takes_from_the_other_half(make_retrieval_inputs, k):
    inputs = make_retrieval_inputs(rows=3, columns=14, integers=True)
    assert_equals_brute_force(*inputs, k)
    query, row_keys, col_keys = inputs
    assert_equals_brute_force(query, col_keys, row_keys, k)


def test_k_of_all_experts_is_a_permutation_of_them(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=4, rows=11, columns=12)
    _, indices = retrieve(*inputs, 132)
    assert torch.equal(indices.sort(dim=-1).values, torch.arange(132).expand(4, 2, 132))


def test_equals_the_reference_on_a_large_grid(make_retrieval_inputs):
    inputs = make_retrieval_inputs(
        tokens=8, heads=4, rows=200, columns=333, dim_key=16, integers=True
    )
    scores, indices = retrieve(*inputs, 32)
    expected_scores, expected_indices = reference.product_key_topk(*inputs, 32)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
def test_random_scores_are_within_rounding_of_brute_force(make_retrieval_inputs, shared):
    inputs = make_retrieval_inputs(
        tokens=20, rows=90, columns=70, dim_key=64, shared=shared, seed=3
    )
    query, row_keys, col_keys = (tensor.double() for tensor in inputs)
    scores, indices = retrieve(*inputs, 16)
    expected_scores, expected_indices = reference.product_key_topk(query, row_keys, col_keys, 16)
    # A sub-score is a sum of 32 products, off by at most 32·u·Σ|q·k|; their sum rounds once more.
    # No order statistic moves further than the largest error of what is ordered.
    row_size, col_size = sub_scores(query.abs(), row_keys.abs(), col_keys.abs())
    error = 34 * 2.0**-24 * (row_size.amax(-1) + col_size.amax(-1))[..., None]
    assert ((scores.double() - expected_scores).abs() <= error).all()
    # Where a score is further than that from its neighbours, its place in the order is certain.
    gaps = (expected_scores[..., :-1] - expected_scores[..., 1:]) > 2 * error
    certain = gaps[..., :-1] & gaps[..., 1:]
    assert certain.float().mean() > 0.9
    same = indices == expected_indices
    assert same[..., 1:-1][certain].all()


def test_returned_scores_are_the_scores_of_the_returned_experts(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=30, rows=90, columns=70, dim_key=64)
    scores, indices = retrieve(*inputs, 16)
    row_scores, col_scores = sub_scores(*(tensor.double() for tensor in inputs))
    expected = row_scores.gather(-1, indices // 70) + col_scores.gather(-1, indices % 70)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=64 * 2.0**-24 * 64)


# --- order ---------------------------------------------------------------------------------------


def test_equal_scores_go_to_the_smaller_row_rank_then_the_smaller_column_rank():
    # Row 1 and column 0 are the best of their halves. Pairs (1, 1) and (0, 0) both score 1; row 1
    # has the smaller row rank, so expert 3 comes before expert 0 although its id is larger.
    scores, indices = retrieve(
        *query_for_sub_scores(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])), 4
    )
    assert indices.flatten().tolist() == [2, 3, 0, 1]
    assert scores.flatten().tolist() == [2, 1, 1, 0]


def test_equal_keys_rank_by_the_smaller_key_id():
    ones = torch.ones(5)
    _, indices = retrieve(*query_for_sub_scores(ones, ones), 7)
    assert indices.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_sums_that_round_to_the_same_score_are_equal():
    # 2^24 + 1 is not a float and rounds to 2^24: pairs (0, 0), (0, 1), (1, 0) tie; ranks decide.
    rows = torch.tensor([2.0**24, 2.0**24 - 1])
    columns = torch.tensor([1.0, 0.0])
    scores, indices = retrieve(*query_for_sub_scores(rows, columns), 4)
    assert scores.flatten().tolist() == [2.0**24, 2.0**24, 2.0**24, 2.0**24 - 1]
    assert indices.flatten().tolist() == [0, 1, 2, 3]


def test_scores_are_sorted_in_descending_order(make_retrieval_inputs, dtype):
    scores, _ = retrieve(*make_retrieval_inputs(tokens=40, rows=60, columns=50, dtype=dtype), 32)
    assert (scores[..., :-1] >= scores[..., 1:]).all()


def test_ids_of_a_head_are_distinct(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=40, rows=60, columns=50, integers=True)
    _, indices = retrieve(*inputs, 64)
    ordered = indices.sort(dim=-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()


# --- every kind of row ---------------------------------------------------------------------------


def mixed(count: int, seed: int, values: list[float]) -> Tensor:
    """`count` draws from `values`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]


def placed(count: int, value: float, *places: int) -> Tensor:
    """Distinct small integers, with `value` at the given places (counted modulo `count`)."""
    scores = (torch.arange(count) * 37 % 101).float()
    for place in places:
        scores[place % count] = value
    return scores


# Each makes the sub-scores of one half from the number of its keys.
HALVES = {
    "ascending": lambda n: torch.arange(n).float(),
    "descending": lambda n: -torch.arange(n).float(),
    "all equal": lambda n: torch.full((n,), 3.0),
    "many ties": lambda n: mixed(n, 1, [-1.0, 0.0, 1.0]),
    "one NaN": lambda n: placed(n, NAN, -1),
    "many NaN": lambda n: placed(n, NAN, *range(0, n, 3)),
    "all NaN": lambda n: torch.full((n,), NAN),
    "one infinity": lambda n: placed(n, INFINITY, -2),
    "one negative infinity": lambda n: placed(n, -INFINITY, 1),
    "all infinity": lambda n: torch.full((n,), INFINITY),
    "all negative infinity": lambda n: torch.full((n,), -INFINITY),
    "both infinities": lambda n: mixed(n, 2, [-INFINITY, 1.0, 2.0, INFINITY]),
    "infinities and NaN": lambda n: mixed(n, 3, [-INFINITY, NAN, 0.0, 5.0, INFINITY]),
    "signed zeros": lambda n: mixed(n, 4, [-0.0, 0.0]),
    "subnormals": lambda n: mixed(n, 5, [1e-45, 3e-45, -1e-45, 0.0, 1e-40]),
    "sums that overflow": lambda n: mixed(n, 6, [3e38, 2e38, -3e38, 1e38, 0.0]),
}


@pytest.mark.parametrize("columns", HALVES)
@pytest.mark.parametrize("rows", HALVES)
def test_every_kind_of_row_meets_every_kind_of_column(rows, columns):
    for row_count, col_count in ((6, 5), (17, 34)):
        inputs = query_for_sub_scores(HALVES[rows](row_count), HALVES[columns](col_count))
        for k in (1, 8, 16, 30):
            assert_equals_brute_force(*inputs, k)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("k", [1, 16])
def test_every_kind_of_row_survives_the_filter_of_a_wide_grid(kind, k):
    inputs = query_for_sub_scores(HALVES[kind](301), HALVES[kind](257), dim_key=6)
    assert_equals_brute_force(*inputs, k)


@pytest.mark.parametrize("kind", HALVES)
def test_every_kind_of_row_is_ordered_in_double(kind):
    rows, columns = HALVES[kind](17).double(), HALVES[kind](23).double()
    if kind == "subnormals":
        rows, columns = rows.sign() * 5e-324, columns.sign() * 1e-323
    if kind == "sums that overflow":
        rows, columns = rows * 5e269, columns * 5e269
    assert_equals_brute_force(*query_for_sub_scores(rows, columns), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_infinite_sub_score_counts_as_the_largest_finite_number_of_its_sign(dtype):
    largest = torch.finfo(dtype).max
    rows = torch.tensor([5.0, -INFINITY, INFINITY, largest], dtype=dtype)
    columns = torch.tensor([0.0, -INFINITY], dtype=dtype)
    scores, indices = retrieve(*query_for_sub_scores(rows, columns), 8)
    expected = [largest, largest, 5.0, 0.0, 0.0, -largest, -largest, -INFINITY]
    assert scores.flatten().tolist() == expected
    assert indices.flatten().tolist() == [4, 6, 0, 5, 7, 1, 2, 3]


def test_infinities_beyond_k_in_both_halves_are_ordered():
    # The k best of either half hold none of the infinities that are opposite to the other's.
    rows = torch.cat([torch.full((20,), NAN), torch.full((20,), -INFINITY)])
    columns = torch.cat([torch.full((20,), INFINITY), torch.full((20,), 1.0)])
    assert_equals_brute_force(*query_for_sub_scores(rows, columns), 16)
    rows = torch.cat([torch.full((40,), 2.0), torch.full((3,), -INFINITY)])
    columns = torch.cat([torch.full((40,), 1.0), torch.full((3,), INFINITY)])
    assert_equals_brute_force(*query_for_sub_scores(rows, columns), 16)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_query_that_is_not_finite_still_gets_k_distinct_experts_in_range(
    make_retrieval_inputs, dtype, value
):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=18, rows=300, columns=270, dtype=dtype)
    query[3, 0, 1] = value
    query[5, 1] = value
    query[7, 0, 5] = value
    _, indices = retrieve(query, row_keys, col_keys, 16)
    ordered = indices.sort(dim=-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    assert ordered.min() >= 0
    assert ordered.max() < 300 * 270


def test_a_token_that_is_not_finite_leaves_the_others_alone(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=18)
    expected_scores, expected_indices = retrieve(query, row_keys, col_keys, 8)
    query[4] = NAN
    scores, indices = retrieve(query, row_keys, col_keys, 8)
    others = torch.arange(18) != 4
    assert torch.equal(scores[others], expected_scores[others])
    assert torch.equal(indices[others], expected_indices[others])


def test_a_key_that_is_nan_is_retrieved_first(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(rows=40, columns=30)
    row_keys[17] = NAN
    scores, indices = retrieve(query, row_keys, col_keys, 30)
    assert (indices // 30 == 17).all()
    assert scores.isnan().all()


# --- reach ---------------------------------------------------------------------------------------


def test_random_queries_reach_every_expert(make_retrieval_inputs):
    # Keys on a sphere and as many random queries as it takes: each key is somebody's best, so each
    # pair is the best of a query whose halves point at its row and its column.
    inputs = make_retrieval_inputs(tokens=6000, heads=1, rows=24, columns=20, dim_key=32, seed=1)
    query, row_keys, col_keys = inputs
    row_keys, col_keys = (keys / keys.norm(dim=-1, keepdim=True) for keys in (row_keys, col_keys))
    _, indices = retrieve(query, row_keys, col_keys, 8)
    assert torch.equal(indices.unique(), torch.arange(24 * 20))


def test_a_query_that_points_at_a_pair_of_keys_retrieves_that_expert(make_retrieval_inputs):
    rows, columns = 64, 48
    _, row_keys, col_keys = make_retrieval_inputs(rows=rows, columns=columns, dim_key=32)
    row_keys, col_keys = (keys / keys.norm(dim=-1, keepdim=True) for keys in (row_keys, col_keys))
    experts = torch.arange(rows * columns)
    query = torch.cat([row_keys[experts // columns], col_keys[experts % columns]], dim=-1)
    _, indices = retrieve(query[:, None], row_keys, col_keys, 1)
    assert torch.equal(indices.flatten(), experts)


def test_ids_reach_the_last_of_a_million_experts(make_retrieval_inputs):
    _, row_keys, col_keys = make_retrieval_inputs(rows=1024, columns=1024, dim_key=64)
    row_keys, col_keys = (keys / keys.norm(dim=-1, keepdim=True) for keys in (row_keys, col_keys))
    experts = torch.tensor([0, 1023, 1024, 524_287, 1_047_552, 1024**2 - 2, 1024**2 - 1])
    query = torch.cat([row_keys[experts // 1024], col_keys[experts % 1024]], dim=-1)
    _, indices = retrieve(query[:, None], row_keys, col_keys, 16)
    assert torch.equal(indices[:, 0, 0], experts)
    assert indices.min() >= 0
    assert indices.max() < 1024**2


# --- shapes, dtypes, layouts ---------------------------------------------------------------------


def test_scores_have_the_accumulation_dtype(make_retrieval_inputs, dtype):
    scores, indices = retrieve(*make_retrieval_inputs(dtype=dtype), 4)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64


def test_zero_tokens_give_empty_outputs(make_retrieval_inputs, dtype):
    scores, indices = retrieve(*make_retrieval_inputs(tokens=0, heads=3, dtype=dtype), 4)
    assert scores.shape == indices.shape == (0, 3, 4)


def test_non_contiguous_inputs_give_the_same_result(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=18, heads=3)
    expected = retrieve(query, row_keys, col_keys, 8)
    query_t = query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.full((row_keys.shape[0], 11), NAN)
    wide[:, 3:7] = row_keys
    results = retrieve(query_t, wide[:, 3:7], col_keys.t().contiguous().t(), 8)
    assert not query_t.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_an_expanded_query_gives_every_token_the_same_experts(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(tokens=1)
    scores, indices = retrieve(query.expand(20, -1, -1), row_keys, col_keys, 8)
    assert torch.equal(scores, scores[:1].expand_as(scores))
    assert torch.equal(indices, indices[:1].expand_as(indices))


def test_keys_per_head_equal_shared_keys_when_they_are_copies(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(heads=3)
    shared = retrieve(query, row_keys, col_keys, 8)
    copies = (keys.expand(3, -1, -1) for keys in (row_keys, col_keys))
    per_head = retrieve(query, *copies, 8)
    assert all(torch.equal(a, b) for a, b in zip(shared, per_head, strict=True))


def test_the_functional_form_is_the_operator(make_retrieval_inputs):
    inputs = make_retrieval_inputs()
    for a, b in zip(
        peer.functional.product_key_topk(*inputs, 8), retrieve(*inputs, 8), strict=True
    ):
        assert torch.equal(a, b)


def test_adding_rows_of_keys_keeps_the_ids_of_existing_experts(make_retrieval_inputs):
    query, row_keys, col_keys = make_retrieval_inputs(rows=12, columns=9, integers=True)
    new_rows = torch.full((4, 4), 0.0)
    before = retrieve(query, row_keys, col_keys, 108)[1]
    after = retrieve(query, torch.cat([row_keys, new_rows]), col_keys, 144)[1]
    kept = after[after < 108].view_as(before)
    assert torch.equal(kept, before)


ON_ANOTHER_CAPABILITY = """
import json, sys, torch, peer
saved = torch.load(sys.argv[1])
scores, indices = torch.ops.peer.product_key_topk(*saved["inputs"], 16)
print(json.dumps({
    "capability": torch.ops.peer.cpu_capability(),
    "same": torch.equal(scores, saved["scores"]) and torch.equal(indices, saved["indices"]),
}))
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.long
def test_every_cpu_capability_retrieves_the_same(
    make_retrieval_inputs, run_python, tmp_path, capability
):
    offered = json.loads(torch.ops.peer.build_info())["cpu_capabilities"].split()
    here = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if capability not in offered or ["default", "avx2", "avx512"].index(capability) > here:
        pytest.skip(f"{capability} cannot run here")
    inputs = make_retrieval_inputs(
        tokens=20, rows=300, columns=270, dim_key=40, integers=True, dtype=torch.float16
    )
    scores, indices = retrieve(*inputs, 16)
    torch.save(
        {"inputs": tuple(inputs), "scores": scores, "indices": indices}, tmp_path / "case.pt"
    )
    result = run_python(
        ON_ANOTHER_CAPABILITY,
        tmp_path / "case.pt",
        environment={"PEER_CPU_CAPABILITY": capability},
    )
    assert result == {"capability": capability, "same": True}


# --- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "keys per head"])
@pytest.mark.parametrize("grid", [(7, 6), (1, 5), (40, 33)], ids=str)
def test_gradients_equal_autograd_through_the_reference(make_retrieval_inputs, grid, shared):
    rows, columns = grid
    inputs = make_retrieval_inputs(
        tokens=33, heads=3, rows=rows, columns=columns, shared=shared, dtype=torch.float64
    )
    ours, theirs = inputs.requiring_grad(), inputs.requiring_grad()
    scores, _ = retrieve(*ours, 5)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)).double()
    scores.backward(grad)
    reference.product_key_topk(*theirs, 5)[0].backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradients_have_the_dtypes_of_the_inputs(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(dtype=dtype).requiring_grad()
    retrieve(*inputs, 4)[0].sum().backward()
    assert [tensor.grad.dtype for tensor in inputs] == [dtype] * 3
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


def test_gradients_of_16_bit_inputs_are_exact_sums_rounded_once(make_retrieval_inputs):
    # 700 tokens retrieve the only key pair with an upstream gradient of 1: the key gradients are
    # sums of integers, beyond 256 where a running sum in bfloat16 would lose them one by one.
    query = torch.ones(700, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    row_keys = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    col_keys = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    retrieve(query, row_keys, col_keys, 1)[0].sum().backward()
    assert row_keys.grad.item() == col_keys.grad.item() == 700  # a bfloat16: 175 · 4
    assert torch.equal(query.grad, torch.ones_like(query))


def test_a_key_in_several_pairs_collects_all_their_gradients():
    # All nine pairs are retrieved, so each key is in three of them.
    query, row_keys, col_keys = query_for_sub_scores(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    )
    indices = retrieve(query, row_keys, col_keys, 9)[1]
    grad = torch.arange(1.0, 10.0).view(1, 1, 9)
    grad_query, grad_rows, grad_cols = backward(grad, query, row_keys, col_keys, indices)
    by_expert = torch.zeros(9).scatter(0, indices.flatten(), grad.flatten()).view(3, 3)
    assert torch.equal(grad_rows.flatten(), by_expert.sum(1))
    assert torch.equal(grad_cols.flatten(), by_expert.sum(0))
    assert torch.equal(
        grad_query.flatten(),
        torch.stack(
            [(by_expert.sum(1) * row_keys[:, 0]).sum(), (by_expert.sum(0) * col_keys[:, 0]).sum()]
        ),
    )


def test_gradients_do_not_depend_on_the_order_of_the_k(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=21, heads=3, rows=12, columns=10, integers=True)
    indices = retrieve(*inputs, 8)[1]
    generator = torch.Generator().manual_seed(2)
    grad = torch.randint(-3, 4, indices.shape, generator=generator).float()
    order = torch.rand(indices.shape, generator=generator).argsort(dim=-1)
    expected = backward(grad, *inputs, indices)
    permuted = backward(grad.gather(-1, order), *inputs, indices.gather(-1, order))
    assert all(torch.equal(a, b) for a, b in zip(expected, permuted, strict=True))


def test_each_gradient_can_be_asked_for_alone(make_retrieval_inputs):
    inputs = make_retrieval_inputs()
    scores, indices = retrieve(*inputs, 4)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    everything = backward(grad, *inputs, indices)
    for position in range(3):
        mask = tuple(i == position for i in range(3))
        alone = backward(grad, *inputs, indices, mask)
        assert torch.equal(alone[position], everything[position])
        assert [gradient is None for gradient in alone] == [not wanted for wanted in mask]


def test_keys_that_were_not_retrieved_have_a_gradient_of_zero(make_retrieval_inputs):
    inputs = make_retrieval_inputs(tokens=2, heads=1, rows=50, columns=40).requiring_grad()
    scores, indices = retrieve(*inputs, 3)
    scores.sum().backward()
    for keys, ids in ((inputs.row_keys, indices // 40), (inputs.col_keys, indices % 40)):
        used = torch.zeros(keys.shape[0], dtype=torch.bool)
        used[ids.unique()] = True
        assert (keys.grad[~used] == 0).all()
        assert (keys.grad[used] != 0).any(dim=-1).all()


def test_a_zero_upstream_gradient_with_a_nan_key_not_retrieved_stays_finite(make_retrieval_inputs):
    # A key that nobody retrieved is not read by backward, whatever it holds.
    query, row_keys, col_keys = make_retrieval_inputs(tokens=3, heads=1, rows=9, columns=8)
    scores, indices = retrieve(query, row_keys, col_keys, 2)
    unused = [row for row in range(9) if row not in (indices // 8).flatten().tolist()]
    row_keys[unused] = NAN
    gradients = backward(torch.ones_like(scores), query, row_keys, col_keys, indices)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_backward_of_zero_tokens_is_zero(make_retrieval_inputs, dtype):
    inputs = make_retrieval_inputs(tokens=0, dtype=dtype).requiring_grad()
    retrieve(*inputs, 4)[0].sum().backward()
    assert inputs.query.grad.shape == inputs.query.shape
    assert (inputs.row_keys.grad == 0).all()
    assert (inputs.col_keys.grad == 0).all()


def test_indices_carry_no_gradient(make_retrieval_inputs):
    scores, indices = retrieve(*make_retrieval_inputs().requiring_grad(), 4)
    assert scores.requires_grad
    assert not indices.requires_grad
