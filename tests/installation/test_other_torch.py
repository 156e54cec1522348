"""The wheel in an environment with another minor version of torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import CHECKOUT, Environment, minor, version_of


@pytest.fixture(scope="module")
def with_other_torch(
    make_environment: Callable[..., Environment], other_torch: Path, torch_version: str
) -> Environment:
    assert minor(version_of(other_torch)) != minor(torch_version)
    return make_environment(other=other_torch)


@pytest.fixture(scope="module")
def forced(with_other_torch: Environment, wheel: Path) -> Environment:
    """An environment with another torch and, without its requirements, the wheel."""
    with_other_torch.succeed(f"pip install --no-index --no-deps {wheel}")
    return with_other_torch


def test_pip_refuses_the_wheel(with_other_torch: Environment, wheel: Path, torch_version: str):
    result = with_other_torch.run(f"pip install --no-index {wheel}")
    assert result.returncode != 0
    required = rf"torch<\d+\.\d+,>={re.escape(minor(torch_version))} \(from torch-peer\)"
    assert re.search(required, result.stderr), result.stderr


def test_import_names_both_versions_and_what_to_type(
    forced: Environment, other_torch: Path, torch_version: str
):
    result = forced.run("python -c 'import peer'")
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("peer.BinaryMismatchError: peer "), result.stderr
    assert f"was built for PyTorch {torch_version}, but this is" in error
    assert f"this is PyTorch {version_of(other_torch)} in" in error
    assert f"{forced.python} -m pip install --force-reinstall --no-deps ." in error
    assert f"{forced.python} -m pip install 'torch=={minor(torch_version)}.*'" in error
    (documented,) = re.findall(
        r"^```text\n(.*?)^```", (CHECKOUT / "docs" / "install.md").read_text(), re.M | re.S
    )
    assert _without_particulars(error) == _without_particulars(documented)


def _without_particulars(text: str) -> list[str]:
    """The words of a text, with versions and paths replaced."""
    return re.sub(r"\d+\.\d+(\.\d+)?(\+\S+(?=[ ,]))?|/\S+", "_", text).split()


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
    assert re.search(r"torch-peer \S+ has requirement torch<\d+\.\d+,>=\d+\.\d+", result.stdout)
