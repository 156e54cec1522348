"""Random cases of every shape, layout and dtype against the reference in double.

Bounds on the distance come from an error analysis (rounding.py), not from experience. Values are
drawn by seed, because shrinking a tensor element by element explains nothing; shapes, dtypes and
layouts are what Hypothesis searches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rounding import Arithmetic, Bounded, analyse_expert_mlp, assert_within
from torch import Tensor

from peer import reference

LOW = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity", "relu2")
ACTIVATION_LAYOUTS = ("contiguous", "transposed", "every other column", "expanded")
TABLE_LAYOUTS = ("contiguous", "part after part", "transposed", "every other row")


class ExpertCase(NamedTuple):
    """A shape, layout and dtype of `expert_mlp`."""

    tokens: int
    per_token: int
    experts: int
    dim: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # x, weights, table
    glu: bool
    activation: str
    layout: str
    table_layout: str
    seed: int


def dtypes_of_experts() -> st.SearchStrategy[tuple[torch.dtype, ...]]:
    mixed = st.tuples(*(st.sampled_from(LOW) for _ in range(3)))
    return st.one_of(mixed, st.just((torch.float64,) * 3))


expert_cases = st.builds(
    ExpertCase,
    tokens=st.integers(0, 9),
    per_token=st.integers(0, 20),
    experts=st.integers(1, 12),
    dim=st.integers(1, 70),
    dtypes=dtypes_of_experts(),
    glu=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from(ACTIVATION_LAYOUTS),
    table_layout=st.sampled_from(TABLE_LAYOUTS),
    seed=st.integers(0, 2**16),
)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (rows repeated where expanded) in another layout."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "part after part":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every other column":
        wide = torch.full((tensor.shape[0], 2 * tensor.shape[1]), 7).to(tensor.dtype)
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if layout == "every other row":
        tall = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), math.nan).to(tensor.dtype)
        tall[::2] = tensor
        return tall[::2]
    if layout == "expanded" and tensor.shape[0] > 0:
        return tensor[:1].expand_as(tensor)
    return tensor


def build(make_expert_inputs, case: ExpertCase):
    x_dtype, weights_dtype, table_dtype = case.dtypes
    inputs = make_expert_inputs(
        tokens=case.tokens,
        per_token=case.per_token,
        experts=case.experts,
        dim=case.dim,
        dtype=x_dtype,
        weights_dtype=weights_dtype,
        table_dtype=table_dtype,
        glu=case.glu,
        seed=case.seed,
    )
    activations = [laid_out(tensor, case.layout) for tensor in inputs[:3]]
    return type(inputs)(*activations, laid_out(inputs.table, case.table_layout))


@given(case=expert_cases)
@example(
    case=ExpertCase(0, 3, 4, 5, (torch.float32,) * 3, True, "gelu", "expanded", "transposed", 0)
)
@example(
    case=ExpertCase(3, 0, 1, 1, (torch.float64,) * 3, False, "relu", "contiguous", "contiguous", 0)
)
def test_experts_are_within_rounding_of_the_reference(make_expert_inputs, case):
    inputs = build(make_expert_inputs, case)
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, case.activation, False)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed))
    grad_out = laid_out(grad_out.to(out.dtype), case.layout)
    gradients = torch.ops.peer.expert_mlp_backward(
        grad_out, *inputs, hidden, gate, case.activation, False, (True,) * 3
    )

    leaves = [t.double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    expected = reference.expert_mlp(*leaves, case.activation)
    expected.backward(grad_out.double())
    analysis = analyse_expert_mlp(*inputs, case.activation, grad_out)

    assert_within(out, expected, analysis.out.error)
    assert_within(hidden, *analysis.hidden)
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    for gradient, leaf, bound in zip(gradients, floating, analysis.gradients, strict=True):
        assert_within(gradient, leaf.grad, bound.error)


@given(case=expert_cases)
def test_the_sparse_gradient_holds_the_dense_one(make_expert_inputs, case):
    inputs = build(make_expert_inputs, case)
    out, hidden, gate = torch.ops.peer.expert_mlp(*inputs, case.activation, True)
    arguments = (out, *inputs, hidden, gate, case.activation)
    *_, dense = torch.ops.peer.expert_mlp_backward(*arguments, False, (True,) * 3)
    *_, sparse = torch.ops.peer.expert_mlp_backward(*arguments, True, (True,) * 3)
    assert sparse.is_coalesced()
    assert torch.equal(sparse.indices()[0], inputs.indices.unique())
    assert torch.equal(sparse.to_dense(), dense)


@given(case=expert_cases, order=st.randoms(use_true_random=False))
def test_permuting_the_tokens_permutes_the_output(make_expert_inputs, case, order):
    inputs = build(make_expert_inputs, case)
    permutation = list(range(case.tokens))
    order.shuffle(permutation)
    out = torch.ops.peer.expert_mlp(*inputs, case.activation, False)[0]
    permuted = [tensor[permutation] for tensor in inputs[:3]]
    again = torch.ops.peer.expert_mlp(*permuted, inputs.table, case.activation, False)[0]
    assert torch.equal(again, out[permutation])


# --- retrieval -----------------------------------------------------------------------------------


class RetrievalCase(NamedTuple):
    """A shape, layout and dtype of `product_key_topk`."""

    tokens: int
    heads: int
    rows: int
    columns: int
    half: int
    part_of_all: float  # k as a part of all experts
    shared: bool
    dtype: torch.dtype
    transposed: bool
    seed: int

    @property
    def k(self) -> int:
        return max(1, round(self.part_of_all * self.rows * self.columns))


retrieval_cases = st.builds(
    RetrievalCase,
    tokens=st.integers(0, 20),
    heads=st.integers(1, 4),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    half=st.integers(1, 40),
    part_of_all=st.one_of(st.floats(0, 0.05), st.floats(0, 1)),
    shared=st.booleans(),
    dtype=st.sampled_from([*LOW, torch.float64]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)


def build_retrieval(make_retrieval_inputs, case: RetrievalCase, integers: bool):
    inputs = make_retrieval_inputs(
        tokens=case.tokens,
        heads=case.heads,
        rows=case.rows,
        columns=case.columns,
        dim_key=2 * case.half,
        shared=case.shared,
        dtype=case.dtype,
        integers=integers,
        seed=case.seed,
    )
    if case.transposed:
        return type(inputs)(*(t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs))
    return inputs


@given(case=retrieval_cases)
def test_retrieval_of_integers_equals_the_reference(make_retrieval_inputs, case):
    inputs = build_retrieval(make_retrieval_inputs, case, integers=True)
    scores, indices = torch.ops.peer.product_key_topk(*inputs, case.k)
    expected = reference.product_key_topk(*(t.double() for t in inputs), case.k)
    assert torch.equal(scores.double(), expected[0])
    assert torch.equal(indices, expected[1])


def scores_of_all(inputs, case: RetrievalCase) -> Bounded:
    """The score of every expert, (T, H, N), and how far the operator's may be from it."""
    arithmetic = Arithmetic(case.dtype)

    def half(queries: Tensor, keys: Tensor) -> Bounded:
        equation = "thd,rd->thr" if case.shared else "thd,hrd->thr"
        zeros = [torch.zeros_like(t, dtype=torch.float64) for t in (queries, keys)]
        return arithmetic.sum_of_products(
            equation,
            Bounded(queries.double(), zeros[0]),
            Bounded(keys.double(), zeros[1]),
            case.half,
        )

    row_query, col_query = inputs.query.chunk(2, dim=-1)
    rows, columns = half(row_query, inputs.row_keys), half(col_query, inputs.col_keys)
    total = arithmetic.add(
        Bounded(*(part[..., :, None] for part in rows)),
        Bounded(*(part[..., None, :] for part in columns)),
    )
    return Bounded(*(part.flatten(-2) for part in total))


