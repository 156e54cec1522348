"""Data parallelism in two processes, against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import peer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def make_model():
    torch.manual_seed(0)
    sizes = {"num_experts": 64, "heads": 2, "num_experts_per_head": 4, "dim_key": 4}
    layer = peer.PEER(8, query_norm=None, sparse_grad=True, **sizes)
    return nn.Sequential(nn.Linear(8, 8), layer)


def hide_tables(model):
    """Hides the tables as in the docstring of `all_reduce_gradients_`."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, peer.ExpertPool)}
    names = [name for name, p in model.named_parameters() if id(p) in tables]
    parallel = nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, names)


def make_two_optimizers(model):
    dense, experts = peer.param_groups(model, lr=0.1, expert_lr=0.1)
    return [torch.optim.SGD([dense]), peer.optim.RowwiseAdagrad([experts])]


def make_one_optimizer(model):
    return [peer.optim.optimizer_for(model, lr=0.01, expert_lr=0.1, tables="rowwise_adagrad")]


def train(model, run, xs, make_optimizers, after_backward=lambda table: None):
    optimizers = make_optimizers(model)
    for x in xs:
        run(x).square().mean().backward()
        after_backward(model[1].experts.weight)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


def draw_batches():
    return torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {
        "state": train_on_half(rank, make_two_optimizers),
        "one optimizer": train_on_half(rank, make_one_optimizer),
        "fused": fail_on_half(rank),
        "means": reduce_some(rank),
        "frozen": train_frozen_on_half(rank),
        "synchronized": {name: normalise_half(rank, name) for name in MASKS},
    }
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def train_on_half(rank, make_optimizers):
    model = make_model()
    hide_tables(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    mine = draw_batches()[:, 10 * rank : 10 * rank + 10]
    return train(model, parallel, mine, make_optimizers, peer.optim.all_reduce_gradients_)


def fail_on_half(rank):
    """The error of an optimizer that is fused into the backward pass, and the moved parameters."""
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hide_tables(model)
    optimizer = peer.optim.optimizer_for(model, lr=0.01, expert_lr=0.1, fused=True)
    try:
        nn.parallel.DistributedDataParallel(model)(draw_batches()[0]).sum().backward()
    except RuntimeError as error:
        moved = [k for k, value in model.state_dict().items() if not torch.equal(value, before[k])]
        return str(error), moved, len(optimizer.state)
    return "", [], 0


def make_frozen_layer():
    torch.manual_seed(0)
    layer = peer.PEER(8, num_experts=64, heads=2, num_experts_per_head=4, dim_key=4)
    layer.freeze_experts(torch.arange(64) % 4 == 0, keys=False, router=True)
    layer.router.freeze_keys(torch.arange(8) < 4, torch.arange(8) < 4)
    layer.disable_experts(range(8))
    return layer


def train_frozen(layer, run, xs):
    """Two forward passes before each backward pass, while data parallelism writes buffers."""
    optimizers = [
        peer.optim.RowwiseAdagrad([layer.experts.weight], lr=0.1, weight_decay=0.1),
        torch.optim.AdamW([layer.router.row_keys, layer.router.col_keys], lr=0.1),
    ]
    for x in xs:
        (run(x).square().mean() + run(x.flip(0)).square().mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return layer.state_dict()


def train_frozen_on_half(rank):
    layer = make_frozen_layer()
    parallel = nn.parallel.DistributedDataParallel(layer)
    return train_frozen(layer, parallel, draw_batches()[:, 10 * rank : 10 * rank + 10])


MASKS = {
    "no mask": None,
    "padding": torch.arange(20) % 10 >= torch.arange(20) // 10 * 4 + 4,
    "one process has padding alone": torch.arange(20) >= 10,
    "one real token": torch.arange(20) != 3,
    "a real token is infinite": torch.arange(20) % 10 >= 8,
}


def draw_for(name):
    xs, mask = draw_batches(), MASKS[name]
    if mask is not None:
        xs = xs.masked_fill(mask[:, None], float("nan"))
    if "infinite" in name:
        xs[1, 2, 0] = float("inf")
    return xs, mask


def make_normalised_layer():
    torch.manual_seed(0)
    layer = peer.PEER(8, num_experts=64, heads=2, num_experts_per_head=4, dim_key=4)
    return layer.double()


def normalise(layer, run, xs, mask):
    """Outputs and gradients of each batch, of the sum over all tokens, and the buffers."""
    results = []
    for x in xs.double():
        leaf = x.clone().requires_grad_()
        out = run(leaf, mask)
        out.square().sum().backward()
        results += [out.detach(), leaf.grad]
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"outputs": results, "gradients": gradients, "buffers": dict(layer.named_buffers())}


def normalise_half(rank, name):
    xs, mask = draw_for(name)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(make_normalised_layer())
    mine = slice(10 * rank, 10 * rank + 10)
    parallel = nn.parallel.DistributedDataParallel(layer)
    return normalise(layer, parallel, xs[:, mine], None if mask is None else mask[mine])


def reduce_some(rank):
    means = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        both, one, idle, dense = (nn.Parameter(torch.zeros(5, 2, dtype=dtype)) for _ in range(4))
        values = torch.ones(3, 2, dtype=dtype)
        both.grad = torch.sparse_coo_tensor(
            [[3, 1 + rank, 3]], values, (5, 2), check_invariants=True
        )
        if rank == 0:
            one.grad = both.grad.clone()
        dense.grad = torch.full_like(dense, 1.0 + rank)
        peer.optim.all_reduce_gradients_([both, one, idle])
        peer.optim.all_reduce_gradients_(dense)
        assert {each.grad.dtype for each in (both, one, idle, dense)} == {dtype}
        means[str(dtype)] = [each.grad.to_dense() for each in (both, one, idle, dense)]
    return means


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two processes. Starting them takes most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_of_two_processes, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def test_two_processes_end_with_the_tables_of_one(results):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (each["state"] for each in results)
    for name, expected in train(model, model, draw_batches(), make_two_optimizers).items():
        assert not torch.equal(expected, before[name]), name
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected)


