"""The computed cost of a training step: instructions of loops, and the time of a kernel."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/gpu"


def load(name: str) -> ModuleType:
    """A script as a module. It finds its neighbours by their names."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def budget() -> ModuleType:
    return load("kernel_budget")


@pytest.fixture(scope="module")
def step(budget: ModuleType) -> ModuleType:
    return load("step_budget")


def test_instructions_of_loops_count_as_often_as_the_loops_run(step: ModuleType) -> None:
    loops = step.parse_loops("10 60(20(5) 8)")
    assert loops == [(10, []), (60, [(20, [(5, [])]), (8, [])])]
    # The innermost loop runs 4 times, in 3 rounds, in 7 rounds. The last loop does not run.
    outer = (60 - 20 - 8) + 3 * ((20 - 5) + 4 * 5)
    assert (
        step.count_executed(100, loops, (2, (7, ((3, (4,)), 0)))) == (100 - 70) + 2 * 10 + 7 * outer
    )


def test_trip_counts_of_other_loops_are_refused(step: ModuleType) -> None:
    with pytest.raises(ValueError, match="2 loops, and trip counts of 1"):
        step.count_executed(100, step.parse_loops("10 20"), (1,))
    with pytest.raises(ValueError, match="0 loops"):
        step.count_executed(100, step.parse_loops("10"), ((2, (1,)),))


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_instructions(
    budget: ModuleType, step: ModuleType
) -> None:
    rows = [budget.Kernel("f", "sm_90", 64, 0, 0, 0, 0, 256, 1000)]
    few = step.Launch("f", blocks=1, threads=32, bytes=4.3e9)
    many = step.Launch("f", blocks=10**7, threads=32, bytes=1)
    assert step.Budget(rows).milliseconds(few, "H200") == pytest.approx(1)
    assert step.Budget(rows).milliseconds(few, "H100") == pytest.approx(4.3 / 3)
    expected = 1e3 * 10**10 / (132 * 4 * 1.98e9)
    assert step.Budget(rows).milliseconds(many, "H100") == pytest.approx(expected)
    unknown = step.Budget([])
    assert unknown.instructions(few) is None
    assert unknown.problems == ["f is not in the table"]


def test_the_trip_counts_are_those_of_the_committed_kernels(
    budget: ModuleType, step: ModuleType
) -> None:
    computed = step.Budget(budget.read_table(budget.TABLE)[1])
    assert computed.text()
    assert computed.problems == []


def test_the_page_has_the_computed_tables(budget: ModuleType, step: ModuleType) -> None:
    text = step.Budget(budget.read_table(budget.TABLE)[1]).text()
    assert f"{step.MARKS[0]}\n\n{text}\n\n{step.MARKS[1]}" in step.PAGE.read_text()


def test_no_prediction_is_below_its_bound(budget: ModuleType, step: ModuleType) -> None:
    computed = step.Budget(budget.read_table(budget.TABLE)[1])
    with step.PREDICTIONS.open(newline="") as file:
        low = {row["stage"]: float(row["low_ms"]) for row in csv.DictReader(file)}
    for stage, launches in step.SUMMARY.items():
        bound = sum(computed.milliseconds(each, "H200") for each in launches)
        assert bound <= low[stage] <= 2 * bound, stage


def test_a_kernel_counted_by_hand_must_be_in_the_table(
    budget: ModuleType, step: ModuleType
) -> None:
    computed = step.Budget([])
    assert computed.instructions(step.Counted("f", 1, 32, 0, counted=7, launches=2)) == 14
    assert computed.problems == ["f is not in the table"]
