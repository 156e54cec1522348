"""One optimizer for a model, against AdamW and an optimizer for tables side by side."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import peer
from peer.optim import SGD, ModelOptimizer, RowwiseAdagrad, RowwiseAdam, optimizer_for

OPTIMIZERS = {"rowwise_adagrad": RowwiseAdagrad, "rowwise_adam": RowwiseAdam, "sgd": SGD}
OPTIONS = {"rowwise_adagrad": {}, "rowwise_adam": {"betas": (0.8, 0.9)}, "sgd": {"momentum": 0.9}}
RATES = {"lr": 1e-2, "expert_lr": 5e-2}


@pytest.fixture(params=OPTIMIZERS)
def tables(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["stored", "fused"])
def fused(request):
    return request.param


def make_model(seed=0, **options):
    options = {"sparse_grad": True, "query_norm": "layer", **options}
    sizes = {"num_experts": 36, "heads": 2, "num_experts_per_head": 4, "dim_key": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [peer.PEER(8, **sizes, **options) for _ in range(2)]
        return nn.Sequential(nn.Linear(6, 8), layers[0], nn.Tanh(), layers[1], nn.Linear(8, 3))


def pools_of(model):
    return [model[1].experts, model[3].experts]


def make_optimizer(model, tables="rowwise_adagrad", **options):
    return optimizer_for(
        model, **{**RATES, "tables": tables, "table_options": OPTIONS[tables], **options}
    )


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def assert_same_model(ours, theirs):
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        is_same = torch.equal(a.detach().view(torch.uint8), b.detach().view(torch.uint8))
        assert is_same, name


# --- equals two optimizers -----------------------------------------------------------------------


def test_equals_an_optimizer_for_tables_and_adamw_bit_by_bit(tables, fused):
    model = make_model()
    ours = copy.deepcopy(model)
    decay = {"weight_decay": 0.1, "expert_weight_decay": 0.2}
    optimizer = make_optimizer(ours, tables, fused=fused, betas=(0.8, 0.99), eps=1e-6, **decay)
    dense, experts = peer.param_groups(model, **RATES, **decay)
    others = [
        torch.optim.AdamW([dense], betas=(0.8, 0.99), eps=1e-6, fused=True),
        OPTIMIZERS[tables]([experts], **{"lr": 1.0, **OPTIONS[tables]}),
    ]
    train(ours, optimizer, range(4))
    for step in range(4):
        loss_of(model, step).backward()
        for other in others:
            other.step()
            other.zero_grad()
    assert_same_model(ours, model)
    assert not torch.equal(ours[1].experts.weight, make_model()[1].experts.weight)


def test_dense_gradients_of_tables_give_the_same_training(tables):
    model, ours = make_model(), make_model(sparse_grad=False)
    train(model, make_optimizer(model, tables), range(3))
    train(ours, make_optimizer(ours, tables), range(3))
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_all_parameters_that_require_grad_are_in_its_groups_by_name():
    model = make_model()
    model[0].requires_grad_(False)
    dense, experts = make_optimizer(model, weight_decay=0.1).param_groups
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert experts["param_names"] == ["1.experts.weight", "3.experts.weight"]
    assert {*dense["param_names"], *experts["param_names"]} == names
    assert (dense["name"], dense["optimizer"], dense["lr"]) == ("dense", "adamw", 1e-2)
    assert (experts["name"], experts["optimizer"]) == ("experts", "rowwise_adagrad")
    assert (dense["weight_decay"], experts["weight_decay"], experts["lr"]) == (0.1, 0.0, 5e-2)


def test_adamw_is_torch_s_fused_one_where_torch_has_one():
    model = make_model()
    assert make_optimizer(model).param_groups[0]["fused"] is True
    group = {"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]}
    optimizer = ModelOptimizer([group], {"adamw": {"lr": 0.1}})
    assert optimizer.param_groups[0]["fused"] is None
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()


def test_a_shared_pool_is_updated_once():
    model = make_model()
    model[3] = peer.PEER(
        8,
        num_experts=36,
        heads=2,
        num_experts_per_head=4,
        dim_key=4,
        experts=model[1].experts,
        sparse_grad=True,
        query_norm="layer",
    )
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    assert len(optimizer.param_groups[1]["params"]) == 1
    assert optimizer.state[model[1].experts.weight]["step"] == 2


def test_a_closure_is_run_with_gradients_and_its_loss_returned(fused):
    model = make_model()
    optimizer = make_optimizer(model, fused=fused)
    before = model[1].experts.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(2)]
    assert losses[1] < losses[0]
    assert not torch.equal(model[1].experts.weight, before)


# --- schedulers ----------------------------------------------------------------------------------

SCHEDULERS = {
    "warm-up": lambda optimizer: LambdaLR(optimizer, lambda step: min(step / 2, 1.0)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "steps": lambda optimizer: StepLR(optimizer, 2),
    "one cycle": lambda optimizer: OneCycleLR(
        optimizer, [0.01, 0.05], total_steps=6, cycle_momentum=False
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_rates_of_all_groups(name, fused, tables):
    model = make_model()
    ours = copy.deepcopy(model)
    optimizer = make_optimizer(ours, tables, fused=fused)
    dense, experts = peer.param_groups(model, **RATES)
    # A scheduler of both groups, for a plain optimizer that holds the rates of two others.
    rates = torch.optim.SGD(
        [{**dense, "params": [torch.zeros(1)]}, {**experts, "params": [torch.ones(1)]}]
    )
    others = [
        torch.optim.AdamW([dense], fused=True),
        OPTIMIZERS[tables]([experts], **{"lr": 1.0, **OPTIONS[tables]}),
    ]
    scheduler, their_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](rates)
    train(ours, optimizer, range(5), scheduler)
    for step in range(5):
        for other, group in zip(others, rates.param_groups, strict=True):
            other.param_groups[0]["lr"] = group["lr"]
        loss_of(model, step).backward()
        for other in others:
            other.step()
            other.zero_grad()
        rates.step()
        their_scheduler.step()
    assert_same_model(ours, model)


def test_one_cycle_moves_the_betas_where_all_groups_have_them():
    optimizer = make_optimizer(make_model(), "rowwise_adam")
    OneCycleLR(optimizer, 0.01, total_steps=6, max_momentum=0.7)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.7, 0.7]
    with pytest.raises(ValueError, match="cycle_momentum"):
        OneCycleLR(make_optimizer(make_model()), 0.01, total_steps=6)


def test_a_plateau_lowers_all_rates():
    optimizer = make_optimizer(make_model())
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in 1.0, 2.0:
        scheduler.step(loss)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 2.5e-2]


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_resumes_bit_by_bit(tables, fused, way):
    model = make_model()
    optimizer = make_optimizer(model, tables, fused=fused)
    train(model, optimizer, range(2))
    if way in ("state_dict", "file"):
        copied = make_model(seed=1)
        copied.load_state_dict(model.state_dict())
        resumed = make_optimizer(copied, tables, fused=fused)
        state = copy.deepcopy(optimizer.state_dict())  # torch's loading shares tensors
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        resumed.load_state_dict(state)
        assert resumed.is_fused == fused
    else:
        both = (model, optimizer)
        both = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        copied, resumed = both
        assert not resumed.is_fused
    train(model, optimizer, range(2, 4))
    train(copied, resumed, range(2, 4))
    assert_same_model(copied, model)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert resumed.state[ours].keys() == optimizer.state[theirs].keys()


def test_there_is_one_state_and_one_list_of_groups():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    assert set(optimizer.state) == set(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    train(model, optimizer, range(1))
    assert_same_model(model, before)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, range(1))
    assert not torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[1].experts.weight, before[1].experts.weight)


def test_the_float32_state_of_a_16_bit_table_survives_loading():
    model = make_model().bfloat16()
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    resumed = make_optimizer(model)
    resumed.load_state_dict(optimizer.state_dict())
    table = model[1].experts.weight
    assert resumed.state[table]["sum_of_squares"].dtype == torch.float32
    assert resumed.state[table]["sum_of_squares"].data_ptr() != (
        optimizer.state[table]["sum_of_squares"].data_ptr()
    )
    assert resumed.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        lambda model: make_optimizer(model, "rowwise_adam"),
        lambda model: torch.optim.AdamW(peer.param_groups(model, **RATES)),
    ],
    ids=["other tables", "another class"],
)
def test_the_state_of_another_optimizer_is_refused(make):
    model = make_model()
    optimizer = make_optimizer(model)
    with pytest.raises(ValueError, match="expected the state of '"):
        optimizer.load_state_dict(make(model).state_dict())


def test_hooks_run_once_for_the_whole():
    model = make_model()
    optimizer = make_optimizer(model)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("state")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    assert calls == ["all", "pre", "post", "all", "state", "load", "loaded"]


def test_a_distributed_checkpoint_resumes_bit_by_bit(tables):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = make_model()
    optimizer = make_optimizer(model, tables)
    train(model, optimizer, range(2))
    model_state, state = copy.deepcopy(checkpoint.get_state_dict(model, optimizer))
    copied = make_model(seed=1)
    before = copy.deepcopy(copied)
    resumed = make_optimizer(copied, tables)
    checkpoint.get_optimizer_state_dict(copied, resumed)  # makes a state and changes nothing
    assert_same_model(copied, before)
    checkpoint.set_state_dict(copied, resumed, model_state_dict=model_state, optim_state_dict=state)
    train(model, optimizer, range(2, 4))
    train(copied, resumed, range(2, 4))
    assert_same_model(copied, model)


# --- groups --------------------------------------------------------------------------------------


def test_groups_are_added():
    model, more = make_model(), make_model(seed=1)
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    dense, experts = peer.param_groups(more, **RATES)
    names = {id(each): name for name, each in more.named_parameters()}
    for group, kind in ((dense, None), (experts, "rowwise_adagrad")):
        group["params"] = [(f"more.{names[id(each)]}", each) for each in group["params"]]
        optimizer.add_param_group(group if kind is None else {**group, "optimizer": kind})
    reference = copy.deepcopy(more)
    train(more, optimizer, range(2))
    train(reference, make_optimizer(reference), range(2))
    assert_same_model(more, reference)
    assert optimizer.holds(more[1].experts.weight)
    assert not optimizer.holds(more[0].weight)


BAD_GROUPS = {
    "unknown optimizer": (lambda model: {"params": [("new", nn.Parameter(torch.zeros(2, 2)))],
                                         "optimizer": "rowwise_adam"},
                          ValueError, "'adamw', 'rowwise_adagrad', got 'rowwise_adam'"),
    "twice": (lambda model: {"params": [("again", model[0].weight)]}, ValueError, "more than one"),
    "no table": (lambda model: {"params": [("new", nn.Parameter(torch.zeros(2)))],
                                "optimizer": "rowwise_adagrad"}, ValueError, "expected tables"),
    "rate": (lambda model: {"params": [("new", nn.Parameter(torch.zeros(2, 2)))], "lr": -1.0,
                            "optimizer": "rowwise_adagrad"}, ValueError, "expected lr"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_bad_group_is_named(case):
    make, error, message = BAD_GROUPS[case]
    model = make_model()
    optimizer = make_optimizer(model)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(make(model))
    assert len(optimizer.param_groups) == 2


BAD_OPTIONS = {
    "tables": ({"tables": "adam"}, ValueError, "expected tables to be one of 'rowwise_adagrad', "),
    "option": ({"table_options": {"momentum": 0.9}}, TypeError, "momentum"),
    "rate": ({"expert_lr": -1.0}, ValueError, "expected lr to be not negative"),
    "dense rate": ({"lr": -1.0}, ValueError, "learning rate"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_named(case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        optimizer_for(make_model(), **{**RATES, **options})


def test_a_model_without_a_pool_is_refused():
    with pytest.raises(ValueError, match="ExpertPool, got Linear"):
        optimizer_for(nn.Linear(3, 3), **RATES)


def test_a_sparse_gradient_of_adamw_is_refused_before_anything_changes():
    model = make_model()
    optimizer = ModelOptimizer(
        [
            {"params": list(model[1].parameters())},
            {"params": [model[3].experts.weight], "optimizer": "sgd"},
        ],
        {"adamw": {"lr": 0.1}, "sgd": {"lr": 0.1}},
    )
    before = copy.deepcopy(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"a parameter of shape \[36, 2, 8\] .*rowwise_adagrad"):
        optimizer.step()
    assert_same_model(model, before)


# --- growth and freezing -------------------------------------------------------------------------


def test_grows_with_the_model(tables, fused):
    model = make_model()
    optimizer = make_optimizer(model, tables, fused=fused)
    train(model, optimizer, range(2))
    peer.grow_(model, rows=2)
    with pytest.raises(RuntimeError, match=r"call peer\.optim\.grow_\(optimizer\)"):
        train(model, optimizer, range(2))
    optimizer.zero_grad()
    peer.optim.grow_(optimizer)
    train(model, optimizer, range(2, 4))
    for pool in pools_of(model):
        assert len(pool.weight) == 48
        rows = [
            each for each in optimizer.state[pool.weight].values() if isinstance(each, torch.Tensor)
        ]
        assert all(len(each) == 48 for each in rows)
    assert optimizer.state[model[1].router.row_keys]["exp_avg"].shape == (8, 2)


def test_frozen_experts_keep_their_bits(tables, fused):
    model = make_model()
    optimizer = make_optimizer(model, tables, fused=fused, weight_decay=0.1)
    train(model, optimizer, range(2))
    model[1].freeze_experts(range(20))
    before = model[1].experts.weight.detach().clone()
    train(model, optimizer, range(2, 6))
    assert torch.equal(model[1].experts.weight[:20], before[:20])
    assert not torch.equal(model[1].experts.weight[20:], before[20:])


def test_fresh_experts_get_fresh_state():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    model[1].reset_experts(range(36), optimizer)
    assert optimizer.state[model[1].experts.weight]["sum_of_squares"].count_nonzero() == 0


def test_a_table_that_does_not_require_grad_is_not_fused():
    model = make_model()
    model[1].experts.weight.requires_grad_(False)
    optimizer = make_optimizer(model, fused=True)
    assert [pool.fused_update is not None for pool in pools_of(model)] == [False, True]
    before = copy.deepcopy(model)
    train(model, optimizer, range(1))
    assert torch.equal(model[1].experts.weight, before[1].experts.weight)
    assert not torch.equal(model[3].experts.weight, before[3].experts.weight)
    model[3].experts.fused_update.remove()
    for pool in pools_of(model):
        pool.weight.requires_grad_(False)
    assert not make_optimizer(model, fused=True).is_fused


# --- what fusion excludes ------------------------------------------------------------------------


def test_a_fused_table_has_no_gradient_that_could_be_clipped():
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    loss_of(model).backward()
    assert all(pool.weight.grad is None for pool in pools_of(model))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def test_accumulated_gradients_count_as_their_sum():
    model = make_model()
    ours = copy.deepcopy(model)
    optimizer, ours_optimizer = make_optimizer(model), make_optimizer(ours)
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    for step in range(2):
        loss_of(ours, step).backward()
    optimizer.step()
    ours_optimizer.step()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_fused_update_refuses_to_accumulate_gradients():
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    loss_of(model).backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"second backward pass .*fused=False"):
        loss_of(model).backward()
    assert_same_model(model, before)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    loss_of(model).backward()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_skips_steps_that_are_not_finite(unscale):
    model = make_model()
    ours = copy.deepcopy(model)
    optimizer, ours_optimizer = make_optimizer(model), make_optimizer(ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        scaler.scale(loss_of(ours, step) * factor).backward()
        if unscale:
            scaler.unscale_(ours_optimizer)
        scaler.step(ours_optimizer)
        scaler.update()
        ours_optimizer.zero_grad()
        if factor == 1.0:
            train(model, optimizer, [step])
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_fused_update_refuses_a_scaler(unscale):
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"scaled by a GradScaler.*fused=False"):
        scaler.step(optimizer)
    # Without a scaler, and with one that is switched off, it works again.
    optimizer.step()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(loss_of(model)).backward()
    off.step(optimizer)
    optimizer.unfuse()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)


def test_a_fused_update_under_bfloat16_autocast_does_not_claim_to_scale():
    model = make_model()
    optimizer = make_optimizer(model, fused=True)
    assert optimizer._step_supports_amp_scaling
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert not optimizer._step_supports_amp_scaling
    optimizer.step()
    loss_of(model).backward()
    assert optimizer._step_supports_amp_scaling


def test_a_fused_update_refuses_several_processes(monkeypatch):
    model = make_model()
    make_optimizer(model, fused=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"2 processes.*all_reduce_gradients_"):
        loss_of(model).backward()
    assert_same_model(model, before)


def test_fusion_ends(fused):
    model = make_model()
    optimizer = make_optimizer(model, fused=fused)
    assert optimizer.is_fused == fused
    optimizer.unfuse()
    assert not optimizer.is_fused
    loss_of(model).backward()
    assert all(pool.weight.grad.is_sparse for pool in pools_of(model))
    with optimizer.fuse_into_backward(model):
        assert optimizer.is_fused
    assert not optimizer.is_fused


def test_a_second_fused_optimizer_is_told_how_to_end_the_first():
    model = make_model()
    make_optimizer(model, fused=True)
    with pytest.raises(ValueError, match=r"pool\.fused_update\.remove\(\)"):
        make_optimizer(model, fused=True)
    for pool in pools_of(model):
        if pool.fused_update is not None:
            pool.fused_update.remove()
    train(model, make_optimizer(model, fused=True), range(1))


def test_a_compiled_model_trains_with_it(fused):
    torch._dynamo.reset()
    model = make_model()
    ours = copy.deepcopy(model)
    train(model, make_optimizer(model, fused=fused), range(3))
    compiled = torch.compile(ours, backend="aot_eager")
    train(compiled, make_optimizer(ours, fused=fused), range(3))
    torch._dynamo.reset()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
