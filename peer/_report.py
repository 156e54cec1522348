"""One HTML file that shows what the experts of a model do."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peer._charts import (
    GROUND,
    USE_COLORS,
    Color,
    block_size,
    line_chart,
    png,
    pool_levels,
    use_levels,
)
from peer._evaluate import find_layers, run_batches
from peer.inspect import changes, distances, experts_of, top_tokens
from peer.modules import PEER, ProductKeyRouter
from peer.usage import LayerUsage, UsageTracker

__all__ = ["report"]

# What an expert is, and a colour for it. Those that this data did not use are darker.
KINDS: tuple[tuple[str, Color], ...] = (
    ("in use", (66, 133, 190)),
    ("not picked by this data", (38, 50, 64)),
    ("frozen, in use", (160, 205, 235)),
    ("frozen, not picked", (84, 104, 124)),
    ("new, in use", (245, 205, 85)),
    ("new, not picked", (112, 92, 40)),
    ("switched off", (205, 75, 65)),
)
SAMPLE_TOKENS = 100
WORTH_NAMING = 0.2  # of the tokens of an expert, those that it shares with another


def report(
    model: nn.Module,
    data: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    decode: Callable[[list[int]], str] | None = None,
    before: nn.Module | Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, float | None]] = (),
    experts_per_layer: int = 12,
    token_ids: Callable[[Any], Tensor] | None = None,
    title: str = "What the experts do",
) -> dict[str, dict[str, Any]]:
    """Writes a report on the `PEER` layers of a model, for readers who know nothing of them.

    The report is one HTML file that needs no other file and no network. It says what the layers
    are, how evenly their experts are used, which text makes experts fire, and which experts are
    frozen, disabled or unused. With an earlier checkpoint, it says what is new and what has moved.

    The model runs twice over the data, in evaluation mode and without gradients.

    Args:
        model: a model with at least one `PEER` layer.
        data: the arguments of the model's calls: a mapping of keyword arguments, a tuple or list of
            positional arguments, or any other object as the only argument. An iterator is kept in a
            list.
        path: the file to write.
        decode: turns a list of ids of tokens into text. Without it, the report shows no text.
        before: an earlier state of the model, or a model with it.
        history: `history` of a `UsageTracker` of the model, for curves over training.
        experts_per_layer: how many experts of each layer are shown with their text.
        token_ids: finds the ids of the tokens in a batch, see `peer.inspect.top_tokens`.
        title: the heading.

    Returns:
        All numbers and texts of the report, for each layer by name.

    Raises:
        ValueError: the model has no layer, the data has no tokens, or no ids of tokens although
            `decode` is given, or `before` is not an earlier state of the model.

    Example:
        >>> import tempfile, torch, peer
        >>> layer = peer.PEER(8, num_experts=16, heads=2, num_experts_per_head=4, dim_key=4)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(26, 8), layer)
        >>> letters = torch.randint(26, (4, 20))
        >>> decode = lambda ids: "".join(chr(97 + i) for i in ids)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = peer.report(model, [letters], f"{folder}/report.html", decode=decode)
        >>> found["1"]["experts"], found["1"]["tokens"]
        (16, 80)
    """
    layers = find_layers(model)
    batches = list(data) if isinstance(data, Iterator) else data
    with UsageTracker(model) as tracker:
        run_batches(model, batches)
    found, pictures = _measure(layers, _by_layer(layers, tracker))
    if decode is not None:
        chosen = {
            name: _choose(usage, experts_per_layer)
            for name, usage in _by_layer(layers, tracker).items()
        }
        _read(model, layers, batches, found, chosen, decode, token_ids)
    if before is not None:
        moved = distances(model, before)
        for name, change in changes(model, before).items():
            found[name]["changes"] = change
        for name, layer in layers.items():
            pool = next(n for n, part in model.named_modules() if part is layer.experts)
            pictures[name]["distance"] = moved[pool][: layer.num_experts]
    page = _Page(title, layers, found, pictures, history)
    Path(path).write_text(page.html(), encoding="utf-8")
    return found


# ---- What the report shows.


def _by_layer(layers: Mapping[str, PEER], tracker: UsageTracker) -> dict[str, LayerUsage]:
    """What a tracker counted, for each layer; layers that share a router share its name."""
    names: dict[ProductKeyRouter, str] = {}
    for name, layer in layers.items():
        names.setdefault(layer.router, name)
    return {name: tracker.layers[names[layer.router]] for name, layer in layers.items()}


def _measure(
    layers: Mapping[str, PEER], usages: Mapping[str, LayerUsage]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """The numbers of each layer, and the counts and masks that its pictures show."""
    found, pictures = {}, {}
    for name, layer in layers.items():
        mass, counts = usages[name].mass.cpu(), usages[name].counts.cpu()
        if int(counts.sum()) == 0:
            raise ValueError(f"expected data with tokens, but the layer {name!r} retrieved nothing")
        none = torch.zeros(layer.num_experts, dtype=torch.bool)
        masks = {
            mask: none if given is None else given[: layer.num_experts].cpu()
            for mask, given in (
                ("frozen", layer.experts.frozen),
                ("disabled", layer.experts.disabled),
            )
        }
        found[name] = {
            **_numbers(layer, usages[name]),
            **{mask: int(given.sum()) for mask, given in masks.items()},
            "unused": int(((counts == 0) & ~masks["disabled"]).sum()),
        }
        pictures[name] = {"counts": counts, "mass": mass, **masks}
    return found, pictures


def _numbers(layer: PEER, usage: LayerUsage) -> dict[str, Any]:
    router = layer.router
    numbers: dict[str, Any] = usage.as_dict()
    per_token = router.heads * router.num_experts_per_head
    share = usage.mass.sort(descending=True).values.cumsum(0) / usage.mass.sum()
    experts = usage.num_experts
    return {
        **numbers,
        "rows": router.rows,
        "columns": router.columns,
        "heads": router.heads,
        "experts_per_token": per_token,
        "tokens": numbers["retrievals"] // per_token,
        "effective_experts": experts * math.exp(-numbers["unevenness"]),
        "share_of_busiest_1_percent": float(share[math.ceil(experts / 100) - 1]),
        "share_of_busiest_10_percent": float(share[math.ceil(experts / 10) - 1]),
    }


def _read(
    model: nn.Module,
    layers: Mapping[str, PEER],
    batches: Iterable[Any],
    found: dict[str, dict[str, Any]],
    chosen: Mapping[str, Sequence[int]],
    decode: Callable[[list[int]], str],
    token_ids: Callable[[Any], Tensor] | None,
) -> None:
    """Adds the text of some experts of each layer, and the experts of the first text."""
    # Layers that share a router have the same experts, under the name of the first.
    first_names = {layer.router: name for name, layer in reversed(list(layers.items()))}
    pairs = {name: chosen[name] for name in first_names.values()}
    with UsageTracker(model, coactivation=pairs) as tracker:
        texts = top_tokens(model, batches, chosen, decode=decode, token_ids=token_ids)
    first = next(iter(batches))
    sample = experts_of(
        model,
        (first,) if isinstance(first, Tensor) else first,
        decode=decode,
        per_token=4,
        max_tokens=SAMPLE_TOKENS,
        token_ids=token_ids,
    )
    for name, usage in _by_layer(layers, tracker).items():
        columns = layers[name].router.columns
        found[name]["shown"] = [
            {
                "expert": expert,
                "row": expert // columns,
                "column": expert % columns,
                "retrievals": int(usage.counts[expert]),
                "mean_weight": float(usage.mass[expert] / usage.counts[expert]),
                "tokens": texts[name][expert],
                "partner": _partner(usage, expert),
            }
            for expert in chosen[name]
        ]
        found[name]["sample"] = sample[name]["tokens"]


def _choose(usage: LayerUsage, count: int) -> list[int]:
    """Experts worth reading: half the ones used most, half those with the largest mean weight."""
    busiest = usage.mass.topk(min((count + 1) // 2, usage.num_experts)).indices.tolist()
    # An expert that was retrieved once tells little. The median of the used ones is a fair number.
    used = usage.counts[usage.counts > 0]
    enough = usage.counts >= max(int(used.median()), 1)
    mean = torch.where(enough, usage.mass / usage.counts.clamp(min=1), 0)
    mean[busiest] = 0
    keenest = mean.topk(min(count - len(busiest), usage.num_experts)).indices.tolist()
    chosen = [*busiest, *keenest]
    return [expert for expert in dict.fromkeys(chosen) if int(usage.counts[expert]) > 0]


def _partner(usage: LayerUsage, expert: int) -> dict[str, Any] | None:
    """Of the shown experts, the one that most often shares a token with an expert."""
    position = usage.chosen.tolist().index(expert)
    row = usage.together[position].clone()
    tokens = int(row[position])
    row[position] = -1
    if len(row) < 2 or int(row.max()) <= 0:
        return None
    best = int(row.argmax())
    return {"expert": int(usage.chosen[best]), "share": int(row[best]) / tokens}


# ---- The page.

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1c242d;
  --soft: #5a6672; --edge: #dcdfe3; --mark: #ffe08a; --mark-ink: #1c242d; --bar: #3b78b5;
  --c0: #2f6fb0; --c1: #c2571a; --c2: #2a8a57; --c3: #8a4fb0; --c4: #a3841a; --c5: #bd3d6b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161b; --card: #1b2129; --ink: #e4e8ec; --soft: #9aa6b2; --edge: #313a45;
    --mark: #d9a72a; --mark-ink: #14181d; --bar: #69a5de;
    --c0: #6cabe6; --c1: #f0905a; --c2: #68c894; --c3: #bd8fe0; --c4: #d9bd5a; --c5: #ee83a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-size: 16px; overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 12px 0 6px; }
h2 { font-size: 1.35rem; margin: 44px 0 10px; padding-top: 18px;
  border-top: 1px solid var(--edge); }
h3 { font-size: 1.05rem; margin: 26px 0 8px; }
p { margin: 8px 0; max-width: 72ch; }
.soft, figcaption, .note { color: var(--soft); font-size: .92rem; }
a { color: var(--c0); }
nav a { display: inline-block; margin-right: 14px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  margin: 16px 0; }
.card, figure, .expert { background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 1.5rem; line-height: 1.2; }
.pair { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: 10px; }
figure h3 { margin-top: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
.grid { stroke: var(--edge); fill: none; } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2.2; } .reference { fill: none; stroke: var(--soft);
  stroke-dasharray: 4 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.map { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px; }
.small.map { max-width: 300px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 10px; font-size: .88rem;
  color: var(--soft); }
.key i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .4em;
  vertical-align: -.08em; border: 1px solid var(--edge); }
.ramp { display: flex; align-items: center; gap: 8px; margin-top: 10px; font-size: .88rem;
  color: var(--soft); } .ramp i { flex: 1; height: 10px; border-radius: 5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .94rem;
  border: 1px solid var(--edge); border-radius: 10px; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--edge);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
.experts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); }
.expert { min-width: 0; } .expert h4 { margin: 0; font-size: 1rem; }
.text { list-style: none; margin: 10px 0 0; padding: 0; font-size: .86rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.text li { padding: 4px 0; border-top: 1px solid var(--edge); display: grid;
  grid-template-columns: 44px 1fr; gap: 8px; align-items: center; }
.bar { height: 6px; border-radius: 3px; background: var(--edge); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
.text span { color: var(--soft); }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 3px; padding: 0 2px;
  white-space: pre-wrap; }
.sample { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 14px 16px; line-height: 2; font-size: .92rem;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample span { border-radius: 3px; padding: 2px 0; white-space: pre-wrap;
  background: color-mix(in srgb, var(--bar) calc(var(--s) * 1%), transparent); }
"""


