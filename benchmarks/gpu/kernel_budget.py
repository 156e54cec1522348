"""What every CUDA kernel takes: registers, spills, shared memory and instructions.

`python benchmarks/gpu/kernel_budget.py` compiles the kernels and compares the result with the
committed table, kernels.csv. It fails on a new spill, on more registers that lower the occupancy,
and on a kernel that is missing on either side. `--write` renews the table instead. No GPU is
needed, only nvcc and nvdisasm.

Columns of the table:
    kernel         name and template arguments; without namespaces and parameters
    architecture   as in nvcc -arch
    registers      of a thread
    spill_stores, spill_loads, stack
                   bytes of a thread
    shared         bytes of static shared memory of a block, without dynamic memory
    max_threads    of a block, by __launch_bounds__; empty without
    instructions   of the machine code, without the padding behind it
    loops          the instructions of each loop, those of inner loops included, in parentheses the
                   loops in it: `13 736(609)` has two loops, and one in the second

The kernels of CUB, in segments.cu, are left out: they depend on the toolkit alone.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("kernels.csv")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Bytes of shared memory of an SM. Of a block, the system takes 1 KB.
SHARED_OF_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
WARPS_OF_SM, BLOCKS_OF_SM, REGISTERS_OF_SM, WARP = 64, 32, 65536, 32
# The block size for the occupancy of kernels without __launch_bounds__.
TYPICAL_THREADS = 256


@dataclass(frozen=True)
class Kernel:
    """A row of the table. `stack` has what spills, and arrays with indices of run time."""

    kernel: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    max_threads: int | None
    instructions: int
    loops: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.architecture

    def warps_of_sm(self, threads: int | None = None, dynamic_shared: int = 0) -> int:
        """The number of warps that an SM holds at once: the occupancy, in warps of 64."""
        warps = -(-(threads or self.max_threads or TYPICAL_THREADS) // WARP)
        registers_of_warp = -(-self.registers * WARP // 256) * 256
        # Each quarter of an SM has its own registers.
        blocks = REGISTERS_OF_SM // 4 // registers_of_warp * 4 // warps
        shared = self.shared + dynamic_shared + 1024
        blocks = min(blocks, SHARED_OF_SM[self.architecture] // shared, BLOCKS_OF_SM)
        return min(blocks * warps, WARPS_OF_SM // warps * warps)


COLUMNS = [field.name for field in fields(Kernel)]


# Reading the output of the tools.


def short_name(demangled: str) -> str:
    """The name of a kernel without namespaces, return type and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bpeer::(cuda::)?", "", demangled)
    name = re.sub(r"\((?:unsigned )?(?:int|long|bool)\)(-?\w+)", r"\1", name)  # (int)8
    depth = 0
    for i, character in enumerate(name):  # the parameters begin outside the template arguments
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"^void ", "", name).replace("> >", ">>").strip()


