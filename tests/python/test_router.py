"""The router: queries, their normalisation, retrieval, weights."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import peer
from peer.modules import BatchQueryNorm, LayerQueryNorm, RMSQueryNorm, make_query_norm
from peer.modules.grid import parse_grid

NORMS = ["batch", "layer", "rms", None]
SCORES = ["softmax", "sigmoid", "relu"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_router(**options):
    sizes = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return peer.ProductKeyRouter(10, **{**sizes, **options})


@pytest.fixture
def padded():
    """Tokens (4, 7, 10) and a mask of their padding, at the ends of the sequences."""
    lengths = torch.tensor([7, 3, 1, 5])
    mask = torch.arange(7) >= lengths[:, None]
    return torch.randn(4, 7, 10) * 3 + 1, mask


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_weights_and_indices_have_the_leading_dimensions_of_x(leading):
    weights, indices = make_router().eval()(torch.randn(*leading, 10))
    assert weights.shape == indices.shape == (*leading, 3, 4)
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize("scores", SCORES)
def test_equals_query_then_retrieval_then_the_function_of_all_k_scores(scores, share_keys):
    router = make_router(scores=scores, share_keys=share_keys, query_norm=None).double()
    x = torch.randn(9, 10).double()
    query = (x @ router.query.weight.T).view(9, 3, 8)
    s, expected_indices = peer.reference.product_key_topk(
        query, router.row_keys, router.col_keys, 4
    )
    expected = {
        "softmax": lambda: s.exp() / s.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + (-s).exp()),
        "relu": lambda: s.clamp(min=0),
    }[scores]()
    weights, indices = router(x)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected)


def test_softmax_weights_of_a_head_sum_to_one():
    weights, _ = make_router()(torch.randn(9, 10))
    torch.testing.assert_close(weights.sum(-1), torch.ones(9, 3))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_gets_a_gradient(norm, scores):
    router = make_router(query_norm=norm, scores=scores, query_bias=True)
    weights, _ = router(torch.randn(50, 10))
    (weights * torch.randn_like(weights)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        # Batch normalisation subtracts a preceding bias with the mean.
        if not (norm == "batch" and name == "query.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


def test_random_tokens_reach_every_expert_of_a_rectangular_grid():
    # Wide keys, because a key inside the convex hull of the others wins for no query.
    router = make_router(
        num_experts=(32, 24), num_experts_per_head=16, dim_key=64, query_norm="layer"
    )
    _, indices = router(torch.randn(20_000, 10))
    assert torch.equal(indices.unique(), torch.arange(32 * 24))


@pytest.mark.parametrize("half_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_16_bit_routers_give_float32_weights(norm, half_dtype, padded):
    x, mask = padded
    router = make_router(query_norm=norm, dtype=half_dtype)
    for mode in True, False:
        weights, indices = router.train(mode)(x.to(half_dtype), mask)
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()
        assert indices.max() < 48


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_region_routes(norm, padded):
    router = make_router(query_norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        weights, _ = router(*padded)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[~padded[1]].sum(-1), torch.ones(int((~padded[1]).sum()), 3))


# --- the norms -----------------------------------------------------------------------------------


def test_layer_norm_equals_torch_on_each_heads_query():
    norm, query = LayerQueryNorm(3, 8), torch.randn(5, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = [
        nn.functional.layer_norm(query[:, head], (8,), norm.weight[head], norm.bias[head], norm.eps)
        for head in (slice(0, 8), slice(8, 16), slice(16, 24))
    ]
    torch.testing.assert_close(norm(query), torch.cat(expected, -1))


def test_rms_norm_equals_torch_on_each_heads_query():
    norm, query = RMSQueryNorm(3, 8), torch.randn(5, 24)
    nn.init.normal_(norm.weight)
    expected = [
        nn.functional.rms_norm(query[:, head], (8,), norm.weight[head], norm.eps)
        for head in (slice(0, 8), slice(8, 16), slice(16, 24))
    ]
    torch.testing.assert_close(norm(query), torch.cat(expected, -1))


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_routing_of_a_token_does_not_depend_on_others_without_batch_norm(norm):
    router, x = make_router(query_norm=norm), torch.randn(9, 10)
    torch.testing.assert_close(router(x)[0][4], router(x[4])[0])


# --- batch normalisation with padding ------------------------------------------------------------


def make_batch_norms(momentum, dtype=torch.float32):
    """Our normalisation and that of torch, with the same random parameters."""
    ours = BatchQueryNorm(24, momentum=momentum, dtype=dtype)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs = nn.BatchNorm1d(24, momentum=momentum, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_state(ours, theirs, **tolerance):
    theirs = theirs.state_dict()
    assert list(ours.state_dict()) == list(theirs)
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], **tolerance)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_masked_batch_norm_equals_torch_on_the_tokens_that_are_not_padding(momentum):
    ours, theirs = make_batch_norms(momentum)
    for step in range(3):
        query, mask = torch.randn(40, 24) * 3 + 100, torch.rand(40) < 0.3
        mine, other = query.clone().requires_grad_(), query.clone().requires_grad_()
        normed, expected = ours(mine, mask)[~mask], theirs(other[~mask])
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-4)
        cotangent = torch.randn_like(expected)
        normed.backward(cotangent)
        expected.backward(cotangent)
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
        assert_same_state(ours, theirs)
        assert ours.num_batches_tracked == step + 1
    query, mask = torch.randn(40, 24), torch.rand(40) < 0.3
    torch.testing.assert_close(ours.eval()(query, mask), theirs.eval()(query))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_without_a_mask_is_torchs(momentum):
    ours, theirs = make_batch_norms(momentum)
    for _ in range(3):
        query = torch.randn(40, 24) * 3 + 1
        assert torch.equal(ours(query), theirs(query))
    assert_same_state(ours, theirs, rtol=0, atol=0)


def test_a_mask_without_padding_changes_nothing():
    ours, theirs = make_batch_norms(0.1)
    query = torch.randn(40, 24)
    torch.testing.assert_close(ours(query, torch.zeros(40, dtype=torch.bool)), theirs(query))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("half_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_statistics_of_16_bit_queries_are_summed_in_float32(half_dtype):
    # 4096 tokens of value 1 + noise: a sum in 16 bits would stop at 256 or 2048.
    norm = BatchQueryNorm(24, momentum=1.0)
    query, mask = (1 + torch.randn(4096, 24) / 8).to(half_dtype), torch.rand(4096) < 0.3
    normed = norm(query, mask)
    assert normed.dtype == half_dtype
    kept = query[~mask].double()
    torch.testing.assert_close(norm.running_mean.double(), kept.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), kept.var(0), rtol=1e-5, atol=0)


def test_what_stands_in_the_padding_does_not_matter(padded):
    x, mask = padded
    router = make_router()
    other = copy.deepcopy(router)
    weights, indices = router(x, mask)
    for junk in 1e30, float("nan"), float("inf"):
        x = x.masked_fill(mask[..., None], junk)
        junk_weights, junk_indices = other(x, mask)
        assert torch.equal(indices[~mask], junk_indices[~mask])
        torch.testing.assert_close(weights[~mask], junk_weights[~mask])
    assert other.norm.running_mean.isfinite().all()
    assert other.norm.running_var.isfinite().all()


@pytest.mark.parametrize("real_tokens", [0, 1])
def test_running_statistics_stay_where_fewer_than_two_tokens_are_not_padding(real_tokens):
    norm = BatchQueryNorm(24)
    norm(torch.randn(30, 24) * 2 + 1)
    before = copy.deepcopy(norm.state_dict())
    mask = torch.arange(6) >= real_tokens
    assert norm(torch.randn(6, 24), mask).isfinite().all()
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_mask_does_not_matter_in_evaluation(padded):
    x, mask = padded
    router = make_router().eval()
    for masked, unmasked in zip(router(x, mask), router(x), strict=True):
        assert torch.equal(masked[~mask], unmasked[~mask])


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_the_mask_does_not_matter_to_norms_without_batch_statistics(norm, padded):
    x, mask = padded
    router = make_router(query_norm=norm)
    for masked, unmasked in zip(router(x, mask), router(x), strict=True):
        assert torch.equal(masked[~mask], unmasked[~mask])


def test_statistics_of_the_batch_are_used_when_there_are_no_running_ones(padded):
    x, mask = padded
    router = make_router()
    expected = router(x, mask)[0]
    torch.func.replace_all_batch_norm_modules_(router)
    torch.testing.assert_close(router.eval()(x, mask)[0], expected)


def test_one_token_in_training_is_refused_under_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make_router()(torch.randn(1, 10))
    make_router(query_norm="layer")(torch.randn(1, 10))
    make_router().eval()(torch.randn(1, 10))


# --- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (
            "batch",
            ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
        ),
        ("layer", ["weight", "bias"]),
        ("rms", ["weight"]),
        (None, []),
    ],
)
@pytest.mark.parametrize("query_bias", [True, False])
def test_names_in_the_state(norm, names, query_bias):
    state = make_router(query_norm=norm, query_bias=query_bias).state_dict()
    query = ["query.weight", "query.bias"] if query_bias else ["query.weight"]
    expected = ["row_keys", "col_keys", *query, *(f"norm.{name}" for name in names)]
    assert sorted(state) == sorted(expected)


@pytest.mark.parametrize("share_keys", [True, False])
def test_shapes_in_the_state(share_keys):
    shapes = {k: tuple(v.shape) for k, v in make_router(share_keys=share_keys).state_dict().items()}
    per_head = () if share_keys else (3,)
    assert shapes["row_keys"] == (*per_head, 8, 4)
    assert shapes["col_keys"] == (*per_head, 6, 4)
    assert shapes["query.weight"] == (24, 10)
    assert shapes["norm.running_mean"] == shapes["norm.weight"] == (24,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share_keys", [True, False])
def test_keys_start_at_the_length_of_the_root_of_a_third(share_keys, dtype):
    router = make_router(num_experts=(40, 30), share_keys=share_keys, dim_key=32, dtype=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for keys in router.row_keys, router.col_keys:
        lengths = keys.double().norm(dim=-1)
        torch.testing.assert_close(
            lengths, torch.full_like(lengths, 3**-0.5), rtol=tolerance, atol=0
        )


def test_keys_start_in_uniform_directions():
    keys = make_router(num_experts=(16000, 1), dim_key=4).row_keys
    # Of points in a square, the octants around its diagonals have 1.41 times as many.
    octants = (torch.atan2(keys[:, 0], keys[:, 1]) / torch.pi * 4).round() % 8
    assert octants.unique(return_counts=True)[1].sub(2000).abs().max() < 200


@pytest.mark.parametrize("share_keys", [True, False])
def test_untrained_keys_retrieve_as_many_experts_as_a_uniform_draw(share_keys):
    router = make_router(
        num_experts=(128, 128), heads=4, num_experts_per_head=16, dim_key=16, share_keys=share_keys
    )
    router.query, router.dim = nn.Identity(), 4 * 16
    with peer.UsageTracker(router) as tracker:
        router(torch.randn(1000, 4 * 16))
    uniform = 1 - (1 - 16 / 128**2) ** 4000
    assert tracker.usage() > uniform - 0.03


@pytest.mark.parametrize("norm", NORMS)
def test_factory_arguments_reach_every_tensor(norm):
    router = make_router(query_norm=norm, query_bias=True, device="meta", dtype=torch.bfloat16)
    for name, tensor in router.state_dict().items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.bfloat16), name


def test_the_representation_names_the_options():
    text = repr(make_router(scores="relu", share_keys=False))
    assert (
        "dim=10, num_experts=(8, 6), heads=3, num_experts_per_head=4, dim_key=8, scores='relu', "
        "share_keys=False, key_norm=False"
    ) in text
    assert "BatchQueryNorm(24" in text


def test_a_square_number_of_experts_makes_a_square_grid():
    router = make_router(num_experts=49)
    assert (router.rows, router.columns, router.num_experts) == (7, 7, 49)


# --- bad input -----------------------------------------------------------------------------------

BAD_OPTIONS = {
    "odd dim_key": ({"dim_key": 7}, ValueError, "even dim_key.* got 7"),
    "no dim_key": ({"dim_key": 0}, ValueError, "even dim_key.* got 0"),
    "no direction": (
        {"dim_key": 2, "key_norm": True},
        ValueError,
        "dim_key of at least 4 with key_norm.* got 2",
    ),
    "no heads": ({"heads": 0}, ValueError, "heads to be positive, got 0"),
    "k of 0": ({"num_experts_per_head": 0}, ValueError, "between 1 and .* 48, got 0"),
    "k > N": ({"num_experts_per_head": 49}, ValueError, "between 1 and .* 48, got 49"),
    "unknown scores": (
        {"scores": "tanh"},
        ValueError,
        "one of 'softmax', 'sigmoid', 'relu', got 'tanh'",
    ),
    "unknown norm": (
        {"query_norm": "group"},
        ValueError,
        "one of 'batch', 'layer', 'rms', None, got 'group'",
    ),
    "softmax of one": (
        {"num_experts_per_head": 1},
        ValueError,
        "no gradient: use scores='sigmoid' or 'relu', or num_experts_per_head > 1",
    ),
    "not a square": (
        {"num_experts": 1_000_001},
        ValueError,
        re.escape(
            "got 1000001; the nearest squares are 1000**2 = 1000000 and 1001**2 = 1002001, or the "
            "grid (101, 9901)"
        ),
    ),
    "a prime": ({"num_experts": 7}, ValueError, r"2\*\*2 = 4 and 3\*\*2 = 9$"),
    "no experts": ({"num_experts": 0}, ValueError, "positive, got 0"),
    "no columns": ({"num_experts": (4, 0)}, ValueError, r"positive, got \(4, 0\)"),
    "three dimensions": ({"num_experts": (4, 4, 4)}, TypeError, "int or a pair"),
    "a float": ({"num_experts": 1e6}, TypeError, "int or a pair.* got 1000000.0"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_gets_a_sentence(case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        make_router(**options)


@pytest.mark.parametrize("scores", ["sigmoid", "relu"])
def test_one_expert_per_head_is_fine_without_softmax(scores):
    make_router(num_experts_per_head=1, scores=scores)


def test_a_grid_of_the_nearest_divisors_is_offered():
    with pytest.raises(ValueError, match=r"grid \(625, 800\)$"):
        parse_grid(500_000)


def test_an_unknown_query_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match="query_norm to be one of 'batch', 'layer', 'rms', None"):
        make_query_norm("Batch", 2, 4)


def test_an_unknown_score_function_lists_the_known_ones():
    with pytest.raises(ValueError, match="softmax, sigmoid or relu, got tanh"):
        peer.functional.router_weights(torch.ones(2), "tanh")


def test_x_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"x of shape \[\.\.\., 10\], got \[2, 3, 11\]"):
        make_router()(torch.randn(2, 3, 11))
    with pytest.raises(ValueError, match=r"x of shape \[\.\.\., 10\], got \[\]"):
        make_router()(torch.tensor(1.0))


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"padding_mask of shape \[2, 3\] to match x, got \[3\]"):
        make_router()(torch.randn(2, 3, 10), torch.zeros(3, dtype=torch.bool))


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(TypeError, match=r"dtype bool, True for padding, got torch.int64"):
        make_router()(torch.randn(2, 3, 10), torch.ones(2, 3, dtype=torch.int64))


# --- keys of one length --------------------------------------------------------------------------


def make_normed(**options):
    """A router with `key_norm` whose parameters have different lengths."""
    router = make_router(key_norm=True, **options)
    with torch.no_grad():
        for keys in router.row_keys, router.col_keys:
            keys *= torch.rand(*keys.shape[:-1], 1) * 5 + 0.1
    return router


@pytest.mark.parametrize("share_keys", [True, False])
def test_key_norm_retrieves_by_keys_of_one_length(share_keys):
    router = make_normed(share_keys=share_keys, query_norm=None).double()
    x = torch.randn(9, 10).double()
    query = (x @ router.query.weight.T).view(9, 3, 8)
    unit = (keys / keys.norm(dim=-1, keepdim=True) for keys in (router.row_keys, router.col_keys))
    s, expected = peer.reference.product_key_topk(query, *(keys * 3**-0.5 for keys in unit), 4)
    weights, indices = router(x)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, s.softmax(-1))


def test_with_key_norm_gradients_move_directions_only():
    router = make_normed().double()
    router(torch.randn(50, 10).double())[0].square().sum().backward()
    for keys in router.row_keys, router.col_keys:
        along = (keys * keys.grad).sum(-1) / keys.norm(dim=-1) / keys.grad.norm(dim=-1).clamp(1e-9)
        assert along.abs().max() < 1e-9
        assert keys.grad.abs().max() > 1e-6


def test_a_key_of_zeros_scores_zero_and_learns_like_any_parameter():
    router = make_normed(num_experts_per_head=48).double()  # all experts
    with torch.no_grad():
        router.row_keys[2] = 0
    twin = make_router(num_experts_per_head=48).double()
    twin.load_state_dict({**router.state_dict(), "row_keys": router.effective_keys()[0]})
    with torch.no_grad():
        twin.col_keys.copy_(router.effective_keys()[1])
    assert torch.equal(twin.row_keys[2], torch.zeros(4).double())
    x = torch.randn(50, 10).double()
    for each in router, twin:
        each(x)[0].square().sum().backward()
    assert router.row_keys.grad[2].abs().max() > 1e-6
    torch.testing.assert_close(router.row_keys.grad[2], twin.row_keys.grad[2])

    def normalised(keys):
        return torch.func.functional_call(EffectiveKeys(router), {"router.row_keys": keys}, ())

    keys = router.row_keys.detach()
    assert torch.func.jacfwd(normalised)(keys).isfinite().all()
    assert torch.func.jacrev(torch.func.jacrev(normalised))(keys).isfinite().all()


class EffectiveKeys(nn.Module):
    """The row keys in effect, as the output of a module."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self):
        return self.router.effective_keys()[0]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_keys_are_normalised_in_float32(dtype, scale):
    router = make_router(key_norm=True, dtype=dtype)
    with torch.no_grad():
        router.row_keys *= scale  # the squares of a length overflow or vanish in float16
    keys = router.effective_keys()[0]
    assert keys.dtype == dtype
    lengths = keys.float().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3**-0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("share_keys", [True, False])
