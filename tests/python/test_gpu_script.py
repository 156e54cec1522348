"""The script for machines with a GPU: what it refuses, and the summary of what it found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

ROWS = """mode,provider,tokens,num_experts,dim,dtype,distribution,median_s
experts-forward,peer,8192,1048576,1024,bfloat16,uniform,0.00115
experts-forward,peer,8192,1048576,1024,bfloat16,zipf:1.0,0.0005
experts-forward,peer,16,1048576,1024,bfloat16,uniform,0.0001
step,peer,8192,1048576,1024,bfloat16,uniform,0.0095
step,peer-fused,8192,1048576,1024,bfloat16,uniform,
"""
KERNELS = """step,kernel,calls,total_ms
sparse,void peer::cuda::(anonymous namespace)::make_pair_ids(long const*),3,0.03
sparse,"void cub::DeviceRadixSortOnesweepKernel<...>",9,0.30
sparse,"void peer::cuda::(anonymous namespace)::sum_segments_kernel<c10::BFloat16>(...)",2,1.0
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a run left: two phases, a test that failed, rows and kernels."""
    (tmp_path / "card.txt").write_text("NVIDIA H200\ntorch 2.11.0\n")
    (tmp_path / "phases.csv").write_text(
        "phase,status,seconds\nagree,failed,9\nagree,ok,7\ntests,failed,80\nscale,cut off,60\n"
    )
    failures = "".join(f"FAILED tests/cuda/test_torch.py::test_{i} - error\n" for i in range(50))
    (tmp_path / "log.txt").write_text(
        "\n==== agree\n1 failed, 2 passed in 9.00s\n"
        "\n==== agree\n..\n3 passed in 7.00s\n"
        f"\n==== tests\n{failures}50 failed, 200 passed, 3 skipped in 79.10s (0:01:19)\n"
        "\n==== scale\n"
    )
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "kernels.csv").write_text(KERNELS)
    return tmp_path


def summarize(out: Path) -> list[str]:
    """The lines that summary.py prints."""
    command = [sys.executable, str(BENCHMARKS / "gpu" / "summary.py"), str(out)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def line_of(out: Path, begin: str) -> str:
    (line,) = (line for line in summarize(out) if line.startswith(begin))
    return line


def test_the_summary_has_at_most_40_lines_and_begins_with_the_card(out):
    lines = summarize(out)
    assert len(lines) <= 40
    assert lines[0] == "NVIDIA H200; torch 2.11.0"


def test_the_summary_says_how_each_phase_ended_last(out):
    assert line_of(out, "agree").split() == ["agree", "7", "s", "ok,", "3", "passed"]
    assert line_of(out, "tests").endswith("failed, 50 failed, 200 passed, 3 skipped")
    assert line_of(out, "scale").endswith("cut off")


def test_the_summary_names_the_first_failures_and_counts_the_rest(out):
    lines = summarize(out)
    assert lines.count("failed") == 1
    assert "FAILED tests/cuda/test_torch.py::test_0 - error" in lines
    assert "... and 38 more, in log.txt" in lines


def test_the_summary_compares_what_was_measured_with_what_was_predicted(out):
    assert line_of(out, "experts forward").split()[2:] == [
        "1.1-1.2",
        "1.150",
        "1.175",
        "as",
        "predicted",
    ]
    assert line_of(out, "training step with sparse").split()[-2:] == ["4.0", "slower"]
    assert line_of(out, "training step with fused").split()[-1] == "4.0"
    assert line_of(out, "sorting the pairs once").split()[-3:] == ["0.110", "as", "predicted"]
    assert line_of(out, "summing one table's pairs").split()[-3:] == ["0.500", "as", "predicted"]


def test_an_empty_folder_is_summarized(tmp_path):
    assert summarize(tmp_path)[-1] == "rows.csv: 0 timed, 0 without a time"


def test_the_script_explains_itself_and_names_its_phases():
    script = str(BENCHMARKS / "gpu.sh")
    usage = subprocess.run([script], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "benchmarks/gpu.sh OUT [PHASE...]" in usage.stdout
    wrong = subprocess.run([script, "/dev/null/x", "tests"], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_the_script_refuses_a_phase_that_it_does_not_have(tmp_path):
    command = [str(BENCHMARKS / "gpu.sh"), str(tmp_path), "built"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no phase built; there are: build agree" in result.stderr
