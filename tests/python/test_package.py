"""The installed package: versions, reports, and errors if the library does not match torch."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import peer

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = Path(peer.__file__).resolve().parent


def run(
    *arguments: str, package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python with a copy of the package, in its directory."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the package that a test can modify."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "peer"))


@pytest.fixture
def package_for_another_torch(copied_package: Path) -> Path:
    """A copy whose build record is for torch 2.3."""
    record = copied_package / "_build_info.json"
    built = json.loads(record.read_text())
    record.write_text(json.dumps({**built, "torch": "2.3.1+cpu", "torch_minor": "2.3"}))
    return copied_package


def test_version_is_the_metadata_s():
    try:
        version = importlib.metadata.version("torch-peer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package runs from the source tree, without metadata")
    assert peer.__version__ == version


def test_library_and_its_record_agree():
    library = json.loads(torch.ops.peer.build_info())
    record = json.loads((PACKAGE / "_build_info.json").read_text())
    assert library["peer"] == record["peer"] == peer.__version__.split("+")[0]
    assert record.get("version", record["peer"]) == peer.__version__
    assert library["compiler"] == record["compiler"]
    assert library["cpu_capabilities"].split() == record["cpu_capabilities"]
    assert record["torch"].startswith(library["torch"].split("+")[0])
    assert library["cuda"] == record["cuda"]


def test_show_config_prints_versions_build_and_capability(capsys: pytest.CaptureFixture[str]):
    peer.show_config()
    lines = dict(re.split(r"\s{2,}| (?=\d)", line, maxsplit=1) for line in _lines(capsys))
    assert lines["peer"].startswith(f"{peer.__version__}, {PACKAGE}")
    assert lines["torch"] == torch.__version__
    assert lines["CPU kernels"].split()[0] == torch.ops.peer.cpu_capability()
    assert lines["threads"] == str(torch.get_num_threads())
    built = json.loads(torch.ops.peer.build_info())["cuda"]
    assert lines["CUDA"].startswith(
        f"built with {built['toolkit']} for {built['architectures'][0]}" if built else "not built"
    )
    assert "not usable" not in lines


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.strip().splitlines()


def test_collect_env_reports_package_torch_and_machine():
    report = run("-m", "peer.collect_env")
    assert report.returncode == 0, report.stderr
    assert f"{peer.__version__}, {PACKAGE}" in report.stdout
    assert f"{torch.__version__}, {Path(torch.__file__).parent}" in report.stdout
    assert sys.executable in report.stdout
    assert "CPU kernels" in report.stdout
    assert "not usable" not in report.stdout


def test_collect_env_works_where_the_library_does_not_load(package_for_another_torch: Path):
    report = run("-m", "peer.collect_env", package=package_for_another_torch)
    assert report.returncode == 0, report.stderr
    assert re.search(r"not usable +peer \S+ was built for PyTorch 2\.3\.1\+cpu", report.stdout)
    assert report.stdout.count("== torch") == 1


def test_another_torch_is_named_with_what_to_type(package_for_another_torch: Path):
    result = run("-c", "import peer", package=package_for_another_torch)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error == (
        f"peer.BinaryMismatchError: peer {peer.__version__} was built for PyTorch 2.3.1+cpu, but "
        f"this is PyTorch {torch.__version__} in {Path(torch.__file__).parent}, and compiled code "
        "works with one minor version only. Build it for this one, in a checkout of peer or an "
        f"unpacked source distribution: {sys.executable} -m pip install --force-reinstall "
        f"--no-deps . Or go back to that PyTorch: {sys.executable} -m pip install 'torch==2.3.*'"
    )


def test_torch_without_cuda_is_refused_by_a_library_with_it(copied_package: Path):
    record = copied_package / "_build_info.json"
    built = json.loads(record.read_text())
    cuda = {"toolkit": "13.0", "architectures": ["sm_90"]}
    record.write_text(json.dumps({**built, "cuda": cuda}))
    result = run(
        "-c", "import torch; torch.version.cuda = None; import peer", package=copied_package
    )
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith(
        f"peer.BinaryMismatchError: peer {peer.__version__} was built with CUDA 13.0, but this is"
    )
    assert ", without CUDA. Build it for this one" in error
    assert f"{sys.executable} -m pip install" in error


def test_version_without_a_record_is_the_release(copied_package: Path):
    (copied_package / "_build_info.json").unlink()
    result = run("-c", "from peer import _library", package=copied_package)
    assert "_build_info.json is missing" in result.stderr
    report = run("-m", "peer.collect_env", package=copied_package)
    assert re.search(r"^peer +\d+\.\d+\.\d+, ", report.stdout, re.M), report.stdout


def test_another_torch_is_an_import_error():
    assert issubclass(peer.BinaryMismatchError, ImportError)


def test_missing_library_says_what_to_type(copied_package: Path):
    (copied_package / "lib" / "libpeer.so").unlink()
    result = run("-c", "import peer", package=copied_package)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: peer: this installation in")
    assert "lib/libpeer.so is missing" in error
    assert "pip install" in error


def test_source_tree_in_which_nothing_is_compiled_says_so(copied_package: Path):
    shutil.rmtree(copied_package / "lib")
    (copied_package / "_build_info.json").unlink()
    (copied_package.parent / "CMakeLists.txt").touch()
    result = run("-c", "import peer", package=copied_package)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert "is the source tree, and _build_info.json is missing because nothing was" in error
    assert "make build" in error


def test_library_that_the_loader_refuses_keeps_the_reason(copied_package: Path):
    (copied_package / "lib" / "libpeer.so").write_bytes(b"no library")
    result = run("-c", "import peer", package=copied_package)
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: peer: the loader rejected")
    assert "invalid ELF header" in error or "file too short" in error
    assert "direct cause" in result.stderr


CAPABILITY = "import peer, torch; print(torch.ops.peer.cpu_capability())"


def test_capability_can_be_lowered():
    result = run("-c", CAPABILITY, PEER_CPU_CAPABILITY="default")
    assert result.stdout.strip() == "default", result.stderr


def test_unknown_capability_lists_the_known_ones():
    result = run("-c", CAPABILITY, PEER_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    error = result.stderr.splitlines()[-1]
    assert error.startswith("RuntimeError: peer: PEER_CPU_CAPABILITY=sse9 is not one of: default")


def test_unknown_capability_does_not_keep_show_config_from_reporting():
    result = run("-c", "import peer; peer.show_config()", PEER_CPU_CAPABILITY="sse9")
    assert result.returncode == 0, result.stderr
    assert "PEER_CPU_CAPABILITY=sse9 is not one of" in result.stdout


@pytest.mark.skipif(
    "avx512vl" in Path("/proc/cpuinfo").read_text(), reason="this processor has every capability"
)
def test_capability_that_the_processor_lacks_is_refused():
    if "avx512" not in json.loads(torch.ops.peer.build_info())["cpu_capabilities"]:
        pytest.skip("not compiled for this architecture")
    result = run("-c", CAPABILITY, PEER_CPU_CAPABILITY="avx512")
    assert result.returncode != 0
    assert "but this processor does not have avx512" in result.stderr.splitlines()[-1]


def test_one_openmp_runtime_serves_torch_and_peer(run_python: Callable[..., Any]):
    runtimes = run_python("""
