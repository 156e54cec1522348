"""Reports the configuration of this installation: versions, build, CPU capability, threads."""

from __future__ import annotations

import os
from typing import Any

import torch

from peer import _library

__all__ = ["show_config"]


def show_config() -> None:
    """Prints versions, the build, the CPU capability in use and the number of threads.

    Example:
        >>> import peer
        >>> peer.show_config()  # doctest: +ELLIPSIS
        peer            0.1.0, ...
        torch           ...
    """
    print(describe())


def describe() -> str:
    """The text of `show_config`. If the library does not load, the text says why."""
    lines = {
        "peer": f"{_library.version()}, {_library.library_path().parents[1]}",
        "torch": str(torch.__version__),
    }
    try:
        built = _library.build_info()
        lines["built for torch"] = built["torch"]
        lines["built with"] = f"{built['compiler']}, CMake {built['cmake']}, {built['build_type']}"
        if built["cxx_flags"]:
            lines["C++ flags"] = built["cxx_flags"]
        lines["CUDA"] = _cuda(built)
        _library.load()
        lines["CPU kernels"] = _cpu_kernels(built)
    except (ImportError, ValueError, RuntimeError) as error:
        lines["not usable"] = str(error)
    lines["threads"] = str(torch.get_num_threads())
    return "\n".join(f"{name:<15} {text}" for name, text in lines.items())


def _cuda(built: dict[str, Any]) -> str:
    if cuda := built["cuda"]:
        return f"built with {cuda['toolkit']} for {', '.join(cuda['architectures'])}"
    if torch.version.cuda:
        return f"not built (torch has {torch.version.cuda})"
    return "not built"


def _cpu_kernels(built: dict[str, list[str]]) -> str:
    override = os.environ.get("PEER_CPU_CAPABILITY")
    return (
        f"{torch.ops.peer.cpu_capability()} (compiled: {', '.join(built['cpu_capabilities'])}; "
        + (f"PEER_CPU_CAPABILITY={override})" if override else "PEER_CPU_CAPABILITY is not set)")
    )