def test_two_processes_with_one_optimizer_end_with_the_parameters_of_one(results):
    model = make_model()
    first, second = (each["one optimizer"] for each in results)
    for name, expected in train(model, model, draw_batches(), make_one_optimizer).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected)


def test_a_fused_optimizer_refuses_two_processes_and_moves_nothing(results):
    for message, moved, states in (each["fused"] for each in results):
        assert "trained by 2 processes" in message
        assert "fused=False" in message
        assert not moved
        assert states == 0


def test_two_processes_keep_what_is_frozen_and_learn_the_rest_like_one(results):
    layer = make_frozen_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = train_frozen(layer, layer, draw_batches())
    first, second = (each["frozen"] for each in results)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
    frozen = before["experts.frozen"]
    assert torch.equal(first["experts.weight"][frozen], before["experts.weight"][frozen])
    assert not torch.equal(first["experts.weight"], before["experts.weight"])
    assert torch.equal(first["router.kept_row_keys"], before["router.kept_row_keys"])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_gradients_become_their_mean(results, dtype):
    for each in results:
        both, one, idle, dense = each["means"][f"torch.{dtype}"]
        assert both[:, 0].tolist() == [0.0, 0.5, 0.5, 2.0, 0.0]
        assert one[:, 0].tolist() == [0.0, 0.5, 0.0, 1.0, 0.0]
        assert (idle == 0).all()
        assert (dense == 1.5).all()


@pytest.mark.parametrize("name", MASKS)
def test_synchronized_statistics_are_those_of_the_whole_batch(results, name):
    layer = make_normalised_layer()
    expected = normalise(layer, layer, *draw_for(name))
    halves = [each["synchronized"][name] for each in results]
    same = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": "infinite" in name}
    for first, second, both in zip(*(each["outputs"] for each in [*halves, expected]), strict=True):
        torch.testing.assert_close(torch.cat([first, second]), both, **same)
    for half in halves:
        for key, gradient in expected["gradients"].items():
            # Data parallelism averages what one process sums.
            torch.testing.assert_close(2 * half["gradients"][key], gradient, **same)
        for key, buffer in expected["buffers"].items():
            assert buffer.isfinite().all()
            torch.testing.assert_close(half["buffers"][key], buffer, rtol=1e-9, atol=1e-9)
    counted = {"one real token": 0, "a real token is infinite": 2}.get(name, 3)
    assert expected["buffers"]["router.norm.num_batches_tracked"] == counted


def test_a_converted_layer_keeps_its_norm_and_its_state():
    layer = make_normalised_layer()
    layer.router.freeze_network()
    layer.router.norm.momentum = 0.3
    before = dict(layer.router.norm.named_parameters()), dict(layer.router.norm.named_buffers())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    )
    norm = converted.router.norm
    assert isinstance(norm, peer.modules.BatchQueryNorm)
    assert norm.is_synchronized
    assert norm.are_statistics_frozen
    assert norm.momentum == 0.3
    for ours, theirs in zip((norm.named_parameters(), norm.named_buffers()), before, strict=True):
        ours = dict(ours)
        assert list(ours) == list(theirs)
        assert all(ours[name] is theirs[name] for name in theirs)
    assert "is_synchronized=True" in repr(converted)


def test_a_synchronized_norm_that_is_assigned_takes_masks():
    layer = make_normalised_layer()
    given = nn.SyncBatchNorm(layer.router.norm.num_features, dtype=torch.float64)
    layer.router.norm = given
    assert layer.router.norm.is_synchronized
    assert layer.router.norm.weight is given.weight
    x, mask = draw_batches()[0].double(), MASKS["padding"]
    assert layer(x, mask).isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_converted_layer_without_other_processes_computes_the_same(masked):
    layer, other = make_normalised_layer(), make_normalised_layer()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(other)
    x, mask = draw_batches()[0].double(), MASKS["padding"] if masked else None
    assert torch.equal(converted(x, mask), layer(x, mask))
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), layer(x, mask))
    scripted = torch.jit.script(converted.eval())
    assert torch.equal(scripted(x, mask), layer.eval()(x, mask))
    with pytest.raises(Exception, match="TorchScript cannot synchronize"):
        scripted.train()(x, mask)
