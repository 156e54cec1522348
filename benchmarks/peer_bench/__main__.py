"""Command line: `python -m peer.bench`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from peer.bench import rows as csv_rows
from peer.bench.cases import DEVICES, DTYPES, MODES, PRESETS, list_plans
from peer.bench.distributions import parse_exponent
from peer.bench.failures import Failure
from peer.bench.machine import ASSUMED_GPU, MachineError, Sizes, open_machine
from peer.bench.memory import HEADROOM
from peer.bench.providers import PROVIDERS
from peer.bench.rows import HUGE_PAGES, uses_huge_pages
from peer.bench.run import Listing, Options, list_entries, run_plans
from peer.bench.targets import TARGET_PRESETS, evaluate, evaluate_runs
from peer.bench.timing import SETTINGS, Settings

__all__ = ["main"]

CAPABILITY = "PEER_CPU_CAPABILITY"
DEFAULTS = {"cpu": "quick", "cuda": "cuda-targets"}  # presets
GIB = 2**30

SIZES = ("num_experts", "tokens", "dim", "heads", "k", "dim_key", "threads")
TIMING = ("rounds", "min_time", "stream_mib", "max_memory")
PASSED_ON = (*SIZES, "dtype", "providers", "modes", *TIMING)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m peer.bench",
        description="Measures PEER layers beside plain PyTorch, PEER-pytorch and the feed-forward "
        "layers that they replace. Options for sizes take one value or several, separated by "
        "commas, instead of the preset's; benchmarks/README.md describes the rows.",
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        help=f"what to measure; default: {DEFAULTS['cpu']}, with --device cuda {DEFAULTS['cuda']}",
    )
    add("--providers", help=f"out of {', '.join(PROVIDERS)}")
    add("--modes", help=f"out of {', '.join(MODES)}; backward includes forward")
    add("--distribution", help="of the ids: uniform, zipf:EXPONENT, router")
    add("--num-experts", help="N, a square")
    add("--tokens", help="T")
    add("--dim", help="D, input and output width")
    add("--heads", help="H")
    add("--k", help="experts per head")
    add("--dim-key", help="query width per head")
    add("--dtype", help=f"out of {', '.join(DTYPES)}")
    add("--threads", help="of torch; default: as many as it chooses")
    add("--csv", type=Path, help="file to append rows to, as they are measured")
    add(
        "--rounds", type=int, help=f"turns of each provider; slow ones take 3; {_default('rounds')}"
    )
    add("--min-time", type=float, help=f"seconds of a turn, at least; {_default('min_time')}")
    add("--stream-mib", type=int, help="size of the buffer that bandwidth is measured on")
    add("--max-memory", type=float, help="GiB to use at most; default: all but 2 GiB of the rest")
    add("--huge-pages", action="store_true", help=f"{HUGE_PAGES}=1: large tensors on huge pages")
    add("--device", choices=list(DEVICES), default="cpu", help="where to measure")
    add("--dry-run", action="store_true", help="list what would run, and allocate nothing")
    add(
        "--targets",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="measure nothing; print which targets the rows of these files meet, of each the last "
        "run that measured it",
    )
    options = parser.parse_args(arguments)
    if options.preset is None:
        options.preset = DEFAULTS[options.device]
    for name in ("rounds", "min_time"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(SETTINGS[options.device], name))
    if options.device != "cpu":
        for name in ("threads", "huge_pages"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} is for --device cpu")
    try:
        options.plans = list_plans(
            options.preset,
            modes=_names(options.modes, MODES, "--modes"),
            providers=_names(options.providers, PROVIDERS, "--providers"),
            distributions=_distributions(options.distribution),
            sizes=_sizes(options),
            device=options.device,
        )
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1 or options.min_time < 0:
        parser.error("--rounds takes a positive number, --min-time none below 0")
    return options


def _default(name: str) -> str:
    cpu, cuda = (getattr(SETTINGS[device], name) for device in DEVICES)
    return f"default: {cpu}, with --device cuda {cuda}"


def _names(text: str | None, known: object, option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(","))) if text else ()
    for name in names:
        if name not in known:  # type: ignore[operator]
            raise ValueError(f"{option} takes names out of {', '.join(known)}, got {name}")  # type: ignore[arg-type]
    return names


def _distributions(text: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(","))) if text else ()
    for name in names:
        parse_exponent(name)
    return names


def _sizes(options: argparse.Namespace) -> dict[str, tuple[int | str, ...]]:
    sizes: dict[str, tuple[int | str, ...]] = {}
    for name in SIZES:
        if text := getattr(options, name):
            sizes[name] = tuple(int(value) for value in text.split(","))
    if options.dtype:
        sizes["dtype"] = tuple(options.dtype.split(","))
    return sizes


def _sizes_of_all_plans(options: argparse.Namespace) -> dict[str, int]:
    """The numbers that the command line gives in place of the preset's."""
    return {
        name: values[0]
        for name, values in _sizes(options).items()
        if len(values) == 1 and isinstance(values[0], int)
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs a preset.

    Returns:
        The exit status: 1 if a provider was wrong or failed, 2 where something is missing, 130
        after Ctrl-C.
    """
    options = parse(arguments)
    try:
        from rich.console import Console

        from peer.bench import report
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        print("peer.bench needs rich: pip install 'peer[bench]'", file=sys.stderr)
        return 2
    # A pipe or a file has no width of its own; tables are for reading there too.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options.targets:
        try:
            found = [row for path in options.targets for row in csv_rows.read(path)]
        except (OSError, ValueError) as error:
            print(f"peer.bench: {error}", file=sys.stderr)
            return 2
        for device in sorted({row.device for row in found}):
            console.print(report.make_targets_table(evaluate_runs(found, device)))
        return 0
    memory = None if options.max_memory is None else round(options.max_memory * GIB)
    try:
        machine = open_machine(options.device)
        sizes = machine.sizes
    except MachineError as error:
        if not options.dry_run:
            print(f"peer.bench: {error}", file=sys.stderr)
            return 2
        sizes = ASSUMED_GPU
        console.print(f"{error}. {describe_assumed(sizes, memory)}", highlight=False)
    budget = sizes.memory - HEADROOM if memory is None else memory
    listings = [
        entry
        for plan in options.plans
        for entry in list_entries(plan, budget, sizes.last_level_cache)
    ]
    if options.dry_run:
        console.print(report.make_listing_table(listings))
        return 0
    run = Options(
        preset=options.preset,
        csv=options.csv,
        settings=Settings(options.rounds, options.min_time),
        stream_size=None if options.stream_mib is None else options.stream_mib * 2**20,
        memory=memory,
        machine=machine,
    )
    display = report.Display(console, count_turns(listings, options.rounds))
    failures: list[tuple[str, Failure]] = []

    def fail(what: str, failure: Failure) -> None:
        failures.append((what, failure))

    try:
        with display.shown():
            rows = run_plans(options.plans, run, display.show_row, display.advance, fail)
    except KeyboardInterrupt:
        print_failures(failures)
        print("\nStopped; rows that were measured are kept.", file=sys.stderr)
        return 130
    console.print(report.make_rows_table(rows))
    if options.preset in TARGET_PRESETS:
        verdicts = evaluate(rows, options.device, _sizes_of_all_plans(options))
        console.print(report.make_targets_table(verdicts))
    status = 1 if failures else 0
    if options.preset == "targets" and torch.ops.peer.cpu_capability() == "avx512":
        others, other_status = measure_as("avx2", options)
        console.print(report.make_rows_table(others))
        status = status or other_status
    print_failures(failures)
    return status


def print_failures(failures: list[tuple[str, Failure]]) -> None:
    """What was wrong or failed, on stderr: tracebacks, then a line each."""
    for what, failure in failures:
        if failure.traceback:
            print(f"{what}:\n{failure.traceback}", file=sys.stderr)
    for what, failure in failures:
        print(f"{what}: {failure.reason}", file=sys.stderr)


def describe_assumed(sizes: Sizes, memory: int | None) -> str:
    """What the list of a dry run reckons with in place of a GPU.

    Args:
        sizes: that are assumed.
        memory: bytes that the command line allows, or None.
    """
    cache = f"{sizes.last_level_cache / 2**20:.0f} MiB of last-level cache"
    if memory is not None:
        return f"The list is for one of which {memory / GIB:g} GiB may be used, with {cache}."
    return f"The list is for one with {sizes.memory / GIB:g} GiB and {cache}."


def count_turns(listings: list[Listing], rounds: int) -> int:
    """Turns of the progress bar: for each entry a check, a peak and its rounds."""
    return len(listings) * (rounds + 2)


def measure_as(capability: str, options: argparse.Namespace) -> tuple[list[csv_rows.Row], int]:
    """Rows of the preset `capability` and the exit status of a process that runs other kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", "peer.bench", "--preset", "capability"]
        command += ["--csv", str(path)]
        for name in PASSED_ON:
            if (value := getattr(options, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {**os.environ, CAPABILITY: capability}
        run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
        rows = csv_rows.read(path) if path.exists() else []
    if options.csv is not None:
        csv_rows.append(rows, options.csv)
    return rows, run.returncode


if __name__ == "__main__":
    # Torch reads the variable when it first allocates, so it must be there before torch is.
    if "--huge-pages" in sys.argv and not uses_huge_pages():
        os.environ[HUGE_PAGES] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
