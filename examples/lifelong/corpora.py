"""The stream of corpora: Python's standard library, C headers, and English manual pages.

The last two are the files of Debian packages, which most machines with a compiler have, or the
files of a folder. One tokenizer serves all corpora. Its training text has an equal share of each,
so that no corpus has an advantage by its tokens.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from language_model import data
from language_model.data import Corpus, SourceFile
from tokenizers import Tokenizer


class CorpusError(Exception):
    """A corpus is missing or too small."""


@dataclass(frozen=True)
class Source:
    """Where the text of a corpus comes from.

    Attributes:
        title: what the text is.
        packages: Debian packages; none for the standard library of the running interpreter.
        suffixes: the names of the files end with one of these.
        megabytes: the least amount of text.
    """

    title: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...]
    megabytes: float


SOURCES = {
    "python": Source("Python standard library", (), (".py",), 8.0),
    "c": Source("C headers", ("libc6-dev", "linux-libc-dev"), (".h", ".c"), 4.0),
    "docs": Source(
        "English manual pages",
        ("git-man", "manpages", "manpages-dev"),
        (*(f".{section}.gz" for section in range(1, 9)), ".txt", ".md", ".rst", ".pod"),
        4.0,
    ),
}

# Macros of manual pages whose arguments are text. Those of two letters alternate between two fonts,
# without a space between their arguments.
TEXT_MACROS = {".B", ".I", ".SM", ".SB", ".SH", ".SS", ".BR", ".RB", ".BI", ".IB", ".IR", ".RI"}
ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')
ESCAPES = (
    (re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)"), ""),  # fonts
    (re.compile(r"\\s[+-]?\d"), ""),  # sizes
    (re.compile(r"\\\(aq|\\\(cq|\\\(oq"), "'"),
    (re.compile(r"\\\(dq|\\\*\(lq|\\\*\(rq|\\\(lq|\\\(rq"), '"'),
    (re.compile(r"\\\(em|\\\(en"), "--"),
    (re.compile(r"\\\(bu"), "*"),
    (re.compile(r"\\\(ha"), "^"),
    (re.compile(r"\\\(ti"), "~"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\e|\\\(rs"), "\0"),  # a backslash, which must not begin another escape
    (re.compile(r"\\(?:\(..|\[[^\]]*\]|\*\(..|\*\[[^\]]*\]|\*.|.)"), ""),
    (re.compile("\0"), r"\\"),
)


def strip_markup(text: str) -> str:
    """The text of a manual page, without its macros, fonts and comments."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line.partition(" ")
            if macro in (".PP", ".P", ".LP", ".sp"):
                lines.append("")
            if macro not in TEXT_MACROS:
                continue
            between = "" if len(macro) == 3 and not macro.startswith(".S") else " "
            line = between.join(quoted or plain for quoted, plain in ARGUMENT.findall(rest))
        for pattern, replacement in ESCAPES:
            line = pattern.sub(replacement, line)
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def list_package(package: str) -> list[Path]:
    """The files of an installed Debian package; none if it is not installed, or dpkg is not."""
    try:
        result = subprocess.run(
            ["dpkg", "-L", package], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return []
    return [Path(line) for line in result.stdout.splitlines()] if result.returncode == 0 else []


def read_text(path: Path) -> str:
    """The text of a file; that of a manual page is unpacked and without markup."""
    if path.suffix != ".gz":
        return path.read_text(encoding="utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return strip_markup(file.read())


def read_files(name: str, folder: Path | None = None) -> list[SourceFile]:
    """Reads the files of a corpus.

    Args:
        name: the corpus, one of `SOURCES`.
        folder: read the files below this folder, of any amount, instead.

    Returns:
        The files with text, by path.

    Raises:
        CorpusError: there is less text than the corpus needs, or none in the folder.
    """
    source = SOURCES[name]
    if name == "python":
        files = data.read_library(folder)
    else:
        paths = (
            [path for package in source.packages for path in list_package(package)]
            if folder is None
            else folder.rglob("*")
        )
        files = []
        for path in sorted(paths):
            if not path.name.endswith(source.suffixes) or path.is_symlink() or not path.is_file():
                continue
            try:
                text = read_text(path)
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                relative = path if folder is None else path.relative_to(folder)
                files.append(SourceFile(relative.as_posix(), text))
    found = sum(len(file.text) for file in files) / 1e6
    if folder is not None and not files:
        raise CorpusError(
            f"expected files of the corpus {name!r} ({', '.join(source.suffixes)}) below {folder}, "
            "found none"
        )
    if folder is None and found < source.megabytes:
        message = (
            f"expected at least {source.megabytes:g} MB of text in the corpus {name!r} "
            f"({source.title}), found {found:.1f} MB"
        )
        if source.packages:
            packages = " ".join(source.packages)
            message += (
                f"; on Debian and Ubuntu: sudo apt-get install --reinstall {packages} (images for "
                "containers may exclude manual pages in /etc/dpkg/dpkg.cfg.d)"
            )
        raise CorpusError(f"{message}; or pass --corpus {name}=FOLDER")
    return files


def prepare(
    cache: Path,
    vocabulary: int,
    megabytes: float | None = None,
    folders: Mapping[str, Path] | None = None,
    read: Callable[[str, Path | None], list[SourceFile]] = read_files,
) -> dict[str, Corpus]:
    """Reads, splits and encodes the corpora, or reads the result of an earlier call from `cache`.

    Args:
        cache: file for the encoded corpora, which is valid for the same text and settings only.
        vocabulary: number of tokens.
        megabytes: approximate amount of text of each corpus, None for all of it.
        folders: folders of some corpora, instead of the standard library and packages.
        read: reads the files of a corpus from a folder or, with None, from its usual place.

    Returns:
        The corpora in the order of the stream. They share the tokenizer and the fingerprint.

    Raises:
        CorpusError: a corpus is missing or too small.
    """
    files = {name: read(name, (folders or {}).get(name)) for name in SOURCES}
    if megabytes is not None:
        files = {name: data.every_nth(each, megabytes * 1e6) for name, each in files.items()}
    named = (
        replace(file, path=f"{name}\0{file.path}") for name, each in files.items() for file in each
    )
    fingerprint = data.make_fingerprint(named, vocabulary)
    if cache.exists():
        saved = torch.load(cache)
        if saved["fingerprint"] == fingerprint:
            tokenizer = Tokenizer.from_str(saved["tokenizer"])
            return {
                name: Corpus(tokenizer=tokenizer, **each) for name, each in saved["corpora"].items()
            }
    parts = {name: data.split(each) for name, each in files.items()}
    for name, (train, held_out) in parts.items():
        if not train or not held_out:
            raise CorpusError(
                f"expected training and held-out files in the corpus {name!r}, got {len(train)} "
                f"and {len(held_out)} of {len(files[name])} files"
            )
    share = min(sum(len(file.text) for file in train) for train, _ in parts.values())
    texts = [file.text for train, _ in parts.values() for file in data.every_nth(train, share)]
    tokenizer = data.train_tokenizer(texts, vocabulary)
    corpora = {
        name: data.encode_corpus(train, held_out, tokenizer, fingerprint, SOURCES[name].title)
        for name, (train, held_out) in parts.items()
    }
    saved = {name: {**vars(each)} for name, each in corpora.items()}
    for each in saved.values():
        del each["tokenizer"]
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"fingerprint": fingerprint, "tokenizer": tokenizer.to_str(), "corpora": saved}, cache
    )
    return corpora


class Batches:
    """Training batches of a new corpus, of which a share is replayed from earlier corpora.

    The replayed windows take turns between the earlier corpora. Batches depend only on seed and
    step.

    Args:
        new: the new corpus.
        old: the earlier corpora.
        share: the share of replayed windows in a batch.
        context: length of a window in tokens.
        batch: windows per batch.
        seed: seed of the order of the windows.
    """

    def __init__(
        self, new: Corpus, old: list[Corpus], share: float, context: int, batch: int, seed: int
    ) -> None:
        self.replayed = round(share * batch)
        self.new = data.Windows(new.train, context, batch - self.replayed, seed)
        replayed = old if self.replayed else []
        self.old = [data.Windows(corpus.train, context, 1, seed) for corpus in replayed]

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, each (batch, context), the new windows first."""
        parts = [self.new[step]]
        for draw in range(step * self.replayed, (step + 1) * self.replayed):
            turn, which = divmod(draw, len(self.old))
            parts.append(self.old[which][turn])
        inputs, targets = zip(*parts, strict=True)
        return torch.cat(inputs), torch.cat(targets)
