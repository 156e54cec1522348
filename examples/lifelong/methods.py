"""The methods: what learns when the next corpus comes, and what is kept of the earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from language_model.data import Corpus, held_out_batches
from language_model.model import LanguageModel
from torch import Tensor, nn

import peer

if TYPE_CHECKING:
    from .settings import StreamSettings

BATCH = 16  # windows per call when use is counted


@dataclass(frozen=True)
class Method:
    """A way to learn the next corpus.

    Attributes:
        model: "dense" or "peer".
        table: which rows of the expert table learn. "all"; "unused": those that old text hardly
            used; "specific": those that new text uses much more than old text; "new": those of
            added experts; "new specific": experts are added, and those that are specific then
            learn, old or new; "tf-idf": in every step, the rows with the largest TF-IDF.
        rest: factor on the learning rates outside the table; 0 if all that is frozen.
        replay: share of old text in every batch.
        old_text: what the method needs of old text when the next corpus comes: "none", "counts"
            for a count of the use of its experts, or "replay".
        uses: the settings of a stream that the method uses, apart from those of all methods.
    """

    model: str
    table: str = "all"
    rest: float = 1.0
    replay: float = 0.0
    old_text: str = "none"
    uses: tuple[str, ...] = ()

    @property
    def takes_notes(self) -> bool:
        """Whether the use of experts is noted right after each corpus is learned."""
        return self.table in ("unused", "specific", "tf-idf")


COUNTS = ("count_tokens", "measure")
METHODS = {
    "dense": Method("dense"),
    "peer": Method("peer"),
    "unused": Method("peer", "unused", rest=0.0, uses=("at_most", *COUNTS)),
    "specific": Method("peer", "specific", rest=0.0, uses=("ratio", *COUNTS)),
    "grow": Method("peer", "new", rest=0.0, uses=("rows", "count_tokens")),
    "grow-specific": Method(
        "peer", "new specific", rest=0.0, old_text="counts", uses=("rows", "ratio", *COUNTS)
    ),
    "tf-idf": Method("peer", "tf-idf", rest=0.0, uses=("slots", "count_tokens")),
    "dense-replay": Method("dense", replay=0.25, old_text="replay"),
    "peer-replay": Method("peer", replay=0.25, old_text="replay"),
}


@dataclass
class Notes:
    """What is kept of the corpora that were learned: numbers by expert, and no text.

    Attributes:
        use: (N,) the use of each expert, counted right after its corpus was learned.
        documents: the number of batches in which `seen` counts.
        seen: (N,) the number of batches that retrieved an expert.
    """

    use: Tensor
    documents: int
    seen: Tensor


def batches(corpora: Iterable[Corpus], settings: StreamSettings, batch: int) -> Iterator[Tensor]:
    """Training windows, spread over each corpus, of `count_tokens` in equal shares."""
    corpora = list(corpora)
    for corpus in corpora:
        limit = settings.count_tokens // len(corpora)
        for inputs, _ in held_out_batches(corpus.train, settings.base.model.context, batch, limit):
            yield inputs


def on_device(model: nn.Module, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches on the device of a model."""
    device = next(model.parameters()).device
    return (batch.to(device) for batch in inputs)


def measure_use(
    model: LanguageModel, corpora: Iterable[Corpus], settings: StreamSettings
) -> Tensor:
    """The use of each expert by training text, (N,): retrievals or router weight."""
    inputs = on_device(model, batches(corpora, settings, BATCH))
    if settings.measure == "count":
        (counts,) = peer.count_usage(model, inputs).values()
        return counts
    if settings.measure != "weight":
        raise ValueError(f"expected measure to be 'count' or 'weight', got {settings.measure!r}")
    model.eval()
    with torch.no_grad(), peer.UsageTracker(*model.layers) as tracker:
        for batch in inputs:
            model(batch)
    model.train()
    return tracker.mass


def count_documents(
    model: LanguageModel, corpus: Corpus, settings: StreamSettings
) -> tuple[int, Tensor]:
    """The number of batches of training text, and how many of them retrieved each expert, (N,)."""
    documents, seen = 0, torch.zeros(())
    for batch in on_device(model, batches([corpus], settings, settings.base.batch)):
        (counts,) = peer.count_usage(model, [batch]).values()
        documents, seen = documents + 1, (counts > 0).long() + seen.to(counts)
    return documents, seen


def take_notes(
    model: LanguageModel, corpus: Corpus, method: Method, settings: StreamSettings
) -> Notes | None:
    """Notes on a corpus that the model has just learned; None if the method needs none."""
    if not method.takes_notes:
        return None
    if method.table == "tf-idf":
        documents, seen = count_documents(model, corpus, settings)
        return Notes(torch.zeros_like(seen), documents, seen)
    use = measure_use(model, [corpus], settings)
    return Notes(use, 0, torch.zeros_like(use))