@given(case=retrieval_cases)
def test_retrieval_of_reals_is_within_rounding_of_brute_force(make_retrieval_inputs, case):
    inputs = build_retrieval(make_retrieval_inputs, case, integers=False)
    scores, indices = torch.ops.peer.product_key_topk(*inputs, case.k)
    every = scores_of_all(inputs, case)
    expected, _ = reference.product_key_topk(*(t.double() for t in inputs), case.k)
    # A sorted list moves no further than the largest error of what is sorted.
    largest = every.error.amax(-1, keepdim=True).expand_as(expected)
    assert_within(scores, expected, largest)
    assert_within(scores, every.value.gather(-1, indices), every.error.gather(-1, indices))
    assert (scores[..., :-1] >= scores[..., 1:]).all()
    ordered = indices.sort(dim=-1).values
    assert (ordered[..., :-1] < ordered[..., 1:]).all()


LARGEST = torch.finfo(torch.float32).max
SPECIAL = (
    *(math.nan, math.inf, -math.inf, LARGEST, -LARGEST),
    *(0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45),
)
sub_scores = st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=24)


@given(rows=sub_scores, columns=sub_scores, part_of_all=st.floats(0, 1))
def test_retrieval_of_special_values_equals_the_reference(rows, columns, part_of_all):
    # With one element per half and a query of ones, the keys are the sub-scores.
    k = max(1, round(part_of_all * len(rows) * len(columns)))
    inputs = (torch.ones(1, 1, 2), torch.tensor(rows)[:, None], torch.tensor(columns)[:, None])
    scores, indices = torch.ops.peer.product_key_topk(*inputs, k)
    expected_scores, expected_indices = reference.product_key_topk(*inputs, k)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=0, equal_nan=True)


