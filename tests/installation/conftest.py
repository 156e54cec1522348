"""Clean virtual environments, and the wheel and source distribution under test.

`make test-install` sets these variables:
    PEER_WHEEL        the wheel
    PEER_PACKAGING    the directory in which the wheel was built. It contains the source
                      distribution, and in `source/` the unpacked source distribution with its
                      build. Empty if the wheel was built elsewhere
    PEER_OTHER_TORCH  site-packages of an environment with another minor version of torch
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from environments import Environment, version_of, with_requirements

# The environment variables that a build reads.
_BUILD_VARIABLES = (
    *("PEER_CUDA", "FORCE_CUDA", "CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"),
    *("DEBUG", "CMAKE_ARGS", "CC", "CXX", "CXXFLAGS"),
)


@pytest.fixture(scope="session")
def torch_version() -> str:
    """The version of the torch that the environments share, such as "2.15.0+cu132"."""
    return version_of(Path(str(importlib.metadata.distribution("torch").locate_file(""))))


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel under test."""
    if "PEER_WHEEL" not in os.environ:
        pytest.skip("PEER_WHEEL is not set; `make test-install` sets it")
    return Path(os.environ["PEER_WHEEL"]).resolve(strict=True)


@pytest.fixture(scope="session")
def packaging() -> Path:
    """The directory in which the wheel was built."""
    if not os.environ.get("PEER_PACKAGING"):
        pytest.skip("the wheel was built elsewhere; `make test-install` without WHEEL builds it")
    return Path(os.environ["PEER_PACKAGING"]).resolve(strict=True)


@pytest.fixture(scope="session")
def other_torch() -> Path:
    """Site-packages with another minor version of torch."""
    if not os.environ.get("PEER_OTHER_TORCH"):
        pytest.skip("PEER_OTHER_TORCH is not set to site-packages with another version of torch")
    return Path(os.environ["PEER_OTHER_TORCH"]).resolve(strict=True)


@pytest.fixture(scope="module")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Makes an environment with these distributions and their requirements."""

    def make(*names: str, other: Path | None = None) -> Environment:
        given = [found for name in ("pip", *names) for found in with_requirements(name)]
        if other is not None:
            given += with_requirements("torch", [str(other)])
        return Environment(tmp_path_factory.mktemp("environment") / "venv", *given)

    return make


@pytest.fixture
def with_torch(make_environment: Callable[..., Environment]) -> Environment:
    """An environment that shares this one's torch and has no peer."""
    return make_environment("torch")


@pytest.fixture(scope="session")
def build_variables() -> dict[str, str]:
    """The variables of the wheel's build. A build with the same variables compiles nothing."""
    return {name: os.environ[name] for name in _BUILD_VARIABLES if name in os.environ}


@pytest.fixture
def checkout(packaging: Path) -> Iterator[Path]:
    """A compiled checkout: the source distribution without PKG-INFO."""
    source = packaging / "source"
    mark, hidden = source / "PKG-INFO", source / "build" / "PKG-INFO"
    mark.rename(hidden)
    yield source
    hidden.rename(mark)
