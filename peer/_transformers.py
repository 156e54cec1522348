"""Registers the quantizer of `peer.hf` with transformers, without importing transformers.

transformers may be imported before or after `peer`, or never, and it imports its registry of
quantizers only when it loads a model. It finds no plugins by entry points. So if the registry is
not there yet, a finder waits for its import, runs it as Python would, and registers the quantizer
afterwards. The finder then removes itself.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_when_imported"]

_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Registers the quantizer now, or as soon as transformers imports its registry."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        from peer.hf import quantizer  # noqa: F401
    except ImportError as error:
        warnings.warn(
            f"peer cannot register with this version of transformers, so models with PEER layers "
            f"cannot be loaded by from_pretrained: {error}",
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    """Finds the registry as the other finders do, and has `_register` called after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module by its own loader and calls `_register` afterwards."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