class _Page:
    def __init__(
        self,
        title: str,
        layers: Mapping[str, PEER],
        found: Mapping[str, Mapping[str, Any]],
        pictures: Mapping[str, Mapping[str, Tensor]],
        history: Sequence[Mapping[str, float | None]],
    ) -> None:
        self.title, self.layers, self.found = title, layers, found
        self.pictures, self.history = pictures, history

    def html(self) -> str:
        parts = [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(self.title)}</title>",
            '<link rel="icon" href="data:,">',  # a browser asks for no icon then
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{escape(self.title)}</h1>",
            self._summary(),
            self._explanation(),
            self._history(),
            *(self._layer(name, number) for number, name in enumerate(self.layers)),
            _words(),
            "</main></body></html>\n",
        ]
        return "\n".join(part for part in parts if part)

    # The whole model.

    def _summary(self) -> str:
        heads = (
            "layer", "experts", "picked per token", "ever picked", "works as if evenly spread over",
            "frozen", "switched off",
        )  # fmt: skip
        rows = [
            (
                f'<a href="#layer-{number}">{escape(_label(name))}</a>',
                f"{f['experts']:,}",
                f"{f['experts_per_token']:,}",
                _percent(1 - f["dead"] / f["experts"]),
                f"{f['effective_experts']:,.0f} experts",
                f"{f['frozen']:,}",
                f"{f['disabled']:,}",
            )
            for number, (name, f) in enumerate(self.found.items())
        ]
        tokens = max(f["tokens"] for f in self.found.values())
        layers = "one layer" if len(rows) == 1 else f"{len(rows)} layers"
        head = "".join(f"<th>{text}</th>" for text in heads)
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
        )
        return (
            f"<p>This page looks into {layers} of a model while it reads {tokens:,} tokens. "
            f"It says which of the layer's experts do the work, and what they respond to.</p>"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            f"</table></div>"
        )

    def _explanation(self) -> str:
        first = next(iter(self.found.values()))
        example = (
            f"{first['experts']:,} experts in a grid of {first['rows']:,} rows and "
            f"{first['columns']:,} columns"
        )
        return (
            '<h2 id="what">What such a layer is</h2><div class="pair"><div>'
            "<p>A model reads its input piece by piece. A piece is called a <b>token</b>: a word, "
            "or a part of one. In most models, every token passes through the same large block of "
            "computation.</p>"
            "<p>Here, some of these blocks are replaced by a large crowd of very small units, the "
            f"<b>experts</b>: {example}, for instance. Each token is handed to a few of them, in "
            f"this layer to {first['experts_per_token']:,}. They add up their answers, and all "
            "others rest. So the crowd can be huge, and a token still costs little.</p>"
            "<p>How are the right ones found among so many? The token is compared with one "
            "<b>key</b> for each row and one for each column. The experts that stand where the "
            "best rows and the best columns cross are picked. Such a layer is called PEER, "
            "Parameter Efficient Expert Retrieval.</p></div>"
            f"<figure>{_diagram()}<figcaption>A token finds its experts in the grid by rows and "
            "columns that match it. Their answers, weighted by how well they match, are added."
            "</figcaption></figure></div>"
        )

    def _history(self) -> str:
        if not self.history:
            return ""
        steps = [
            (float(number if row.get("step") is None else row["step"]), row)  # type: ignore[arg-type]
            for number, row in enumerate(self.history)
        ]

        def lines(measure: str) -> list[tuple[str, list[tuple[float, float]]]]:
            return [
                (
                    _label(name),
                    [
                        (step, math.nan if row.get(key) is None else float(row[key]))  # type: ignore[arg-type]
                        for step, row in steps
                    ],
                )
                for name in self.found
                if any((key := f"{name}/{measure}" if name else measure) in row for _, row in steps)
            ]

        usage, unevenness = lines("usage"), lines("unevenness")
        if not usage:
            raise ValueError(
                f"expected a history of the layers {list(self.found)}, as that of a UsageTracker "
                f"of the model"
            )
        key = _key([(f"var(--c{i % 6})", name) for i, (name, _) in enumerate(usage)])
        return (
            '<h2 id="training">Over training</h2><div class="pair">'
            "<figure><h3>Experts in use</h3>"
            + line_chart(
                usage,
                label="share of experts in use over training",
                x_label="step",
                y_label="share of experts",
                x_format=_short,
                y_format="{:.0%}".format,
                y_range=(0.0, 1.0),
            )
            + f"{key}</figure><figure><h3>Unevenness</h3>"
            + line_chart(
                unevenness,
                label="unevenness over training",
                x_label="step",
                y_label="unevenness (nats)",
                x_format=_short,
            )
            + f"{key}<figcaption>0 means that all experts do the same amount of work.</figcaption>"
            "</figure></div>"
        )

    # One layer.

    def _layer(self, name: str, number: int) -> str:
        found, pictures = self.found[name], self.pictures[name]
        parts = [
            f'<h2 id="layer-{number}">Layer {escape(_label(name))}</h2>',
            self._even(found, pictures),
            self._state(found, pictures),
        ]
        if "shown" in found:
            parts += [self._experts(found), self._sample(found)]
        else:
            parts.append(
                '<p class="note">This report was made without a decoder of tokens, so it shows no '
                "text.</p>"
            )
        if "changes" in found:
            parts.append(self._changes(found, pictures))
        return "\n".join(parts)

    def _even(self, found: Mapping[str, Any], pictures: Mapping[str, Tensor]) -> str:
        experts = found["experts"]
        share = found["effective_experts"] / experts
        ramp = ", ".join(_css(color) for color in USE_COLORS[1:])
        atlas = png(use_levels(_grid(pictures["counts"], found)), USE_COLORS)
        return (
            "<h3>How evenly are the experts used?</h3>"
            f"<p>Of {experts:,} experts, {experts - found['dead']:,} "
            f"({_percent(1 - found['dead'] / experts)}) were picked at least once. "
            f"The busiest 1% of them do {_percent(found['share_of_busiest_1_percent'])} of the "
            f"work, the busiest 10% do {_percent(found['share_of_busiest_10_percent'])}. "
            f"The work is spread as if {found['effective_experts']:,.0f} experts "
            f"({_percent(share)}) shared it evenly.</p>"
            '<div class="cards">'
            + _card(_percent(1 - found["dead"] / experts), "of the experts picked at least once")
            + _card(f"{found['unevenness']:.2f}", "unevenness, 0 if all do the same amount")
            + _card(f"{found['tokens']:,}", "tokens read")
            + _card(
                f"{found['experts_per_token']:,}",
                "picked per token" + (f", by {found['heads']} heads" if found["heads"] > 1 else ""),
            )
            + '</div><div class="pair"><figure><h3>Map of the experts</h3>'
            f'<img class="map" alt="map of how often each expert is picked" src="{atlas}">'
            f'<div class="ramp">seldom<i style="background: linear-gradient(90deg, {ramp})"></i>'
            "often</div>"
            + _key([(_css(GROUND), "never")])
            + f"<figcaption>Each point is {_point(found)}. Bright stripes are rows and columns "
            "that many tokens match, and dark ones those that few do.</figcaption></figure>"
            "<figure><h3>Who does the work</h3>"
            + line_chart(
                [("experts", _shares(pictures["mass"]))],
                label="share of the work done by the busiest experts",
                x_label="the busiest experts, share of all",
                y_label="share of the work",
                x_format="{:.0%}".format,
                y_format="{:.0%}".format,
                y_range=(0.0, 1.0),
                reference=[(0.0, 0.0), (1.0, 1.0)],
            )
            + "<figcaption>The dashed line is a perfectly even spread. The further the curve rises "
            "above it, the more a few experts dominate.</figcaption></figure></div>"
        )

    def _state(self, found: Mapping[str, Any], pictures: Mapping[str, Tensor]) -> str:
        kinds = torch.zeros_like(pictures["counts"])
        if "distance" in pictures:
            kinds = torch.where(pictures["distance"].isnan(), 4, kinds)
        kinds = torch.where(pictures["frozen"], 2, kinds) + (pictures["counts"] == 0)
        kinds = torch.where(pictures["disabled"], 6, kinds)
        counts = kinds.bincount(minlength=len(KINDS)).tolist()
        picture = png(pool_levels(_grid(kinds, found), len(KINDS)), [color for _, color in KINDS])
        sentences = []
        if found["frozen"]:
            sentences.append(
                f"{_count(found['frozen'], 'expert')} <b>frozen</b>. Frozen experts still answer, "
                "but training does not change them, so what they know is kept."
            )
        if found["disabled"]:
            sentences.append(
                f"{_count(found['disabled'], 'expert')} <b>switched off</b>, and get no tokens."
            )
        if found["unused"]:
            sentences.append(
                f"{found['unused']:,} of the experts could be picked, but no token of this data "
                "did so. They are room for something new, or belong to other data."
            )
        if not found["frozen"]:
            sentences.append("No expert is frozen: all can go on learning.")
        if not found["disabled"]:
            sentences.append("No expert is switched off.")
        key = [
            (_css(color), f"{kind}: {count:,}")
            for (kind, color), count in zip(KINDS, counts, strict=True)
            if count > 0
        ]
        return (
            "<h3>What is frozen, switched off or unused?</h3>"
            '<div class="pair"><div><p>' + "</p><p>".join(sentences) + "</p></div>"
            '<figure><img class="small map" alt="map of frozen, disabled and unused experts" '
            f'src="{picture}">{_key(key)}</figure></div>'
        )

    def _experts(self, found: Mapping[str, Any]) -> str:
        cards = []
        for shown in found["shown"]:
            strongest = abs(shown["tokens"][0]["strength"]) if shown["tokens"] else 1.0
            lines = "".join(
                f'<li title="strength {token["strength"]:.3g}"><div class="bar">'
                f'<i style="width: {100 * abs(token["strength"]) / (strongest or 1.0):.0f}%"></i>'
                f"</div><div><span>{_show(token['before'])}</span>"
                f"<mark>{_show(token['token'])}</mark>"
                f"<span>{_show(token['after'])}</span></div></li>"
                for token in shown["tokens"][:6]
            )
            share = _percent(shown["retrievals"] / found["tokens"])
            partner = ""
            if shown["partner"] and shown["partner"]["share"] >= WORTH_NAMING:
                partner = (
                    f" In {_percent(shown['partner']['share'])} of its tokens, it works together "
                    f"with expert {shown['partner']['expert']:,}."
                )
            cards.append(
                f'<article class="expert"><h4>Expert {shown["expert"]:,}</h4>'
                f'<div class="soft">row {shown["row"]:,}, column {shown["column"]:,}. Picked '
                f"{_times(shown['retrievals'])} ({share} of the tokens).{partner}</div>"
                f'<ul class="text">{lines}</ul></article>'
            )
        return (
            "<h3>Which experts fire on what?</h3>"
            "<p>Each card is one expert, with the places in the text at which it fired most "
            "strongly. The token that made it fire is marked, and the bar compares its strength "
            "with that of the first place. The first half of the cards are the busiest experts, "
            "and the others those that are weighted most when they are picked. An expert need not "
            "have a meaning that a person can name.</p>"
            f'<div class="experts">{"".join(cards)}</div>'
        )

    def _sample(self, found: Mapping[str, Any]) -> str:
        tokens = []
        for token in found["sample"]:
            strengths = [abs(each["strength"]) for each in token["experts"]]
            names = ", ".join(f"{each['expert']:,}" for each in token["experts"])
            share = strengths[0] / sum(strengths) if strengths and sum(strengths) > 0 else 0.0
            tokens.append(
                f'<span style="--s: {75 * max(share - 0.25, 0) / 0.75:.0f}" '
                f'title="strongest experts: {names}">{_show(token["token"])}</span>'
            )
        return (
            "<h3>One text, token by token</h3>"
            f'<div class="sample">{"".join(tokens)}</div>'
            '<p class="note">The beginning of the data. The stronger the colour, the more one '
            "expert stands out among the four that answer most strongly. Point at a token to see "
            "which ones these are.</p>"
        )

    def _changes(self, found: Mapping[str, Any], pictures: Mapping[str, Tensor]) -> str:
        change, distance = found["changes"], pictures["distance"]
        old = change["experts"] - change["grown"]
        sentences = [
            f"{_count(change['grown'], 'expert')} <b>new</b>."
            if change["grown"]
            else "No expert is new."
        ]
        if change["moved"]:
            sentences.append(
                f"Of the {old:,} old ones, {change['moved']:,} moved and {change['unmoved']:,} "
                f"stayed the same to the last bit. On average, an old expert changed by "
                f"{_percent(change['mean'])} of its own size."
            )
        else:
            sentences.append("All old ones stayed the same to the last bit.")
        sentences.append(
            f"By their keys, tokens find the experts: {change['row_keys_moved']:,} of those of the "
            f"rows and {change['column_keys_moved']:,} of those of the columns moved."
        )
        parts = [
            "<h3>What changed since the earlier checkpoint?</h3>",
            f"<p>{' '.join(sentences)}</p>",
        ]
        if change["moved"]:
            ramp = ", ".join(_css(color) for color in USE_COLORS[1:])
            atlas = png(use_levels(_grid(distance.nan_to_num(0.0), found)), USE_COLORS)
            largest = "".join(
                f"<tr><td>expert {each['expert']:,}</td><td>{_percent(each['distance'])}</td></tr>"
                for each in change["largest"]
            )
            parts.append(
                '<div class="pair"><figure><h3>Map of the change</h3>'
                f'<img class="map" alt="map of how far each expert has moved" src="{atlas}">'
                '<div class="ramp">little'
                f'<i style="background: linear-gradient(90deg, {ramp})"></i>much</div>'
                + _key([(_css(GROUND), "not at all, or new")])
                + '</figure><div class="scroll"><table><thead><tr><th>moved most</th>'
                "<th>change, relative to the expert</th></tr></thead>"
                f"<tbody>{largest}</tbody></table></div></div>"
            )
        return "".join(parts)