import json, re, peer
maps = open("/proc/self/maps").read()
print(json.dumps(sorted(set(re.findall(r"/\\S*lib(?:g|i)?omp\\S*", maps)))))
""")
    assert len(runtimes) == 1, runtimes


def test_torch_s_number_of_threads_governs_the_operators(run_python: Callable[..., Any]):
    started = run_python("""
import json, os, peer, torch

x, table = torch.ones(512, 32), torch.ones(64, 2, 32)
weights, indices = torch.ones(512, 8), torch.zeros(512, 8, dtype=torch.int64)
threads = []
for count in (1, 4):
    torch.set_num_threads(count)
    torch.ops.peer.expert_mlp(x, weights, indices, table, "relu")
    threads.append(len(os.listdir("/proc/self/task")))
print(json.dumps(threads[1] - threads[0]))
""")
    assert started == 3


def _modules() -> list[str]:
    found = pkgutil.walk_packages(peer.__path__, "peer.")
    return ["peer", *(module.name for module in found)]


@pytest.mark.parametrize("name", _modules())
def test_examples_in_docstrings_hold(name: str):
    if name.startswith("peer.hf."):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


class TestBuild:
    """Messages and decisions of the build, without compiling."""

    pytestmark = pytest.mark.skipif(
        not (CHECKOUT / "setup.py").exists(), reason="not in a checkout"
    )
    find = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT / 'build_backend')!r}); "
        "from torch_location import find_torch; print(find_torch())"
    )

    def test_torch_is_found_from_an_isolated_build(self):
        # -S removes site-packages, like the isolated build of a front end.
        result = run("-S", "-c", self.find, PYTHONPATH="")
        assert result.stdout.strip() == str(Path(torch.__file__).resolve().parent), result.stderr

    def test_no_torch_says_what_to_type(self, tmp_path: Path):
        result = run("-c", self.find, TORCH_DIR=str(tmp_path))
        assert result.returncode != 0
        assert f"{sys.executable} -m pip install torch" in result.stderr

    def test_too_old_a_torch_is_refused(self, tmp_path: Path):
        (tmp_path / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
        result = run("-c", self.find, TORCH_DIR=str(tmp_path))
        assert result.returncode != 0
        assert "peer needs torch 2.11 or newer" in result.stderr

    @pytest.mark.parametrize("variable", ["PEER_CUDA", "FORCE_CUDA"])
    def test_cuda_without_a_compiler_for_it_is_an_error(self, variable: str, tmp_path: Path):
        result = build_in_place(TORCH_DIR=fake_torch(tmp_path), CUDA_HOME=tmp_path, **{variable: 1})
        assert result.returncode != 0
        assert result.stderr.strip() == (
            f"peer: CUDA kernels were requested, but there is no nvcc in CUDA_HOME={tmp_path}"
        )

    def test_cuda_with_a_torch_that_has_none_is_an_error(self, tmp_path: Path):
        torch_dir = fake_torch(tmp_path, cuda=None)
        result = build_in_place(TORCH_DIR=torch_dir, PEER_CUDA=1)
        assert result.returncode != 0
        assert "but torch 2.15.0" in result.stderr
        assert "was built without CUDA" in result.stderr

    def test_cuda_of_another_major_version_is_an_error(self, tmp_path: Path):
        result = build_in_place(
            TORCH_DIR=fake_torch(tmp_path, cuda="12.6"), CUDACXX=fake_nvcc(tmp_path), PEER_CUDA=1
        )
        assert result.returncode != 0
        nvcc = tmp_path / "nvcc"
        assert f"was built with CUDA 12.6, but {nvcc} is from CUDA 13.0" in result.stderr

    @pytest.mark.parametrize("value", ["yes", "2"])
    def test_peer_cuda_is_0_or_1(self, value: str, tmp_path: Path):
        result = build_in_place(TORCH_DIR=fake_torch(tmp_path), PEER_CUDA=value)
        assert result.returncode != 0
        assert f"expected PEER_CUDA=0 or PEER_CUDA=1, got '{value}'" in result.stderr

    @pytest.mark.parametrize(
        ("tag", "variables"),
        [
            ("torch2.15cu130", {"CUDACXX": "nvcc"}),
            ("torch2.15cpu", {"CUDACXX": "nvcc", "PEER_CUDA": 0}),
            ("torch2.15cpu", {"CUDA_HOME": "nowhere"}),
        ],
        ids=["CUDA", "CUDA left out", "no toolkit"],
    )
    def test_version_says_what_the_build_is_for(
        self, tag: str, variables: dict[str, Any], tmp_path: Path
    ):
        fake_nvcc(tmp_path)
        places = {n: tmp_path / v for n, v in variables.items() if isinstance(v, str)}
        result = setup_py(
            "--version",
            TORCH_DIR=fake_torch(tmp_path),
            TORCH_CUDA_ARCH_LIST="9.0",
            **{**variables, **places},
        )
        assert result.stdout.strip() == f"{peer.__version__.split('+')[0]}+{tag}", result.stderr

    def test_torch_without_cuda_needs_no_toolkit(self, tmp_path: Path):
        result = setup_py("--version", TORCH_DIR=fake_torch(tmp_path, cuda=None))
        assert result.stdout.strip().endswith("+torch2.15cpu"), result.stderr

    def test_build_that_differs_from_its_metadata_is_an_error(self, tmp_path: Path):
        torch_dir = fake_torch(tmp_path)
        with_cuda = {"CUDACXX": fake_nvcc(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
        prepared = setup_py("dist_info", "-o", str(tmp_path), TORCH_DIR=torch_dir, **with_cuda)
        assert prepared.returncode == 0, prepared.stderr
        (metadata,) = tmp_path.glob("*.dist-info")
        result = setup_py(
            *("bdist_wheel", "--dist-info-dir", str(metadata)), TORCH_DIR=torch_dir, PEER_CUDA=0
        )
        assert result.returncode != 0
        error = result.stderr.splitlines()[-1]
        assert re.match(r"peer: the metadata are for torch-peer \S+\+torch2\.15cu130 and", error)
        assert re.search(r"a build of torch-peer \S+\+torch2\.15cpu for torch>=2\.15,<2", error)

    @pytest.mark.parametrize(
        ("minor", "toolkit", "found"),
        [("2.15", "12.6", "torch2.15cu126"), ("2.14", None, "torch2.14cpu")],
    )
    def test_cmake_that_makes_something_else_is_an_error(
        self, minor: str, toolkit: str | None, found: str, tmp_path: Path
    ):
        result = self.build_with_cmake_that_makes(minor, toolkit, tmp_path)
        assert result.returncode != 0
        assert result.stderr.splitlines()[-1].startswith(
            f"peer: expected a build for torch2.15cpu, but CMake built for {found}; "
        )

    def test_record_gets_the_version(self, tmp_path: Path):
        result = self.build_with_cmake_that_makes("2.15", None, tmp_path)
        assert result.returncode == 0, result.stderr
        record = json.loads((tmp_path / "lib" / "peer" / "_build_info.json").read_text())
        assert record["version"] == f"{peer.__version__.split('+')[0]}+torch2.15cpu"

    def build_with_cmake_that_makes(
        self, minor: str, toolkit: str | None, directory: Path
    ) -> subprocess.CompletedProcess[str]:
        """Builds for the CPU and torch 2.15 with a CMake that only writes such a record."""
        record = {"torch_minor": minor, "cuda": toolkit and {"toolkit": toolkit}}
        (directory / "cmake").mkdir()
        (directory / "cmake" / "__init__.py").write_text(
            f"CMAKE_BIN_DIR = {str(directory / 'cmake')!r}\n"
        )
        fake_program(
            directory / "cmake" / "cmake",
            f"[ $1 = --install ] || exit 0\nmkdir -p $4\n"
            f"echo {shlex.quote(json.dumps(record))} >$4/_build_info.json",
        )
        return setup_py(
            *("build_ext", "--build-lib", str(directory / "lib")),
            PYTHONPATH=os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
            TORCH_DIR=fake_torch(directory),
            PEER_CUDA=0,
        )


class TestCudaToolkit:
    """The GPUs that the CUDA kernels are compiled for."""

    pytestmark = TestBuild.pytestmark
    known: ClassVar = {75, 80, 86, 89, 90, 100, 120}

    @pytest.fixture
    def toolkit(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(str(CHECKOUT / "build_backend"))
        return importlib.import_module("cuda_toolkit")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("9.0", ["90-real"]),
            ("8.0;9.0+PTX", ["80-real", "90"]),
            ("8.0 9.0a, 9.0a;12.0", ["80-real", "90a-real", "120-real"]),
            ("7.5;8.6", ["86-real"]),
            (" 8.0 ; 9.0; ", ["80-real", "90-real"]),
        ],
    )
    def test_architectures_are_those_of_the_list(self, toolkit, text: str, expected: list[str]):
        assert toolkit.parse_architectures(text, self.known) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("Hopper", r"expected compute capabilities .*'8.0;9.0\+PTX', got 'Hopper'"),
            ("90", "got '90'"),
            (";", "got ''"),
            ("7.0;7.5+PTX", r"compute capability of 8\.0 or newer .* got '7\.0;7\.5\+PTX'"),
            ("8.0;13.0", "has 13.0, but this nvcc supports 7.5, 8.0, .*, 12.0"),
        ],
    )
    def test_a_list_that_names_no_gpus_is_refused(self, toolkit, text: str, message: str):
        with pytest.raises(ValueError, match=message):
            toolkit.parse_architectures(text, self.known)

    @pytest.mark.parametrize(
        ("gpus", "expected"),
        [
            ({90}, ["90"]),
            ({75, 80, 86, 90, 100}, ["80-real", "86-real", "90-real", "100"]),
            ({86, 87}, ["86"]),  # nvcc does not support 8.7
            ({130}, ["120"]),  # PTX of the newest that nvcc supports
        ],
    )
    def test_gpus_get_machine_code_and_the_newest_ptx(
        self, toolkit, gpus: set[int], expected: list[str]
    ):
        assert toolkit.choose_architectures(gpus, self.known) == expected

    @pytest.mark.parametrize(
        ("gpus", "message"), [({70, 75}, "the GPUs have 7.0, 7.5"), (set(), "are unknown")]
    )
    def test_gpus_that_are_too_old_leave_no_build(self, toolkit, gpus: set[int], message: str):
        with pytest.raises(toolkit.NoCudaError, match=message):
            toolkit.choose_architectures(gpus, self.known)

    def test_the_list_is_asked_before_the_machine(
        self, toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        nvcc = fake_nvcc(tmp_path)
        monkeypatch.setenv("CUDACXX", str(nvcc))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        found = toolkit.find_toolkit(fake_torch(tmp_path))
        assert found == toolkit.Toolkit(nvcc, "13.0", ["90-real"])

    def test_this_machine_s_gpus_are_the_default(
        self, toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path)))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        fake_program(tmp_path / "nvidia-smi", "echo 8.0\necho 9.0\necho 9.0")
        found = toolkit.find_toolkit(fake_torch(tmp_path))
        assert found.architectures == ["80-real", "90"]

    def test_without_a_gpu_those_of_torch_are_compiled_for(
        self, toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        monkeypatch.setenv("CUDACXX", str(fake_nvcc(tmp_path)))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        fake_program(tmp_path / "nvidia-smi", "exit 9")
        torch_dir = fake_torch(tmp_path)
        (torch_dir / "__init__.py").write_text(
            "class _C:\n    _cuda_getArchFlags = lambda: 'sm_75 sm_80 sm_90 compute_90'\n"
        )
        assert toolkit.find_toolkit(torch_dir).architectures == ["80-real", "90"]


def build_in_place(**environment: object) -> subprocess.CompletedProcess[str]:
    """Runs setup.py for a build that stops before it compiles."""
    return setup_py("build_ext", "--inplace", **environment)


def setup_py(*arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """Runs setup.py. Of the variables that it reads, only these are set."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs the build requirements")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PEER_CUDA", "FORCE_CUDA", "CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
    }
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=CHECKOUT,
        env={**inherited, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_torch(directory: Path, cuda: str | None = "13.2") -> Path:
    """A directory that the choice of a CUDA compiler accepts as torch."""
    directory = directory / "torch"
    directory.mkdir()
    (directory / "version.py").write_text(
        f"__version__ = '2.15.0+test'\ncuda: Optional[str] = {cuda!r}\n"
    )
    return directory


def fake_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(directory: Path) -> Path:
    return fake_program(
        directory / "nvcc",
        "echo 'Cuda compilation tools, release 13.0, V13.0.88'\necho compute_80\necho compute_90",
    )
