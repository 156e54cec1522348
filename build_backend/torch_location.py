"""Finds the torch to build against, which is the one that the package will run with."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 11)

_FIND = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s else '')"
)


class TorchNotFoundError(Exception):
    """No torch was found, or it is too old. The message contains the command to run."""


def find_torch() -> Path:
    """Returns the directory of the torch package: TORCH_DIR, or that of the environment.

    A build front end such as pip isolates the build with environment variables. If this process
    finds no torch, it starts the same interpreter without these variables. This finds a torch in
    the environment, in system site packages, in the user site and in a .pth file.

    Raises:
        TorchNotFoundError: there is no torch, or it is older than `OLDEST`.
    """
    if given := os.environ.get("TORCH_DIR"):
        directory: Path | None = Path(given).resolve()
    else:
        directory = _in_this_process() or _in_the_environment()
    if directory is None or not (directory / "version.py").exists():
        raise TorchNotFoundError(_ADVICE.format(python=sys.executable))
    if minor(directory) < OLDEST:
        raise TorchNotFoundError(
            f"peer needs torch 2.11 or newer; {directory} is {version(directory)}.\n"
            f"Type:  {sys.executable} -m pip install --upgrade torch"
        )
    return directory


def version(torch: Path) -> str:
    """The version of the torch in this directory, "2.15.0+cu132", without importing it."""
    match = re.search(
        r"^__version__\s*=\s*'([^']+)'", (torch / "version.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise TorchNotFoundError(f"peer: {torch / 'version.py'} contains no version")
    return match[1]


def minor(torch: Path) -> tuple[int, int]:
    """The minor version, such as (2, 15), which fixes the C++ ABI."""
    first, second = version(torch).split(".")[:2]
    return int(first), int(second)


def cuda(torch: Path) -> str | None:
    """The CUDA version of the torch in this directory, such as "13.2"; None without CUDA."""
    match = re.search(r"^cuda\b.*=\s*'([^']+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def run_in_the_environment(code: str) -> str:
    """Runs code outside of the isolated build. Returns its output, or "" if it fails."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")
    }
    # Python would import modules from the current directory, so it starts in the root directory.
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() if run.returncode == 0 else ""


def _in_this_process() -> Path | None:
    spec = importlib.util.find_spec("torch")
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]).resolve() if locations else None


def _in_the_environment() -> Path | None:
    found = run_in_the_environment(_FIND)
    return Path(found).resolve() if found else None


_ADVICE = """\
peer is compiled against the torch of its environment, and this environment has none:
  {python}
Type:
  {python} -m pip install torch
and then install peer again. `python -m build` builds in a new environment: add --no-isolation, or
set the torch to build against with TORCH_DIR=.../site-packages/torch
"""