def _count(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number:,} {noun}s are"


def _label(name: str) -> str:
    return name or "of the model"


def _point(found: Mapping[str, Any]) -> str:
    block = block_size(found["rows"], found["columns"])
    return "one expert" if block == 1 else f"the mean of {block} × {block} experts"


def _grid(values: Tensor, found: Mapping[str, Any]) -> Tensor:
    return values.view(found["rows"], found["columns"])


def _shares(mass: Tensor) -> list[tuple[float, float]]:
    """Points of the share of the work over the share of the busiest experts."""
    total = mass.sort(descending=True).values.cumsum(0) / mass.sum()
    size = len(total)
    # Close to each other at first, since a few experts may do most of the work.
    places = sorted({min(size, max(1, round(size * (i / 120) ** 3))) for i in range(1, 121)})
    return [(0.0, 0.0), *((place / size, float(total[place - 1])) for place in places)]


def _show(text: str) -> str:
    """Text for HTML. Line ends, tabs and tokens of spaces alone can be seen."""
    if text and not text.strip(" \n"):
        text = text.replace(" ", "␣")
    shown = "".join(
        character if character.isprintable() else _SIGNS.get(character, "�") for character in text
    )
    return escape(re.sub("␣{5,}", lambda run: f"␣×{len(run[0])}", shown))


