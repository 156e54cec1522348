"""Shared fixtures: operator inputs, a new interpreter, and settings for warnings and Hypothesis.

Fixtures for inputs return seeded functions and have session scope, so Hypothesis can call them for
every example.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

import peer

hypothesis.settings.register_profile(
    "peer",
    derandomize=True,  # the same examples in every run, on every machine
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("peer")

# Warnings from peer, a test or an operator call are errors. Torch's deprecation of TorchScript is
# ignored.
WARNING_FILTERS = (
    r"error:.*\bpeer\b",
    r"error:::peer",
    r"error:::test_",
    r"error:::torch\._ops",
    r"ignore:.*torch\.jit\..* is (deprecated|not supported):DeprecationWarning",
    r"ignore:.*torch\.jit\..* is (deprecated|not supported):FutureWarning",
    # Torch warns once in every program that makes a sparse tensor.
    r"ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in WARNING_FILTERS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled() -> None:
    """Every file starts without compiled functions: torch limits those of each forward method."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Every test starts with two threads, and the number is reset after it."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def no_slow_fallback() -> Iterator[None]:
    """Makes vmap raise if torch has no batching rule, instead of looping over the samples."""
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(enabled)


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the operators take."""
    return request.param


@pytest.fixture(params=["gelu", "gelu_tanh", "relu", "silu", "identity", "relu2"])
def activation(request: pytest.FixtureRequest) -> str:
    """Each activation of an expert."""
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "glu"])
def glu(request: pytest.FixtureRequest) -> bool:
    """Experts without and with a gate."""
    return request.param


class ExpertInputs(NamedTuple):
    """The tensors of `expert_mlp`, in the operator's order."""

    x: Tensor
    weights: Tensor
    indices: Tensor
    table: Tensor

    def requiring_grad(self) -> ExpertInputs:
        """The same values as leaves that require gradients."""
        return ExpertInputs(*(_as_leaf(tensor) for tensor in self))

    def differentiable(self) -> list[Tensor]:
        """The tensors that have gradients: all but the indices."""
        return [self.x, self.weights, self.table]


class RetrievalInputs(NamedTuple):
    """The tensors of `product_key_topk`, in the operator's order."""

    query: Tensor
    row_keys: Tensor
    col_keys: Tensor

    def requiring_grad(self) -> RetrievalInputs:
        """The same values as leaves that require gradients."""
        return RetrievalInputs(*(_as_leaf(tensor) for tensor in self))


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _make_expert_inputs(
    *,
    tokens: int = 5,
    per_token: int = 6,
    experts: int = 11,
    dim: int = 9,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    table_dtype: torch.dtype | None = None,
    glu: bool = False,
    seed: int = 0,
) -> ExpertInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float, kind: torch.dtype | None) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
        return values.to(kind or dtype)

    x = normal(tokens, dim, 1.0, dtype)
    weights = normal(tokens, per_token, 1.0, weights_dtype)
    indices = torch.randint(experts, (tokens, per_token), generator=generator)
    down = normal(experts, dim, max(dim, 1) ** -0.5, table_dtype)
    up = normal(experts, dim, max(per_token, 1) ** -0.5, table_dtype)
    gate = [normal(experts, dim, max(dim, 1) ** -0.5, table_dtype)] if glu else []
    return ExpertInputs(x, weights, indices, torch.stack([down, *gate, up], dim=1))


def _make_retrieval_inputs(
    *,
    tokens: int = 5,
    heads: int = 2,
    rows: int = 7,
    columns: int = 6,
    dim_key: int = 8,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    integers: bool = False,
    seed: int = 0,
) -> RetrievalInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    per_head = () if shared else (heads,)
    return RetrievalInputs(
        query=draw(tokens, heads, dim_key),
        row_keys=draw(*per_head, rows, dim_key // 2),
        col_keys=draw(*per_head, columns, dim_key // 2),
    )


@pytest.fixture(scope="session")
def make_expert_inputs() -> Callable[..., ExpertInputs]:
    """Random inputs of `expert_mlp`; ids repeat within and across tokens."""
    return _make_expert_inputs


@pytest.fixture
def make_smooth_inputs(
    make_expert_inputs: Callable[..., ExpertInputs], glu: bool
) -> Callable[..., ExpertInputs]:
    """Float64 inputs with repeated ids and no pre-activation near the kink of relu."""

    def make(**sizes: int) -> ExpertInputs:
        inputs = make_expert_inputs(**sizes, dtype=torch.float64, glu=glu, seed=2)
        hidden = torch.ops.peer.expert_mlp(*inputs, "relu", False)[1]
        assert hidden.abs().min() > 1e-3
        assert inputs.indices.unique().numel() < inputs.indices.numel()
        return inputs

    return make


@pytest.fixture(scope="session")
def make_retrieval_inputs() -> Callable[..., RetrievalInputs]:
    """Random inputs of `product_key_topk`.

    With `integers=True` all values are small integers: sub-scores are exact in any summation order,
    ties are frequent, and ids can be compared exactly.
    """
    return _make_retrieval_inputs


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Any]:
    """Runs a snippet in a new interpreter with the same `peer`, and returns the JSON it prints.

    The JSON is the last line that parses, because the output of a GPU kernel can follow it.
    """

    def run(snippet: str, *arguments: object, environment: dict[str, str] | None = None) -> Any:
        package_root = str(Path(peer.__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([package_root, inherited] if inherited else [package_root])
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", snippet, *map(str, arguments)],
            # In the checkout, the source tree would shadow the installed package.
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            pytest.fail(f"the new interpreter exited with {result.returncode}:\n{result.stderr}")
        return _last_json(result.stdout)

    return run


def _last_json(output: str) -> Any:
    for line in reversed(output.splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    pytest.fail(f"the new interpreter printed no JSON:\n{output}")
