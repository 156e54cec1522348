"""Command line: `python -m peer_bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from peer_bench import results
from peer_bench.cases import DEVICES, DTYPES, MODES, PRESETS, PROVIDERS, list_plans
from peer_bench.entries import list_entries
from peer_bench.machine import ASSUMED_GPU, CPU, GIB, HEADROOM, Gpu, MachineError
from peer_bench.problem import parse_exponent
from peer_bench.results import HUGE_PAGES, TARGET_PRESETS, evaluate, evaluate_runs, uses_huge_pages
from peer_bench.runner import SETTINGS, Failure, Run, Settings, count_turns

DEFAULTS = {"cpu": "quick", "cuda": "cuda-targets"}  # presets
SIZES = ("num_experts", "tokens", "dim", "heads", "k", "dim_key", "threads")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line. `plans` are those of the preset with the options in place."""
    parser = argparse.ArgumentParser(
        prog="python -m peer_bench",
        allow_abbrev=False,
        description="Measures PEER layers beside plain PyTorch, PEER-pytorch and the feed-forward "
        "layers that they replace. Options for sizes take one value or several, separated by "
        "commas, and replace the preset's. benchmarks/README.md describes the rows.",
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=list(PRESETS),
        help=f"what to measure; default: {DEFAULTS['cpu']}, with --device cuda {DEFAULTS['cuda']}",
    )
    add("--providers", help=f"some of {', '.join(PROVIDERS)}")
    add("--modes", help=f"some of {', '.join(MODES)}; backward includes forward")
    add("--distribution", help="of the ids: uniform, zipf:EXPONENT, router")
    add("--num-experts", help="N, a square")
    add("--tokens", help="T")
    add("--dim", help="D, input and output width")
    add("--heads", help="H")
    add("--k", help="experts per head")
    add("--dim-key", help="query width per head")
    add("--dtype", help=f"some of {', '.join(DTYPES)}")
    add("--threads", help="of torch; default: as many as it chooses")
    add("--csv", type=Path, help="file to append rows to, as they are measured")
    add("--rounds", type=int, help=f"turns of each provider; slow ones take 3; {_say('rounds')}")
    add("--min-time", type=float, help=f"seconds of a turn, at least; {_say('min_time')}")
    add("--bandwidth-mib", type=int, help="size of the buffer that bandwidth is measured on")
    add(
        "--max-memory",
        type=float,
        help="memory limit in GiB; default: the available memory minus 2 GiB",
    )
    add("--huge-pages", action="store_true", help=f"{HUGE_PAGES}=1: large tensors on huge pages")
    add("--device", choices=list(DEVICES), default="cpu", help="where to measure")
    add("--dry-run", action="store_true", help="list what would run, and allocate nothing")
    add(
        "--targets",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="measure nothing; print which targets the rows of these files meet, each by the last "
        "run that measured it",
    )
    options = parser.parse_args(arguments)
    options.preset = options.preset or DEFAULTS[options.device]
    for name in ("rounds", "min_time"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(SETTINGS[options.device], name))
    for name in ("threads", "huge_pages"):
        if options.device != "cpu" and getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} is for --device cpu")
    if options.rounds < 1 or options.min_time < 0:
        parser.error("expected --rounds to be positive and --min-time not to be negative")
    try:
        distributions = _split(options.distribution)
        for distribution in distributions:
            parse_exponent(distribution)
        sizes: dict[str, tuple[int | str, ...]] = {
            name: tuple(int(value) for value in getattr(options, name).split(","))
            for name in SIZES
            if getattr(options, name)
        }
        options.single_sizes = {
            name: values[0] for name, values in sizes.items() if len(values) == 1
        }
        options.plans = list_plans(
            options.preset,
            modes=_split(options.modes, MODES, "--modes"),
            providers=_split(options.providers, PROVIDERS, "--providers"),
            distributions=distributions,
            sizes={**sizes, "dtype": _split(options.dtype)} if options.dtype else sizes,
            device=options.device,
        )
    except ValueError as error:
        parser.error(str(error))
    return options


