"""PEP 517 backend: that of setuptools, with the environment's torch on the path.

`pip install .` isolates the build from the environment. Other backends then find no torch, or
install a second one that does not match the environment. This backend finds the environment's torch
and appends it to the path, after the build requirements.
"""

from __future__ import annotations

import sys

from setuptools import build_meta
from setuptools.build_meta import build_sdist
from torch_location import TorchNotFoundError, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _add_torch_to_path() -> None:
    try:
        site_packages = find_torch().parent
    except TorchNotFoundError as error:
        # The front end prints this message, without a traceback.
        sys.exit(str(error))
    if str(site_packages) not in sys.path:
        sys.path.append(str(site_packages))


def _with_torch_on_path(hook):
    def wrapped(*args, **kwargs):
        _add_torch_to_path()
        return hook(*args, **kwargs)

    return wrapped


def _no_requirements(config_settings=None):
    """Returns no further requirements. Setuptools would run setup.py to find them."""
    return []


get_requires_for_build_sdist = _no_requirements
get_requires_for_build_wheel = _with_torch_on_path(_no_requirements)
get_requires_for_build_editable = _with_torch_on_path(_no_requirements)
prepare_metadata_for_build_wheel = _with_torch_on_path(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch_on_path(
    build_meta.prepare_metadata_for_build_editable
)
build_wheel = _with_torch_on_path(build_meta.build_wheel)
build_editable = _with_torch_on_path(build_meta.build_editable)