def read_compilation(log: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The mangled name of each kernel in the output of `ptxas -v`, and what it takes."""
    for part in re.split(r"Compiling entry function ", log)[1:]:
        part = part.split("Compiling entry function")[0]
        name = re.match(r"'(\w+)'", part)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if not (name and stack and registers):
            raise ValueError(f"the output of ptxas has another form than expected:\n{part[:400]}")
        shared = re.search(r"(\d+) bytes smem", part)
        yield (
            name[1],
            {
                "registers": int(registers[1]),
                "stack": int(stack[1]),
                "spill_stores": int(stack[2]),
                "spill_loads": int(stack[3]),
                "shared": int(shared[1]) if shared else 0,
            },
        )


def read_disassembly(text: str) -> dict[str, list[str]]:
    """The lines of each kernel, by its mangled name: instructions, and labels such as `.L_x_3:`."""
    kernels: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            lines = kernels.setdefault(section[1], [])
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
        elif re.match(r"\.L_\w+:", line):
            lines.append(line.strip())
    return kernels


def count_instructions(lines: list[str]) -> int:
    """The instructions, without the branch to itself and the NOPs that fill the last cache line."""
    instructions = [line for line in lines if not line.endswith(":")]
    while instructions and instructions[-1] == "NOP":
        instructions.pop()
    if instructions and instructions[-1].startswith("BRA "):
        instructions.pop()
    return len(instructions)


def describe_loops(lines: list[str]) -> str:
    """The loops of a kernel, as in the table.

    A loop is what lies between a branch and its target before it. Code behind the last EXIT is
    left out: it is for divergent warps, and branches back.
    """
    places: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = len(instructions)
        else:
            instructions.append(line)
    last_exit = max((i for i, line in enumerate(instructions) if "EXIT" in line), default=0)
    ends: dict[int, int] = {}
    for i, line in enumerate(instructions[:last_exit]):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if target and places.get(target[1], i) < i:
            ends[places[target[1]]] = i + 1
    text = ""
    open_ends: list[int] = []  # of the loops around
    for start, end in sorted(ends.items()):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
            text += ")"
        end = min([end, *open_ends])
        text += f" {end - start}("
        open_ends.append(end)
    text = (text + ")" * len(open_ends)).replace("()", "").replace("( ", "(")
    return text.strip()


def read_max_threads(cubin: bytes) -> dict[str, int]:
    """The __launch_bounds__ of kernels, by their mangled names, from the sections .nv.info."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[names_index][4]
    found = {}
    for section in sections:
        start = names + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if not name.startswith(".nv.info._Z"):
            continue
        place, end = section[4], section[4] + section[5]
        while place < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, place)
            if (form, attribute) == (4, 5):  # EIFMT_SVAL, EIATTR_MAX_THREADS
                (found[name[len(".nv.info.") :]],) = struct.unpack_from("<I", cubin, place + 4)
            place += 4 + (length if form == 4 else 0)
    return found


# Running the tools.


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, in CUDA's folder, or in the package of Triton."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"kernel_budget: {name} is neither on PATH nor in {', '.join(map(str, folders))}")
    return found


