"""The HTML report: its structure, its numbers, and how it looks to a browser where there is one."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from test_viz import read_png
from torch import nn

import peer
from peer._report import _choose
from peer.usage import LayerUsage

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SIZES = {"num_experts": (5, 6), "heads": 2, "num_experts_per_head": 4, "dim_key": 8}
ALPHABET = "abcdefghijklmnopqrstuvw \n<"


def decode(ids):
    return "".join(ALPHABET[i] for i in ids)


class Model(nn.Module):
    """Letters to vectors, and two layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(26, 10)
        self.first = peer.PEER(10, **SIZES)
        self.last = peer.PEER(10, **{**SIZES, "num_experts": (4, 6)})

    def forward(self, ids, mask=None):
        return self.last(self.first(self.embedding(ids), mask), mask)


class Page(HTMLParser):
    """The elements of a page. Fails if one is not closed."""

    EMPTY = ("meta", "link", "img", "br")
    EMPTY_IN_SVG = ("polyline", "rect", "path", "circle")

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.EMPTY_IN_SVG
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


@pytest.fixture(scope="module")
def material():
    """A model that has grown and learned since a checkpoint, its data and its history."""
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.first.router.row_keys[..., [0, 2], :] *= 0.01  # short keys, so some are unused
    before = copy.deepcopy(model.state_dict())
    model.first.freeze_experts(range(7))
    model.first.disable_experts([28, 29])
    model.first.grow(1)
    with torch.no_grad():
        model.first.experts.weight[8] *= 1.5
    data = [torch.randint(5, (3, 12)) for _ in range(4)]  # few letters, so some experts are idle
    with peer.UsageTracker(model) as tracker:
        for step, batch in enumerate(data):
            model(batch)
            tracker.snapshot(100 * step)
    return model.eval(), data, before, tracker.history


@pytest.fixture(scope="module")
def written(material, tmp_path_factory):
    """The whole report and what it returned."""
    model, data, before, history = material
    path = tmp_path_factory.mktemp("report") / "report.html"
    found = peer.report(
        model, data, path, decode=decode, before=before, history=history, experts_per_layer=6
    )
    return path, found


def test_the_report_is_one_file_that_loads_nothing(written):
    path, _ = written
    page = Page(path)
    assert not page.all("script")
    for attributes in (each for _, each in page.elements):
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("data:", "#")), value
    style = re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "prefers-color-scheme: dark" in style[0]
    links = {each["href"][1:] for each in page.all("a")}
    assert links <= {each.get("id") for _, each in page.elements}
    assert len(page.all("img")) == 5  # use and state of both layers, change of one


def test_every_picture_says_what_it_shows(written):
    page = Page(written[0])
    assert all(each["alt"] for each in page.all("img"))
    assert all(each["aria-label"] for each in page.all("svg"))


def test_the_numbers_are_those_of_the_tracker(material, written):
    model, data, _, _ = material
    _, found = written
    with peer.UsageTracker(model) as tracker, torch.no_grad():
        for batch in data:
            model(batch)
    for name, usage in tracker.layers.items():
        numbers = usage.as_dict()
        assert {key: found[name][key] for key in numbers} == numbers
        assert found[name]["tokens"] == 4 * 3 * 12
        effective = numbers["experts"] / math.exp(numbers["unevenness"])
        assert found[name]["effective_experts"] == pytest.approx(effective)
    first = found["first"]
    assert (first["rows"], first["columns"], first["experts_per_token"]) == (6, 6, 8)
    assert (first["frozen"], first["disabled"]) == (7, 2)
    assert first["unused"] == numbers_of_unused(tracker.layers["first"], disabled=[28, 29])
    mass = tracker.layers["first"].mass.sort(descending=True).values
    assert first["share_of_busiest_10_percent"] == pytest.approx(float(mass[:4].sum() / mass.sum()))
    json.dumps(found)


def numbers_of_unused(usage, disabled):
    return sum(int(count) == 0 and e not in disabled for e, count in enumerate(usage.counts))


