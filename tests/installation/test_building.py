"""Builds by pip: with torch and without, from a source distribution, editable, without CUDA.

No test compiles. The wheel was built in the same directory for the same torch, so a build finds all
objects up to date.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from environments import CHECKOUT, Environment, minor, record_of, release


@pytest.fixture(scope="module")
def tagged(wheel: Path, torch_version: str) -> str:
    """The version of the compiled code, if built from a checkout."""
    cuda = record_of(wheel)["cuda"]
    kernels = f"cu{cuda['toolkit'].replace('.', '')}" if cuda else "cpu"
    return f"{release()}+torch{minor(torch_version)}{kernels}"


@pytest.fixture(scope="module")
def sdist(packaging: Path) -> Path:
    (found,) = packaging.glob("*.tar.gz")
    return found


@pytest.fixture
def nothing_is_compiled(packaging: Path) -> Iterator[None]:
    """Fails a test that compiles again."""

    def objects() -> dict[Path, int]:
        return {o: o.stat().st_mtime_ns for o in packaging.glob("source/build/torch*/**/*.o")}

    before = objects()
    assert before
    yield
    assert objects() == before


def test_without_torch_the_message_names_the_command(make_environment: Callable[..., Environment]):
    environment = make_environment()
    result = environment.run("pip install .", CHECKOUT)
    assert result.returncode != 0
    assert f"Type:\n  {environment.python} -m pip install torch\n" in _unindented(result.stderr)
    assert "Traceback" not in result.stderr
    assert "torch" not in environment.succeed("pip list")


def _unindented(text: str) -> str:
    """Removes the indent of six that pip adds to the output of the build."""
    return re.sub(r"^      ", "", text, flags=re.MULTILINE)


def test_pip_install_builds_for_the_torch_that_is_there(
    with_torch: Environment,
    packaging: Path,
    torch_version: str,
    build_variables: dict[str, str],
    nothing_is_compiled: None,
):
    output = with_torch.succeed("pip install .", packaging / "source", **build_variables)
    assert "Collecting torch" not in output
    assert not (with_torch.site_packages / "torch").exists()
    assert not list(with_torch.site_packages.glob("torch-*"))
    built_for = 'peer._library.build_info()["torch"]'
    assert with_torch.evaluate(built_for, "peer.__version__") == [torch_version, release()]


def test_wheel_from_a_checkout_is_tagged(
    with_torch: Environment,
    checkout: Path,
    tagged: str,
    build_variables: dict[str, str],
    nothing_is_compiled: None,
):
    shutil.rmtree(checkout / "wheels", ignore_errors=True)
    with_torch.succeed("pip wheel --no-deps --wheel-dir wheels .", checkout, **build_variables)
    (wheel,) = (checkout / "wheels").iterdir()
    assert wheel.name.startswith(f"torch_peer-{tagged}-py3-none-linux_")
    with_torch.succeed("pip install wheels/torch_peer-*.whl", checkout, PIP_NO_INDEX=1)
    assert with_torch.evaluate("peer.__version__") == [tagged]
    assert f"torch-peer=={tagged}" in with_torch.succeed("pip list --format freeze").split()
    # The tagged version satisfies a requirement on the release.
    requirement = f"torch-peer=={release()}"
    assert "already satisfied" in with_torch.succeed(f"pip install --no-index {requirement}")


def test_editable_install_follows_the_source(
    with_torch: Environment,
    checkout: Path,
    tagged: str,
    build_variables: dict[str, str],
    nothing_is_compiled: None,
):
    with_torch.succeed("pip install -e .", checkout, **build_variables)
    added = checkout / "peer" / "added_after_installation.py"
    added.write_text("from torch import ops\n")
    try:
        assert with_torch.evaluate(
            "peer.__file__",
            "peer.__version__",
            'metadata.version("torch-peer")',
            '__import__("peer.added_after_installation").added_after_installation.ops is torch.ops',
        ) == [str(checkout / "peer" / "__init__.py"), tagged, tagged, "True"]
    finally:
        added.unlink()


def test_source_distribution_is_for_every_torch(sdist: Path):
    with tarfile.open(sdist) as archive:
        file = archive.extractfile(f"torch_peer-{release()}/PKG-INFO")
        assert file is not None
        metadata = email.message_from_bytes(file.read())
    assert metadata["Version"] == release()
    assert [r for r in metadata.get_all("Requires-Dist", []) if "extra" not in r] == ["torch>=2.11"]


def test_source_distribution_of_a_source_distribution_is_the_same(
    make_environment: Callable[..., Environment], packaging: Path, sdist: Path
):
    """The environment has no torch."""
    source = packaging / "source"
    shutil.rmtree(source / "dist", ignore_errors=True)
    make_environment("build").succeed("python -m build --sdist", source)
    (again,) = (source / "dist").iterdir()
    assert again.name == sdist.name
    assert _files(again) == _files(sdist)


def test_source_distribution_forgets_what_an_earlier_one_held(
    make_environment: Callable[..., Environment], sdist: Path, tmp_path: Path
):
    environment = make_environment("setuptools")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    (source / "notes.txt").touch()
    (source / "torch_peer.egg-info" / "SOURCES.txt").open("a").write("\nnotes.txt\n")
    environment.succeed("python setup.py sdist --dist-dir ..", source)
    assert _files(tmp_path / sdist.name) == _files(sdist)


def _files(archive: Path) -> set[str]:
    with tarfile.open(archive) as opened:
        return {member.name for member in opened if member.isfile()}


def test_pip_takes_the_source_distribution_by_name(
    make_environment: Callable[..., Environment], sdist: Path
):
    """pip rejects a source distribution if the build's version is not the one in its name."""
    environment = make_environment("torch", "setuptools")
    output = environment.succeed(
        "pip install --dry-run --no-index --no-build-isolation --no-binary torch-peer "
        f"--find-links {sdist.parent} torch-peer"
    )
    assert f"Would install torch-peer-{release()}" in output.splitlines()


def test_source_distribution_holds_what_git_tracks(sdist: Path):
    git = subprocess.run(
        ["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if git.returncode != 0:
        pytest.skip(f"not in a git checkout: {git.stderr}")
    tracked = git.stdout.splitlines()
    # These files only serve the repository.
    needless = re.compile(r"\.ci/|\.git")
    wanted = {name for name in tracked if not needless.match(name) and (CHECKOUT / name).exists()}
    assert wanted - {name.split("/", 1)[1] for name in _files(sdist)} == set()


def test_cpu_build_asks_for_no_cuda_toolkit(
    make_environment: Callable[..., Environment], tmp_path: Path
):
    """A torch with CUDA does not change that, although its own CMake package needs a toolkit."""
    environment = make_environment("torch", "cmake")
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists()]
    output = environment.succeed(
        "python -m cmake -G 'Unix Makefiles' "
        f"-S {CHECKOUT} -B {tmp_path / 'build'} -DPEER_PYTHON={environment.python}",
        PATH=os.pathsep.join([str(environment.python.parent), *path]),
        CUDA_HOME=tmp_path / "nowhere",
    )
    assert "CUDA" not in output
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "CMAKE_CUDA_COMPILER" not in cache
    assert "CUDAToolkit" not in cache