def compiler_version() -> str:
    """The version of nvcc, such as 13.0.88."""
    text = subprocess.run(
        [find_tool("nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    if match is None:
        sys.exit(f"kernel_budget: nvcc --version has no version: {text}")
    return match[1]


def kernel_sources() -> list[Path]:
    """The sources that cmake/Kernels.cmake lists."""
    text = (ROOT / "cmake/Kernels.cmake").read_text()
    return [ROOT / name for name in re.findall(r"csrc/\S+\.cu", text)]


def demangle(names: list[str]) -> list[str]:
    """The names as they are in the source, in the same order."""
    tool = shutil.which("cu++filt") or find_tool("c++filt")
    text = "\n".join(names)
    result = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def disassemble(source: Path, architecture: str, cubin: Path) -> tuple[str, dict[str, list[str]]]:
    """Compiles a source. Returns what ptxas prints, and the code of its kernels."""
    command = [find_tool("nvcc"), "-std=c++20", "-O3", "--expt-relaxed-constexpr"]
    command += ["-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-arch", architecture]
    command += ["-cubin", "-o", str(cubin), str(source)]
    compilation = subprocess.run(command, capture_output=True, text=True, check=False)
    if compilation.returncode != 0:
        sys.exit(f"kernel_budget: {source.name} does not compile:\n{compilation.stderr}")
    code = subprocess.run(
        [find_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    )
    return compilation.stderr, read_disassembly(code.stdout)


def kernels_of(source: Path, architecture: str) -> list[Kernel]:
    """Compiles one source for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        log, code = disassemble(source, architecture, cubin)
        max_threads = read_max_threads(cubin.read_bytes())
    compiled = dict(read_compilation(log))
    rows = []
    for mangled, name in zip(compiled, demangle(list(compiled)), strict=True):
        if "peer" not in name or "cub::" in name.split("<")[0]:
            continue
        rows.append(
            Kernel(
                kernel=short_name(name),
                architecture=architecture,
                max_threads=max_threads.get(mangled),
                instructions=count_instructions(code[mangled]),
                loops=describe_loops(code[mangled]),
                **compiled[mangled],
            )
        )
    return rows


def compile_all(jobs: int, architectures: Iterable[str] = ARCHITECTURES) -> list[Kernel]:
    """Compiles all sources for all architectures. The rows are in the order of the table."""
    tasks = [(source, name) for source in kernel_sources() for name in architectures]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(kernels_of, *zip(*tasks, strict=True)))
    return merge((task[0].name, part) for task, part in zip(tasks, parts, strict=True))


def merge(parts: Iterable[tuple[str, list[Kernel]]]) -> list[Kernel]:
    """The kernels of all sources, in the order of the table.

    Several sources may have the kernels of one header. If they differ, each has a row.
    """
    found: dict[tuple[str, str], dict[str, Kernel]] = {}
    for source, rows in parts:
        for row in rows:
            found.setdefault(row.key, {})[source] = row
    merged = []
    for rows_of_sources in found.values():
        if len(set(rows_of_sources.values())) == 1:
            merged.append(next(iter(rows_of_sources.values())))
        else:
            merged += [
                replace(row, kernel=f"{row.kernel} in {source}")
                for source, row in rows_of_sources.items()
            ]
    return sorted(merged, key=lambda row: (row.kernel, ARCHITECTURES.index(row.architecture)))


# The table.


def write_table(path: Path, version: str, rows: list[Kernel]) -> None:
    """Writes a table that a compiler of this version made."""
    with path.open("w", newline="") as file:
        file.write(f"# nvcc {version}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = [getattr(row, name) for name in COLUMNS]
            writer.writerow(["" if value is None else value for value in values])


def read_table(path: Path) -> tuple[str, list[Kernel]]:
    """The version of nvcc that made a table, and its rows."""
    with path.open(newline="") as file:
        version = re.fullmatch(r"# nvcc (\S+)\n", file.readline())
        if version is None:
            raise ValueError(f"{path} does not begin with the version of nvcc")
        rows = []
        for row in csv.DictReader(file):
            numbers = {name: int(row[name]) for name in COLUMNS[2:-1] if row[name]}
            numbers.setdefault("max_threads", None)
            rows.append(Kernel(row["kernel"], row["architecture"], **numbers, loops=row["loops"]))
    return version[1], rows


def find_problems(before: list[Kernel], after: list[Kernel]) -> list[str]:
    """What is worse than the table says. A sentence each."""
    old, new = {row.key: row for row in before}, {row.key: row for row in after}
    problems = []
    for key in sorted(old.keys() | new.keys()):
        name = " on ".join(key)
        if key not in new:
            problems.append(f"{name}: the table has this kernel, but it is no longer compiled")
        elif key not in old:
            problems.append(f"{name}: this kernel is new, and the table does not have it")
        else:
            was, is_now = old[key], new[key]
            if is_now.spill_stores + is_now.spill_loads > was.spill_stores + was.spill_loads:
                problems.append(
                    f"{name}: spills {is_now.spill_stores} bytes of stores and "
                    f"{is_now.spill_loads} of loads; the table has {was.spill_stores} and "
                    f"{was.spill_loads}"
                )
            if is_now.registers > was.registers and is_now.warps_of_sm() < was.warps_of_sm():
                problems.append(
                    f"{name}: takes {is_now.registers} registers instead of {was.registers}, so "
                    f"an SM holds {is_now.warps_of_sm()} warps instead of {was.warps_of_sm()}"
                )
    return problems


def describe_change(before: list[Kernel], after: list[Kernel]) -> str:
    """How many rows of the table differ from what the compiler gives."""
    old = {row.key: row for row in before}
    changed = sum(old.get(row.key, row) != row for row in after)
    spills = sorted({row.kernel for row in after if row.spill_stores or row.spill_loads})
    text = f"{len(after)} rows, {changed} of them changed"
    return text + (f"; {len(spills)} kernels spill: {', '.join(spills)}" if spills else "")


def main() -> None:
    """Compares the table with what the compiler gives, or renews it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    version = compiler_version()
    rows = compile_all(arguments.jobs)
    if arguments.write:
        before = read_table(arguments.table)[1] if arguments.table.exists() else []
        write_table(arguments.table, version, rows)
        print(f"{arguments.table}: {describe_change(before, rows)}")
        return
    made_by, before = read_table(arguments.table)
    problems = find_problems(before, rows)
    for problem in problems:
        print(problem)
    print(f"nvcc {version}: {describe_change(before, rows)}")
    if not problems:
        return
    if made_by != version:
        print(f"warning: nvcc {made_by} made the table, so the differences may be the compiler's")
        return
    sys.exit(
        "kernel_budget: make the kernels cheaper, or renew the table: kernel_budget.py --write"
    )


if __name__ == "__main__":
    main()