def linear_gradients(grad, query, row_keys, col_keys, indices) -> list[Tensor]:
    """The gradients of Σ grad·scores in double; exact, up to double's rounding."""
    heads, columns = query.shape[1], col_keys.shape[-2]
    row_query, col_query = query.chunk(2, dim=-1)

    def of_half(query: Tensor, keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        table = keys.expand(heads, -1, -1) if keys.dim() == 2 else keys
        head = torch.arange(heads)[None, :, None]
        grad_query = torch.einsum("thk,thkd->thd", grad, table[head, ids])
        pairs = torch.einsum("thk,thd->thkd", grad, query)
        grad_keys = torch.zeros(table.shape, dtype=grad.dtype)
        grad_keys.index_put_((head.expand_as(ids), ids), pairs, accumulate=True)
        return grad_query, grad_keys.sum(0) if keys.dim() == 2 else grad_keys

    of_row_query, of_row_keys = of_half(row_query, row_keys, indices // columns)
    of_col_query, of_col_keys = of_half(col_query, col_keys, indices % columns)
    return [torch.cat([of_row_query, of_col_query], dim=-1), of_row_keys, of_col_keys]


@given(case=retrieval_cases)
def test_gradients_of_retrieval_are_within_rounding_of_the_exact_ones(make_retrieval_inputs, case):
    inputs = build_retrieval(make_retrieval_inputs, case, integers=False)
    scores, indices = torch.ops.peer.product_key_topk(*inputs, case.k)
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(case.seed))
    grad = grad.to(scores.dtype)
    gradients = torch.ops.peer.product_key_topk_backward(grad, *inputs, indices, (True,) * 3)

    doubles = [tensor.double() for tensor in (grad, *inputs)]
    expected = linear_gradients(*doubles, indices)
    magnitudes = linear_gradients(*(tensor.abs() for tensor in doubles), indices)
    arithmetic = Arithmetic(case.dtype)
    terms = max(1, case.tokens * case.heads * case.k)
    gamma = terms * arithmetic.unit / (1 - terms * arithmetic.unit)
    for actual, value, magnitude in zip(gradients, expected, magnitudes, strict=True):
        assert_within(actual, *arithmetic.store(Bounded(value, gamma * magnitude), case.dtype))
