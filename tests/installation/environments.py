"""Clean virtual environments.

This module imports neither torch nor peer. The tests run both in the environments.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]

# Variables that a build reads, or that would make one environment visible in another.
_NOT_INHERITED = re.compile(
    r"(PEER_|PYTHON|VIRTUAL_ENV|FORCE_CUDA|CUDA|TORCH_|CMAKE_|MAKE|DEBUG|CXX|CC$)"
)


class Environment:
    """A virtual environment with pip and links to the given distributions.

    The links are in a directory that a .pth file adds to the path. pip sees these distributions but
    does not change them.
    """

    def __init__(self, directory: Path, *distributions: importlib.metadata.Distribution) -> None:
        venv.create(directory, with_pip=False, symlinks=True)
        self.directory = directory
        self.python = directory / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site_packages = directory / "lib" / version / "site-packages"
        given = directory / "given"
        given.mkdir()
        for distribution in distributions:
            _link(distribution, given)
        (self.site_packages / "given.pth").write_text(f"{given}\n")
        for program in ("pip", "pip3"):
            script = directory / "bin" / program
            script.write_text(f'#!/bin/sh\nexec {self.python} -m pip "$@"\n')
            script.chmod(0o755)

    def run(
        self, command: str, cwd: Path | None = None, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell command with this environment activated, by default in its directory."""
        others = sysconfig.get_path("scripts")
        path = [p for p in os.environ["PATH"].split(os.pathsep) if p and p != others]
        environment = {n: v for n, v in os.environ.items() if not _NOT_INHERITED.match(n)}
        environment["PATH"] = os.pathsep.join([str(self.python.parent), *path])
        environment["VIRTUAL_ENV"] = str(self.directory)
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.directory,
            env={**environment, **{name: str(value) for name, value in variables.items()}},
            capture_output=True,
            text=True,
            check=False,
        )

    def succeed(self, command: str, cwd: Path | None = None, **variables: object) -> str:
        """Runs a command that must succeed, and returns its output."""
        result = self.run(command, cwd, **variables)
        if result.returncode != 0:
            pytest.fail(f"{command}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    def evaluate(self, *expressions: str) -> list[str]:
        """Evaluates expressions that can use peer, torch and importlib.metadata."""
        program = "import torch, peer; from importlib import metadata"
        prints = "".join(f"; print({expression})" for expression in expressions)
        return self.succeed(f"python -c {shlex.quote(program + prints)}").splitlines()


def _link(distribution: importlib.metadata.Distribution, directory: Path) -> None:
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "/", "__pycache__"}
    for top in tops:
        target = directory / top
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(top))).resolve())


def with_requirements(
    name: str, path: list[str] | None = None
) -> list[importlib.metadata.Distribution]:
    """A distribution on this path, and its requirements."""
    installed = {
        canonicalize_name(distribution.metadata["Name"]): distribution
        for distribution in reversed(
            list(importlib.metadata.distributions(path=sys.path if path is None else path))
        )
    }
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), "")]
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        name, extra = key
        found[name] = installed[name]
        for line in installed[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                waiting += [(needed, extra) for extra in ("", *requirement.extras)]
    return list(found.values())


def record_of(wheel: Path) -> dict[str, Any]:
    """The build record in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("peer/_build_info.json"))


def release() -> str:
    """The version of the checkout, without a build tag."""
    source = (CHECKOUT / "peer" / "_version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    assert match is not None
    return match[1]


def version_of(site_packages: Path) -> str:
    """The version of the torch in this directory."""
    source = (site_packages / "torch" / "version.py").read_text()
    match = re.search(r"^__version__ = '([^']+)'", source, re.MULTILINE)
    assert match is not None
    return match[1]


def minor(version: str) -> str:
    """The minor version of torch, "2.15" for "2.15.0+cu132"."""
    return ".".join(version.split(".")[:2])