def test_folding_the_key_norm_keeps_all_bits(share_keys, dtype, low):
    router = make_normed(share_keys=share_keys, query_norm="layer", dtype=dtype)
    router.freeze_keys(torch.arange(8) < 2, torch.arange(6) < 1)
    with torch.no_grad():
        router.row_keys += 1  # an optimizer moves the parameters of frozen keys, too
    x = torch.randn(30, 10, dtype=dtype)
    with torch.autocast("cpu", low, enabled=low is not None):
        expected = router(x)
        assert peer.fold_key_norm_(router) is router
        for ours, theirs in zip(router(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    router.unfreeze_keys()
    other = make_router(share_keys=share_keys, query_norm="layer", dtype=dtype)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x)[0], router(x)[0])
    assert repr(other) == repr(router)


def test_folding_the_key_norm_changes_every_router_in_a_model():
    model = nn.Sequential(make_normed(), nn.Linear(2, 2), make_router(), make_normed())
    model[3].row_keys = model[0].row_keys
    expected = [model[i].effective_keys() for i in (0, 2, 3)]
    peer.fold_key_norm_(model)
    for i, keys in zip((0, 2, 3), expected, strict=True):
        assert not model[i].key_norm
        assert torch.equal(model[i].row_keys, keys[0])
        assert torch.equal(model[i].col_keys, keys[1])


