"""Drives CMake, which builds everything compiled, and packs the result.

Environment variables:
    TORCH_DIR   directory of the torch package to build against, instead of the environment's
    MAX_JOBS    compiler processes at a time; default: one per 2 GB of memory, at most one per core
    CMAKE_ARGS  further arguments for CMake, such as -DCMAKE_CXX_COMPILER_LAUNCHER=ccache
    DEBUG       1 builds without optimisation and with debug information
    PEER_CUDA   1 (or FORCE_CUDA=1) compiles the CUDA kernels or fails, 0 leaves them out; default:
                compile them where torch was built with CUDA and there is an nvcc that fits it
    CUDACXX, CUDA_HOME
                the nvcc, or the toolkit with it; default: from PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST
                the GPUs to compile for, such as "8.0;9.0+PTX"; default: those of this machine, or,
                without one, those that torch was compiled for
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_toolkit import NoCudaError, Toolkit, find_toolkit, wanted  # noqa: E402
from torch_location import TorchNotFoundError, cuda, find_torch, minor, version  # noqa: E402

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def toolkit(torch: Path) -> Toolkit | None:
    """What compiles the CUDA kernels, or None for a build without them, whose reason is printed."""
    try:
        asked_for = wanted()
        if asked_for is False or (asked_for is None and cuda(torch) is None):
            return None
        try:
            return find_toolkit(torch)
        except NoCudaError as error:
            if asked_for:
                sys.exit(f"peer: CUDA kernels are asked for, but {error}")
            print(f"peer: the CUDA kernels are left out, because {error}")
            return None
    except ValueError as error:
        sys.exit(str(error))


def jobs() -> int:
    """How many compilers may run at a time."""
    if given := os.environ.get("MAX_JOBS"):
        return int(given)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // (2 * 10**9)))


def tool(name: str, directory: str) -> str:
    """The program from the PyPI package of that name, if it can be imported, or else from PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        program = Path(getattr(importlib.import_module(name), directory)) / name
        if program.exists():
            return str(program)
    if found := shutil.which(name):
        return found
    sys.exit(f"peer: {name} is needed for the build; {sys.executable} -m pip install {name}")


def build_directory(torch: Path, with_cuda: Toolkit | None = None) -> Path:
    """One per torch, CUDA compiler and kind of build: builds beside each other do not meet."""
    tools = str(torch) if with_cuda is None else f"{torch} {with_cuda.nvcc}"
    place = hashlib.sha256(tools.encode()).hexdigest()[:8]
    first, second = minor(torch)
    kind = ("debug" if DEBUG else "release") + ("-cuda" if with_cuda else "")
    return ROOT / "build" / f"torch{first}.{second}-{kind}-{place}"


def cuda_arguments(with_cuda: Toolkit | None) -> list[str]:
    """What CMake has to know of CUDA."""
    if with_cuda is None:
        return ["-DPEER_CUDA=OFF"]
    return [
        "-DPEER_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={with_cuda.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(with_cuda.architectures)}",
    ]


def build_and_install(prefix: Path) -> None:
    """Configures, builds and installs into the directory of the package."""
    try:
        torch = find_torch()
    except TorchNotFoundError as error:
        sys.exit(str(error))
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    with_cuda = toolkit(torch)
    directory = build_directory(torch, with_cuda)
    print(
        f"peer: compiling for torch {version(torch)} in {torch}, {jobs()} jobs, "
        + (
            f"with CUDA {with_cuda.version} for {' '.join(with_cuda.architectures)}"
            if with_cuda
            else "without CUDA"
        )
    )
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if DEBUG else 'Release'}",
        f"-DPEER_PYTHON={sys.executable}",
        f"-DTORCH_DIR={torch}",
        *cuda_arguments(with_cuda),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    for command in (
        configure,
        [cmake, "--build", str(directory), "--parallel", str(jobs())],
        [cmake, "--install", str(directory), "--prefix", str(prefix)],
    ):
        print(" ".join(map(shlex.quote, command)), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit("peer: the build failed; the first error above says why")


class Build(build):
    """The build, in CMake's directory, so that one for another torch can run beside it."""

    def initialize_options(self) -> None:
        super().initialize_options()
        with contextlib.suppress(TorchNotFoundError):  # which a source distribution does without
            self.build_base = str(build_directory(find_torch()) / "python")

    def run(self) -> None:
        # What an earlier build left may no longer belong to the package.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """libpeer.so, its headers and its build record; into the source tree for editable installs."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        build_and_install(ROOT / "peer" if in_place else Path(self.build_lib).resolve() / "peer")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Bound to the platform, but to no Python: the library does not know of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    """Has something compiled, although no Extension that setuptools would know."""

    def has_ext_modules(self) -> bool:
        return True


def torch_requirement() -> str:
    """Compiled code works with one minor version of torch; a source distribution with all."""
    if "sdist" not in sys.argv[1:]:
        try:
            first, second = minor(find_torch())
            return f"torch>={first}.{second},<{first}.{second + 1}"
        except TorchNotFoundError:
            pass
    return "torch>=2.11"


setup(
    distclass=WithLibrary,
    install_requires=[torch_requirement()],
    cmdclass={
        "build": Build,
        "build_ext": BuildLibrary,
        "bdist_wheel": PlatformWheel,
    },
)
