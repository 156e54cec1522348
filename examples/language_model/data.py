"""The corpus: the standard library of the running interpreter, split by file and tokenised.

The split depends only on the path and text of a file, so it is equal in all runs and for all seeds.
Text in both parts would reward memorisation. The split therefore drops exact copies, and held-out
files if most of their longer lines occur in training files.
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
HELD_OUT_IN = 20  # one file of this many is held out
# In characters. Shorter lines, such as "return None", do not identify a file.
LONG_LINE = 20
COPIED_SHARE = 0.5  # maximum share of a held-out file's long lines that occur in training files


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the library, with forward slashes, and its text."""

    path: str
    text: str


@dataclass
class Corpus:
    """The tokens of both parts of the split, and the tokenizer.

    Attributes:
        train: token ids of the training files, concatenated, (n,) int64.
        held_out: token ids of the held-out files, concatenated, (m,) int64.
        token_bytes: number of bytes of each token, (vocabulary,); 0 for the separator.
        tokenizer: byte-level BPE, trained on the training files only.
        train_files: number of training files.
        held_out_files: number of held-out files.
        fingerprint: digest of the text and of the settings of the split and the tokenizer.
        title: what the text is.
    """

    train: Tensor
    held_out: Tensor
    token_bytes: Tensor
    tokenizer: Tokenizer
    train_files: int
    held_out_files: int
    fingerprint: str
    title: str = "Python standard library"

    @property
    def vocabulary(self) -> int:
        """Number of distinct tokens."""
        return len(self.token_bytes)

    def describe(self) -> str:
        """A summary in one line."""
        sides = (
            ("training", self.train, self.train_files),
            ("held-out", self.held_out, self.held_out_files),
        )
        parts = (
            f"{int(self.token_bytes[tokens].sum()) / 1e6:.1f} MB in {files} {side} files "
            f"({len(tokens) / 1e6:.2f} M tokens)"
            for side, tokens, files in sides
        )
        return f"{self.title}: " + ", ".join(parts)


def read_library(root: Path | None = None) -> list[SourceFile]:
    """Reads every Python file below `root`, the standard library, except installed packages."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            # Some of Python's own test files have other encodings on purpose.
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def long_lines(file: SourceFile) -> set[str]:
    """The distinct lines of a file that are long enough to identify it."""
    return {line for raw in file.text.splitlines() if len(line := raw.strip()) >= LONG_LINE}


def split(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Splits files into training and held-out files, without copies between the parts."""
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


def every_nth(files: list[SourceFile], characters: float) -> list[SourceFile]:
    """Every n-th file, so that about a number of characters is left."""
    total = sum(len(file.text) for file in files)
    return files[:: max(1, round(total / characters))]


def make_fingerprint(files: Iterable[SourceFile], vocabulary: int) -> str:
    """The digest of the text and of the settings of the split and the tokenizer."""
    digest = hashlib.sha256(f"{vocabulary} {HELD_OUT_IN} {LONG_LINE} {COPIED_SHARE}".encode())
    for file in files:
        digest.update(f"{file.path}\0{file.text}\0".encode())
    return digest.hexdigest()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE, which encodes every byte string and decodes without loss."""
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
    """Encodes files as one tensor of token ids, with a separator before every file."""
    separator = tokenizer.token_to_id(SEPARATOR)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        stream.append(separator)
        stream.extend(encoding.ids)
    return torch.tensor(stream, dtype=torch.int64)


def count_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text per token id. The byte-level alphabet has one character per byte."""
    vocabulary = tokenizer.get_vocab()
    counts = torch.zeros(len(vocabulary), dtype=torch.int64)
    for token, index in vocabulary.items():
        counts[index] = 0 if token == SEPARATOR else len(token)
    return counts


def encode_corpus(
    train: list[SourceFile],
    held_out: list[SourceFile],
    tokenizer: Tokenizer,
    fingerprint: str,
    title: str = Corpus.title,
) -> Corpus:
    """Encodes both parts of a split; the arguments have the names of the corpus' attributes."""
    return Corpus(
        train=encode(train, tokenizer),
        held_out=encode(held_out, tokenizer),
        token_bytes=count_bytes(tokenizer),
        tokenizer=tokenizer,
        train_files=len(train),
        held_out_files=len(held_out),
        fingerprint=fingerprint,
        title=title,
    )


def prepare(cache: Path, vocabulary: int, megabytes: float | None = None) -> Corpus:
    """Reads, splits and encodes the library, or reads the result of an earlier call from `cache`.

    Args:
        cache: file for the encoded corpus, which is valid for the same text and settings only.
        vocabulary: number of tokens.
        megabytes: approximate amount of text to use, as every n-th file; None for all of it.

    Returns:
        The encoded corpus.
    """
    files = read_library()
    if megabytes is not None:
        files = every_nth(files, megabytes * 1e6)
    fingerprint = make_fingerprint(files, vocabulary)
    if cache.exists():
        saved = torch.load(cache)
        if saved["fingerprint"] == fingerprint:
            return Corpus(tokenizer=Tokenizer.from_str(saved.pop("tokenizer")), **saved)
    train, held_out = split(files)
    tokenizer = train_tokenizer((file.text for file in train), vocabulary)
    corpus = encode_corpus(train, held_out, tokenizer, fingerprint)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**vars(corpus), "tokenizer": tokenizer.to_str()}, cache)
    return corpus


class Windows:
    """Training batches: windows of the corpus in an order that depends only on seed and step.

    Every epoch starts the windows at another offset and shuffles them again. There is no state
    between steps, so a resumed run sees the same batches as an uninterrupted one.
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
    """Inputs and targets, each (batch, context), of all windows or of a part of them.

    The windows follow each other, so every token except the first is a target once. Tokens after
    the last full window are skipped. With `limit`, the windows of a part of that many tokens are
    spread evenly over all.
    """
    windows = (len(tokens) - 1) // context
    chosen = windows if limit is None else min(windows, limit // context)
    starts = torch.arange(chosen) * windows // max(1, chosen) * context
    for part in starts.split(batch):
        window = tokens[part[:, None] + torch.arange(context + 1)]
        yield window[:, :-1], window[:, 1:]
