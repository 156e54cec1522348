"""Finds the torch to build against: the one that the package will run with."""

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
    """There is no torch to build against, or one that is too old. The message says what to type."""


def find_torch() -> Path:
    """The directory of the torch package: TORCH_DIR if set, else that of the running environment.

    A build front end such as pip isolates the build from the environment, by environment variables
    that a fresh interpreter can do without. So if this process does not see a torch, the same
    interpreter is asked outside of the isolation. That covers every way in which an environment may
    come by a torch: installed in it, system site packages, the user's site, a .pth file.

    Raises:
        TorchNotFoundError: If there is none, or it is older than the oldest supported.
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
    """The version of the torch in this directory, such as "2.15.0+cu132"; it is not imported."""
    match = re.search(
        r"^__version__\s*=\s*'([^']+)'", (torch / "version.py").read_text(), re.MULTILINE
    )
    if match is None:
        raise TorchNotFoundError(f"peer: {torch / 'version.py'} states no version")
    return match[1]


def minor(torch: Path) -> tuple[int, int]:
    """The part of the version that compiled code is tied to, such as (2, 15)."""
    first, second = version(torch).split(".")[:2]
    return int(first), int(second)


def cuda(torch: Path) -> str | None:
    """The version of CUDA that the torch in this directory was built with, such as "13.2"."""
    match = re.search(r"^cuda\b.*=\s*'([^']+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return match[1] if match else None


def run_in_the_environment(code: str) -> str:
    """What the code prints outside of the build's isolation; nothing if it fails."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")
    }
    # From the root directory: Python looks for modules in the directory that it is started in.
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
peer is compiled against the torch of the environment in which it will run, and this one has none:
  {python}
Type:
  {python} -m pip install torch
and then install peer again. With `python -m build`, which builds in an environment of its own,
add --no-isolation, or name the torch to build against: TORCH_DIR=.../site-packages/torch
"""
