"""Locates and loads `libpeer.so`, which registers `torch.ops.peer`.

The library is tied to the minor version of Torch that it was compiled for, and with CUDA to a Torch
that has it. That is compared before loading, because what the loader says otherwise is an unknown
symbol or a missing file.
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

# Where CMake's find_package(peer) is to look, as torch.utils.cmake_prefix_path is for Torch.
cmake_prefix_path = str(_PACKAGE / "share" / "cmake")


class BinaryMismatchError(ImportError):
    """The compiled part of peer was built for another Torch than the one at hand."""

    __module__ = "peer"  # where users find it, and what a traceback names


def version() -> str:
    """The version with what was built: "0.1.0+torch2.15cpu", or "0.1.0" where that is not recorded.

    It is the one in the metadata of the installed package.
    """
    try:
        return str(build_info().get("version", _version.__version__))
    except ImportError:
        return _version.__version__


def library_path() -> Path:
    """Where the compiled library of this installation belongs."""
    return _PACKAGE / "lib" / "libpeer.so"


def build_info() -> dict[str, Any]:
    """How the compiled library was built, as recorded beside it.

    Returns:
        peer and torch versions, compiler, CPU capabilities, CUDA and more, by name.

    Raises:
        ImportError: If there is no such record: nothing was built here.
    """
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError as error:
        raise ImportError(_not_built("_build_info.json")) from error
    return record


def minor_version(version: str) -> str:
    """The part of a Torch version that a library is tied to: "2.15" of "2.15.0+cu132"."""
    return ".".join(re.split(r"[.+]", version)[:2])


def load_on_import() -> None:
    """Loads the library while the package is imported.

    For `python -m peer.collect_env`, Python imports the package before it runs the module in it. As
    that report is wanted most where the library does not load, it is given in place of the error.
    """
    try:
        load()
    except ImportError:
        if ("-m", "peer.collect_env") not in pairwise(sys.orig_argv):
            raise
        from peer import collect_env

        collect_env.main()
        sys.exit()


def load() -> None:
    """Loads the compiled library, once; later calls do nothing.

    Raises:
        BinaryMismatchError: If it was built for another minor version of Torch, or with CUDA for a
            Torch that has none.
        ImportError: If it is missing or the loader refuses it.
    """
    path = library_path()
    built = build_info()
    if not path.exists():
        raise ImportError(_not_built("lib/libpeer.so"))
    found = str(torch.__version__)
    if built["torch_minor"] != minor_version(found):
        raise BinaryMismatchError(
            f"peer {version()} was built for PyTorch {built['torch']}, but {_torch_at_hand()}, and "
            f"compiled code works with one minor version only. {_HOW_TO_REBUILD} Or go back to "
            f"that PyTorch: {sys.executable} -m pip install 'torch=={built['torch_minor']}.*'"
        )
    if built["cuda"] and not torch.version.cuda:
        raise BinaryMismatchError(
            f"peer {version()} was built with CUDA {built['cuda']['toolkit']}, but "
            f"{_torch_at_hand()}, without CUDA. {_HOW_TO_REBUILD}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"peer: the loader refused {path}, built for PyTorch {built['torch']} and loaded into "
            f"PyTorch {found}: {error.__cause__ or error}. {_HOW_TO_REBUILD}"
        ) from error


def _torch_at_hand() -> str:
    return f"this is PyTorch {torch.__version__} in {Path(torch.__file__).parent}"


_HOW_TO_REBUILD = (
    "Build it for this one, in a checkout of peer or an unpacked source distribution: "
    f"{sys.executable} -m pip install --force-reinstall --no-deps ."
)


def _not_built(missing: str) -> str:
    if (_PACKAGE.parent / "CMakeLists.txt").exists():
        return (
            f"peer: {_PACKAGE} is the source tree, in which nothing is compiled: {missing} is "
            "missing. Either install the package, `pip install .`, and start Python from another "
            "directory; or compile in place, `make build`."
        )
    return f"peer: this installation in {_PACKAGE} is incomplete: {missing} is missing. " + (
        _HOW_TO_REBUILD
    )
