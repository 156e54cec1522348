"""Drives CMake, which builds everything compiled, and packs the result.

Environment variables:
    TORCH_DIR   directory of the torch package to build against, instead of the environment's
    MAX_JOBS    compiler processes at a time; default: one per 2 GB of memory, at most one per core
    CMAKE_ARGS  further arguments for CMake, such as -DCMAKE_CXX_COMPILER_LAUNCHER=ccache
    DEBUG       1 builds without optimisation and with debug information
    PEER_CUDA   0 or 1; there are no CUDA kernels yet, so 1 (like FORCE_CUDA=1) is an error
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
from torch_location import TorchNotFoundError, find_torch, minor, version  # noqa: E402

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def refuse_cuda() -> None:
    """Says so if CUDA kernels are asked for."""
    for name in ("PEER_CUDA", "FORCE_CUDA"):
        if os.environ.get(name, "0") not in ("", "0"):
            sys.exit(
                f"peer: {name}={os.environ[name]}, but there are no CUDA kernels yet; unset it"
            )


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


def build_directory(torch: Path) -> Path:
    """One per torch and kind of build, so that builds beside each other do not meet."""
    place = hashlib.sha256(str(torch).encode()).hexdigest()[:8]
    first, second = minor(torch)
    return ROOT / "build" / f"torch{first}.{second}-{'debug' if DEBUG else 'release'}-{place}"


def build_and_install(prefix: Path) -> None:
    """Configures, builds and installs into the directory of the package."""
    refuse_cuda()
    try:
        torch = find_torch()
    except TorchNotFoundError as error:
        sys.exit(str(error))
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    directory = build_directory(torch)
    print(f"peer: compiling for torch {version(torch)} in {torch}, {jobs()} jobs, without CUDA")
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if DEBUG else 'Release'}",
        f"-DPEER_PYTHON={sys.executable}",
        f"-DTORCH_DIR={torch}",
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
