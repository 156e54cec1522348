"""The table of what the CUDA kernels take: how output of the compiler is read, and what fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPILATION = """ptxas info    : 1 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN4peer1aIfEEv' for 'sm_90'
ptxas info    : Function properties for _ZN4peer1aIfEEv
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Compile time = 124.007 ms
ptxas info    : Compiling entry function '_ZN4peer1bEv' for 'sm_90'
ptxas info    : Function properties for vprintf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 512 bytes smem
"""
DISASSEMBLY = """
\t.section\t.text._ZN4peer1bEv,"ax",@progbits
\t.align\t128
        .type           _ZN4peer1bEv,@function
_ZN4peer1bEv:
.text._ZN4peer1bEv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   BRA `(.L_x_1);
        /*0040*/                   NOP;
        /*0050*/                   NOP;
"""


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    path = ROOT / "benchmarks/gpu/kernel_budget.py"
    spec = importlib.util.spec_from_file_location("kernel_budget", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_budget"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_the_output_of_ptxas_is_read(budget: ModuleType) -> None:
    assert dict(budget.read_compilation(COMPILATION)) == {
        "_ZN4peer1aIfEEv": {
            "registers": 126,
            "stack": 24,
            "spill_stores": 8,
            "spill_loads": 12,
            "shared": 0,
        },
        "_ZN4peer1bEv": {
            "registers": 32,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
            "shared": 512,
        },
    }


def test_output_of_another_form_is_an_error(budget: ModuleType) -> None:
    with pytest.raises(ValueError, match="another form"):
        list(budget.read_compilation(COMPILATION.replace("Used", "Uses")))


def test_padding_is_not_counted(budget: ModuleType) -> None:
    code = budget.read_disassembly(DISASSEMBLY)
    assert list(code) == ["_ZN4peer1bEv"]
    assert budget.count_instructions(code["_ZN4peer1bEv"]) == 3
    assert ".L_x_0:" in code["_ZN4peer1bEv"]


def test_loops_are_nested_and_end_at_the_last_exit(budget: ModuleType) -> None:
    code = """.L_x_0:
        MOV
.L_x_1:
        FFMA
        @P0 BRA `(.L_x_1)
        BRA.DIV UR4, `(.L_x_3)
.L_x_2:
        @!P1 BRA `(.L_x_0)
        @P2 BRA `(.L_x_4)
.L_x_4:
        FADD
        @P0 BRA `(.L_x_4)
        EXIT
.L_x_3:
        BRA `(.L_x_2)"""
    assert budget.describe_loops([line.strip() for line in code.splitlines()]) == "5(2) 2"
    assert budget.describe_loops(["EXIT"]) == ""


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        (
            "void peer::cuda::_GLOBAL__N__7799d992_13_expert_mlp_cu_de25cdc8_18275::"
            "expert_mlp_kernel<peer::cuda::RowTile<8, 2, true>, peer::Half, float, "
            "peer::cuda::_GLOBAL__N__7799d992_13_expert_mlp_cu_de25cdc8_18275::"
            "ForwardCoefficients<float> >(peer::cuda::Direction<float>, int)",
            "expert_mlp_kernel<RowTile<8, 2, true>, Half, float, ForwardCoefficients<float>>",
        ),
        (
            "void peer::cuda::(anonymous namespace)::f<(int)8, (bool)1>(float (*)(int))",
            "f<8, 1>",
        ),
        ("peer::cuda::make_pair_ids(long const*, int)", "make_pair_ids"),
    ],
)
def test_names_keep_what_tells_kernels_apart(
    budget: ModuleType, demangled: str, expected: str
) -> None:
    assert budget.short_name(demangled) == expected


def test_occupancy_is_limited_by_registers_and_shared_memory(budget: ModuleType) -> None:
    kernel = budget.Kernel("f", "sm_90", 64, 0, 0, 0, 0, 256, 100)
    assert kernel.warps_of_sm() == 32
    assert dataclasses.replace(kernel, registers=65).warps_of_sm() == 24
    assert dataclasses.replace(kernel, registers=32).warps_of_sm() == 64
    assert kernel.warps_of_sm(dynamic_shared=100 << 10) == 16
    assert kernel.warps_of_sm(threads=1024) == 32


def test_the_table_is_read_as_it_was_written(budget: ModuleType, tmp_path: Path) -> None:
    rows = [
        budget.Kernel("f<float, 8>", "sm_90", 64, 0, 0, 0, 0, 256, 100, "13 736(609)"),
        budget.Kernel("g", "sm_80", 40, 0, 0, 16, 1024, None, 10),
    ]
    budget.write_table(tmp_path / "kernels.csv", "13.0.88", rows)
    assert budget.read_table(tmp_path / "kernels.csv") == ("13.0.88", rows)


def test_only_what_is_worse_is_a_problem(budget: ModuleType) -> None:
    kernel = budget.Kernel("f", "sm_90", 64, 0, 0, 0, 0, 256, 100)

    def problems(after: list[object]) -> list[str]:
        found: list[str] = budget.find_problems([kernel], after)
        return found

    assert problems([kernel]) == []
    assert problems([dataclasses.replace(kernel, registers=48, instructions=900)]) == []
    lower = dataclasses.replace(kernel, registers=59)
    assert budget.find_problems([lower], [kernel]) == []  # the same occupancy
    assert "32" in problems([dataclasses.replace(kernel, registers=65)])[0]
    assert "spills 0 bytes" in problems([dataclasses.replace(kernel, spill_loads=4)])[0]
    assert "no longer compiled" in problems([])[0]
    new = dataclasses.replace(kernel, kernel="g")
    assert ["new" in problem for problem in problems([kernel, new])] == [True]


def test_kernels_of_a_header_have_one_row(budget: ModuleType) -> None:
    kernel = budget.Kernel("f", "sm_90", 64, 0, 0, 0, 0, 256, 100)
    larger = dataclasses.replace(kernel, instructions=101)
    assert budget.merge([("a.cu", [kernel]), ("b.cu", [kernel])]) == [kernel]
    assert [row.kernel for row in budget.merge([("a.cu", [kernel]), ("b.cu", [larger])])] == [
        "f in a.cu",
        "f in b.cu",
    ]


def test_the_committed_table_has_all_sources_and_architectures(budget: ModuleType) -> None:
    _, rows = budget.read_table(budget.TABLE)
    assert {row.architecture for row in rows} == set(budget.ARCHITECTURES)
    names = [row.kernel.split("<")[0] for row in rows]
    for source in budget.kernel_sources():
        text = source.read_text()
        assert any(f"{name}(" in text or f"{name}<" in text for name in names), source.name
    assert len({row.key for row in rows}) == len(rows)