_SIGNS = {"\n": "⏎", "\t": "⇥"}


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _percent(share: float) -> str:
    if share == 0 or share >= 0.995:
        return f"{share:.0%}"
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _css(color: Color) -> str:
    return "rgb({}, {}, {})".format(*color)


def _card(number: str, text: str) -> str:
    return f'<div class="card"><b>{number}</b><span class="soft">{text}</span></div>'


def _key(entries: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="key">'
        + "".join(
            f'<span><i style="background: {color}"></i>{escape(text)}</span>'
            for color, text in entries
        )
        + "</div>"
    )


def _diagram() -> str:
    """A token, the grid with the rows and columns that match it, and the sum."""
    rows, columns, size, left, top = (2, 5), (1, 4, 6), 20, 150, 34
    cells = []
    for row in range(8):
        for column in range(8):
            picked = row in rows and column in columns
            line = row in rows or column in columns
            fill = "var(--c1)" if picked else "var(--bar)" if line else "var(--edge)"
            opacity = 1 if picked else 0.35 if line else 1
            cells.append(
                f'<rect x="{left + column * size}" y="{top + row * size}" width="{size - 3}" '
                f'height="{size - 3}" rx="3" fill="{fill}" opacity="{opacity}"/>'
            )
    middle = top + 4 * size
    arrow = 'stroke="var(--soft)" stroke-width="2" fill="none" marker-end="url(#head)"'
    return (
        '<svg viewBox="0 0 460 220" role="img" aria-label="a token, a grid of experts, and the sum '
        'of those that are picked"><defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" '
        'markerWidth="6" markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" '
        'fill="var(--soft)"/></marker></defs>'
        f'<rect x="12" y="{middle - 20}" width="84" height="36" rx="8" fill="var(--mark)"/>'
        f'<text x="54" y="{middle + 2}" text-anchor="middle" style="fill: var(--mark-ink)">token'
        f'</text><path d="M100 {middle - 2}H142" {arrow}/>'
        + "".join(cells)
        + f'<text x="{left + 4 * size}" y="22" text-anchor="middle">columns</text>'
        f'<text transform="translate({left - 10} {top + 34}) rotate(-90)" text-anchor="middle">rows'
        f'</text><path d="M{left + 8 * size + 6} {middle - 2}H{left + 8 * size + 48}" {arrow}/>'
        f'<rect x="{left + 8 * size + 56}" y="{middle - 20}" width="84" height="36" rx="8" '
        f'fill="var(--card)" stroke="var(--c1)" stroke-width="2"/>'
        f'<text x="{left + 8 * size + 98}" y="{middle + 2}" text-anchor="middle" '
        'style="fill: var(--ink)">sum</text></svg>'
    )


def _words() -> str:
    entries = (
        ("token", "a piece of the input: a word, a part of a word, or another small unit"),
        ("expert", "one tiny unit of the layer. It compares the token with a pattern of its own, "
                   "and writes a pattern of its own if they match"),
        ("picked", "an expert is picked, or retrieved, if the layer hands the token to it"),
        ("fires", "an expert fires strongly if it is picked with a large weight, its pattern "
                  "matches, and what it writes is large"),
        ("head", "a token may search the grid several times, each time for something else. Each "
                 "search is a head"),
        ("unevenness", "how far the spread of the work is from an even one, in nats: the KL "
                       "divergence from the uniform distribution. N experts with an unevenness of "
                       "u do the work as if N divided by e to the power of u did it evenly"),
    )  # fmt: skip
    return (
        '<h2 id="words">Words</h2>'
        + "".join(f"<p><b>{word}</b>: {meaning}.</p>" for word, meaning in entries)
        + '<p class="note">Made with peer.report.</p>'
    )
