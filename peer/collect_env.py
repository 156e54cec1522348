"""Prints what a bug report needs: `python -m peer.collect_env`.

If the compiled library does not load, the report says why.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from peer import config

__all__ = ["main"]

_VARIABLES = (
    "PEER_CPU_CAPABILITY",
    "PEER_CUDA",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDACXX",
    "TORCH_DIR",
    "MAX_JOBS",
    "CMAKE_ARGS",
    "DEBUG",
    "CC",
    "CXX",
    "CXXFLAGS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
)


def main() -> None:
    """Prints the report: peer, torch, Python, system, build tools and environment variables."""
    print("Please paste all of this into your report.\n")
    for title, text in (
        ("peer", config.describe()),
        ("torch", _torch()),
        ("Python", f"{sys.version}\n{sys.executable}"),
        ("system", _system()),
        ("build tools", _tools()),
        ("environment", _environment()),
    ):
        print(f"== {title}\n{text}\n")


def _torch() -> str:
    lines = [f"{torch.__version__}, {Path(torch.__file__).parent}"]
    lines.append(
        f"CUDA {torch.version.cuda or 'not built'}, ROCm {torch.version.hip or 'not built'}"
    )
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(device)
            lines.append(f"GPU {device}: {torch.cuda.get_device_name(device)}, {major}.{minor}")
    else:
        lines.append("no usable GPU")
    lines.append(f"CPU capability {torch.backends.cpu.get_cpu_capability()}")
    return "\n".join(lines)


def _system() -> str:
    lines = [platform.platform(), " ".join(platform.libc_ver())]
    try:
        cpu = Path("/proc/cpuinfo").read_text()
        memory = Path("/proc/meminfo").read_text()
    except OSError:
        lines.append(platform.processor() or platform.machine())
    else:
        if model := re.search(r"^model name\s*:\s*(.*)$", cpu, re.MULTILINE):
            lines.append(model[1])
        if flags := re.search(r"^flags\s*:\s*(.*)$", cpu, re.MULTILINE):
            vector = re.findall(r"\b(?:avx\w*|fma|f16c|amx\w*)\b", flags[1])
            lines.append("vector instructions: " + " ".join(vector))
        if total := re.search(r"^MemTotal:\s*(\d+) kB", memory, re.MULTILINE):
            lines.append(f"{int(total[1]) / 2**20:.1f} GiB of memory")
    lines.append(f"{os.cpu_count()} processors")
    return "\n".join(lines)


def _tools() -> str:
    lines = []
    for tool in (os.environ.get("CXX", "c++"), "cmake", "ninja", "nvcc"):
        path = shutil.which(tool)
        if path is None:
            lines.append(f"{tool}: not found")
            continue
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        output = (run.stdout or run.stderr).strip().splitlines() or ["no version"]
        # nvcc prints its version in the last line, all others in the first.
        lines.append(f"{tool}: {output[-1 if tool == 'nvcc' else 0]}, {path}")
    return "\n".join(lines)


def _environment() -> str:
    lines = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return "\n".join(lines) or "no variable that peer reads is set"


if __name__ == "__main__":
    main()