def test_folding_refuses_a_module_without_key_norm():
    with pytest.raises(ValueError, match="key_norm is True, found none"):
        peer.fold_key_norm_(make_router())


def test_both_norms_fold():
    router = trained_router(key_norm=True)
    x = torch.randn(30, 10)
    expected = router(x)
    peer.fold_query_norm_(peer.fold_key_norm_(router))
    torch.testing.assert_close(router(x)[0], expected[0])
    assert (router.query_norm, router.query_bias, router.key_norm) == (None, True, False)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_experts": (5, 6)}, {"dim_key": 4}, {"heads": 2}, {"share_keys": False}],
    ids=str,
)
def test_a_checkpoint_of_other_options_says_what_it_holds(options):
    saved = make_router(**options).state_dict()
    (option, value), *_ = options.items()
    with pytest.raises(RuntimeError) as caught:
        make_router().load_state_dict(saved)
    theirs, ours = str(caught.value).split("the checkpoint's router has ")[1].split("this one")
    assert f"{option}={value}" in theirs
    assert (
        f"{option}={getattr(make_router(), option) if option != 'num_experts' else (8, 6)}" in ours
    )
    assert "build the layer with the checkpoint's options" in ours


def test_a_checkpoint_of_the_same_options_loads():
    router, other = make_router(), make_router()
    other.load_state_dict(router.state_dict())
    x = torch.randn(5, 10)
    assert torch.equal(router.eval()(x)[0], other.eval()(x)[0])


