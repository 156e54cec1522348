"""The wheel beside a torch of another minor version than the one that it was built for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import Environment, minor, version_of


@pytest.fixture(scope="module")
def with_other_torch(
    make_environment: Callable[..., Environment], other_torch: Path, torch_version: str
) -> Environment:
    assert minor(version_of(other_torch)) != minor(torch_version)
    return make_environment(other=other_torch)


@pytest.fixture(scope="module")
def forced(with_other_torch: Environment, wheel: Path) -> Environment:
    """The environment into which the wheel was installed all the same."""
    with_other_torch.succeed(f"pip install --no-index --no-deps {wheel}")
    return with_other_torch


def test_pip_refuses_the_wheel(with_other_torch: Environment, wheel: Path, torch_version: str):
    result = with_other_torch.run(f"pip install --no-index {wheel}")
    assert result.returncode != 0
    required = rf"torch<\d+\.\d+,>={re.escape(minor(torch_version))} \(from peer\)"
    assert re.search(required, result.stderr), result.stderr


def test_import_names_both_versions_and_what_to_type(
    forced: Environment, other_torch: Path, torch_version: str
):
    result = forced.run("python -c 'import peer'")
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"peer\.BinaryMismatchError: peer \S+ was built for PyTorch "
        rf"{re.escape(torch_version)}, but this is PyTorch {re.escape(version_of(other_torch))} "
        rf"in \S+, and compiled code works with one minor version only\. .*"
        rf"{forced.python} -m pip install --force-reinstall --no-deps \. .*"
        rf"{forced.python} -m pip install 'torch=={re.escape(minor(torch_version))}\.\*'",
        error,
    ), result.stderr


def test_collect_env_reports_both_versions(
    forced: Environment, other_torch: Path, torch_version: str
):
    report = forced.succeed("python -m peer.collect_env")
    assert re.search(rf"^built for torch +{re.escape(torch_version)}$", report, re.MULTILINE)
    assert re.search(rf"^torch +{re.escape(version_of(other_torch))}$", report, re.MULTILINE)
    assert re.search(r"^not usable +peer \S+ was built for PyTorch", report, re.MULTILINE)


def test_pip_check_names_the_mismatch(forced: Environment):
    result = forced.run("pip check")
    assert result.returncode != 0
    assert re.search(r"peer \S+ has requirement torch<\d+\.\d+,>=\d+\.\d+", result.stdout)
