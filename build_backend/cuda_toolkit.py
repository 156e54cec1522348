"""Decides whether to compile the CUDA kernels, with which nvcc and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torch_location import cuda, run_in_the_environment, version

OLDEST_GPU = 80  # compute capability 8.0, the minimum for the kernels' instructions


class NoCudaError(Exception):
    """A requirement of the CUDA build is missing. The message names it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the architectures to compile for."""

    nvcc: Path
    version: str
    architectures: list[str]  # as in CMake: "80-real" is machine code, "90" is machine code and PTX


def is_cuda_requested() -> bool | None:
    """Whether PEER_CUDA or FORCE_CUDA requests CUDA. None if neither is set.

    Raises:
        ValueError: PEER_CUDA is neither 0 nor 1.
    """
    if given := os.environ.get("PEER_CUDA"):
        if given not in ("0", "1"):
            raise ValueError(f"peer: expected PEER_CUDA=0 or PEER_CUDA=1, got {given!r}")
        return given == "1"
    return True if os.environ.get("FORCE_CUDA", "0") not in ("", "0") else None


def find_toolkit(torch: Path) -> Toolkit:
    """Returns the CUDA compiler for the torch in this directory, and the GPUs to compile for.

    Raises:
        NoCudaError: torch has no CUDA, no matching nvcc is found, or nvcc and the kernels support
            none of the GPUs.
        ValueError: TORCH_CUDA_ARCH_LIST is not valid.
    """
    torch_cuda = cuda(torch)
    if torch_cuda is None:
        raise NoCudaError(f"torch {version(torch)} in {torch} was built without CUDA")
    nvcc = find_nvcc()
    toolkit = _nvcc_version(nvcc)
    if toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        raise NoCudaError(
            f"torch {version(torch)} was built with CUDA {torch_cuda}, but {nvcc} is from CUDA "
            f"{toolkit}; the major versions must match, set CUDA_HOME to another toolkit"
        )
    known = _nvcc_architectures(nvcc)
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return Toolkit(nvcc, toolkit, parse_architectures(given, known))
    gpus = _local_gpus() or _torch_architectures(torch)
    return Toolkit(nvcc, toolkit, choose_architectures(gpus, known))


def find_nvcc() -> Path:
    """Returns the nvcc of CUDACXX, CUDA_HOME, PATH or /usr/local/cuda, in this order.

    Raises:
        NoCudaError: there is no nvcc, or none where CUDACXX or CUDA_HOME points to.
    """
    if given := os.environ.get("CUDACXX"):
        if found := shutil.which(given):
            return Path(found).absolute()
        raise NoCudaError(f"there is no CUDA compiler CUDACXX={given}")
    if given := os.environ.get("CUDA_HOME"):
        if found := shutil.which("nvcc", path=str(Path(given) / "bin")):
            return Path(found).absolute()
        raise NoCudaError(f"there is no nvcc in CUDA_HOME={given}")
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return Path(found).absolute()
    raise NoCudaError("there is no nvcc, neither on PATH nor in /usr/local/cuda; set CUDA_HOME")


def parse_architectures(text: str, known: set[int]) -> list[str]:
    """Converts TORCH_CUDA_ARCH_LIST, "8.0;9.0+PTX", to CMake's form, "80-real", "90".

    Architectures that are too old for the kernels are skipped, because the variable is often set
    for several packages.

    Raises:
        ValueError: an entry is not a compute capability, nvcc does not support one, or all of them
            are too old.
    """
    architectures = []
    for word in re.split(r"[;,\s]+", text.strip(";, \t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise ValueError(
                "peer: expected compute capabilities in TORCH_CUDA_ARCH_LIST, such as "
                f"'8.0;9.0+PTX', got {word!r} in {text!r}"
            )
        major, minor, features, ptx = match.groups()
        number = int(major + minor)
        if number < OLDEST_GPU:
            continue
        if number not in known:
            raise ValueError(
                f"peer: TORCH_CUDA_ARCH_LIST has {word}, but this nvcc supports {_list(known)}"
            )
        architectures.append(f"{number}{features}{'' if ptx else '-real'}")
    if not architectures:
        raise ValueError(
            f"peer: expected a compute capability of {_dotted(OLDEST_GPU)} or newer in "
            f"TORCH_CUDA_ARCH_LIST, got {text!r}"
        )
    return list(dict.fromkeys(architectures))


def choose_architectures(gpus: set[int], known: set[int]) -> list[str]:
    """Chooses machine code for the supported GPUs, and PTX for the newest of them.

    For a GPU newer than nvcc, it chooses PTX of the newest architecture that nvcc supports.

    Raises:
        NoCudaError: all GPUs are too old.
    """
    supported = {min(gpu, max(known)) for gpu in gpus if gpu >= OLDEST_GPU} & known
    if not supported:
        raise NoCudaError(
            f"the kernels need a GPU of compute capability {_dotted(OLDEST_GPU)} or newer, and "
            + (f"the GPUs have {_list(gpus)}" if gpus else "the architectures of torch are unknown")
            + "; set TORCH_CUDA_ARCH_LIST, such as '8.0;9.0', to compile for other GPUs"
        )
    *others, newest = sorted(supported)
    return [*(f"{gpu}-real" for gpu in others), str(newest)]


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _list(numbers: set[int]) -> str:
    return ", ".join(map(_dotted, sorted(numbers)))


def _output(*command: str | Path) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout


def _nvcc_version(nvcc: Path) -> str:
    match = re.search(r"\brelease (\d+\.\d+)", _output(nvcc, "--version"))
    if match is None:
        raise NoCudaError(f"{nvcc} --version prints no version")
    return match[1]


def _nvcc_architectures(nvcc: Path) -> set[int]:
    return {
        int(number) for number in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    }


def _local_gpus() -> set[int]:
    capabilities = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.findall(r"^(\d+)\.(\d)\s*$", capabilities, re.MULTILINE)
    return {int(major + minor) for major, minor in found}


def _torch_architectures(torch: Path) -> set[int]:
    """The architectures that torch was compiled for."""
    code = (
        f"import sys; sys.path.insert(0, {str(torch.parent)!r}); "
        "import torch; print(torch._C._cuda_getArchFlags())"
    )
    return {int(number) for number in re.findall(r"\bsm_(\d+)", run_in_the_environment(code))}
