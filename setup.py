"""Runs CMake, which compiles the library, and packs the result.

Environment variables:
    TORCH_DIR   directory of the torch package to build against; default: that of the environment
    MAX_JOBS    number of compiler processes; default: one per 2 GB of memory, at most one per core
    CMAKE_ARGS  additional arguments for CMake, such as -DCMAKE_CXX_COMPILER_LAUNCHER=ccache
    DEBUG       1 builds without optimisation and with debug information
    PEER_CUDA   1 (or FORCE_CUDA=1) compiles the CUDA kernels or fails, 0 skips them; default:
                compile them if torch was built with CUDA and a matching nvcc is found
    CUDACXX, CUDA_HOME
                the nvcc, or the toolkit that contains it; default: from PATH or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST
                compute capabilities to compile for, such as "8.0;9.0+PTX"; default: those of the
                GPUs in this machine, or without a GPU those that torch was compiled for
"""

from __future__ import annotations

import contextlib
import email
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent

sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_toolkit import NoCudaError, Toolkit, find_toolkit, is_cuda_requested  # noqa: E402
from torch_location import (  # noqa: E402
    OLDEST,
    TorchNotFoundError,
    cuda,
    find_torch,
    minor,
    version,
)

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


@functools.cache
def environment_torch() -> Path:
    """The directory of the torch to build against."""
    try:
        return find_torch()
    except TorchNotFoundError as error:
        sys.exit(str(error))


@functools.cache
def toolkit(torch: Path) -> tuple[Toolkit | None, str]:
    """The toolkit that compiles the CUDA kernels, or None and the reason for skipping them."""
    try:
        requested = is_cuda_requested()
        if requested is False:
            return None, "PEER_CUDA=0 is set"
        if requested is None and cuda(torch) is None:
            return None, f"torch {version(torch)} has no CUDA"
        try:
            return find_toolkit(torch), ""
        except NoCudaError as error:
            if requested:
                sys.exit(f"peer: CUDA kernels were requested, but {error}")
            return None, str(error)
    except ValueError as error:
        sys.exit(str(error))


