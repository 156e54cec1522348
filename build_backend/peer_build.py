"""PEP 517 backend: setuptools' own, after making sure that there is a torch to build against.

`pip install .` isolates the build from the environment, so stock backends either do not see its
torch or fetch a second one, which the result would then not fit. This one finds the environment's
torch and puts it on the path behind the build requirements.
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


def _see_torch() -> None:
    try:
        site_packages = find_torch().parent
    except TorchNotFoundError as error:
        # Without a traceback: the front end shows what is printed here.
        sys.exit(str(error))
    if str(site_packages) not in sys.path:
        sys.path.append(str(site_packages))


def _after_seeing_torch(hook):
    def with_torch(*args, **kwargs):
        _see_torch()
        return hook(*args, **kwargs)

    return with_torch


def _no_more_requirements(config_settings=None):
    """Those of pyproject.toml are all. Setuptools would run setup.py to find that out."""
    return []


get_requires_for_build_sdist = _no_more_requirements
get_requires_for_build_wheel = _after_seeing_torch(_no_more_requirements)
get_requires_for_build_editable = _after_seeing_torch(_no_more_requirements)
prepare_metadata_for_build_wheel = _after_seeing_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _after_seeing_torch(
    build_meta.prepare_metadata_for_build_editable
)
build_wheel = _after_seeing_torch(build_meta.build_wheel)
build_editable = _after_seeing_torch(build_meta.build_editable)