def add_notes(first: Notes | None, second: Notes | None) -> Notes | None:
    """Notes on the corpora of both."""
    if first is None or second is None:
        return first or second
    return Notes(
        first.use + second.use, first.documents + second.documents, first.seen + second.seen
    )


def freeze_routing(model: LanguageModel) -> None:
    """Freezes keys, query networks and their normalisation."""
    for layer in model.layers:
        layer.router.freeze_keys()
        layer.router.freeze_network()


def freeze_all_but(model: LanguageModel, rows: Tensor) -> None:
    """Freezes all rows of the table but `rows`, (N,) bool."""
    for layer in model.layers:
        layer.freeze_experts(~rows, keys=False, router=False)


def freeze_rest(model: LanguageModel, rest: float) -> None:
    """Freezes what is outside the PEER layers, or lets it learn again."""
    inside = {id(p) for layer in model.layers for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(rest > 0)


def grow(model: LanguageModel, new: Corpus, settings: StreamSettings) -> None:
    """Adds rows of keys, drawn from queries of the new corpus, and the experts of these rows."""
    keys = []
    for layer in model.layers:
        inputs = on_device(model, batches([new], settings, BATCH))
        generator = torch.Generator().manual_seed(settings.seed)
        keys.append(peer.keys_from(layer, inputs, settings.rows, model=model, generator=generator))
    for layer, its_keys in zip(model.layers, keys, strict=True):
        layer.grow(settings.rows, its_keys)


def prepare(
    model: LanguageModel,
    method: Method,
    settings: StreamSettings,
    old: list[Corpus],
    new: Corpus,
    notes: Notes | None,
) -> None:
    """Grows a model and freezes what must not learn, before it learns a corpus.

    Args:
        model: the model, in which nothing is frozen.
        method: the method.
        settings: the settings of the stream.
        old: the earlier corpora. Only methods that say so in `old_text` may use them.
        new: the corpus that comes.
        notes: the notes on the earlier corpora.
    """
    is_frozen = factor_on_rest(method, settings) == 0
    if method.table == "new":
        for layer in model.layers:  # before growth, so that the new keys learn
            layer.freeze_experts(router=is_frozen)
        grow(model, new, settings)
        return
    if method.table == "unused":
        assert notes is not None
        freeze_all_but(model, peer.select_rows.unused(notes.use, settings.at_most))
    elif method.table == "specific":
        assert notes is not None
        use = measure_use(model, [new], settings)
        freeze_all_but(model, peer.select_rows.specific(notes.use, use, settings.ratio))
    elif method.table == "new specific":
        grow(model, new, settings)
        before, now = (measure_use(model, texts, settings) for texts in (old, [new]))
        freeze_all_but(model, peer.select_rows.specific(before, now, settings.ratio))
    if is_frozen:
        freeze_routing(model)


def factor_on_rest(method: Method, settings: StreamSettings) -> float:
    """The factor on the learning rates outside the table."""
    return method.rest if settings.rest is None else settings.rest


def release(model: LanguageModel) -> None:
    """Lets everything learn again."""
    for layer in model.layers:
        layer.unfreeze_experts()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def score_slots(counts: Tensor, notes: Notes) -> Tensor:
    r"""The TF-IDF of each expert in a batch, (N,).

    With the retrievals :math:`c_e` of expert e in the batch, and the number :math:`d_e` of the D
    old batches that retrieved it: :math:`c_e / \sum c \cdot \log((D + 1) / (d_e + 1))`.

    Source: arXiv 2510.15103.
    """
    frequency = counts.double() / counts.sum()
    return frequency * ((notes.documents + 1) / (notes.seen.double() + 1)).log()


@contextmanager
def update_slots(model: LanguageModel, notes: Notes, slots: int) -> Iterator[None]:
    """Lets only the rows with the largest TF-IDF of each batch learn from it.

    Between the router and the experts, the batch's retrievals are known and the mask of its
    backward pass is not taken yet.
    """

    def choose(pool: Any, arguments: tuple[Tensor, ...]) -> None:
        if not pool.training:
            return
        counts = torch.bincount(arguments[2].flatten(), minlength=pool.num_experts)
        best = score_slots(counts, notes).topk(min(slots, pool.num_experts))
        chosen = torch.zeros_like(counts, dtype=torch.bool)
        chosen[best.indices[best.values > 0]] = True
        pool.unfreeze_experts()
        pool.freeze_experts(~chosen)

    handle = model.layers[0].experts.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