# --- folding -------------------------------------------------------------------------------------


def trained_router(**options):
    """A router whose batch statistics are not the initial ones."""
    router = make_router(**options)
    with torch.no_grad():
        for parameter in router.norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if router.query.bias is not None:
            router.query.bias.copy_(torch.randn_like(router.query.bias))
    for _ in range(5):
        router(torch.randn(50, 10) * 2 + 1)
    return router.eval()


@pytest.mark.parametrize("query_bias", [True, False])
def test_folding_leaves_outputs_as_they_are(query_bias):
    router = trained_router(query_bias=query_bias).double()
    x = torch.randn(30, 10).double()
    weights, indices = router(x)
    assert peer.fold_query_norm_(router) is router
    folded_weights, folded_indices = router(x)
    assert torch.equal(indices, folded_indices)
    torch.testing.assert_close(weights, folded_weights)


def test_a_folded_state_loads_into_a_router_without_norm():
    router = peer.fold_query_norm_(trained_router())
    other = make_router(query_norm=None, query_bias=True)
    other.load_state_dict(router.state_dict())
    x = torch.randn(30, 10)
    assert torch.equal(other(x)[0], router(x)[0])
    assert repr(other) == repr(router)


def test_a_folded_router_takes_a_mask_and_training_mode(padded):
    router = peer.fold_query_norm_(trained_router())
    expected = router(padded[0])[0]
    real = ~padded[1]
    assert torch.equal(router.train()(*padded)[0][real], expected[real])


def test_folding_changes_every_router_in_a_model():
    model = nn.Sequential(trained_router(), nn.Linear(2, 2), trained_router()).eval()
    peer.fold_query_norm_(model)
    assert isinstance(model[0].norm, nn.Identity)
    assert isinstance(model[2].norm, nn.Identity)


def test_folding_refuses_training_mode():
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        peer.fold_query_norm_(make_router())


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_folding_refuses_a_module_without_batch_norm(norm):
    with pytest.raises(ValueError, match="query_norm is 'batch', found none"):
        peer.fold_query_norm_(make_router(query_norm=norm).eval())


def test_folding_keeps_a_frozen_projection_frozen():
    router = trained_router().requires_grad_(False)
    peer.fold_query_norm_(router)
    assert not router.query.weight.requires_grad
    assert not router.query.bias.requires_grad
