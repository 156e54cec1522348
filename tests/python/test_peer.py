"""The layer, and the behaviour that users of `torch.nn` expect."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import io
import pickle
import pkgutil

import pytest
import torch
from torch import nn

import peer

NORMS = ["batch", "layer", "rms", None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def make_layer(**options):
    sizes = {"num_experts": (8, 6), "heads": 3, "num_experts_per_head": 4, "dim_key": 8}
    return peer.PEER(10, **{**sizes, **options})


def draw_padded(batch=4, length=7):
    mask = torch.arange(length) >= torch.randint(2, length + 1, (batch, 1))
    return torch.randn(batch, length, 10), mask


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_norm": "layer", "query_bias": True},
        {"query_norm": "rms", "scores": "sigmoid"},
        {"query_norm": None, "scores": "relu", "share_keys": False},
        {"key_norm": True},
        {"key_norm": True, "share_keys": False, "query_norm": "layer"},
        {"glu": True, "activation": "silu"},
        {"num_experts": (3, 16), "num_experts_per_head": 20},
        {"scores": "relu", "num_experts_per_head": 1, "activation": "relu2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
def test_equals_the_reference_with_gradients(options, training, masked):
    layer = make_layer(**options).double().train(training)
    x, mask = draw_padded()
    x, mask = x.double(), mask if masked else None
    results = []
    for apply in peer.reference.peer, lambda layer, x, mask: layer(x, mask):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        y = apply(layer, inputs[0], mask)
        cotangent = torch.linspace(-1, 1, y.numel()).double().view_as(y)
        results.append((y, *torch.autograd.grad((y * cotangent).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(leading):
    layer = make_layer().eval()
    x = torch.randn(*leading, 10)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 10), layer(x.reshape(-1, 10)))


def test_a_transposed_input_gives_the_same():
    layer, x = make_layer().eval(), torch.randn(3, 5, 10)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_16_bit_layers_train(norm, dtype):
    layer = make_layer(query_norm=norm, glu=True, dtype=dtype)
    x, mask = draw_padded()
    x = x.to(dtype).requires_grad_()
    y = layer(x, mask)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for tensor in [x, *layer.parameters()]:
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_gives_its_dtype_and_full_precision_gradients(norm):
    layer = make_layer(query_norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*draw_padded())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_tables_may_be_stored_in_fewer_bits_than_the_activations():
    layer = make_layer().eval()
    x = torch.randn(5, 10)
    expected = layer(x)
    layer.experts.bfloat16()
    y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


# --- initialisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_scale_of_outputs_does_not_depend_on_the_number_of_experts(scores):
    def measure(side):
        layer = peer.PEER(64, num_experts=side**2, heads=4, scores=scores, dim_key=64)
        return layer(torch.randn(512, 64)).std().item()

    scales = [measure(side) for side in (8, 32, 128)]
    assert max(scales) < 1.5 * min(scales)
    assert min(scales) > 0.03
    assert max(scales) < 1


def test_zero_init_out_adds_nothing_at_first():
    layer = make_layer(zero_init_out=True)
    assert torch.equal(layer(torch.randn(5, 10)), torch.zeros(5, 10))


@pytest.mark.parametrize("norm", NORMS)
def test_reset_parameters_alone_initialises_a_layer_from_the_meta_device(norm):
    options = {"query_norm": norm, "query_bias": True, "glu": True, "share_keys": False}
    layer = make_layer(**options, device="meta")
    assert all(tensor.device.type == "meta" for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(77)
    layer.reset_parameters()
    for name, tensor in layer.state_dict().items():
        assert not (tensor == 77).any(), name
    torch.manual_seed(1)
    layer.reset_parameters()
    reset = copy.deepcopy(layer.state_dict())
    torch.manual_seed(1)
    layer.reset_parameters()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, reset[name]), name
    layer(torch.randn(5, 10))


def test_a_layer_on_the_meta_device_has_output_shapes():
    layer = make_layer(device="meta")
    assert layer(torch.empty(2, 3, 10, device="meta")).shape == (2, 3, 10)


def test_the_layer_of_the_paper_is_the_default():
    layer = peer.PEER(64, device="meta")
    assert layer.num_experts == 1024**2
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "router.query.weight": (8 * 256, 64),
        "router.row_keys": (1024, 128),
        "router.col_keys": (1024, 128),
        "router.norm.weight": (2048,),
        "router.norm.bias": (2048,),
        "router.norm.running_mean": (2048,),
        "router.norm.running_var": (2048,),
        "router.norm.num_batches_tracked": (),
        "experts.weight": (1024**2, 2, 64),
    }
    assert layer.router.num_experts_per_head == 16
    assert layer.router.scores == "softmax"
    assert layer.experts.activation == "gelu"


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_leaves_out_whole_experts_and_scales_the_others():
    layer = make_layer(dropout=0.25, query_norm=None)
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    x = torch.randn(2000, 10)
    layer(x)
    weights, _ = layer.router(x)
    (dropped,) = seen
    is_dropped = dropped == 0
    assert abs(is_dropped.float().mean() - 0.25) < 0.01
    torch.testing.assert_close(dropped[~is_dropped], weights[~is_dropped] / 0.75)


def test_dropout_is_off_in_evaluation():
    layer = make_layer(dropout=0.9).eval()
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), peer.reference.peer(layer, x))


def test_the_reference_refuses_random_dropout():
    with pytest.raises(ValueError, match="without dropout"):
        peer.reference.peer(make_layer(dropout=0.1), torch.randn(5, 10))


# --- shared parts --------------------------------------------------------------------------------


def test_layers_can_share_a_pool():
    first = make_layer()
    second = make_layer(experts=first.experts)
    assert second.experts is first.experts
    assert not torch.equal(second.router.row_keys, first.router.row_keys)
    x = torch.randn(5, 10)
    gradients = []
    for layer in first, second:
        gradients.append(torch.autograd.grad(layer(x).square().sum(), first.experts.weight)[0])
    (first(x).square().sum() + second(x).square().sum()).backward()
    torch.testing.assert_close(first.experts.weight.grad, sum(gradients))
    both = nn.ModuleList([first, second])
    assert len(list(both.parameters())) == len(list(first.parameters())) + 5


def test_sharing_a_pool_does_not_initialise_it_again():
    first = make_layer()
    before = first.experts.weight.clone()
    make_layer(experts=first.experts)
    assert torch.equal(first.experts.weight, before)


def test_options_of_a_given_pool_may_be_left_out():
    pool = peer.ExpertPool(10, num_experts=49, glu=True, activation="relu")
    layer = peer.PEER(10, experts=pool, heads=2, dim_key=8)
    assert layer.num_experts == 49
    assert layer(torch.randn(5, 10)).shape == (5, 10)


def test_a_router_can_be_given():
    router = peer.ProductKeyRouter(10, num_experts=(3, 5), heads=2, num_experts_per_head=7)
    layer = peer.PEER(10, router=router)
    assert layer.router is router
    assert layer.experts.num_experts == 15
    assert layer.experts.num_experts_per_token == 14
    layer(torch.randn(5, 10))


def test_router_and_pool_can_both_be_given():
    other = make_layer()
    layer = peer.PEER(10, router=other.router, experts=other.experts, dropout=0.5).eval()
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), other.eval()(x))


CONTRADICTIONS = {
    "activation": ({"activation": "silu"}, "experts", "activation='silu'.*activation='gelu'"),
    "glu": ({"glu": True}, "experts", "glu=True.*glu=False"),
    "sparse_grad": ({"sparse_grad": True}, "experts", "sparse_grad=True.*sparse_grad=False"),
    "number of experts": ({"num_experts": (8, 8)}, "experts", "num_experts=64.*num_experts=48"),
    "grid": ({"num_experts": (6, 8)}, "router", "rows=6.*rows=8"),
    "heads": ({"heads": 2}, "router", "heads=2.*heads=3"),
    "dim_key": ({"dim_key": 16}, "router", "dim_key=16.*dim_key=8"),
    "scores": ({"scores": "relu"}, "router", "scores='relu'.*scores='softmax'"),
    "query_norm": ({"query_norm": None}, "router", "query_norm=None.*query_norm='batch'"),
    "share_keys": ({"share_keys": False}, "router", "share_keys=False.*share_keys=True"),
    "key_norm": ({"key_norm": True}, "router", "key_norm=True.*key_norm=False"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_option_that_contradicts_a_given_part_is_refused(case):
    options, part, message = CONTRADICTIONS[case]
    given = getattr(make_layer(), part)
    with pytest.raises(
        ValueError, match=f"{message}".replace(".*", f" contradicts the given {part}, which has ")
    ):
        make_layer(**{part: given, **options})


@pytest.mark.parametrize("part", ["router", "experts"])
def test_a_part_of_another_width_is_refused(part):
    given = getattr(make_layer(), part)
    with pytest.raises(ValueError, match=f"dim=11 contradicts the given {part}, which has dim=10"):
        peer.PEER(11, num_experts=(8, 6), **{part: given})


def test_a_router_and_a_pool_of_different_sizes_are_refused():
    big = peer.ProductKeyRouter(10, num_experts=1024**2, device="meta")
    with pytest.raises(ValueError, match="num_experts=1048576 contradicts the given experts"):
        peer.PEER(10, router=big, experts=make_layer().experts)


def test_a_pool_that_is_no_square_needs_its_grid():
    with pytest.raises(ValueError, match=r"got 48; .* or the grid \(6, 8\)"):
        peer.PEER(10, experts=make_layer().experts)


def test_a_device_without_a_new_part_to_put_there_is_refused():
    other = make_layer()
    with pytest.raises(ValueError, match="have no effect if router and experts are given"):
        peer.PEER(10, router=other.router, experts=other.experts, dtype=torch.float64)


# --- torch.nn manners ----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_dropout_must_be_a_probability(dropout):
    with pytest.raises(ValueError, match="dropout between 0 and 1"):
        make_layer(dropout=dropout)


def test_options_of_the_parts_are_checked():
    with pytest.raises(ValueError, match="even dim_key"):
        make_layer(dim_key=9)
    with pytest.raises(ValueError, match="one of 'gelu'"):
        make_layer(activation="tanh")


def test_factory_arguments_reach_every_tensor():
    layer = make_layer(glu=True, query_bias=True, device="meta", dtype=torch.float64)
    for name, tensor in layer.state_dict().items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float64), name


def test_a_state_loads_and_gives_the_same_outputs():
    layer, other = make_layer(glu=True), make_layer(glu=True)
    layer(torch.randn(50, 10) * 3)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(5, 10)
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_a_checkpoint_of_another_size_names_both_sizes():
    saved = make_layer(num_experts=(16, 16)).state_dict()
    with pytest.raises(RuntimeError) as caught:
        make_layer().load_state_dict(saved)
    message = str(caught.value)
    assert "router: the checkpoint's router has dim=10, num_experts=(16, 16)" in message
    assert "experts: the checkpoint's pool has num_experts=256" in message


@pytest.mark.parametrize("norm", NORMS)
def test_a_copy_and_a_pickle_are_independent_and_equal(norm):
    layer, x = make_layer(query_norm=norm).eval(), torch.randn(5, 10)
    expected = layer(x)
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.experts.weight)
        assert torch.equal(layer(x), expected)


def test_the_representation_shows_the_parts():
    text = repr(make_layer(dropout=0.1))
    assert text.startswith("PEER(\n  dropout=0.1\n  (router): ProductKeyRouter(\n")
    assert "(experts): ExpertPool(" in text


def test_num_experts_is_that_of_the_grid():
    assert make_layer().num_experts == 48


def test_a_scripted_layer_follows_train_and_eval():
    layer = make_layer()
    scripted = torch.jit.script(copy.deepcopy(layer))
    x = torch.randn(5, 10)
    assert torch.equal(scripted.eval()(x), layer.eval()(x))
    assert torch.equal(scripted.train()(x), layer.train()(x))


def test_a_scripted_layer_names_an_input_of_another_width():
    scripted = torch.jit.script(make_layer())
    with pytest.raises(torch.jit.Error, match=r"x of shape \[\.\.\., 10\], got \[2, 11\]"):
        scripted(torch.randn(2, 11))


@pytest.mark.parametrize("norm", NORMS)
def test_per_sample_gradients_equal_gradients_of_single_samples(norm):
    layer = make_layer(query_norm=norm, glu=True).eval()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(4, 5, 10)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for sample in range(4):
        layer.zero_grad()
        layer(x[sample]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][sample], parameter.grad)


def test_an_ensemble_of_layers_equals_its_members():
    layers = [make_layer(query_norm="layer") for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(5, 10)
    outputs = torch.vmap(
        lambda parameters: torch.func.functional_call(layers[0], parameters, (x,))
    )(stacked)
    torch.testing.assert_close(outputs, torch.stack([layer(x) for layer in layers]))


def test_a_layer_trains():
    layer, teacher = (
        make_layer(heads=4),
        nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 10)),
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 10)
    target = teacher(x).detach()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --- the package ---------------------------------------------------------------------------------

MODULES = [
    module.name
    for module in pkgutil.walk_packages(peer.__path__, "peer.")
    if module.name != "peer.collect_env"
]


@pytest.mark.parametrize("name", ["peer", *MODULES])
def test_examples_in_docstrings_run(name):
    if name == "peer.hf.quantizer":
        pytest.importorskip("transformers")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert results.failed == 0


PUBLIC = [
    peer.PEER,
    peer.ExpertPool,
    peer.ProductKeyRouter,
    peer.UsageTracker,
    peer.fold_key_norm_,
    peer.fold_query_norm_,
    peer.report,
    peer.show_config,
    *(getattr(peer.inspect, name) for name in peer.inspect.__all__),
    *(getattr(peer.viz, name) for name in peer.viz.__all__),
    *(
        getattr(peer.functional, name)
        for name in ("product_key_topk", "expert_mlp", "router_weights")
    ),
    *(getattr(peer.reference, name) for name in ("product_key_topk", "expert_mlp", "peer")),
    *(getattr(peer.modules, name) for name in peer.modules.__all__),
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_everything_public_has_an_example(thing):
    assert ">>>" in inspect.getdoc(thing)


def test_everything_in_all_exists():
    for name in peer.__all__:
        assert hasattr(peer, name)
