"""The corpus: the running interpreter's standard library, split by file and cut into tokens.

The split looks only at a file's path and text, so that it is the same on every run and for every
seed. Text that occurs on both sides would reward remembering instead of predicting; therefore exact
copies are dropped, and so is a held-out file most of whose longer lines occur in training files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SEPARATOR = "<|file|>"
HELD_OUT_IN = 20  # one file in so many is held out
# Characters. Shorter lines, such as "return None", say nothing about where they came from.
LONG_LINE = 20
COPIED_SHARE = 0.5


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path below the library's root, with forward slashes, and its text."""

    path: str
    text: str


@dataclass
class Corpus:
    """Token streams of both sides of the split, and what is needed to read them back.

    Attributes:
        train: token ids of the training files, one stream (n,), int64.
        held_out: token ids of the held-out files, one stream (m,), int64.
        token_bytes: bytes of text that a token stands for (vocabulary,), 0 for the separator.
        tokenizer: byte-level BPE, trained on the training files alone.
        train_files: number of training files.
        held_out_files: number of held-out files.
        fingerprint: digest of the text and of how it was split and encoded.
    """

    train: Tensor
    held_out: Tensor
    token_bytes: Tensor
    tokenizer: Tokenizer
    train_files: int
    held_out_files: int
    fingerprint: str

    @property
    def vocabulary(self) -> int:
        """Number of distinct tokens."""
        return len(self.token_bytes)

    def describe(self) -> str:
        """One line on the corpus, for people."""
        sides = (
            ("training", self.train, self.train_files),
            ("held-out", self.held_out, self.held_out_files),
        )
        parts = (
            f"{int(self.token_bytes[tokens].sum()) / 1e6:.1f} MB in {files} {side} files "
            f"({len(tokens) / 1e6:.2f} M tokens)"
            for side, tokens, files in sides
        )
        return "Python standard library: " + ", ".join(parts)


def read_library(root: Path | None = None) -> list[SourceFile]:
    """Every readable Python file below `root` (the standard library), installed packages apart."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            # Python's own tests hold files in other encodings on purpose.
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def long_lines(file: SourceFile) -> set[str]:
    """The distinct lines of a file that are long enough to recognise it by."""
    return {line for raw in file.text.splitlines() if len(line := raw.strip()) >= LONG_LINE}


def split(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Training files and held-out files: disjoint by path, by content, and nearly so by lines."""
    unique = {
        file.text: file for file in sorted(files, key=lambda file: file.path, reverse=True)
    }.values()
    train: list[SourceFile] = []
    candidates: list[SourceFile] = []
    for file in sorted(unique, key=lambda file: file.path):
        bucket = (
            int.from_bytes(hashlib.sha256(file.path.encode()).digest()[:8], "big") % HELD_OUT_IN
        )
        (candidates if bucket == 0 else train).append(file)
    known = set().union(*map(long_lines, train)) if train else set()
    held_out = []
    for file in candidates:
        lines = long_lines(file)
        if lines and len(lines & known) <= COPIED_SHARE * len(lines):
            held_out.append(file)
    return train, held_out


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every byte string has an encoding, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(files: list[SourceFile], tokenizer: Tokenizer) -> Tensor:
    """One stream of token ids, a separator before every file."""
    separator = tokenizer.token_to_id(SEPARATOR)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        stream.append(separator)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.int64)


def count_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text per token id. The byte-level alphabet writes one character for each byte."""
    vocabulary = tokenizer.get_vocab()
    counts = torch.zeros(len(vocabulary), dtype=torch.int64)
    for token, index in vocabulary.items():
        counts[index] = 0 if token == SEPARATOR else len(token)
    return counts


def prepare(cache: Path, vocabulary: int, megabytes: float | None = None) -> Corpus:
    """Reads, splits and encodes the library, or reads what an earlier call left in `cache`.

    Args:
        cache: file to keep the encoded corpus in; used again only for the same text and settings.
        vocabulary: number of tokens.
        megabytes: use only about this much of the text (every n-th file), or all of it if None.

    Returns:
        The encoded corpus.
    """
    files = read_library()
    if megabytes is not None:
        stride = max(1, round(sum(len(file.text) for file in files) / (megabytes * 1e6)))
        files = files[::stride]
    digest = hashlib.sha256(f"{vocabulary} {HELD_OUT_IN} {LONG_LINE} {COPIED_SHARE}".encode())
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    fingerprint = digest.hexdigest()
    if cache.exists():
        kept = torch.load(cache)
        if kept["fingerprint"] == fingerprint:
            return Corpus(tokenizer=Tokenizer.from_str(kept.pop("tokenizer")), **kept)
    train, held_out = split(files)
    tokenizer = train_tokenizer((file.text for file in train), vocabulary)
    corpus = Corpus(
        train=encode(train, tokenizer),
        held_out=encode(held_out, tokenizer),
        token_bytes=count_bytes(tokenizer),
        tokenizer=tokenizer,
        train_files=len(train),
        held_out_files=len(held_out),
        fingerprint=fingerprint,
    )
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**vars(corpus), "tokenizer": tokenizer.to_str()}, cache)
    return corpus


class Windows:
    """Training batches: windows of the stream, in an order that depends on seed and step alone.

    Every epoch cuts the stream at another offset and shuffles the windows anew. Nothing is carried
    from one step to the next: a run that resumes sees what an uninterrupted one would have seen.
    """

    def __init__(self, tokens: Tensor, context: int, batch: int, seed: int) -> None:
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.windows = (len(tokens) - context - 1) // context
        if self.windows < batch:
            raise ValueError(
                f"expected at least {batch} training windows of {context} tokens for one batch, "
                f"got {self.windows}"
            )
        self.steps_per_epoch = self.windows // batch

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, each (batch, context)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = int(torch.randint(self.context, (), generator=generator))
        order = torch.randperm(self.windows, generator=generator)
        starts = order[position * self.batch : (position + 1) * self.batch] * self.context + offset
        window = self.tokens[starts[:, None] + torch.arange(self.context + 1)]
        return window[:, :-1], window[:, 1:]


def held_out_batches(
    tokens: Tensor, context: int, batch: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, each (batch, context), that cover a stream or its first `limit` tokens.

    Every token but the first is a target once; what does not fill a last window is left out.
    """
    windows = (min(len(tokens), limit or len(tokens)) - 1) // context
    for first in range(0, windows, batch):
        count = min(batch, windows - first)
        start = first * context
        inputs = tokens[start : start + count * context].view(count, context)
        targets = tokens[start + 1 : start + 1 + count * context].view(count, context)
        yield inputs, targets