def test_the_text_of_experts_is_that_of_inspect(material, written):
    model, data, _, _ = material
    _, found = written
    for name in ("first", "last"):
        shown = found[name]["shown"]
        assert len(shown) == 6
        expected = peer.inspect.top_tokens(
            model, data, {name: [each["expert"] for each in shown]}, decode=decode
        )[name]
        assert {each["expert"]: each["tokens"] for each in shown} == expected
    sample = found["first"]["sample"]
    assert "".join(token["token"] for token in sample) == decode(data[0].flatten().tolist())


def test_an_expert_that_was_seldom_picked_is_not_shown_for_its_weight():
    usage = LayerUsage(6, (), torch.device("cpu"))
    usage.counts = torch.tensor([10, 10, 10, 10, 1, 0])
    usage.mass = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.9, 0.0], dtype=torch.float64)
    assert _choose(usage, 4) == [0, 1, 2, 3]


def test_the_partner_of_an_expert_is_the_one_that_shares_most_of_its_tokens(material, written):
    model, data, _, _ = material
    _, found = written
    named = 0
    for name, numbers in found.items():
        ids = sorted(each["expert"] for each in numbers["shown"])
        with peer.UsageTracker(model, coactivation={name: ids}) as tracker, torch.no_grad():
            for batch in data:
                model(batch)
        together = tracker.layers[name].together
        for each in numbers["shown"]:
            row = together[ids.index(each["expert"])].tolist()
            tokens = row[ids.index(each["expert"])]
            others = {i: n for i, n in zip(ids, row, strict=True) if i != each["expert"]}
            if max(others.values()) == 0:
                assert each["partner"] is None
                continue
            named += 1
            assert each["partner"]["expert"] != each["expert"]
            assert each["partner"]["share"] == max(others.values()) / tokens
            assert others[each["partner"]["expert"]] == max(others.values())
    assert named > 0


def test_the_changes_are_those_of_inspect(material, written):
    model, _, before, _ = material
    _, found = written
    changes = peer.inspect.changes(model, before)
    assert {name: found[name]["changes"] for name in found} == changes
    words = Page(written[0]).words
    assert "6 experts are new. Of the 30 old ones, 1 moved and 29 stayed the same" in words
    assert "7 experts are frozen" in words
    assert "2 experts are switched off" in words


def test_the_maps_show_each_expert_at_its_place(material, written):
    model, data, _, _ = material
    page = Page(written[0])
    use, state = (read_png(each["src"])[0] for each in page.all("img")[:2])
    counts = peer.count_usage(model, data)["first.experts"]
    assert torch.equal(use == 0, (counts == 0).view(6, 6))
    assert use.flatten()[counts.argmax()] == 15
    expected = [
        6 if expert in (28, 29) else (2 if expert < 7 else 4 if expert >= 30 else 0) + (count == 0)
        for expert, count in enumerate(counts.tolist())
    ]
    assert state.flatten().tolist() == expected
    assert len(set(expected)) > 4
    for kind in ("in use", "frozen, in use", "new, in use", "switched off"):
        assert re.search(rf"{kind}: \d+", page.words)


def test_white_space_that_fires_can_be_seen(material, tmp_path):
    model, data, _, _ = material
    peer.report(model, data, tmp_path / "a.html", decode=lambda ids: "\n" + " " * 9)
    assert "⏎␣×9" in Page(tmp_path / "a.html").words


def test_text_cannot_become_markup(material, tmp_path):
    model, data, _, _ = material
    evil = '<script>alert("1")</script>&amp;\x07\x1b\u202e'
    found = peer.report(
        model, data, tmp_path / "report.html", decode=lambda ids: evil, title="<b>title</b>"
    )
    page = Page(tmp_path / "report.html")
    assert not page.all("script")
    assert "<b>title</b>" in page.words
    assert '<script>alert("1")</script>&amp;' in page.words
    assert not set("\x07\x1b\u202e") & set(page.words)
    assert found["first"]["shown"][0]["tokens"][0]["token"] == evil