def release() -> str:
    """The version without a build tag, such as 0.1.0."""
    source = (ROOT / "peer" / "_version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    assert match is not None
    return match[1]


def tag(torch_minor: tuple[int, int], cuda_version: str | None) -> str:
    """The build tag: torch2.15cpu, or torch2.15cu130 with kernels compiled by CUDA 13.0."""
    kernels = f"cu{cuda_version.replace('.', '')}" if cuda_version else "cpu"
    return "torch{}.{}".format(*torch_minor) + kernels


@functools.cache
def full_version() -> str:
    """The release, with the build tag if built from a checkout: 0.1.0+torch2.15cpu.

    A build from a source distribution has no tag: pip rejects a build whose version differs from
    the one in the file name, and that name was chosen before torch was known.
    """
    if building_sdist() or (ROOT / "PKG-INFO").exists():
        return release()
    torch = environment_torch()
    with_cuda, _ = toolkit(torch)
    return f"{release()}+{tag(minor(torch), with_cuda.version if with_cuda else None)}"


def torch_requirement() -> str:
    """The requirement on torch: one minor version for a wheel, all for a source distribution."""
    if building_sdist():
        return "torch>={}.{}".format(*OLDEST)
    first, second = minor(environment_torch())
    return f"torch>={first}.{second},<{first}.{second + 1}"


def building_sdist() -> bool:
    """Whether this builds a source distribution, which needs no torch."""
    return "sdist" in sys.argv[1:]


def jobs() -> int:
    """The number of compiler processes to run in parallel."""
    if given := os.environ.get("MAX_JOBS"):
        return int(given)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // (2 * 10**9)))


def tool(name: str, directory: str) -> str:
    """The program from the Python package with its name, or from PATH if there is no package."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        program = Path(getattr(importlib.import_module(name), directory)) / name
        if program.exists():
            return str(program)
    if found := shutil.which(name):
        return found
    sys.exit(f"peer: {name} is needed for the build; {sys.executable} -m pip install {name}")


def build_directory(torch: Path, with_cuda: Toolkit | None = None) -> Path:
    """The build directory for this torch, CUDA compiler, build type and set of flags.

    Different builds have different directories, so they can run in parallel and share no CMake
    cache.
    """
    tools = [str(torch)] if with_cuda is None else [str(torch), str(with_cuda.nvcc)]
    flags = [f"{n}={os.environ[n]}" for n in ("CMAKE_ARGS", "CXX", "CXXFLAGS") if os.environ.get(n)]
    digest = hashlib.sha256(" ".join([*tools, *flags]).encode()).hexdigest()[:8]
    first, second = minor(torch)
    kind = ("debug" if DEBUG else "release") + ("-cuda" if with_cuda else "")
    return ROOT / "build" / f"torch{first}.{second}-{kind}-{digest}"


def cuda_arguments(with_cuda: Toolkit | None) -> list[str]:
    """CMake's arguments for CUDA."""
    if with_cuda is None:
        return ["-DPEER_CUDA=OFF"]
    return [
        "-DPEER_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={with_cuda.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(with_cuda.architectures)}",
    ]


def build_and_install(prefix: Path) -> None:
    """Configures, builds and installs into `prefix`, the directory of the Python package."""
    torch = environment_torch()
    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    with_cuda, reason = toolkit(torch)
    directory = build_directory(torch, with_cuda)
    print(
        f"peer: compiling for torch {version(torch)} in {torch}, {jobs()} jobs, "
        + (
            f"with CUDA {with_cuda.version} for {' '.join(with_cuda.architectures)}"
            if with_cuda
            else f"without CUDA kernels, because {reason}"
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
            sys.exit("peer: the build failed; see the first error above")
    complete_record(prefix / "_build_info.json", torch, with_cuda)


def complete_record(path: Path, torch: Path, with_cuda: Toolkit | None) -> None:
    """Adds the full version to the build record, after checking that CMake built for its tag."""
    built = json.loads(path.read_text())
    first, second = built["torch_minor"].split(".")
    found = tag((int(first), int(second)), built["cuda"] and built["cuda"]["toolkit"])
    expected = tag(minor(torch), with_cuda.version if with_cuda else None)
    if found != expected:
        sys.exit(
            f"peer: expected a build for {expected}, but CMake built for {found}; set TORCH_DIR, "
            "PEER_CUDA and CUDA_HOME instead of choosing torch or CUDA in CMAKE_ARGS"
        )
    path.write_text(json.dumps({"version": full_version(), **built}, indent=2) + "\n")


class Build(build):
    """The build. It runs in CMake's build directory, so builds for two torches do not collide."""

    def initialize_options(self) -> None:
        super().initialize_options()
        with contextlib.suppress(TorchNotFoundError):  # a source distribution needs no torch
            self.build_base = str(build_directory(find_torch()) / "python")

    def run(self) -> None:
        # An earlier build may have left files that are no longer part of the package.
        package = Path(self.build_lib) / "peer"
        if package.exists():
            shutil.rmtree(package)
        super().run()


class BuildLibrary(build_ext):
    """Builds libpeer.so, its headers and its build record; in place for editable installs."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        build_and_install(ROOT / "peer" if in_place else Path(self.build_lib).resolve() / "peer")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


def check_prepared_metadata(directory: str | None) -> None:
    """Ends a build that does not match the metadata that the front end prepared before it."""
    if directory is None:
        return
    metadata = email.message_from_string((Path(directory) / "METADATA").read_text())
    torch = next(
        line for line in metadata.get_all("Requires-Dist", []) if re.match(r"torch[<>=]", line)
    )
    bounds = set(re.findall(r"[<>=]+[\d.]+", torch))
    if (metadata["Version"], bounds) != (full_version(), set(torch_requirement()[5:].split(","))):
        sys.exit(
            f"peer: the metadata are for torch-peer {metadata['Version']} and {torch}, but this is "
            f"a build of torch-peer {full_version()} for {torch_requirement()}; use the same torch "
            "and the same environment variables for the metadata and the build"
        )


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3, because the library does not link Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def run(self) -> None:
        check_prepared_metadata(self.dist_info_dir)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class EditableWheel(editable_wheel):
    """An editable install, which uses the library in the source tree."""

    def run(self) -> None:
        check_prepared_metadata(self.dist_info_dir)
        super().run()


class SourceDistribution(sdist):
    """Contains the files in MANIFEST.in; setuptools would add those of earlier archives."""

    def run(self) -> None:
        (ROOT / "torch_peer.egg-info" / "SOURCES.txt").unlink(missing_ok=True)
        super().run()


class WithLibrary(Distribution):
    """Makes setuptools treat the package as compiled, although it has no Extension."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    version=full_version(),
    distclass=WithLibrary,
    install_requires=[torch_requirement()],
    cmdclass={
        "build": Build,
        "build_ext": BuildLibrary,
        "bdist_wheel": PlatformWheel,
        "editable_wheel": EditableWheel,
        "sdist": SourceDistribution,
    },
)
