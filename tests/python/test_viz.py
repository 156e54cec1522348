"""Pictures of the experts, by matplotlib and without it."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
import sys
import zlib
from xml.etree import ElementTree

import pytest
import torch

import peer
from peer import _charts


def test_an_atlas_shows_experts_by_row_and_column():
    counts = torch.arange(24)
    (axes, bar) = peer.viz.atlas(counts, (4, 6), title="experts").axes
    shown = torch.tensor(axes.images[0].get_array().filled(0).tolist())
    assert torch.equal(shown.view(-1), counts.float())
    assert axes.images[0].get_array().mask[0, 0]  # never retrieved: blank
    assert bar.get_ylabel() == "retrievals"


def test_an_atlas_of_a_large_grid_shows_means():
    counts = torch.arange(1024 * 600) % 1024
    image = peer.viz.atlas(counts, (1024, 600)).axes[0].images[0].get_array()
    assert image.shape == (512, 300)
    expected = counts.view(512, 2, 300, 2).double().mean((1, 3))
    assert float(image[7, 9]) == float(expected[7, 9])


def test_an_atlas_of_one_amount_or_none_is_drawn():
    for counts in (torch.zeros(24), torch.ones(24)):
        peer.viz.atlas(counts, (4, 6)).savefig(io.BytesIO())


def test_a_usage_curve_descends_from_the_busiest_expert():
    counts = {"a": torch.tensor([0, 9, 1, 4]), "b": torch.tensor([2, 2])}
    first, second = peer.viz.usage_curve(counts).axes[0].lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 3], [9, 4, 1])
    assert list(second.get_ydata()) == [2, 2]
    assert peer.viz.usage_curve(torch.zeros(3)).axes[0].lines[0].get_xdata().tolist() == []


def test_a_history_has_a_line_for_each_layer():
    rows = [
        {"step": step, "a/usage": 0.1 * step, "b/usage": 0.5, "a/unevenness": 1.0}
        for step in (0, 10, 20)
    ]
    usage, unevenness = peer.viz.history(rows).axes
    assert [line.get_label() for line in usage.lines] == ["a", "b"]
    assert list(usage.lines[0].get_xdata()) == [0, 10, 20]
    assert usage.lines[0].get_ydata().tolist() == pytest.approx([0, 1, 2])
    assert len(unevenness.lines) == 1


def test_pictures_of_a_tracked_model_can_be_saved(tmp_path):
    layer = peer.PEER(8, num_experts=(4, 6), heads=2, num_experts_per_head=4, dim_key=4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with peer.UsageTracker(layer) as tracker:
        layer(torch.randn(30, 8))
        tracker.snapshot(1, reset=False)
    layer.grow(1)
    layer.experts.weight.data[3] *= 2
    moved = peer.inspect.distances(layer, before)["experts"]
    figures = (
        peer.viz.atlas(tracker.counts, (4, 6)),
        peer.viz.usage_curve(peer.count_usage(layer, [torch.randn(30, 8)])),
        peer.viz.history(tracker.history),
        peer.viz.changes(moved, (5, 6)),
    )
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert figures[3].axes[1].get_title() == "23 of 24 old experts did not move, 6 are new"


def test_wrong_sizes_are_errors():
    with pytest.raises(ValueError, match=r"24 values for the grid \(4, 6\), got \[25\]"):
        peer.viz.atlas(torch.zeros(25), (4, 6))
    with pytest.raises(ValueError, match="at least one row"):
        peer.viz.history([])


def test_without_matplotlib_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        peer.viz.atlas(torch.zeros(24), (4, 6))


# ---- Without matplotlib: what the report is made of.


def read_png(uri):
    """Levels and colours of an indexed PNG, by a reader of its own."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (check,) = struct.unpack_from(">I", data, place + 8 + length)
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + length
    columns, rows, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    lines = zlib.decompress(chunks[b"IDAT"])
    pixels = [list(lines[r * (columns + 1) + 1 : (r + 1) * (columns + 1)]) for r in range(rows)]
    return torch.tensor(pixels), list(zip(*[iter(chunks[b"PLTE"])] * 3, strict=True))


def test_a_png_has_the_levels_and_colours():
    levels = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0))
    colors = [(1, 2, 3), (40, 50, 60), (255, 0, 9)]
    found = read_png(_charts.png(levels, colors))
    assert torch.equal(found[0], levels)
    assert found[1] == colors


def test_levels_of_use_are_logarithmic_and_zero_is_unused():
    levels = _charts.use_levels(torch.tensor([[0.0, 1.0], [10.0, 100.0]]))
    assert levels.tolist() == [[0, 1], [8, 15]]
    assert _charts.use_levels(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    assert (_charts.use_levels(torch.ones(2, 2)) > 0).all()


def test_a_block_of_a_large_grid_has_the_kind_of_most_of_its_experts():
    kinds = torch.zeros(600, 2, dtype=torch.int64)
    kinds[:3, :] = torch.tensor([[2, 2], [2, 1], [1, 1]])
    assert _charts.pool_levels(kinds, 3).shape == (300, 1)
    assert _charts.pool_levels(kinds, 3)[:3, 0].tolist() == [2, 0, 0]


def test_a_line_chart_places_its_points():
    chart = _charts.line_chart(
        [("one <&>", [(0, 0), (5, math.nan), (10, 4), (20, 8)])],
        label='a "chart"',
        x_label="x",
        y_label="y",
        x_format="{:g}%".format,
    )
    root = ElementTree.fromstring(chart)
    assert root.get("aria-label") == 'a "chart"'
    (dot,) = root.findall("circle")
    (line,) = (each for each in root.findall("polyline") if each.get("class") == "line c0")
    assert line.find("title").text == "one <&>"
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    start = (float(dot.get("cx")), float(dot.get("cy")))
    end = points[1]
    assert points[0] == pytest.approx([(a + b) / 2 for a, b in zip(start, end, strict=True)])
    texts = [each.text for each in root.findall("text")]
    assert {"0%", "5%", "10%", "20%", "0", "8", "x", "y"} <= set(texts)
    assert all(re.fullmatch(r"-?[\d.]+%?|x|y", text) for text in texts)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.07, [0, 0.02, 0.04, 0.06]),
        (-3, 4, [-2, 0, 2, 4]),
        (0, 12000, [0, 2500, 5000, 7500, 10000]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert _charts._ticks(low, high) == pytest.approx(expected)