def test_without_decoder_checkpoint_and_history_the_report_has_less(material, tmp_path):
    model, data, _, _ = material
    found = peer.report(model, iter(data), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "shows no text" in page.words
    for words in ("Which experts fire on what", "Over training", "earlier checkpoint"):
        assert words not in page.words
    assert not {"shown", "sample", "changes"} & found["first"].keys()
    assert len(page.all("img")) == 4


def test_numbers_of_one_are_singular(tmp_path):
    model = nn.Sequential(nn.Embedding(26, 10), peer.PEER(10, **{**SIZES, "heads": 1}).eval())
    peer.report(model, [torch.tensor([[3, 5]])], tmp_path / "report.html", decode=decode)
    words = Page(tmp_path / "report.html").words
    assert "Picked once" in words
    assert "heads" not in words
    assert not re.search(r"\b1 (times|heads|experts|tokens|layers)\b", words)


def test_layers_that_share_a_router_or_a_pool_are_reported(tmp_path):
    torch.manual_seed(0)
    first = peer.PEER(10, **SIZES)
    model = nn.Sequential(
        nn.Embedding(26, 10),
        first,
        peer.PEER(10, router=first.router),
        peer.PEER(10, **{**SIZES, "num_experts": (4, 6)}, experts=first.experts),
    )
    before = copy.deepcopy(model)
    found = peer.report(
        model, [torch.randint(26, (3, 12))], tmp_path / "a.html", decode=decode, before=before
    )
    assert list(found) == ["1", "2", "3"]
    assert found["1"]["retrievals"] == found["2"]["retrievals"] == 2 * 36 * 8
    assert found["3"]["experts"] == 24
    Page(tmp_path / "a.html")


def test_wrong_material_is_an_error_and_no_file(material, tmp_path):
    model, data, _, _ = material
    path = tmp_path / "report.html"
    for arguments, options, message in (
        ((nn.Linear(2, 2), data), {}, "with a PEER layer"),
        ((model, []), {}, "retrieved nothing"),
        ((model, data), {"before": {}}, "no tensor first.experts.weight"),
        ((model, data), {"history": [{"step": 1, "other/usage": 0.5}]}, "history of the layers"),
        ((model.first, [torch.randn(2, 10)]), {"decode": decode}, "no tensor of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            peer.report(*arguments, path, **options)
        assert not path.exists()


# ---- In a browser.

PROBE = """<script>addEventListener("load", () => {
  document.body.dataset.found = JSON.stringify({
    pictures: [...document.images].map(image => [image.naturalWidth, image.clientWidth]),
    charts: [...document.querySelectorAll("svg")].map(chart => chart.clientWidth),
    page: [document.documentElement.scrollWidth, innerWidth],
    ground: getComputedStyle(document.body).backgroundColor,
  });
});</script></body>"""


def open_in_browser(path, folder, *options):
    """The findings of a script that runs in the page, and what the browser reported."""
    probed = folder / "probed.html"
    probed.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom",
        *options, probed.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = {}

    class Body(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "body":
                found.update(json.loads(dict(attributes)["data-found"]))

    Body().feed(result.stdout)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return found, console


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_pictures_and_reports_no_error(written, tmp_path, width, scheme):
    options = [f"--window-size={width},900"]
    if scheme == "dark":
        options += ["--blink-settings=preferredColorScheme=0"]
    found, console = open_in_browser(written[0], tmp_path, *options)
    assert console == []
    assert len(found["pictures"]) == 5
    assert all(natural > 0 and shown > 100 for natural, shown in found["pictures"])
    assert len(found["charts"]) >= 5
    assert all(shown > 100 for shown in found["charts"])
    assert found["page"][0] <= found["page"][1]  # nothing to scroll sideways
    channels = [int(number) for number in re.findall(r"\d+", found["ground"])[:3]]
    assert (sum(channels) < 200) == (scheme == "dark")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_would_report_an_error(tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<html><body><img src="data:,"><script>missing()</script></body></html>')
    found, console = open_in_browser(path, tmp_path)
    assert found["pictures"][0][0] == 0
    assert any("missing is not defined" in line for line in console)
