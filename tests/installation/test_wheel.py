"""The wheel: its metadata, its contents, and that it works in an environment with only torch."""

from __future__ import annotations

import email
import re
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path, PurePosixPath

import pytest
from environments import CHECKOUT, Environment, minor, record_of
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename


@pytest.fixture(scope="module")
def installed(make_environment: Callable[..., Environment], wheel: Path) -> Environment:
    environment = make_environment("torch")
    environment.succeed(f"pip install --no-index {wheel}")
    return environment


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_metadata_pin_the_minor_version_of_torch(metadata: Message, torch_version: str):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    (torch,) = (r for r in requirements if r.name == "torch")
    first, second = map(int, minor(torch_version).split("."))
    assert torch.marker is None
    assert {str(s) for s in torch.specifier} == {f">={first}.{second}", f"<{first}.{second + 1}"}
    assert all("extra" in str(r.marker) for r in requirements if r.name != "torch")


def test_name_metadata_and_record_tell_the_same_version(wheel: Path, metadata: Message):
    _, version, _, _ = parse_wheel_filename(wheel.name)
    record = record_of(wheel)
    assert metadata["Version"] == record["version"] == str(version)
    assert record["peer"] == version.public


def test_wheel_is_for_this_platform_and_any_python_3(wheel: Path):
    (tag,) = parse_wheel_filename(wheel.name)[3]
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert tag.platform.startswith("linux_")


def test_library_headers_and_type_marker_are_in_the_wheel(names: set[str]):
    assert {
        "peer/lib/libpeer.so",
        "peer/include/peer/peer.h",
        "peer/include/peer/version.h",
        "peer/_build_info.json",
        "peer/py.typed",
    } <= names


def test_every_module_is_in_the_wheel_and_no_other(names: set[str]):
    modules = {str(m.relative_to(CHECKOUT)) for m in (CHECKOUT / "peer").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_nothing_else_is_in_the_wheel(names: set[str]):
    others = {
        name
        for name in names
        if not re.match(r"torch_peer-[^/]*\.dist-info/", name)
        and not name.startswith(("peer/include/peer/", "peer/share/cmake/peer/"))
        and PurePosixPath(name).suffix != ".py"
    }
    assert others == {"peer/_build_info.json", "peer/lib/libpeer.so", "peer/py.typed"}


def test_torch_is_the_shared_one_and_the_only_one(installed: Environment, torch_version: str):
    version, file = installed.evaluate("torch.__version__", "torch.__file__")
    assert version == torch_version
    assert file.startswith(str(installed.directory / "given"))
    assert not (installed.site_packages / "torch").exists()


def test_import_comes_from_the_wheel_whose_metadata_tell_its_version(installed: Environment):
    file, version, metadata = installed.evaluate(
        "peer.__file__", "peer.__version__", 'metadata.version("torch-peer")'
    )
    assert Path(file).parents[1] == installed.site_packages
    assert version == metadata


def test_requirements_are_met(installed: Environment):
    assert "No broken requirements" in installed.succeed("pip check")


def test_a_layer_trains(installed: Environment):
    program = """
import torch, peer
torch.manual_seed(0)
layer = peer.PEER(16, num_experts=64, heads=2, num_experts_per_head=4, dim_key=8)
x, y = torch.randn(32, 16), torch.randn(32, 16)
optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(layer(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
print(losses[0], losses[-1])
"""
    (installed.directory / "train.py").write_text(program)
    first, last = map(float, installed.succeed("python train.py").split())
    assert last < first


def test_collect_env_reports_the_installation(installed: Environment, torch_version: str):
    report = installed.succeed("python -m peer.collect_env")
    assert re.search(
        rf"^peer +\S+, {re.escape(str(installed.site_packages / 'peer'))}$", report, re.MULTILINE
    )
    assert re.search(rf"^built for torch +{re.escape(torch_version)}$", report, re.MULTILINE)
    assert "not usable" not in report
    assert str(installed.python) in report


def test_uninstalling_leaves_nothing(make_environment: Callable[..., Environment], wheel: Path):
    environment = make_environment("torch")
    environment.succeed(f"pip install --no-index {wheel}")
    environment.succeed("python -c 'import peer' && pip uninstall --yes torch-peer")
    assert not list(environment.site_packages.glob("*peer*"))
