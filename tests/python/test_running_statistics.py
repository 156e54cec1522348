"""Running statistics of the queries: batches that must not enter them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layers import draw, make_layer
from torch import Tensor, nn
from torch.export import export
from torch.utils._python_dispatch import TorchDispatchMode

from peer.modules import BatchQueryNorm

NAMES = ["num_batches_tracked", "running_mean", "running_var"]
Inputs = tuple[Tensor, Tensor | None]


FORMS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "eager": lambda module, _: module,
    "scripted": lambda module, _: torch.jit.script(module),
    "compiled": lambda module, _: torch.compile(module, fullgraph=True, backend="aot_eager"),
    "exported": lambda module, inputs: export(module, inputs).module(),
}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics, by the last part of their names."""
    found = {name.split(".")[-1]: value.clone() for name, value in module.state_dict().items()}
    return {name: found[name] for name in NAMES}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_finite_statistics_does_not_count(form, masked, value):
    layer = make_layer()
    x, mask = draw(layer, 6, masked)
    form_of_layer = FORMS[form](copy.deepcopy(layer), (x, mask))
    form_of_layer(x, mask)
    before = statistics(form_of_layer)
    assert before["num_batches_tracked"] == 1
    bad = x.clone()
    bad[0, 0, 0] = value
    form_of_layer(bad, mask)
    assert_equal(statistics(form_of_layer), before)
    # The next batch counts as if the bad one had not been there.
    form_of_layer(x + 1, mask)
    layer(x, mask)
    layer(x + 1, mask)
    for name, tensor in statistics(layer).items():
        torch.testing.assert_close(statistics(form_of_layer)[name], tensor)
    assert layer.router.norm.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
def test_one_feature_that_is_not_finite_keeps_the_batch_from_all(masked, momentum):
    norm = BatchQueryNorm(24, momentum=momentum)
    mask = torch.arange(30) >= 20 if masked else None
    for _ in range(2):
        norm(torch.randn(30, 24) * 2 + 1, mask)
    before = statistics(norm)
    query = torch.randn(30, 24)
    query[3, 5] = float("nan")
    norm(query, mask)
    assert_equal(statistics(norm), before)


def test_an_average_over_all_batches_scripts():
    norm, query = BatchQueryNorm(4, momentum=None), torch.randn(30, 4)
    scripted = torch.jit.script(copy.deepcopy(norm))
    for each in query, query * float("nan"), query + 3:
        norm(each)
        scripted(each)
    assert_equal(statistics(scripted), statistics(norm))
    torch.testing.assert_close(norm.running_mean, query.mean(0) + 1.5)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
def test_a_variance_that_overflows_its_buffer_does_not_count(masked):
    norm = BatchQueryNorm(4, momentum=1.0).half()
    mask = torch.arange(30) >= 20 if masked else None
    query = torch.randn(30, 4, dtype=torch.float16)
    norm(query, mask)
    before = statistics(norm)
    norm(query * 1000, mask)  # finite, but its variance is not
    assert_equal(statistics(norm), before)
    norm(query * 2, mask)
    assert norm.num_batches_tracked == 2


def test_a_refused_batch_does_not_count():
    norm = BatchQueryNorm(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 4))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
def test_no_value_is_read_from_the_device(masked):
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            assert function is not torch.ops.aten.nonzero.default
            return function(*args, **(kwargs or {}))

    norm, query = BatchQueryNorm(4), torch.randn(30, 4)
    with Reads():
        norm(query, torch.arange(30) >= 20 if masked else None)


def test_outputs_of_two_forward_passes_have_gradients():
    norm, query = BatchQueryNorm(4), torch.randn(30, 4, requires_grad=True)
    (norm(query) * norm(query + 1)).sum().backward()
    assert query.grad is not None
