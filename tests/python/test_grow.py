"""Growth of layers: more rows of keys, and with each of them C experts."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from layers import DIM, OPTIONS, differing, draw, make_layer, step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import peer

ROWS, COLUMNS = 6, 5
OLD = ROWS * COLUMNS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def zero_keys(layer, rows):
    """Keys that lose to all old keys with a positive score."""
    return torch.zeros(rows, layer.router.dim_key // 2)


def old_tokens(layer, x):
    """A mask (...) of the tokens that retrieve old experts only."""
    return (layer.router(x)[1] < OLD).flatten(-2).all(-1)


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_that_retrieve_old_experts_only_keep_their_outputs_bit_for_bit(name):
    layer = make_layer(name).eval()
    x, _ = draw(layer, 50, masked=False)
    before = layer(x).detach()
    layer.grow(3, zero_keys(layer, 3))
    is_old = old_tokens(layer, x)
    assert is_old.float().mean() > 0.2
    assert torch.equal(layer(x)[is_old], before[is_old])


@pytest.mark.parametrize("name", OPTIONS)
def test_old_parameters_are_equal_bit_for_bit(name):
    layer = make_layer(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.grow(3)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    after["router.row_keys"] = after["router.row_keys"][..., :ROWS, :]
    after["experts.weight"] = after["experts.weight"][:OLD]
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_sizes_follow():
    layer = make_layer()
    layer.grow(3)
    assert (layer.router.rows, layer.router.columns) == (9, 5)
    assert layer.num_experts == layer.router.num_experts == layer.experts.num_experts == 45
    assert layer.router.row_keys.shape == (9, 4)
    assert layer.experts.weight.shape == (45, 2, DIM)
    assert "num_experts=(9, 5)" in repr(layer)
    assert "num_experts=45" in repr(layer)


@pytest.mark.parametrize("name", ["paper", "gated", "bfloat16"])
def test_new_experts_have_zero_output_and_the_input_weights_of_a_new_layer(name):
    layer = make_layer(name, num_experts=(64, 50))
    layer.grow(60)
    new = layer.experts.weight[64 * 50 :].detach().float()
    assert torch.equal(new[:, -1], torch.zeros_like(new[:, -1]))
    for part in new[:, :-1].unbind(1):
        assert part.std().item() == pytest.approx(DIM**-0.5, rel=0.05)
        assert len(part.unique(dim=0)) == len(part)


def test_parameters_keep_their_identity_and_get_a_new_version():
    layer = make_layer()
    weight, row_keys = layer.experts.weight, layer.router.row_keys
    versions = weight._version, row_keys._version
    layer.grow(2)
    assert layer.experts.weight is weight
    assert layer.router.row_keys is row_keys
    assert weight._version > versions[0]
    assert row_keys._version > versions[1]
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("name", ["paper", "keys_per_head", "bfloat16"])
def test_drawn_keys_are_found_and_do_not_win_everything(name):
    layer = make_layer(name, num_experts=(64, 20), dim_key=16).eval()
    x, _ = draw(layer, 2000, masked=False)
    layer.grow(16)
    retrievals = peer.count_usage(layer, [x])["experts"].view(-1, 20).sum(1)
    is_found = (retrievals > 0).float()
    assert is_found[64:].mean() > 0.9 * is_found[:64].mean()
    share = retrievals[64:].sum() / retrievals.sum()
    assert 0.1 < share < 0.3  # of 16 in 80 rows, a fair share is 0.2


@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize("rows", [2, 15])
def test_drawn_keys_have_the_lengths_of_old_keys_and_are_all_different(share_keys, rows):
    router = make_layer(share_keys=share_keys).router
    old = router.row_keys.detach().norm(dim=-1)
    keys = router.make_row_keys(rows)
    distances = keys.norm(dim=-1)[..., :, None] - old[..., None, :]
    assert distances.abs().amin(-1).max() < 1e-6
    assert len(keys.reshape(-1, 4).unique(dim=0)) == keys.numel() // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize("key_norm", [True, False])
def test_keys_of_equal_length_stay_so_in_growth(key_norm, share_keys, dtype):
    options = {"num_experts": (6, 5), "num_experts_per_head": 4, "dim_key": 8}
    options |= {"share_keys": share_keys, "key_norm": key_norm}
    layer = peer.PEER(DIM, **options, heads=3, dtype=dtype)
    if key_norm:
        with torch.no_grad():
            layer.router.row_keys *= 3
    layer.grow(7)
    x = torch.randn(20, DIM, dtype=dtype)
    layer.grow(5, peer.keys_from(layer, [x], 5))
    layer.grow(2)
    keys = torch.cat([layer.router.effective_keys()[0], layer.router.row_keys[..., 6:, :]], -2)
    lengths = keys.double().norm(dim=-1)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3**-0.5), rtol=tolerance, atol=0)


def test_given_keys_are_appended():
    keys = torch.randn(2, 4, dtype=torch.float64)
    layer = make_layer()
    layer.grow(2, keys)
    assert torch.equal(layer.router.row_keys[ROWS:], keys.float())
    layer = make_layer("keys_per_head")
    layer.grow(2, keys)
    assert torch.equal(layer.router.row_keys[:, ROWS:], keys.float().expand(3, 2, 4))
    per_head = torch.randn(3, 1, 4)
    layer.grow(1, per_head)
    assert torch.equal(layer.router.row_keys[:, -1:], per_head)


def test_a_grown_layer_trains_like_one_of_its_size():
    layer, twin = make_layer(), make_layer(num_experts=(ROWS + 3, COLUMNS))
    layer.grow(3)
    twin.load_state_dict(layer.state_dict())
    x, mask = draw(layer, 20)
    assert differing(step(layer, x, mask), step(twin, x, mask)) == []


@pytest.mark.parametrize("sparse_grad", [True, False])
def test_new_experts_learn(sparse_grad):
    layer = make_layer(sparse_grad=sparse_grad)
    dense, tables = peer.param_groups(layer, lr=1e-2, expert_lr=1e-1)
    optimizers = [torch.optim.AdamW([dense]), peer.optim.RowwiseAdagrad([tables])]
    x, _ = draw(layer, 30)

    def train():
        layer(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    train()
    layer.grow(3)
    for optimizer in optimizers:
        peer.optim.grow_(optimizer)
    train()
    used = layer.router(x)[1].unique()
    assert (used >= OLD).any()
    new = layer.experts.w_up[used[used >= OLD]]
    assert (new != 0).any(-1).all()


def test_a_layer_grows_again_and_again():
    layer = make_layer()
    states = []
    for _ in range(3):
        states.append(layer.experts.weight.detach().clone())
        layer.grow(1)
    assert layer.num_experts == 45
    for state in states:
        assert torch.equal(layer.experts.weight[: len(state)], state)


def test_a_layer_grows_in_inference_mode_and_trains_afterwards():
    layer = make_layer()
    with torch.inference_mode():
        layer.grow(2)
    layer(draw(layer, 5)[0]).sum().backward()
    assert len(layer.experts.weight.grad) == OLD + 10


def test_a_layer_on_the_meta_device_grows():
    layer = make_layer().to("meta")
    layer.grow(2)
    assert layer.experts.weight.shape == (40, 2, DIM)


# Refusals


@pytest.mark.parametrize(
    ("rows", "keys", "error", "message"),
    [
        (0, None, ValueError, "expected rows to be positive, got 0"),
        (2, torch.zeros(3, 4), ValueError, r"expected keys of shape \[2, 4\], got \[3, 4\]"),
        (2, torch.zeros(3, 2, 4), ValueError, r"expected keys of shape \[2, 4\], got \[3, 2, 4\]"),
        (2, torch.zeros(2, 4, dtype=torch.int64), TypeError, "floating-point tensor, got torch.i"),
        (2, [[0.0] * 4] * 2, TypeError, "floating-point tensor, got list"),
    ],
)
def test_bad_arguments_are_refused(rows, keys, error, message):
    layer = make_layer()
    with pytest.raises(error, match=message):
        layer.grow(rows, keys)
    assert layer.num_experts == OLD


def keep_loss(layer):
    return layer(draw(layer, 5)[0]).sum()


def keep_backward_loss(layer):
    loss = keep_loss(layer)
    loss.backward()
    layer.zero_grad()
    return loss


def keep_gradient_of_table(layer):
    layer.experts.weight.grad = torch.zeros_like(layer.experts.weight)


def keep_gradient_of_keys(layer):
    layer.router.row_keys.grad = torch.zeros_like(layer.router.row_keys)


def share_memory(layer):
    layer.experts.share_memory()


def keep_frozen_graph(layer):
    loss = keep_loss(layer)
    layer.requires_grad_(False)
    return loss


def parametrise(layer):
    nn.utils.parametrize.register_parametrization(layer.experts, "weight", nn.Tanh())


OBSTACLES = {
    keep_loss: "graph of autograd.*delete old losses.*after growing",
    keep_backward_loss: "graph of autograd.*delete old losses",
    keep_frozen_graph: "graph of autograd.*delete old losses",
    keep_gradient_of_table: "weight.*gradient has the old shape.*zero_grad",
    keep_gradient_of_keys: "row_keys.*gradient has the old shape.*zero_grad",
    share_memory: "shared memory",
    parametrise: "expected a torch.nn.Parameter",
}


@pytest.mark.parametrize("obstruct", OBSTACLES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("whole_model", [False, True])
def test_a_refusal_changes_nothing(obstruct, whole_model):
    layers = nn.ModuleList([make_layer(), make_layer()])
    kept = obstruct(layers[1])
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    with pytest.raises(RuntimeError, match=OBSTACLES[obstruct]):
        peer.grow_(layers, 2) if whole_model else layers[1].grow(2)
    after = layers.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [layer.router.rows for layer in layers] == [ROWS, ROWS]
    assert [layer.experts.num_experts for layer in layers] == [OLD, OLD]
    del kept


def test_a_layer_grows_after_its_losses_are_deleted():
    layer = make_layer()
    loss = keep_backward_loss(layer)
    del loss
    layer.grow(2)
    cycle = [keep_backward_loss(layer)]
    cycle.append(cycle)
    del cycle
    layer.grow(2)
    assert layer.num_experts == 50


def test_a_graph_that_saved_a_frozen_parameter_notices_growth():
    layer = make_layer().requires_grad_(False)
    x = draw(layer, 5)[0].requires_grad_()
    loss = layer(x).sum()
    layer.grow(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_layers_in_data_parallelism_and_sharded_ones_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = make_layer()
        parallel = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(RuntimeError, match="DistributedDataParallel after growing"):
            layer.grow(2)
        del parallel
        layer.grow(2)
        parallel = nn.parallel.DistributedDataParallel(layer)
        parallel(draw(layer, 5)[0]).sum().backward()
        assert len(layer.experts.weight.grad) == OLD + 10
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        layer = make_layer()
        sharded = distribute_tensor(layer.experts.weight, init_device_mesh("cpu", (1,)))
        layer.experts.weight = nn.Parameter(sharded)
        with pytest.raises(RuntimeError, match=r"weight of a pool: expected .* sharded"):
            layer.grow(2)
        assert layer.router.rows == ROWS
    finally:
        dist.destroy_process_group()


# What else holds the parameters


@pytest.mark.parametrize("name", ["paper", "sparse"])
def test_hooks_go_on_being_called(name):
    layer = make_layer(name)
    seen = []
    layer.experts.weight.register_hook(lambda grad: seen.append(grad.shape[0]))
    layer.experts.weight.register_post_accumulate_grad_hook(lambda p: seen.append(len(p.grad)))
    layer(draw(layer, 5)[0]).sum().backward()
    layer.zero_grad()
    layer.grow(2)
    layer(draw(layer, 5)[0]).sum().backward()
    assert seen == [OLD, OLD, OLD + 10, OLD + 10]


def test_a_compiled_layer_sees_the_growth():
    torch._dynamo.reset()
    layer = make_layer()
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    x, mask = draw(layer, 20)
    step(layer, x, mask, compiled)
    layer.zero_grad()
    layer.grow(3)
    twin = copy.deepcopy(layer)
    assert differing(step(layer, x, mask, compiled), step(twin, x, mask)) == []


@pytest.mark.parametrize(
    "capture",
    [
        lambda layer, x: torch.jit.script(layer),
        lambda layer, x: torch.jit.trace(layer, (x,)),
        lambda layer, x: torch.export.export(layer, (x,)).module(),
    ],
    ids=["script", "trace", "export"],
)
def test_programs_of_the_process_see_the_growth(capture):
    layer = make_layer().eval()
    x, _ = draw(layer, 20)
    program = capture(layer, x)
    with torch.no_grad():
        program(x)
        layer.grow(3)
        assert (layer.router(x)[1] >= OLD).any()
        assert torch.equal(program(x), layer(x))
        assert torch.equal(capture(layer, x)(x), layer(x))


@pytest.mark.parametrize("pickled", [True, False])
def test_copies_of_a_grown_layer_are_independent_and_grow(pickled):
    layer = make_layer().eval()
    layer.grow(2)
    other = pickle.loads(pickle.dumps(layer)) if pickled else copy.deepcopy(layer)
    x, _ = draw(layer, 5)
    assert torch.equal(other(x), layer(x))
    other.grow(1)
    assert (layer.num_experts, other.num_experts) == (40, 45)


def test_a_file_with_grown_parameters_loads_without_trust():
    layer = make_layer()
    layer.grow(2)
    layer.grow(1)
    file = io.BytesIO()
    torch.save(layer.state_dict(keep_vars=True), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert torch.equal(state["experts.weight"], layer.experts.weight)


def test_growth_keeps_no_parameter_alive():
    layer = make_layer()
    layer.grow(2)
    observer = weakref.ref(layer.experts.weight)
    del layer
    assert observer() is None


def test_masks_grow_with_experts_and_keys():
    layer = make_layer()
    layer.experts.frozen = torch.rand(OLD) < 0.5
    layer.experts.disabled = torch.rand(OLD) < 0.5
    layer.router.frozen_rows = torch.rand(ROWS) < 0.5
    layer.router.frozen_columns = torch.rand(COLUMNS) < 0.5
    layer.router.kept_row_keys = torch.randn(ROWS, 4)
    layer.router.kept_col_keys = torch.randn(COLUMNS, 4)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    keys = torch.randn(2, 4)
    layer.grow(2, keys)
    after = dict(layer.named_buffers())
    for name, new in {
        "experts.frozen": torch.zeros(10, dtype=torch.bool),
        "experts.disabled": torch.zeros(10, dtype=torch.bool),
        "router.frozen_rows": torch.zeros(2, dtype=torch.bool),
        "router.kept_row_keys": keys,
    }.items():
        assert torch.equal(after[name], torch.cat([before[name], new]))
    for name in ("router.frozen_columns", "router.kept_col_keys"):
        assert torch.equal(after[name], before[name])


# Shared pools


def make_pair(rows=(6, 2)):
    """Two layers on the pool of the first, of which the second uses a prefix."""
    first = make_layer(num_experts=(rows[0], COLUMNS))
    second = make_layer(num_experts=(rows[1], COLUMNS), experts=first.experts)
    return nn.ModuleList([first, second])


def test_a_layer_may_use_a_prefix_of_its_pool():
    _, second = make_pair()
    assert second.num_experts == 10
    alone = make_layer(num_experts=(2, COLUMNS)).eval()
    state = second.state_dict()
    state["experts.weight"] = state["experts.weight"][:10]
    alone.load_state_dict(state)
    x, _ = draw(second, 5)
    assert torch.equal(second.eval()(x), alone(x))


def test_the_pool_grows_only_where_a_layer_needs_it():
    first, second = make_pair()
    pool = first.experts.weight.detach().clone()
    second.grow(4)
    assert torch.equal(first.experts.weight, pool)
    second.grow(1)
    assert first.experts.num_experts == 35
    assert first.num_experts == OLD
    assert second.num_experts == 35
    assert torch.equal(first.experts.weight[:OLD], pool)
    assert second.experts.weight is first.experts.weight


def test_all_layers_of_a_model_grow():
    model = make_pair((6, 5))
    model.append(make_layer(num_experts=(3, 4)))
    model.append(make_layer(router=model[2].router, num_experts=(3, 4)))
    assert peer.grow_(model, 2) is model
    assert [layer.router.rows for layer in model] == [8, 7, 5, 5]
    assert [layer.experts.num_experts for layer in model] == [40, 40, 20, 20]
    with pytest.raises(ValueError, match="expected a model with a PEER layer, got Linear"):
        peer.grow_(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="expected rows to be positive, got -1"):
        peer.grow_(model, -1)


# States


def freeze_some(layer):
    layer.experts.frozen = torch.rand(layer.experts.num_experts) < 0.5
    layer.router.frozen_rows = torch.rand(layer.router.rows) < 0.5
    layer.router.frozen_columns = torch.rand(layer.router.columns) < 0.5
    layer.router.kept_row_keys = layer.router.row_keys.detach().clone()
    layer.router.kept_col_keys = layer.router.col_keys.detach().clone()
    layer.router.frozen = torch.tensor(True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_of_a_grown_and_frozen_layer_loads_after_grow_to(name):
    layer, other = make_layer(name), make_layer(name)
    layer.grow(2)
    freeze_some(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    weight = other.experts.weight
    assert peer.grow_to_(other, state) is other
    other.load_state_dict(state)
    assert other.experts.weight is weight
    ours, theirs = layer.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (other.router.rows, other.num_experts) == (8, 40)


def test_grow_to_copies_new_rows_and_masks_only():
    layer, other = make_layer(), make_layer()
    freeze_some(layer)
    with torch.no_grad():
        other.experts.weight.add_(1)
        other.router.row_keys.add_(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    layer.grow(2)
    peer.grow_to_(other, layer.state_dict())
    assert torch.equal(other.experts.weight[:OLD], before["experts.weight"])
    assert torch.equal(other.router.row_keys[:ROWS], before["router.row_keys"])
    assert torch.equal(other.experts.weight[OLD:], layer.experts.weight[OLD:])
    assert torch.equal(other.router.row_keys[ROWS:], layer.router.row_keys[ROWS:])
    assert torch.equal(other.experts.frozen, layer.experts.frozen)


def test_masks_that_a_state_does_not_have_are_removed():
    layer = make_layer()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    freeze_some(layer)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)
    peer.grow_to_(layer, state).load_state_dict(state)
    assert layer.state_dict().keys() == state.keys()


def test_shared_pools_grow_to_a_state():
    model, other = make_pair(), make_pair()
    peer.grow_(model, 3)
    peer.grow_to_(other, model.state_dict()).load_state_dict(model.state_dict())
    assert other[1].experts is other[0].experts
    assert [layer.router.rows for layer in other] == [9, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": (5, 5)}, r"router.row_keys .* \[6, 4\], .* \[5, 4\]; .*dimension 0"),
        ({"num_experts": (6, 6)}, r"router.col_keys .* \[5, 4\], and in the state \[6, 4\]"),
        ({"num_experts": (8, 6)}, r"router.col_keys"),
        ({"num_experts": (8, 5), "dim_key": 16}, r"router.row_keys .* \[6, 4\], .* \[8, 8\]"),
        (
            {"num_experts": (8, 5), "glu": True},
            r"experts.weight .* \[30, 2, 10\], .* \[40, 3, 10\]",
        ),
        ({"num_experts": (8, 5), "share_keys": False}, r"router.row_keys"),
    ],
)
def test_a_state_that_growth_does_not_reach_is_refused(options, message):
    layer, state = make_layer(), make_layer(**options).state_dict()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=f"growth does not lead to the state: {message}"):
        peer.grow_to_(layer, state)
    after = layer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_state_of_another_model_is_refused():
    layer = make_layer()
    state = {f"module.{name}": value for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"the state has no tensor router\.row_keys"):
        peer.grow_to_(layer, state)


def test_a_mask_of_another_size_is_refused():
    layer = make_layer()
    state = {**layer.state_dict(), "experts.frozen": torch.zeros(7, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"experts.frozen of shape \[30\] in the state, got \[7\]"):
        peer.grow_to_(layer, state)
    with pytest.raises(ValueError, match="expected a model with a router or a pool"):
        peer.grow_to_(nn.Linear(2, 2), {})


def test_the_error_of_a_strict_load_names_grow_to():
    layer, other = make_layer(), make_layer()
    layer.grow(2)
    with pytest.raises(RuntimeError) as error:
        other.load_state_dict(layer.state_dict())
    assert str(error.value).count("call peer.grow_to_(model, state_dict) before loading") == 2


def test_an_average_follows_the_growth_of_its_model():
    model = make_layer()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.grow(2)
    freeze_some(model)
    with pytest.raises((RuntimeError, ValueError)):
        averaged.update_parameters(model)
    old = averaged.module.experts.weight.detach().clone()
    peer.grow_to_(averaged.module, model.state_dict())
    averaged.update_parameters(model)
    ours, mean = model.experts.weight, averaged.module.experts.weight
    torch.testing.assert_close(mean[:OLD], 0.9 * old + 0.1 * ours[:OLD])
    torch.testing.assert_close(mean[OLD:], ours[OLD:])
    assert torch.equal(averaged.module.experts.frozen, model.experts.frozen)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["paper", "gated", "keys_per_head", "bfloat16_tables", "key_norm"])
def test_after_freezing_and_growing_only_what_is_new_learns(name, fused):
    layer = make_layer(name, sparse_grad=True)
    x, mask = draw(layer, 30)
    layer(x, mask)
    keys, weight = layer.router.effective_keys()[0].detach(), layer.experts.weight.detach().clone()
    network = {key: value.clone() for key, value in layer.router.query.state_dict().items()}
    layer.freeze_experts()
    layer.grow(2)
    drawn = layer.router.effective_keys()[0].detach()[..., ROWS:, :]
    optimizers = [
        torch.optim.AdamW(layer.router.parameters(), lr=0.1, weight_decay=0.1),
        peer.optim.RowwiseAdam(layer.experts.parameters(), lr=0.1, weight_decay=0.1),
    ]
    if fused:
        optimizers[1].fuse_into_backward(layer)
    for step_count in range(4):
        if step_count == 2:
            layer.grow(1)
            for optimizer in optimizers:
                peer.optim.grow_(optimizer)
        (layer(x, mask) - 1).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    effective = layer.router.effective_keys()[0].detach()
    assert torch.equal(effective[..., :ROWS, :], keys)
    assert torch.equal(layer.experts.weight[:OLD], weight)
    assert all(torch.equal(layer.router.query.state_dict()[key], network[key]) for key in network)
    assert (effective[..., ROWS : ROWS + 2, :] != drawn).any()
    assert layer.experts.w_up[OLD : OLD + 10].any()
    assert layer.experts.w_up[OLD + 10 :].any()


# Keys from data


@pytest.mark.parametrize(
    "name", ["paper", "layer", "unnormalised", "keys_per_head", "bfloat16", "key_norm"]
)
def test_keys_from_data_are_queries_of_its_tokens_at_the_length_of_old_keys(name):
    layer = make_layer(name)
    batches = [draw(layer, length, masked=False)[0] for length in (7, 12)]
    keys = peer.keys_from(layer, batches, 9)
    assert keys.dtype == layer.router.row_keys.dtype
    assert keys.shape == (*layer.router.row_keys.shape[:-2], 9, 4)
    layer.eval()
    tokens = torch.cat([batch.flatten(0, 1) for batch in batches])
    query = layer.router.norm(layer.router.query(tokens)).view(-1, 3, 8)[..., :4]
    halves = query.reshape(1, -1, 4) if layer.router.share_keys else query.transpose(0, 1)
    halves = nn.functional.normalize(halves.float(), dim=-1)
    grouped = keys.float().reshape(-1, 9, 4)
    length = layer.router.effective_keys()[0].float().norm(dim=-1).mean(-1).reshape(-1, 1, 1)
    tolerance = {"atol": 0.02, "rtol": 0.02} if name == "bfloat16" else {}
    torch.testing.assert_close(
        grouped.norm(dim=-1, keepdim=True), length.expand(-1, 9, 1), **tolerance
    )
    likeness = (grouped / length) @ halves.mT
    best = likeness.max(-1).values
    torch.testing.assert_close(best, torch.ones_like(best), **tolerance)
    if name != "bfloat16":
        assert all(len(row.unique()) == 9 for row in likeness.argmax(-1))


def test_keys_from_data_exclude_padding_and_come_through_the_model():
    layer = make_layer()
    model = nn.ModuleDict({"first": nn.Linear(DIM, DIM), "second": layer})
    x, mask = draw(layer, 7)
    x[mask] = float("nan")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, mask):
            return self.parts["second"](self.parts["first"](x), padding_mask=mask)

    outer = Model().train()
    count = 3 * int((~mask).sum())
    keys = peer.keys_from(layer, [(x, mask)], count, model=outer)
    assert keys.isfinite().all()
    assert outer.training
    assert layer.training
    assert not layer.router._forward_pre_hooks
    assert not layer.router.norm._forward_hooks
    with pytest.raises(ValueError, match=f"at least {count + 1} queries, got {count}"):
        peer.keys_from(layer, [(x, mask)], count + 1, model=outer)
    with pytest.raises(ValueError, match="expected a model that contains the layer"):
        peer.keys_from(layer, [x], 1, model=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a PEER layer or a ProductKeyRouter, got Linear"):
        peer.keys_from(nn.Linear(2, 2), [x], 1)


@pytest.mark.parametrize("name", ["paper", "keys_per_head"])
def test_keys_from_data_exclude_tokens_that_are_not_finite(name):
    layer = make_layer(name)
    x = torch.randn(20, DIM)
    x[3, 1], x[7] = math.inf, math.nan
    count = 18 * (3 if layer.router.share_keys else 1)
    assert peer.keys_from(layer, [x], count).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {count + 1} queries, got {count}"):
        peer.keys_from(layer, [x], count + 1)


def test_keys_from_data_are_repeatable_and_every_query_is_as_likely():
    layer = make_layer()
    batches = [draw(layer, 3, masked=False)[0] for _ in range(2)]
    first, second = (
        peer.keys_from(layer.router, batches, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    everything = peer.keys_from(layer, batches, 72)
    drawn = torch.cat([peer.keys_from(layer, batches, 18) for _ in range(100)])
    counts = (drawn[:, None] == everything.unique(dim=0)).all(-1).sum(0)
    assert len(counts) == 36  # the two batches are equal
    assert counts.min() > 20
    assert counts.max() < 90


# Fresh experts


@pytest.mark.parametrize("name", ["paper", "gated", "bfloat16"])
@pytest.mark.parametrize("form", ["list", "ids", "mask"])
def test_reset_experts_are_fresh_and_others_do_not_change(name, form):
    layer = make_layer(name)
    before = layer.experts.weight.detach().clone()
    mask = torch.zeros(OLD, dtype=torch.bool)
    mask[[4, 0, 20]] = True
    ids = {"list": [4, 0, 20, 4], "ids": torch.tensor([4, 0, 20]), "mask": mask}[form]
    layer.reset_experts(ids)
    after = layer.experts.weight.detach()
    assert torch.equal(after[~mask], before[~mask])
    assert (after[mask][:, :-1] != before[mask][:, :-1]).any(-1).all()
    assert torch.equal(after[mask][:, -1], torch.zeros_like(after[mask][:, -1]))


def test_reset_experts_have_the_input_weights_of_a_new_layer():
    layer = make_layer(num_experts=(64, 50))
    layer.reset_experts(torch.arange(3000))
    assert layer.experts.w_down[:3000].std().item() == pytest.approx(DIM**-0.5, rel=0.05)


def test_experts_that_cannot_be_reset_are_refused():
    layer = make_layer()
    before = layer.experts.weight.detach().clone()
    layer.experts.frozen = torch.arange(OLD) == 7
    other = torch.optim.SGD(layer.router.parameters())
    for ids, optimizer, error, message in (
        ([3, 7], None, ValueError, "1 frozen ones, such as 7"),
        ([30], None, IndexError, r"in \[0, 30\), got 30"),
        ([-1], None, IndexError, r"in \[0, 30\), got -1"),
        ([0.5], None, TypeError, "integer ids or a bool mask, got torch.float32"),
        (torch.zeros(31, dtype=torch.bool), None, ValueError, r"shape \[30\], got \[31\]"),
        ([3], other, ValueError, "expected an optimizer that holds the table"),
        ([3], "sgd", TypeError, "expected a torch.optim.Optimizer, got str"),
    ):
        with pytest.raises(error, match=message):
            layer.reset_experts(ids, optimizer)
    layer.reset_experts([])
    layer.experts.weight.grad = torch.zeros_like(layer.experts.weight)
    with pytest.raises(RuntimeError, match="zero_grad"):
        layer.reset_experts([3])
    assert torch.equal(layer.experts.weight, before)


# Usage


def test_a_tracker_grows_with_its_layer():
    layer = make_layer().eval()
    x, _ = draw(layer, 50, masked=False)
    with peer.UsageTracker(layer) as tracker:
        with torch.inference_mode():
            layer(x)
        before = tracker.counts.clone()
        layer.grow(3)
        with torch.inference_mode():
            layer(x)
        layer(x)
    counts = peer.count_usage(layer, [x, x])["experts"]
    counts[:OLD] += before
    assert torch.equal(tracker.counts, counts)
    assert (counts[OLD:] > 0).any()
    assert len(tracker.mass) == 45
    assert tracker.usage() == (tracker.mass != 0).double().mean().item()


def test_layers_of_different_sizes_on_one_pool_are_tracked_together():
    first, second = make_pair()
    x, _ = draw(first, 5, masked=False)
    with peer.UsageTracker(second, first) as tracker:
        first.eval()(second.eval()(x))
    assert len(tracker.counts) == OLD
    assert tracker.counts.sum() == 2 * 4 * 5 * 12
