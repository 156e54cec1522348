"""C++ programs that use the installed package: the examples, and comparisons with Python.

The programs are compiled with `peer.cmake_prefix_path`, like those of a user.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import peer

CHECKOUT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "dim": 16,
    "num_experts": 64,
    "heads": 2,
    "num_experts_per_head": 4,
    "dim_key": 8,
}

pytestmark = [
    pytest.mark.skipif(not (CHECKOUT / "examples/cpp").exists(), reason="not in a checkout"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake"),
]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program and captures its output."""
    return subprocess.run(
        list(map(str, command)),
        # The programs link the sanitizer's runtime, which is preloaded into Python only.
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "LD_PRELOAD": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: object, **environment: str) -> str:
    """Runs a program that must succeed, and returns its output."""
    result = run(*command, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# The linker drops unused libraries, as it does by default in some distributions.
FLAGS = {
    "CMAKE_GENERATOR": "Ninja",
    "CXXFLAGS": os.environ.get("CXXFLAGS", "-Wall -Wextra -Werror"),
    "LDFLAGS": "-Wl,--as-needed",
    "TORCH_DIR": str(Path(torch.__file__).parent),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the example programs, built with the commands in docs/cpp.md."""
    page = (CHECKOUT / "docs/cpp.md").read_text()
    (commands,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    directory = tmp_path_factory.mktemp("examples")
    project = Path(shutil.copytree(CHECKOUT / "examples/cpp", directory / "cpp"))
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{directory}:{os.environ['PATH']}"
    succeed("bash", "-euc", f"cd {project}\n{commands}", **FLAGS, PATH=path)
    assert (project / "state.pt").exists()
    return project / "build"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the test programs. Their build must not search for CUDA or Python."""
    build = tmp_path_factory.mktemp("programs")
    unwanted = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("CUDAToolkit", "Python")]
    prefix = f"-DCMAKE_PREFIX_PATH={peer.cmake_prefix_path}"
    source = CHECKOUT / "tests/cpp_program"
    succeed("cmake", "-S", source, "-B", build, prefix, *unwanted, **FLAGS)
    succeed("cmake", "--build", build)
    return build


# ---- The package of CMake's.


def test_cmake_prefix_path_is_in_the_package():
    assert Path(peer.cmake_prefix_path) == Path(peer.__file__).parent / "share/cmake"
    assert (Path(peer.cmake_prefix_path) / "peer/peerConfig.cmake").exists()


def test_no_installed_file_holds_a_path_of_the_build():
    share = Path(peer.cmake_prefix_path)
    texts = [p.read_text() for p in share.rglob("*.cmake")]
    assert texts
    assert not [t for t in texts if str(CHECKOUT) in t or str(Path(torch.__file__).parent) in t]


@pytest.mark.parametrize("program", ["operators", "train", "run_torchscript", "run_aoti"])
def test_programs_need_peer_and_no_python(examples: Path, program: str):
    dynamic = succeed("readelf", "-d", examples / program)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert {"libpeer.so", "libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    loaded = succeed("ldd", examples / program)
    assert not re.search(r"libpython|libtorch_python|not found", loaded)


CONSUMER = """
cmake_minimum_required(VERSION 3.18)
project(consumer LANGUAGES CXX)
{before}
find_package(peer {arguments})
if(peer_FOUND)
  message(STATUS "found peer ${{peer_VERSION}}")
  get_target_property(libraries peer::peer INTERFACE_LINK_LIBRARIES)
  message(STATUS "with ${{libraries}}")
endif()
"""


def find_package(directory: Path, arguments: str, *options: str, before: str = "") -> str:
    """The output of CMake for find_package(peer ...), after other lines."""
    project = CONSUMER.format(arguments=arguments, before=before)
    directory.joinpath("CMakeLists.txt").write_text(project)
    command = ["cmake", "-S", directory, "-B", directory / "build", "-G", "Ninja"]
    result = run(*command, f"-DCMAKE_PREFIX_PATH={peer.cmake_prefix_path}", *options)
    return " ".join((result.stdout + result.stderr).split())


def fake_torch(directory: Path, version: str) -> Path:
    """A directory that find_package(peer) accepts as torch."""
    (directory / "torch/lib").mkdir(parents=True)
    (directory / "torch/lib/libtorch_cpu.so").touch()
    (directory / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return directory / "torch"


def test_version_is_checked(tmp_path: Path):
    torch_dir = f"-DTORCH_DIR={Path(torch.__file__).parent}"
    base = peer.__version__.split("+")[0]
    assert f"found peer {base}" in find_package(tmp_path, base, torch_dir)
    assert f"version: {base} The version found is not" in find_package(tmp_path, "9.0", torch_dir)


def test_another_torch_is_named(tmp_path: Path):
    said = find_package(tmp_path, "REQUIRED", f"-DTORCH_DIR={fake_torch(tmp_path, '2.3.1+cpu')}")
    built = peer._library.build_info()["torch"]
    assert f"peer was built for PyTorch {built}, but" in said
    assert "is PyTorch 2.3.1+cpu" in said
    assert "python -m pip install --force-reinstall --no-deps ." in said
    assert ";" not in said


def test_no_torch_says_what_to_type(tmp_path: Path):
    said = find_package(tmp_path, "REQUIRED", f"-DTORCH_DIR={tmp_path}")
    assert f"which is not in {tmp_path}" in said
    assert "Set its directory: \"-DTORCH_DIR=$(python -c 'import torch" in said


def test_torch_that_the_program_found_before_is_taken(tmp_path: Path):
    # The result of find_package(Torch).
    found = "add_library(torch INTERFACE IMPORTED)\nset(TORCH_INSTALL_PREFIX {})"
    here = Path(torch.__file__).parent
    assert "with torch" in find_package(tmp_path, "", before=found.format(here))
    other = fake_torch(tmp_path, "2.3.1+cpu")
    said = find_package(tmp_path, "REQUIRED", before=found.format(other))
    assert f"but {other} is PyTorch 2.3.1+cpu" in said


def test_torch_is_found_beside_peer_and_by_its_own_package(tmp_path: Path):
    site = tmp_path / "site"
    shutil.copytree(peer.cmake_prefix_path, site / "peer/share/cmake")
    version = torch.__version__
    beside = fake_torch(site, version)
    elsewhere = fake_torch(tmp_path / "elsewhere", version)
    (elsewhere / "share/cmake/Torch").mkdir(parents=True)
    (elsewhere / "share/cmake/Torch/TorchConfig.cmake").touch()
    if peer._library.build_info()["cuda"]:
        for directory in (beside, elsewhere):
            (directory / "lib/libc10_cuda.so").touch()
    here = str(site / "peer/share/cmake")
    assert f"with {beside}/lib" in find_package(tmp_path, "", f"-DCMAKE_PREFIX_PATH={here}")
    both = f"-DCMAKE_PREFIX_PATH={here};{elsewhere / 'share/cmake'}"
    assert f"with {elsewhere}/lib" in find_package(tmp_path, "", both)
    directory_itself = f"-DCMAKE_PREFIX_PATH={here};{elsewhere}"  # as with LibTorch
    assert f"with {elsewhere}/lib" in find_package(tmp_path, "", directory_itself)


# ---- The examples, and the page about them.


def test_the_page_shows_what_the_examples_are():
    page = (CHECKOUT / "docs/cpp.md").read_text()
    shown = re.findall(r"^```(?:cpp|cmake)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) > 5
    examples = [p.read_text() for p in (CHECKOUT / "examples/cpp").iterdir()]
    missing = [block for block in shown if not any(block in example for example in examples)]
    assert not missing, missing[0]


def test_the_readme_shows_what_the_programs_do():
    (block,) = re.findall(
        r"^```cpp\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    program = (CHECKOUT / "tests/cpp_program/test_state_dict.cpp").read_text()
    there = [line.strip() for line in program.splitlines()]
    assert [line for line in block.splitlines() if line and line not in there] == []


def test_operators_example_runs(examples: Path):
    printed = succeed(examples / "operators")
    assert "output [5, 16], gradients " in printed


def test_train_example_learns_and_python_takes_its_state(examples: Path, tmp_path: Path):
    printed = succeed(examples / "train", tmp_path / "state.pt", 200)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses[-1] < losses[0] / 2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.peer = peer.PEER(
                32, num_experts=64**2, heads=4, num_experts_per_head=8, dim_key=32, dropout=0.1
            )

    block = Block()
    block.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert block.peer.router.norm.num_batches_tracked == 201


SCRIPTED = [
    {"glu": True},
    {"query_norm": "layer", "query_bias": True, "scores": "sigmoid", "activation": "gelu_tanh"},
    {"query_norm": "rms", "share_keys": False, "scores": "relu", "activation": "relu2"},
    {"key_norm": True, "share_keys": False},
    {"query_norm": None, "num_experts": (4, 6), "activation": "silu"},
    {"sparse_grad": True, "activation": "relu", "zero_init_out": True},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", SCRIPTED, ids=lambda options: ",".join(options))
def test_torchscript_example_computes_what_python_does(
    examples: Path, tmp_path: Path, options: dict[str, Any], training: bool
):
    torch.manual_seed(0)
    layer = peer.PEER(**{**SMALL, **options}).train(training)
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    printed = succeed(examples / "run_torchscript", tmp_path / "layer.pt", 16)
    x = torch.linspace(-1, 1, 8 * 16).view(8, 16).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    expected = {"output": y, "grad x": x.grad}
    expected |= {f"grad {name}": p.grad for name, p in layer.named_parameters()}
    found = dict(re.findall(r"^(output|grad \S+).* (\S+)$", printed, re.MULTILINE))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float(found[name]) == pytest.approx(tensor.norm().item(), rel=1e-6), name


def test_frozen_torchscript_runs_in_cpp(examples: Path, tmp_path: Path):
    torch.manual_seed(0)
    layer = peer.PEER(**SMALL).eval()
    torch.jit.freeze(torch.jit.script(layer)).save(str(tmp_path / "layer.pt"))
    printed = succeed(examples / "run_torchscript", tmp_path / "layer.pt", 16)
    y = layer(torch.linspace(-1, 1, 8 * 16).view(8, 16))
    norm = re.findall(r"^output .* (\S+)$", printed, re.MULTILINE)
    assert float(norm[0]) == pytest.approx(y.norm().item(), rel=1e-6)
    assert "grad router" not in printed  # its parameters have become constants


def test_aoti_example_computes_what_python_does(examples: Path, tmp_path: Path):
    torch.manual_seed(0)
    layer = peer.PEER(**SMALL)
    layer(torch.randn(64, 16))
    peer.fold_query_norm_(layer.eval())
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (torch.randn(8, 16),), dynamic_shapes=({0: tokens},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    printed = succeed(examples / "run_aoti", package, 16)
    found = re.findall(r"^(\d+) tokens \[(\d+), 16\] (\S+)$", printed, re.MULTILINE)
    assert [int(count) for count, _, _ in found] == [2, 8, 100]
    for count, rows, norm in found:
        assert rows == count
        x = torch.linspace(-1, 1, int(count) * 16).view(-1, 16)
        assert float(norm) == pytest.approx(layer(x).norm().item(), rel=1e-4)


# ---- That C++ and Python are the same.


@pytest.mark.long
def test_program_tests_pass(programs: Path, hostile_states: Path):
    printed = succeed(programs / "program_tests", PEER_HOSTILE_FILES=str(hostile_states))
    assert "All tests passed" in printed


class Case(NamedTuple):
    """A layer that both languages build."""

    options: dict[str, Any]
    training: bool = True
    masked: bool = False

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        words += ["train" if self.training else "eval", *(["mask"] if self.masked else [])]
        return ",".join(words)


CASES = [
    Case({}),
    Case({}, training=False),
    Case({}, masked=True),
    Case({"query_norm": "layer", "query_bias": True, "scores": "sigmoid"}),
    Case({"query_norm": "rms", "share_keys": False, "scores": "relu", "activation": "relu2"}),
    Case({"query_norm": None, "num_experts": (4, 6), "num_experts_per_head": 3}),
    Case({"glu": True, "activation": "silu"}),
    Case({"dropout": 0.5, "activation": "gelu_tanh"}),
    Case({"dropout": 0.5, "activation": "identity"}, training=False, masked=True),
    Case({"sparse_grad": True, "activation": "relu"}),
    Case({"zero_init_out": True, "glu": True, "query_bias": True}),
    Case({"dtype": "float64", "query_norm": "layer"}),
    Case({"dtype": "bfloat16"}, masked=True),
    Case({"query_norm": "rms", "glu": True, "sparse_grad": True}, masked=True),
    Case({"dtype": "float16"}),
    Case({"key_norm": True}),
    Case({"key_norm": True, "share_keys": False, "dtype": "bfloat16"}),
]


def build(options: dict[str, Any]) -> peer.PEER:
    """The layer of a case. Its dtype is a string."""
    options = {**SMALL, **options}
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return peer.PEER(**options)


@pytest.fixture(scope="module")
def results_in_cpp(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The program's results for all cases, and the paths of its saved states."""
    directory = tmp_path_factory.mktemp("cases")
    given = []
    for i, case in enumerate(CASES):
        torch.manual_seed(100 + i)
        layer = build(case.options)
        layer(torch.randn(16, 16, dtype=layer.experts.weight.dtype))  # updates running statistics
        state = layer.state_dict()
        if i == 0:  # a view with a large row stride
            table = state["experts.weight"]
            state["experts.weight"] = torch.stack([table, table], dim=1)[:, 0]
        torch.save(state, directory / f"python{i}.pt")
        x = torch.randn(3, 5, 16, dtype=layer.experts.weight.dtype)
        mask = torch.rand(3, 5) < 0.3 if case.masked else None
        if mask is not None:  # NaN in a result would differ from itself
            x = x.masked_fill(mask[..., None], float("nan"))
        given.append(
            {
                "options": {**SMALL, **case.options},
                "seed": i,
                "training": case.training,
                "x": x,
                "padding_mask": mask,
                "state": str(directory / f"python{i}.pt"),
                "saved": str(directory / f"cpp{i}.pt"),
            }
        )
    torch.save(given, directory / "cases.pt")
    succeed(programs / "same_as_python", directory / "cases.pt", directory / "results.pt")
    # Written by LibTorch, whose types Python loads only with weights_only=False.
    results = torch.load(directory / "results.pt", weights_only=False)
    return list(zip(given, results, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: str(CASES[i]))
class TestSameAsPython:
    """Names, seeded parameters, outputs, gradients and buffers are equal bit by bit."""

    def test_a_seed_gives_the_same_parameters(self, results_in_cpp, i: int):
        given, _ = results_in_cpp[i]
        torch.manual_seed(given["seed"])
        expected = build(CASES[i].options).state_dict()
        assert_same(torch.load(given["saved"], weights_only=True), dict(expected))

    def test_outputs_gradients_and_buffers_are_equal(self, results_in_cpp, i: int):
        given, found = results_in_cpp[i]
        layer = build(CASES[i].options)
        layer.load_state_dict(torch.load(given["state"], weights_only=True))
        layer.train(given["training"])
        torch.manual_seed(given["seed"] + 1)
        x = given["x"].clone().requires_grad_()
        y = layer(x, given["padding_mask"])
        y.square().sum().backward()
        gradients = {name: p.grad.to_dense() for name, p in layer.named_parameters()}
        assert_same(dict(found), {"y": y.detach(), "x": x.grad, **gradients})
        after = torch.load(given["saved"] + ".after", weights_only=True)
        assert_same(after, dict(layer.state_dict()))

    def test_python_takes_the_state_of_cpp(self, results_in_cpp, i: int):
        given, _ = results_in_cpp[i]
        layer = build(CASES[i].options)
        layer.load_state_dict(torch.load(given["saved"], weights_only=True))


# ---- Files that say what cannot be.


def write_state(path: Path, program: bytes, records: dict[str, bytes] | None = None) -> None:
    """An archive in the format of torch.save with this pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", program, len(program))
    for name, content in (records or {"data/0": bytes(4 * 8)}).items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()


PREFIX = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01"
FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\nq\x02"
STORAGE = (
    b"((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
    b"X\x03\x00\x00\x00cpuq\x06%sq\x07tQ"
)


def tensor(
    offset: int = 0,
    sizes: tuple[int, ...] = (8,),
    strides: tuple[int, ...] = (1,),
    elements: int = 8,
) -> bytes:
    """The pickle of {"a": tensor} with arbitrary sizes and strides."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        PREFIX
        + FUNCTION
        + STORAGE.replace(b"%s", number(elements))
        + number(offset)
        + numbers(sizes)
        + numbers(strides)
        + b"\x89}tRu."
    )


# The error, the pickle, and the message of the reader.
OUTSIDE = "lies outside its storage"
HOSTILE: list[tuple[str, bytes, str]] = [
    ("runs a program", pickle.dumps({"a": os.getcwd}, protocol=2), "imports posix.getcwd"),
    ("makes an object", pickle.dumps({"a": Path("x")}, protocol=2), "imports pathlib"),
    ("size beyond the storage", tensor(sizes=(9,)), OUTSIDE),
    ("offset beyond the storage", tensor(offset=1), OUTSIDE),
    ("offset before the storage", tensor(offset=-1), OUTSIDE),
    ("negative size", tensor(sizes=(-8,)), OUTSIDE),
    ("negative stride", tensor(strides=(-1,)), OUTSIDE),
    ("stride beyond the storage", tensor(strides=(2,)), OUTSIDE),
    ("stride overflows", tensor(strides=(2**62,)), OUTSIDE),
    ("offset and stride overflow", tensor(offset=2**62, strides=(2**60,)), OUTSIDE),
    ("last element overflows", tensor(sizes=(2**62, 5), strides=(4, 2**62)), OUTSIDE),
    ("repeats without end", tensor(sizes=(2**32, 2**32), strides=(0, 0)), "expected shape [8]"),
    ("sizes and strides of different lengths", tensor(sizes=(2, 2)), OUTSIDE),
    ("too many dimensions", tensor(sizes=(1,) * 65, strides=(0,) * 65), "65 dimensions"),
    ("storage smaller than it says", tensor(elements=2**40), "bytes instead of"),
    ("negative storage", tensor(elements=-1, sizes=(0,)), OUTSIDE),
    ("no end", PREFIX, "ends too early"),
    ("nothing", b"", "ends too early"),
    ("only a stop", b".", "does not end with one value"),
    ("two values", b"\x80\x02}}.", "does not end with one value"),
    ("not a dictionary", b"\x80\x02K\x01.", "of an unexpected type"),
    ("number as a name", b"\x80\x02}K\x01K\x02s.", "of an unexpected type"),
    ("name without a value", b"\x80\x02}(X\x01\x00\x00\x00au.", "a key without a value"),
    ("text longer than the file", b"\x80\x02X\xff\xff\xff\xffa.", "ends too early"),
    ("recalls nothing", b"\x80\x02h\x05.", "a memo entry that it has not written"),
    ("takes from an empty stack", b"\x80\x02R.", "pops from an empty stack"),
    ("keeps from an empty stack", b"\x80\x02q\x00.", "pops from an empty stack"),
    ("no mark", b"\x80\x02}u.", "pops from an empty stack"),
    ("tuples in tuples", b"\x80\x02" + b")" + b"\x85" * 10**6 + b".", "nests tuples too deeply"),
    ("no line end", b"\x80\x02ctorch", "ends too early"),
    ("persistent id of something else", b"\x80\x02(K\x01tQ.", "is not a storage"),
    ("arguments missing", PREFIX + FUNCTION + b")Ru.", "a tensor lacks an argument"),
    ("an unknown opcode", b"\x80\x02\xff.", "does not belong to a dictionary"),
    ("long number", b"\x80\x02\x8a\xff" + bytes(255) + b".", "a number has 255 bytes"),
    ("a name twice", tensor()[:-2] + tensor()[len(b"\x80\x02}q\x00(") :], "occurs twice"),
    # A terabyte if each recall made a copy.
    (
        "recalls a long text often",
        b"\x80\x02X"
        + (10**6).to_bytes(4, "little")
        + b"a" * 10**6
        + b"q\x00"
        + b"h\x00" * 10**6
        + b".",
        "does not end with one value",
    ),
    # 10**12 steps if each tuple were searched.
    (
        "wraps a long tuple often",
        b"\x80\x02(" + b"K\x01" * 10**6 + b"tq\x00" + b"h\x00\x85" * 10**6 + b".",
        "does not end with one value",
    ),
]


@pytest.fixture(scope="session")
def hostile_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of archives that torch can open but that are not a state {"a": tensor of [8]}.

    One archive is such a state. It shows that the reader does not reject the name or the shape.
    """
    directory = tmp_path_factory.mktemp("hostile")
    write_state(directory / "good.pt", tensor())
    records = [
        ("storage missing", {"data/1": bytes(32)}, "data/0"),
        ("storage too short", {"data/0": bytes(31)}, "bytes instead of"),
        ("storage too long", {"data/0": bytes(36)}, "bytes instead of"),
    ]
    for name, program, message in HOSTILE:
        write_state(directory / f"{name}.pt", program)
        (directory / f"{name}.txt").write_text(message)
    for name, storages, message in records:
        write_state(directory / f"{name}.pt", tensor(), storages)
        (directory / f"{name}.txt").write_text(message)
    with zipfile.ZipFile(directory / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/version", "3\n")
        archive.writestr("bomb/data.pkl", tensor(elements=2**24))
        archive.writestr("bomb/data/0", bytes(4 * 2**24))
    (directory / "bomb.txt").write_text("within a file of")
    return directory
