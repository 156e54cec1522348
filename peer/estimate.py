"""Prints what layers cost: `python -m peer.estimate --help`.

`peer.estimate` is the function behind it. An `import peer.estimate` puts this module in its place,
so the module is callable, too.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from peer._estimate import DEVICES, Device, Estimate, estimate, format_estimates
from peer.layer_config import PEERConfig

__all__ = ["estimate", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program.

    Args:
        arguments: the arguments of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m peer.estimate",
        description="Predicts parameters, FLOPs, memory and the time of a step of PEER layers. "
        "Options of the layer take several values, separated by commas; the table has a column "
        "for each combination.",
    )
    several: dict[str, tuple[Callable[[str], Any], str, str]] = {
        "--dim": (int, "1024", "width of the layer"),
        "--num-experts": (_grid, "1048576", "N, or a grid such as 512x1024"),
        "--heads": (int, "8", "H"),
        "--num-experts-per-head": (int, "16", "K"),
        "--dim-key": (int, "256", "query width per head"),
        "--tokens": (int, "8192", "tokens of a step"),
    }
    for name, (kind, default, text) in several.items():
        parser.add_argument(
            name, type=_list_of(kind), default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--glu", action="store_true", help="experts with a gate")
    parser.add_argument("--keys-per-head", action="store_true", help="heads do not share keys")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32"
    )
    parser.add_argument(
        "--device", help=f"{', '.join(DEVICES)}, or cpu or cuda, which is measured; gives times"
    )
    parser.add_argument("--bandwidth", type=float, help="bytes per second, instead of --device")
    parser.add_argument("--flops", type=float, help="FLOP/s of products, with --bandwidth")
    given = parser.parse_args(arguments)
    if (given.bandwidth is None) != (given.flops is None):
        parser.error("--bandwidth and --flops go together")
    dtype = getattr(torch, given.dtype)
    device: Any = given.device
    if given.bandwidth is not None:
        if device is not None:
            parser.error("--device and --bandwidth exclude each other")
        device = Device(given.bandwidth, given.flops)
    elif device is not None and device not in DEVICES:
        device = Device.measure(device, dtype)
        print(
            f"measured on {device.name}: {device.bandwidth / 1e9:.3g} GB/s, "
            f"{device.flops / 1e9:.3g} GFLOP/s\n"
        )
    names = [name.removeprefix("--").replace("-", "_") for name in several]
    choices = [getattr(given, name) for name in names]
    varied = [name for name, values in zip(names, choices, strict=True) if len(values) > 1]
    estimates = {}
    try:
        for values in itertools.product(*choices):
            options = dict(zip(names, values, strict=True))
            label = ", ".join(f"{name}={_show(options[name])}" for name in varied)
            tokens = options.pop("tokens")
            config = PEERConfig(glu=given.glu, share_keys=not given.keys_per_head, **options)
            estimates[label] = estimate(config, tokens=tokens, device=device, dtype=dtype)
    except ValueError as error:
        parser.error(str(error))
    print(format_estimates(estimates))


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        return [kind(each) for each in text.split(",")]

    return values


def _grid(text: str) -> int | tuple[int, int]:
    rows, cross, columns = text.partition("x")
    return (int(rows), int(columns)) if cross else int(text)


def _show(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Estimate:
        return estimate(*arguments, **options)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _CallableModule