def _say(name: str) -> str:
    cpu, cuda = (getattr(SETTINGS[device], name) for device in DEVICES)
    return f"default: {cpu}, with --device cuda {cuda}"


def _split(text: str | None, known: Iterable[str] = (), option: str = "") -> tuple[str, ...]:
    """The distinct names of a list, which must be known ones."""
    names = tuple(dict.fromkeys(text.split(","))) if text else ()
    for name in names:
        if known and name not in tuple(known):
            raise ValueError(f"expected {option} out of {', '.join(known)}, got {name}")
    return names


def main(arguments: list[str] | None = None) -> int:
    """Runs a preset.

    Returns:
        The exit status: 1 if a provider was wrong or failed, 2 if something is missing, 130 after
        Ctrl-C.
    """
    options = parse(arguments)
    try:
        from rich.console import Console

        from peer_bench import report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        return _refuse("rich is not installed: pip install rich")
    # A pipe or a file has no width of its own; tables are read there, too.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if options.targets:
        try:
            found = [row for path in options.targets for row in results.read(path)]
        except (OSError, ValueError) as error:
            return _refuse(str(error))
        for device in sorted({row.device for row in found}):
            console.print(report.make_targets_table(evaluate_runs(found, device)))
        return 0
    memory = None if options.max_memory is None else round(options.max_memory * GIB)
    machine = CPU
    try:
        machine = CPU if options.device == "cpu" else Gpu()
        available, cache = machine.available(), machine.last_level_cache
    except MachineError as error:
        if not options.dry_run:
            return _refuse(str(error))
        available, cache = ASSUMED_GPU
        size = f"{available / GIB:g} GiB of memory and {cache / 2**20:.0f} MiB of L2 cache"
        console.print(f"{error}. The list assumes one with {size}.", highlight=False)
    budget = available - HEADROOM if memory is None else memory
    entries = [entry for plan in options.plans for entry in list_entries(plan, budget, cache)]
    if options.dry_run:
        console.print(report.make_entries_table(entries))
        return 0
    display = report.Display(console, count_turns(entries, options.rounds))
    failures: list[tuple[str, Failure]] = []
    run = Run(
        preset=options.preset,
        csv=options.csv,
        settings=Settings(options.rounds, options.min_time),
        transfer_size=options.bandwidth_mib and options.bandwidth_mib * 2**20,
        memory=memory,
        machine=machine,
        on_row=display.show_row,
        on_progress=display.advance,
        on_failure=lambda what, failure: failures.append((what, failure)),
    )
    try:
        with display.progress:
            rows = run.measure(options.plans)
    except KeyboardInterrupt:
        print_failures(failures)
        print("\nStopped; rows that were measured are kept.", file=sys.stderr)
        return 130
    console.print(report.make_rows_table(rows))
    if options.preset in TARGET_PRESETS:
        verdicts = evaluate(rows, options.device, options.single_sizes)
        console.print(report.make_targets_table(verdicts))
    print_failures(failures)
    return 1 if failures else 0


def _refuse(reason: str) -> int:
    print(f"peer_bench: {reason}", file=sys.stderr)
    return 2


def print_failures(failures: list[tuple[str, Failure]]) -> None:
    """Prints what was wrong or failed to stderr: tracebacks, then a line each."""
    for what, failure in failures:
        if failure.traceback:
            print(f"{what}:\n{failure.traceback}", file=sys.stderr)
    for what, failure in failures:
        print(f"{what}: {failure.reason}", file=sys.stderr)


if __name__ == "__main__":
    # Torch reads the variable at its first allocation, so it must be set before torch is imported.
    if "--huge-pages" in sys.argv and not uses_huge_pages():
        os.environ[HUGE_PAGES] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
