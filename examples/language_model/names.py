"""Names that one model predicts better than the other: by rarity, and one as an example.

A name is an identifier of at least `SHORTEST` bytes in the held-out text, and no keyword. Its code
length is that of the tokens that hold it. A name that occurs earlier in the same window could be
copied from there, so only first occurrences in a window count. They show what a model remembers
from training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from keyword import iskeyword

import torch
from torch import Tensor

from .data import Corpus
from .train import HeldOut

NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
SHORTEST = 6  # bytes
CONTEXT = 32  # tokens of context that a name needs
# The example is a name with few occurrences in the training text. A name without any would be luck.
RARE = range(2, 51)
BINS = (range(1), range(1, 11), range(11, 101), range(101, 1001), range(1001, 2**62))


@dataclass(frozen=True)
class Name:
    """An occurrence of a name in the held-out text.

    Attributes:
        text: the name.
        first: position of its first token among the targets, see `train.HeldOut`.
        last: position of its last token.
        count: occurrences in the training text.
    """

    text: str
    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Group:
    """Names with a similar number of occurrences in the training text.

    Attributes:
        counts: the numbers of occurrences.
        names: how many names of the held-out text are in the group.
        bits: mean code length of a name in bits, by model.
    """

    counts: range
    names: int
    bits: dict[str, float]


def decode(tokens: Tensor, corpus: Corpus) -> bytes:
    """The text of tokens."""
    text = corpus.tokenizer.decode(tokens.tolist()).encode()
    assert len(text) == int(corpus.token_bytes[tokens].sum())
    return text


def find_names(corpus: Corpus, context: int) -> list[Name]:
    """First occurrences of names in the windows of the held-out text.

    Args:
        corpus: the corpus.
        context: length of a window in tokens.

    Returns:
        The names whose tokens lie in one window, after at least `CONTEXT` other targets.
    """
    known = Counter(NAME.findall(decode(corpus.train, corpus)))
    targets = corpus.held_out[1 : 1 + (len(corpus.held_out) - 1) // context * context]
    text = decode(targets, corpus)
    ends = corpus.token_bytes[targets].cumsum(0)
    matches = [match for match in NAME.finditer(text) if _is_name(match.group())]
    # The token that holds byte i is the first one that ends after it.
    firsts = torch.searchsorted(ends, torch.tensor([m.start() for m in matches]), right=True)
    lasts = torch.searchsorted(ends, torch.tensor([m.end() - 1 for m in matches]), right=True)
    names = []
    window, seen = -1, set[bytes]()
    for match, first, last in zip(matches, firsts.tolist(), lasts.tolist(), strict=True):
        if first // context != window:
            window, seen = first // context, set()
        name = match.group()
        if name not in seen and last // context == window and first % context >= CONTEXT:
            names.append(Name(name.decode(), first, last, known[name]))
        seen.add(name)
    return names


def _is_name(text: bytes) -> bool:
    return len(text) >= SHORTEST and not iskeyword(text.decode())


def code_lengths(names: list[Name], nats: Tensor) -> Tensor:
    """The code length of each name in bits."""
    total = torch.cat((torch.zeros(1, dtype=torch.float64), nats.double().cumsum(0)))
    first = torch.tensor([name.first for name in names])
    last = torch.tensor([name.last for name in names])
    return (total[last + 1] - total[first]) / math.log(2)


def group_by_count(names: list[Name], held_out: dict[str, HeldOut]) -> list[Group]:
    """Mean code lengths by the number of occurrences in the training text."""
    lengths = {model: code_lengths(names, each.nats) for model, each in held_out.items()}
    groups = []
    for counts in BINS:
        chosen = torch.tensor([name.count in counts for name in names])
        if chosen.any():
            bits = {model: float(each[chosen].mean()) for model, each in lengths.items()}
            groups.append(Group(counts, int(chosen.sum()), bits))
    return groups


def find_example(
    names: list[Name], targets: Tensor, better: HeldOut, worse: HeldOut
) -> Name | None:
    """The rare name on which one model saves the most bits, if it predicts every token of it.

    Args:
        names: the names of the held-out text.
        targets: the target tokens of the held-out text.
        better: what the one model makes of the held-out text.
        worse: what the other model makes of it.

    Returns:
        Among the names with a number of occurrences in `RARE` whose tokens are all the most
        probable ones for the better model, the name with the largest difference of code lengths.
        None if no name has these properties and a positive difference.
    """
    gains = code_lengths(names, worse.nats) - code_lengths(names, better.nats)
    is_right = better.best == targets[: len(better.best)]
    for index in gains.argsort(descending=True).tolist():
        name = names[index]
        if gains[index] <= 0:
            return None
        if name.count in RARE and bool(is_right[name.first : name.last + 1].all()):
            return name
    return None
