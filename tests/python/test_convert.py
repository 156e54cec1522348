"""Converted layers against PEER-pytorch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import peer
from peer.convert import from_peer_pytorch

published = pytest.importorskip("PEER_pytorch")

DIM = 6
GELU_BY_TANH = functools.partial(nn.GELU, approximate="tanh")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_source(**options):
    """A small layer of PEER-pytorch whose weights make every term count."""
    sizes = {
        "heads": 3,
        "num_experts": 49,
        "num_experts_per_head": 4,
        "non_competing_scores": False,
    }
    source = published.PEER(DIM, **{**sizes, **options}).double()
    nn.init.normal_(source.keys)
    if options.get("pre_rmsnorm"):
        nn.init.normal_(source.norm.gamma, std=0.3)
    return source


def layer_of(converted):
    return converted[1] if isinstance(converted, nn.Sequential) else converted


def gradients_in_their_layout(converted):
    """The gradients of a converted layer, under their names in PEER-pytorch."""
    layer = layer_of(converted)
    router, experts = layer.router, layer.experts
    query = router.query.weight.grad.view(router.heads, 2, -1, DIM).transpose(0, 1)
    down, up = experts.weight.grad.to_dense().unbind(1)
    gradients = {
        "weight_down_embed.weight": down,
        "weight_up_embed.weight": up,
        "to_queries.0.weight": query.reshape(-1, DIM),
        "keys": torch.stack([router.row_keys.grad, router.col_keys.grad], dim=2),
    }
    if layer is not converted:
        gradients["norm.gamma"] = converted[0].weight.grad
    return gradients


def assert_same_function(source, converted, tokens=(2, 9)):
    x = torch.randn(*tokens, DIM, dtype=torch.double)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    upstream = torch.randn(*tokens, DIM, dtype=torch.double)
    outputs = []
    for layer, leaf in zip((source, converted), leaves, strict=True):
        torch.manual_seed(1)  # for dropout
        outputs.append(layer(leaf))
        outputs[-1].backward(upstream)
    assert outputs[0].abs().max() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    ours = gradients_in_their_layout(converted)
    theirs = {name: parameter.grad for name, parameter in source.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


# --- equal to the source -------------------------------------------------------------------------


@pytest.mark.parametrize("pre_rmsnorm", [False, True], ids=["plain", "pre-norm"])
@pytest.mark.parametrize("non_competing_scores", [False, True], ids=["softmax", "top-1"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["whole", "dropout"])
@pytest.mark.parametrize(
    "activation",
    [nn.GELU, GELU_BY_TANH, nn.ReLU, nn.SiLU, nn.Identity],
    ids=["gelu", "gelu_tanh", "relu", "silu", "identity"],
)
def test_outputs_and_gradients_are_equal(activation, dropout, non_competing_scores, pre_rmsnorm):
    source = make_source(
        activation=activation,
        dropout=dropout,
        non_competing_scores=non_competing_scores,
        pre_rmsnorm=pre_rmsnorm,
    )
    converted = from_peer_pytorch(source)
    assert isinstance(converted, nn.Sequential) == pre_rmsnorm
    assert_same_function(source, converted)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 1},
        {"heads": 1, "separate_embed_per_head": True},
        {"dim_key": 5},
        {"product_key_topk": 7},
        {"num_experts": 9, "num_experts_per_head": 5, "product_key_topk": 3},
        {"num_experts_per_head": 7, "product_key_topk": 1, "non_competing_scores": True},
        {"num_experts": 1, "num_experts_per_head": 1, "non_competing_scores": True},
    ],
    ids=str,
)
def test_sizes_and_exact_retrievals_are_kept(options):
    source = make_source(**options)
    assert_same_function(source, from_peer_pytorch(source))


def test_experts_without_competition_that_are_more_than_one_keep_their_number():
    source = make_source(non_competing_scores=True)
    source.num_experts_per_head_topk = 4  # undoes a change of the option by PEER-pytorch
    converted = from_peer_pytorch(source)
    assert (converted.router.num_experts_per_head, converted.router.scores) == (4, "relu")
    assert_same_function(source, converted)


def test_the_default_is_named_as_what_it_is():
    source = published.PEER(DIM, num_experts=256)
    router = from_peer_pytorch(source).router
    assert (router.num_experts_per_head, router.scores, router.heads) == (1, "relu", 8)
    assert "one expert per head" in from_peer_pytorch.__doc__


def test_the_norm_before_the_layer_maps_zero_and_tiny_tokens_as_the_source_does():
    source = make_source(pre_rmsnorm=True)
    converted = from_peer_pytorch(source)
    x = torch.randn(4, 1, DIM, dtype=torch.double)
    x *= torch.tensor([0.0, 1e-9, 1e-3, 1e9], dtype=torch.double).view(4, 1, 1)
    torch.testing.assert_close(converted(x), source(x))
    single, x = converted.float(), x.float()
    torch.testing.assert_close(single(x), source.float()(x))


def test_chunks_are_unwrapped():
    source = make_source(pre_rmsnorm=True)
    chunked = published.ChunkedPEER(source, seq_chunk_size=4)
    converted = from_peer_pytorch(chunked)
    x = torch.randn(2, 9, DIM, dtype=torch.double)
    torch.testing.assert_close(converted(x), chunked(x))
    assert_same_function(source, converted)
    state = chunked.state_dict()
    options = {"num_experts_per_head": 4, "non_competing_scores": False}
    torch.testing.assert_close(from_peer_pytorch(state, prefix="peer.", **options)(x), chunked(x))


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts_per_head": 4, "non_competing_scores": False},
        {"num_experts_per_head": 3, "non_competing_scores": False, "activation": "silu"},
        {"num_experts_per_head": 3, "product_key_topk": 6, "dropout": 0.3},
        {"num_experts_per_head": 5, "non_competing_scores": True, "activation": "gelu_tanh"},
    ],
    ids=str,
)
def test_a_state_with_its_options_is_as_good_as_the_module(options):
    kinds = {"silu": nn.SiLU, "gelu_tanh": GELU_BY_TANH}
    theirs = {**options, "activation": kinds.get(options.get("activation"), nn.GELU)}
    source = make_source(**{"non_competing_scores": True, **theirs, "pre_rmsnorm": True})
    assert_same_function(source, from_peer_pytorch(source.state_dict(), **options))


def test_a_layer_inside_of_a_models_state_is_found_by_its_prefix():
    source = make_source()
    model = nn.ModuleDict({"embed": nn.Embedding(3, DIM), "mlp": source})
    options = {"num_experts_per_head": 4, "non_competing_scores": False}
    with pytest.raises(ValueError, match=r"such a layer is under prefix='mlp\.'"):
        from_peer_pytorch(model.state_dict(), **options)
    converted = from_peer_pytorch(model.state_dict(), prefix="mlp.", **options)
    assert_same_function(source, converted)


def test_sparse_gradients_are_a_choice():
    source = make_source()
    converted = from_peer_pytorch(source, sparse_grad=True)
    assert_same_function(source, converted)
    assert converted.experts.weight.grad.is_sparse


# --- what the result is made of ------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_nothing_is_shared_with_the_source(heads):
    source = make_source(heads=heads, pre_rmsnorm=True)
    converted = from_peer_pytorch(source)
    theirs = {each.untyped_storage().data_ptr() for each in source.parameters()}
    ours = [each.untyped_storage() for each in converted.parameters()]
    assert theirs.isdisjoint(each.data_ptr() for each in ours)
    assert len({each.data_ptr() for each in ours}) == len(ours)
    for storage, parameter in zip(ours, converted.parameters(), strict=True):
        assert parameter.is_contiguous()
        assert storage.nbytes() == parameter.numel() * parameter.element_size()
    before = [each.detach().clone() for each in converted.parameters()]
    with torch.no_grad():
        for each in source.parameters():
            each.zero_()
    for each, old in zip(converted.parameters(), before, strict=True):
        assert torch.equal(each, old)


def test_dtypes_devices_modes_and_frozen_parameters_are_kept(dtype):
    source = make_source(pre_rmsnorm=True).to(dtype).eval()
    source.weight_down_embed.requires_grad_(False)
    source.weight_up_embed.requires_grad_(False)
    source.keys.requires_grad_(False)
    converted = from_peer_pytorch(source)
    assert not any(each.training for each in converted.modules())
    assert {each.dtype for each in converted.parameters()} == {dtype}
    frozen = [name for name, each in converted.named_parameters() if not each.requires_grad]
    assert frozen == ["1.router.row_keys", "1.router.col_keys", "1.experts.weight"]
    on_meta = from_peer_pytorch(make_source().to("meta"))
    assert {each.device.type for each in on_meta.parameters()} == {"meta"}
    source.weight_down_embed.to(torch.float64)  # different dtypes are preserved
    assert from_peer_pytorch(source)[1].experts.weight.dtype == torch.float64
    assert from_peer_pytorch(source)[1].router.row_keys.dtype == dtype


@pytest.mark.parametrize("name", ["weight_down_embed", "weight_up_embed"])
def test_a_part_that_is_trained_or_more_exact_makes_the_table_so(name):
    source = make_source().to(torch.bfloat16).requires_grad_(False)
    getattr(source, name).to(torch.float32).requires_grad_(True)
    table = from_peer_pytorch(source).experts.weight
    assert table.requires_grad
    assert table.dtype == torch.float32
    assert torch.equal(table[:, 0], source.weight_down_embed.weight.float())
    assert torch.equal(table[:, 1], source.weight_up_embed.weight.float())


def test_the_random_state_is_left_alone():
    source = make_source()
    before = torch.get_rng_state()
    from_peer_pytorch(source)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_outputs_are_near_where_scores_do_not_tie():
    source = make_source(non_competing_scores=True, product_key_topk=7)
    x = torch.randn(2, 9, DIM, dtype=torch.double)
    expected = source(x)
    converted = from_peer_pytorch(source.bfloat16())
    torch.testing.assert_close(converted(x.bfloat16()).double(), expected, rtol=0.1, atol=0.5)


def test_the_result_saves_and_loads_as_a_layer_with_its_options(tmp_path):
    converted = from_peer_pytorch(make_source())
    torch.save(converted.state_dict(), tmp_path / "layer.pt")
    layer = peer.PEER(
        DIM,
        num_experts=49,
        heads=3,
        num_experts_per_head=4,
        dim_key=6,
        query_norm=None,
        share_keys=False,
        key_norm=False,
        dtype=torch.double,
    )
    layer.load_state_dict(torch.load(tmp_path / "layer.pt"))
    x = torch.randn(5, DIM, dtype=torch.double)
    assert torch.equal(layer(x), converted(x))


# --- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "too few candidates": ({"product_key_topk": 3}, r"product_key_topk=3 .* miss some of the 4"),
    "tables per head": ({"separate_embed_per_head": True}, r"tables for each of its 3 heads"),
    "softmax over one expert": ({"num_experts_per_head": 1}, r"softmax over one expert per head"),
    "more candidates than keys": (
        {"product_key_topk": 8},
        r"product_key_topk of at most 7, .* got 8",
    ),
    "unknown activation": ({"activation": nn.Tanh}, r"activation to be .* got Tanh\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_layer_of_peer_computes_is_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match="^from_peer_pytorch: .*" + message):
        from_peer_pytorch(make_source(**options))


def test_the_retrieval_that_is_refused_does_miss_experts():
    # With 3 candidates of each half, the fourth best pair can be missing.
    source = make_source(product_key_topk=3)
    x = torch.randn(4, 50, DIM, dtype=torch.double)
    inexact = source(x)
    source.product_key_topk = 4
    exact = from_peer_pytorch(source)(x)
    torch.testing.assert_close(exact, source(x))
    assert not torch.allclose(exact, inexact)


class Subclass(published.PEER):
    def forward(self, x):
        return 2 * super().forward(x)


OTHERS = {
    "PEERLora": lambda: published.PEERLora(DIM, num_experts=49),
    "ChunkedPEER of PEERLora": lambda: published.ChunkedPEER(
        published.PEERLora(DIM, num_experts=49)
    ),
    "PK": lambda: published.PK(DIM, num_keys=7, final_topk=4),
    "a subclass": lambda: Subclass(DIM, num_experts=49, num_experts_per_head=4),
    "a linear layer": lambda: nn.Linear(DIM, DIM),
    "a layer of peer": lambda: peer.PEER(DIM, num_experts=49, dim_key=4),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_modules_are_refused_by_name(case):
    module = OTHERS[case]()
    with pytest.raises(TypeError, match=r"got .*, which computes something else"):
        from_peer_pytorch(module)
    with pytest.raises(ValueError, match="expected the state of a PEER_pytorch"):
        from_peer_pytorch({**module.state_dict(), "theirs": torch.ones(1)})


def test_a_patched_module_is_refused():
    source = make_source()
    source.forward = lambda x: x
    with pytest.raises(TypeError, match="computes something else"):
        from_peer_pytorch(source)
    source = make_source()
    source.score_activation = nn.Tanh()
    with pytest.raises(ValueError, match=r"scores under ReLU or Softmax, got Tanh\(\)"):
        from_peer_pytorch(source)
    source = make_source()
    source.norm = nn.LayerNorm(DIM)
    with pytest.raises(ValueError, match=r"unexpected: 'norm\.weight', 'norm\.bias'"):
        from_peer_pytorch(source)


def test_options_beside_a_module_are_refused():
    with pytest.raises(
        TypeError, match=r"expected no options for a module, .* got activation, prefix"
    ):
        from_peer_pytorch(make_source(), activation="gelu", prefix="peer.")


BAD_STATES = {
    "no keys": ({"keys": None}, ValueError, "missing: keys$"),
    "one dimension of keys less": (
        {"keys": torch.ones(3, 7, 2)},
        ValueError,
        r"keys of shape .*2\]",
    ),
    "three halves": ({"keys": torch.ones(3, 7, 3, 3)}, ValueError, r"keys of shape .*7, 3, 3\]"),
    "no heads": ({"keys": torch.ones(0, 7, 2, 3)}, ValueError, r"keys of shape .*\[0, 7, 2, 3\]"),
    "other keys": (
        {"keys": torch.ones(3, 6, 2, 3)},
        ValueError,
        r"shape \[36, 6\] .*got \[49, 6\]",
    ),
    "a shorter table": (
        {"weight_up_embed.weight": torch.ones(48, 6)},
        ValueError,
        r"weight_up_embed\.weight of shape \[49, 6\] .* got \[48, 6\]",
    ),
    "a flat table": (
        {"weight_down_embed.weight": torch.ones(49)},
        ValueError,
        r"weight_down_embed\.weight of shape \[experts, dim\], got \[49\]",
    ),
    "fewer queries": (
        {"to_queries.0.weight": torch.ones(12, 6)},
        ValueError,
        r"to_queries\.0\.weight of shape \[18, 6\] .* got \[12, 6\]",
    ),
    "a wider norm": ({"norm.gamma": torch.ones(7)}, ValueError, r"norm\.gamma of shape \[6\]"),
    "integers": (
        {"weight_up_embed.weight": torch.ones(49, 6, dtype=torch.int8)},
        TypeError,
        "weight_up_embed.weight to be a dense floating-point tensor, got torch.int8",
    ),
    "a sparse table": (
        {"weight_up_embed.weight": torch.ones(49, 6).to_sparse()},
        TypeError,
        "dense floating-point tensor, got torch.float32, torch.sparse_coo",
    ),
    "a list": ({"keys": [1.0, 2.0]}, TypeError, "keys to be a tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_gets_a_sentence(case):
    changes, kind, message = BAD_STATES[case]
    state = {**make_source().state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(kind, match="^from_peer_pytorch: expected .*" + message):
        from_peer_pytorch(state, num_experts_per_head=4, non_competing_scores=False)


def test_an_unknown_activation_beside_a_state_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"activation to be one of 'gelu', .* got 'tanh'"):
        from_peer_pytorch(make_source().state_dict(), num_experts_per_head=4, activation="tanh")
