"""Decides whether the CUDA kernels are compiled, by which nvcc and for which GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torch_location import cuda, run_in_the_environment, version

OLDEST_GPU = 80  # what the kernels' instructions need


class NoCudaError(Exception):
    """Something that a build with CUDA needs is missing. The message says what."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and what it is to compile for."""

    nvcc: Path
    version: str
    architectures: list[str]  # in CMake's words: "80-real" is machine code, "90" that and PTX


def wanted() -> bool | None:
    """Whether CUDA is asked for: PEER_CUDA=0 or 1, else FORCE_CUDA=1; None where neither says.

    Raises:
        ValueError: If PEER_CUDA is something else.
    """
    if given := os.environ.get("PEER_CUDA"):
        if given not in ("0", "1"):
            raise ValueError(f"peer: expected PEER_CUDA=0 or PEER_CUDA=1, got {given!r}")
        return given == "1"
    return True if os.environ.get("FORCE_CUDA", "0") not in ("", "0") else None


def find_toolkit(torch: Path) -> Toolkit:
    """The CUDA compiler for the torch in this directory, and the GPUs to compile for.

    Raises:
        NoCudaError: If that torch has no CUDA, there is no nvcc that fits it, or no GPU that both
            nvcc and the kernels know.
        ValueError: If TORCH_CUDA_ARCH_LIST does not say which GPUs.
    """
    torch_cuda = cuda(torch)
    if torch_cuda is None:
        raise NoCudaError(f"torch {version(torch)} in {torch} was built without CUDA")
    nvcc = find_nvcc()
    toolkit = _nvcc_version(nvcc)
    if toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        raise NoCudaError(
            f"torch {version(torch)} was built with CUDA {torch_cuda}, but {nvcc} is of CUDA "
            f"{toolkit}, and their major versions must be the same; CUDA_HOME names another toolkit"
        )
    known = _known_to(nvcc)
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return Toolkit(nvcc, toolkit, parse_architectures(given, known))
    return Toolkit(nvcc, toolkit, choose_architectures(_gpus_here() or _gpus_of(torch), known))


def find_nvcc() -> Path:
    """The nvcc that CUDACXX or CUDA_HOME names, else that of PATH, else that of /usr/local/cuda.

    Raises:
        NoCudaError: If there is none, or none where a variable says.
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
    """What TORCH_CUDA_ARCH_LIST says, such as "8.0;9.0+PTX", in CMake's words: "80-real", "90".

    GPUs that the kernels do not support are left out, because the variable is often set for more
    than one package.

    Raises:
        ValueError: If it is not a list of numbers, nvcc does not know one of them, or none is left.
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
                f"peer: TORCH_CUDA_ARCH_LIST asks for {word}, but this nvcc knows {_listed(known)}"
            )
        architectures.append(f"{number}{features}{'' if ptx else '-real'}")
    if not architectures:
        raise ValueError(
            f"peer: TORCH_CUDA_ARCH_LIST={text!r} names no GPU of compute capability "
            f"{_dotted(OLDEST_GPU)} or newer, which the kernels need"
        )
    return list(dict.fromkeys(architectures))


def choose_architectures(gpus: set[int], known: set[int]) -> list[str]:
    """Machine code for those of the GPUs that nvcc and the kernels know, and PTX of the newest.

    GPUs newer than nvcc get PTX of the newest that it knows.

    Raises:
        NoCudaError: If all of them are too old.
    """
    supported = {min(gpu, max(known)) for gpu in gpus if gpu >= OLDEST_GPU} & known
    if not supported:
        raise NoCudaError(
            f"the kernels need a GPU of compute capability {_dotted(OLDEST_GPU)} or newer, and "
            + (
                f"these are {_listed(gpus)}"
                if gpus
                else "which ones torch was built for is unknown"
            )
            + "; TORCH_CUDA_ARCH_LIST, such as '8.0;9.0', names others"
        )
    *others, newest = sorted(supported)
    return [*(f"{gpu}-real" for gpu in others), str(newest)]


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def _listed(numbers: set[int]) -> str:
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
        raise NoCudaError(f"{nvcc} does not tell its version")
    return match[1]


def _known_to(nvcc: Path) -> set[int]:
    return {
        int(number) for number in re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch"))
    }


def _gpus_here() -> set[int]:
    capabilities = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.findall(r"^(\d+)\.(\d)\s*$", capabilities, re.MULTILINE)
    return {int(major + minor) for major, minor in found}


def _gpus_of(torch: Path) -> set[int]:
    """Those that torch itself was compiled for."""
    code = (
        f"import sys; sys.path.insert(0, {str(torch.parent)!r}); "
        "import torch; print(torch._C._cuda_getArchFlags())"
    )
    return {int(number) for number in re.findall(r"\bsm_(\d+)", run_in_the_environment(code))}
