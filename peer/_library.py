"""Locates and loads `libpeer.so`, which registers `torch.ops.peer`.

The library works with the minor version of Torch that it was compiled for. If it was built with
CUDA, it needs a Torch with CUDA. `load` checks both first, because the loader would report only an
unknown symbol or a missing file.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from peer import _version

__all__ = [
    "BinaryMismatchError",
    "build_info",
    "cmake_prefix_path",
    "library_path",
    "load",
    "load_on_import",
    "version",
]

_PACKAGE = Path(__file__).resolve().parent

# For CMake's find_package(peer), like torch.utils.cmake_prefix_path for Torch.
cmake_prefix_path = str(_PACKAGE / "share" / "cmake")


class BinaryMismatchError(ImportError):
    """The compiled library was built for another Torch than the imported one."""

    __module__ = "peer"  # the public name, which tracebacks show


def version() -> str:
    """The version of the installed package.

    Returns:
        The release and the build tag, "0.1.0+torch2.15cpu", as in the metadata of the distribution;
        the release alone, "0.1.0", if no build is recorded.
    """
    try:
        return str(build_info().get("version", _version.__version__))
    except ImportError:
        return _version.__version__


def library_path() -> Path:
    """The path of this installation's compiled library, whether or not the file exists."""
    return _PACKAGE / "lib" / "libpeer.so"


def build_info() -> dict[str, Any]:
    """The build record that is installed with the compiled library.

    Returns:
        The versions of peer and torch, the compiler, the CPU capabilities and the CUDA toolkit, by
        name.

    Raises:
        ImportError: there is no record, so nothing was built here.
    """
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError as error:
        raise ImportError(_not_built("_build_info.json")) from error
    return record


def minor_version(version: str) -> str:
    """The minor version of Torch, "2.15" for "2.15.0+cu132", which fixes its C++ ABI."""
    return ".".join(re.split(r"[.+]", version)[:2])


def load_on_import() -> bool:
    """Loads the library while the package is imported.

    `python -m peer.collect_env` imports the package before it runs the module. Its report says why
    a library does not load, so the import must succeed without the library in that case.

    Returns:
        Whether the library is loaded. False only for `python -m peer.collect_env`.

    Raises:
        ImportError: the library does not load, see `load`.
    """
    try:
        load()
    except ImportError:
        # While Python imports the package of a module given by -m, sys.argv[0] is "-m".
        if sys.argv[:1] == ["-m"] and ("-m", "peer.collect_env") in pairwise(sys.orig_argv):
            return False
        raise
    return True


def load() -> None:
    """Loads the compiled library. Later calls have no effect.

    Raises:
        BinaryMismatchError: the library was built for another minor version of Torch, or it was
            built with CUDA and Torch was not.
        ImportError: the library is missing, or the loader rejects it.
    """
    path = library_path()
    built = build_info()
    if not path.exists():
        raise ImportError(_not_built("lib/libpeer.so"))
    found = str(torch.__version__)
    if built["torch_minor"] != minor_version(found):
        raise BinaryMismatchError(
            f"peer {version()} was built for PyTorch {built['torch']}, but {_imported_torch()}, "
            f"and compiled code works with one minor version only. {_HOW_TO_REBUILD} Or go back to "
            f"that PyTorch: {sys.executable} -m pip install 'torch=={built['torch_minor']}.*'"
        )
    if built["cuda"] and not torch.version.cuda:
        raise BinaryMismatchError(
            f"peer {version()} was built with CUDA {built['cuda']['toolkit']}, but "
            f"{_imported_torch()}, without CUDA. {_HOW_TO_REBUILD}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"peer: the loader rejected {path}, built for PyTorch {built['torch']}, in PyTorch "
            f"{found}: {error.__cause__ or error}. {_HOW_TO_REBUILD}"
        ) from error


def _imported_torch() -> str:
    return f"this is PyTorch {torch.__version__} in {Path(torch.__file__).parent}"


_HOW_TO_REBUILD = (
    "Build it for this one, in a checkout of peer or an unpacked source distribution: "
    f"{sys.executable} -m pip install --force-reinstall --no-deps ."
)


def _not_built(missing: str) -> str:
    if (_PACKAGE.parent / "CMakeLists.txt").exists():
        return (
            f"peer: {_PACKAGE} is the source tree, and {missing} is missing because nothing was "
            "compiled here. Either install the package with `pip install .` and start Python in "
            "another directory, or compile in place with `make build`."
        )
    return f"peer: this installation in {_PACKAGE} is incomplete: {missing} is missing. " + (
        _HOW_TO_REBUILD
    )
