"""Pictures for HTML without a drawing library: lines as SVG, grids of experts as PNG.

The colours of an SVG are CSS variables, so that it follows the page from light to dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape

import torch
from torch import Tensor

__all__ = [
    "GROUND",
    "USE_COLORS",
    "Color",
    "block_size",
    "line_chart",
    "mean_blocks",
    "png",
    "pool_levels",
    "use_levels",
]

Color = tuple[int, int, int]

LARGEST = 512  # pixels of a side of a picture

# From an unused expert to the one that is used most, on a dark ground.
_STOPS: tuple[Color, ...] = (
    (45, 35, 100),
    (60, 90, 170),
    (40, 150, 165),
    (110, 200, 110),
    (240, 225, 90),
)
GROUND: Color = (16, 21, 28)


def _ramp(steps: int) -> list[Color]:
    colors = []
    for step in range(steps):
        place = step / (steps - 1) * (len(_STOPS) - 1)
        low = min(int(place), len(_STOPS) - 2)
        part = place - low
        first, second = _STOPS[low], _STOPS[low + 1]
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
        colors.append((red, green, blue))
    return colors


USE_COLORS: list[Color] = [GROUND, *_ramp(15)]


def png(levels: Tensor, colors: Sequence[Color]) -> str:
    """A picture as a `data:` URI.

    Args:
        levels: (rows, columns), a position in the colours for each pixel.
        colors: at most 256 colours.
    """
    rows, columns = levels.shape
    pixels = bytes(levels.to(torch.uint8).flatten().tolist())
    lines = b"".join(b"\0" + pixels[row * columns : (row + 1) * columns] for row in range(rows))
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", b"".join(bytes(color) for color in colors)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def block_size(rows: int, columns: int) -> int:
    """How many rows and columns of a grid become one pixel."""
    return math.ceil(max(rows, columns) / LARGEST)


def mean_blocks(grid: Tensor) -> Tensor:
    """The means of square blocks of a grid, (rows, columns), so that a picture is not too large."""
    block = block_size(*grid.shape)
    return torch.nn.functional.avg_pool2d(grid.double()[None, None], block, ceil_mode=True)[0, 0]


def use_levels(grid: Tensor) -> Tensor:
    """Levels for `USE_COLORS` of the retrievals of experts, (rows, columns), by logarithm."""
    means = mean_blocks(grid)
    largest = float(means.max())
    if largest == 0:
        return torch.zeros_like(means, dtype=torch.int64)
    smallest = float(means[means > 0].min())
    span = math.log(largest / smallest) or 1.0
    level = 1 + ((means.clamp(min=smallest) / smallest).log() / span * 14).round().long()
    return torch.where(means > 0, level.clamp(1, 15), 0)


def pool_levels(kinds: Tensor, count: int) -> Tensor:
    """The most frequent kind in each block of a grid of kinds, (rows, columns), in [0, count)."""
    shares = torch.stack([mean_blocks(kinds == kind) for kind in range(count)])
    return shares.argmax(0)


def line_chart(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str] = "{:g}".format,
    y_format: Callable[[float], str] = "{:g}".format,
    y_range: tuple[float, float] | None = None,
    reference: Sequence[tuple[float, float]] = (),
) -> str:
    """Lines over two linear axes, as an SVG element.

    Args:
        lines: the name of each line and its points. A point that is not finite breaks the line.
        label: what the chart shows, for readers who do not see it.
        x_label: what the horizontal axis shows.
        y_label: what the vertical axis shows.
        x_format: makes the labels of the horizontal axis.
        y_format: makes the labels of the vertical axis.
        y_range: the ends of the vertical axis; by default those of the points.
        reference: points of a dashed line.
    """
    left, right, top, bottom, width, height = 54, 24, 12, 44, 440, 270
    points = [point for _, line in lines for point in line if all(map(math.isfinite, point))]
    points += reference
    x_low, x_high = _ends([x for x, _ in points])
    y_low, y_high = y_range or _ends([0.0, *(y for _, y in points)])

    def place(point: tuple[float, float]) -> str:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = height - bottom - (point[1] - y_low) / (y_high - y_low) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for value in _ticks(y_low, y_high):
        start, end = place((x_low, value)), place((x_high, value))
        y = start.split(",")[1]
        parts.append(f'<polyline class="grid" points="{start} {end}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y}" dy=".35em" text-anchor="end">'
            f"{escape(y_format(value))}</text>"
        )
    for value in _ticks(x_low, x_high):
        x = place((value, y_low)).split(",")[0]
        parts.append(
            f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{escape(x_format(value))}</text>"
        )
    corner, end = place((x_low, y_low)), place((x_high, y_low))
    parts.append(f'<polyline class="axis" points="{corner} {end}"/>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    if reference:
        path = " ".join(map(place, reference))
        parts.append(f'<polyline class="reference" points="{path}"/>')
    for number, (name, line) in enumerate(lines):
        for piece in _pieces(line):
            title = f"<title>{escape(name)}</title>"
            if len(piece) == 1:
                x, y = place(piece[0]).split(",")
                parts.append(f'<circle class="dot c{number % 6}" cx="{x}" cy="{y}" r="3">')
                parts.append(f"{title}</circle>")
            else:
                path = " ".join(map(place, piece))
                parts.append(f'<polyline class="line c{number % 6}" points="{path}">')
                parts.append(f"{title}</polyline>")
    return "".join([*parts, "</svg>"])


def _pieces(line: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The parts of a line between points that are not finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in line:
        if all(map(math.isfinite, point)):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
