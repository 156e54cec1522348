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


def train(model, run, xs, after_backward=lambda tables: None):
    dense, experts = peer.param_groups(model, lr=0.1, expert_lr=0.1)
    optimizers = [torch.optim.SGD([dense]), peer.optim.RowwiseAdagrad([experts])]
    for x in xs:
        run(x).square().mean().backward()
        after_backward(experts["params"])
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
        "state": train_on_half(rank),
        "means": reduce_some(rank),
        "frozen": train_frozen_on_half(rank),
    }
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def train_on_half(rank):
    model = make_model()
    hide_tables(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    mine = draw_batches()[:, 10 * rank : 10 * rank + 10]
    return train(model, parallel, mine, peer.optim.all_reduce_gradients_)


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
    for name, expected in train(model, model, draw_batches()).items():
        assert not torch.equal(expected, before[name]), name
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected)


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
