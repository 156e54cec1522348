"""The example of lifelong learning: corpora, methods, resumed streams, and the comparison."""

from __future__ import annotations

import csv
import gzip
import random
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

for requirement in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(requirement)

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = CHECKOUT / "examples"
PAGE = CHECKOUT / "docs" / "lifelong.md"
sys.path.append(str(EXAMPLES))

from language_model import data, flops  # noqa: E402
from language_model.data import Corpus, SourceFile  # noqa: E402
from language_model.model import LanguageModel  # noqa: E402
from language_model.search import Trial, read_trials  # noqa: E402
from language_model.settings import override  # noqa: E402
from language_model.train import Interrupt, OtherRunError  # noqa: E402
from lifelong import __main__ as command  # noqa: E402
from lifelong import corpora, methods, plot, results, stream  # noqa: E402
from lifelong.methods import METHODS, Method, Notes  # noqa: E402
from lifelong.results import Point, Score  # noqa: E402
from lifelong.settings import StreamSettings, cuda, smoke  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

import peer  # noqa: E402

WORDS = {
    "python": ["def", "return", "import", "class", "self", "value", "print", "range"],
    "c": ["int", "struct", "void", "define", "include", "static", "unsigned", "char"],
    "docs": ["The", "file", "system", "call", "returns", "an", "error", "when", "user"],
}
SUFFIXES = {"python": ".py", "c": ".h", "docs": ".txt"}


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """The models are so small that a second thread only waits, and long if the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three small corpora, each with words of its own."""
    found = {}
    for name, words in WORDS.items():
        folder = found[name] = tmp_path_factory.mktemp(name)
        generator = random.Random(name)
        for index in range(50):
            lines = (
                " ".join(f"{generator.choice(words)}{generator.randrange(40)}" for _ in range(6))
                for _ in range(40)
            )
            (folder / f"file_{index}{SUFFIXES[name]}").write_text("\n".join(lines))
    return found


@pytest.fixture(scope="module")
def texts(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    """The encoded corpora."""
    cache = tmp_path_factory.mktemp("cache") / "corpora.pt"
    return corpora.prepare(cache, smoke().base.model.vocabulary, None, folders)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bases that the tests of this module share."""
    return tmp_path_factory.mktemp("out")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run_list(
    out: Path, folders: dict[str, Path], path: Path, lines: list[str], *arguments: str
) -> int:
    """Runs a list of streams of the smallest size. The rows are beside the list."""
    torch.set_num_threads(1)  # fixtures of the module call it before `one_thread`
    path.write_text("\n".join(lines))
    names = [f"--corpus={name}={folder}" for name, folder in folders.items()]
    files = ["--csv", str(path.with_suffix(".csv")), "--out", str(out)]
    return command.main([str(path), *files, "--smoke", *names, *arguments])


def start(
    name: str,
    texts: dict[str, Corpus],
    out: Path,
    path: Path,
    *changes: str,
    index: int = 1,
    taken_after: int = 1,
) -> stream.Phase:
    """A phase of a method on a base that knows the first corpus."""
    settings = smoke()
    for change in changes:
        settings = override(settings, change)
    method = METHODS[name]
    base = stream.load_base(method.model, settings, texts, out, "cpu", Interrupt())
    assert base is not None
    notes = None
    for corpus in list(texts.values())[:taken_after]:
        taken = methods.take_notes(base.model, corpus, method, settings)
        notes = methods.add_notes(notes, taken)
    return stream.Phase(Trial(name, "", settings), texts, index, base.model, [], notes, path)


# The corpora.


def test_the_text_of_a_manual_page_has_no_markup() -> None:
    page = r""".\" A comment.
.TH READ 2 2022-01-01
.SH NAME
read \- read from a \fIfile\fP descriptor
.PP
.BI "ssize_t read(int " fd ", void " buf );
See
.BR open (2),
.B close
and \(aqthe rest\(aq: C:\e or \fB\-1\fR.\&
.TP
"""
    assert corpora.strip_markup(page).splitlines() == [
        "NAME",
        "read - read from a file descriptor",
        "",
        "ssize_t read(int fd, void buf);",
        "See",
        "open(2),",
        "close",
        "and 'the rest': C:\\ or -1.",
    ]


def test_the_files_of_installed_packages_are_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "read.2.gz"
    page.write_bytes(gzip.compress(b".SH NAME\n" + b"x" * 10_000))
    missing = tmp_path / "excluded.2.gz"
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"no manual page"))
    packages = {"manpages": sorted([page, missing, tmp_path / "other.gz"])}
    monkeypatch.setattr(corpora, "list_package", lambda package: packages.get(package, []))
    source = replace(corpora.SOURCES["docs"], megabytes=0.01)
    monkeypatch.setitem(corpora.SOURCES, "docs", source)
    assert [file.path for file in corpora.read_files("docs")] == [page.as_posix()]


@pytest.mark.parametrize("name", ["c", "docs"])
def test_a_missing_corpus_is_an_error_that_names_the_packages(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "list_package", lambda package: [])
    packages = " ".join(corpora.SOURCES[name].packages)
    with pytest.raises(corpora.CorpusError, match=f"--reinstall {packages}") as caught:
        corpora.read_files(name)
    assert f"--corpus {name}=FOLDER" in str(caught.value)
    assert "found 0.0 MB" in str(caught.value)


def test_the_command_ends_with_the_error_of_a_missing_corpus(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    wrong = {**folders, "docs": tmp_path / "empty"}
    assert run_list(tmp_path / "out", wrong, tmp_path / "list", ["dense"]) == 2
    assert "expected files of the corpus 'docs'" in capsys.readouterr().err
    assert not (tmp_path / "list.csv").exists()


def test_the_tokenizer_has_as_much_text_of_each_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = {"python": 40, "c": 120, "docs": 80}

    def read(name: str, folder: Path | None) -> list[SourceFile]:
        return [
            SourceFile(f"{i}", "".join(f"{name} number {i}, line {j}\n" for j in range(20)))
            for i in range(number[name])
        ]

    seen = dict.fromkeys(number, 0)
    train = data.train_tokenizer

    def count(texts: list[str], vocabulary: int) -> Tokenizer:
        for text in texts:
            seen[text.partition(" ")[0]] += len(text)
        return train(texts, vocabulary)

    monkeypatch.setattr(data, "train_tokenizer", count)
    corpora.prepare(tmp_path / "corpora.pt", 512, read=read)
    assert min(seen.values()) > 0
    assert max(seen.values()) < 1.25 * min(seen.values())


def test_corpora_share_a_tokenizer_and_are_kept(
    folders: dict[str, Path], texts: dict[str, Corpus], tmp_path: Path
) -> None:
    assert list(texts) == ["python", "c", "docs"]
    first, *others = texts.values()
    assert all(each.tokenizer is first.tokenizer for each in others)
    assert len({each.fingerprint for each in texts.values()}) == 1
    cache = tmp_path / "corpora.pt"
    for _ in range(2):  # the second time from the cache
        again = corpora.prepare(cache, smoke().base.model.vocabulary, None, folders)
        for name, corpus in texts.items():
            assert torch.equal(again[name].held_out, corpus.held_out)
            assert again[name].describe() == corpus.describe()
    words = first.tokenizer.get_vocab()
    for name in WORDS:  # the last words of each
        assert any(word in words or f"Ġ{word}" in words for word in WORDS[name][-3:]), name


def test_text_that_changed_is_encoded_again(tmp_path: Path) -> None:
    def read(name: str, folder: Path | None) -> list[SourceFile]:
        words = " ".join(f"{name}_{i}_{changed}" for i in range(200))
        return [SourceFile(f"{i}", f"file {i} {name}\n{words} {i}\n") for i in range(60)]

    changed = "before"
    first = corpora.prepare(tmp_path / "c.pt", 300, read=read)
    changed = "after"
    second = corpora.prepare(tmp_path / "c.pt", 300, read=read)
    assert first["c"].fingerprint != second["c"].fingerprint


def make_corpus(first: int, count: int = 400) -> Corpus:
    """A corpus whose tokens say which it is."""
    tokens = torch.arange(first, first + count)
    return Corpus(tokens, tokens, tokens, None, 1, 1, "")  # type: ignore[arg-type]


def test_a_quarter_of_each_batch_is_old_text_in_turns() -> None:
    new, old = make_corpus(0), [make_corpus(1000), make_corpus(2000)]
    batches = corpora.Batches(new, old, 0.25, context=8, batch=4, seed=0)
    origins = []
    for step in range(6):
        inputs, targets = batches[step]
        assert inputs.shape == (4, 8)
        assert torch.equal(inputs + 1, targets)
        assert (inputs // 1000 == 0).all(1).sum() == 3
        origins.append(int(inputs[3, 0]) // 1000)
    assert origins == [1, 2, 1, 2, 1, 2]
    starts = [int(batches[step][0][3, 0]) for step in range(6)]
    assert len(set(starts)) == 6  # not one window again and again


def test_the_replayed_share_is_that_of_the_batch() -> None:
    old = [make_corpus(1000), make_corpus(2000)]
    inputs, _ = corpora.Batches(make_corpus(0), old, 0.25, context=8, batch=8, seed=0)[5]
    assert (inputs[:, 0] // 1000).tolist() == [0] * 6 + [1, 2]
    for method in METHODS.values():
        assert method.replay == (0.25 if method.old_text == "replay" else 0.0)


def test_without_replay_old_text_is_not_touched() -> None:
    old: Any = [None]  # which has no text
    inputs, _ = corpora.Batches(make_corpus(0), old, 0.0, context=8, batch=4, seed=0)[3]
    assert (inputs < 1000).all()


# The methods.


class Untouchable(list[Corpus]):
    """Old corpora that may not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("old text was read")


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].old_text != "replay"])
def test_only_a_method_that_says_so_reads_old_text(
    name: str, texts: dict[str, Corpus], out: Path
) -> None:
    method, settings = METHODS[name], smoke()
    base = stream.load_base(method.model, settings, texts, out, "cpu", Interrupt())
    assert base is not None
    notes = methods.take_notes(base.model, texts["python"], method, settings)
    arguments = (base.model, method, settings, Untouchable(), texts["c"], notes)
    if method.old_text == "counts":
        with pytest.raises(AssertionError, match="old text was read"):
            methods.prepare(*arguments)
    else:
        methods.prepare(*arguments)


def moved_rows(phase: stream.Phase) -> torch.Tensor:
    """Trains a phase. Returns which rows of the table changed."""
    table = phase.model.layers[0].experts.weight
    before = table.detach().clone()
    assert phase.train(Interrupt())
    return (table != before).flatten(1).any(1)


def snapshot(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The state without the table, and without counters and masks."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.endswith(("experts.weight", "frozen", "num_batches_tracked"))
        and "frozen_" not in name
        and "kept_" not in name
    }


FROZEN = [name for name, method in METHODS.items() if method.model == "peer" and method.rest == 0]


@pytest.mark.parametrize("name", FROZEN)
def test_what_a_method_freezes_stays_bit_by_bit(
    name: str, texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start(name, texts, out, tmp_path / "phase.pt", "rate=3", "at_most=8", "ratio=0.9")
    pool, router = phase.model.layers[0].experts, phase.model.layers[0].router
    learns = torch.ones(pool.num_experts, dtype=torch.bool)
    if name != "tf-idf":
        learns = ~pool.frozen
        assert 0 < learns.sum() < pool.num_experts
    before = snapshot(phase.model)
    moved = moved_rows(phase)
    assert moved.any()
    assert not moved[~learns].any()
    changed = {key for key, value in snapshot(phase.model).items() if not value.equal(before[key])}
    if name == "grow":
        assert learns.tolist() == [False] * 16 * 16 + [True] * 2 * 16
        assert {key.split(".")[-1] for key in changed} == {"row_keys"}
        keys = next(value for key, value in before.items() if key.endswith("row_keys"))
        assert router.row_keys[..., :16, :].equal(keys[..., :16, :])
    else:
        assert not changed


@pytest.mark.parametrize("name", ["peer", "peer-replay"])
def test_other_methods_train_everything(
    name: str, texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start(name, texts, out, tmp_path / "phase.pt")
    before = snapshot(phase.model)
    assert moved_rows(phase).sum() > 100
    for key, value in snapshot(phase.model).items():
        assert not value.equal(before[key]), key


@pytest.mark.parametrize("rest", [0.0, 0.1])
def test_the_rest_learns_at_a_factor_of_the_rate(
    rest: float, texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("specific", texts, out, tmp_path / "p.pt", f"rest={rest}", "rate=0.5")
    dense, table = phase.optimizers
    training = smoke().base.peer_training
    peaks = [group["peak_lr"] for group in dense.param_groups]
    assert peaks == pytest.approx([4e-3 * 0.5 * (rest or 1.0)] * 3)
    assert table.param_groups[0]["peak_lr"] == pytest.approx(training.table_lr * 0.5)
    before = snapshot(phase.model)
    assert phase.train(Interrupt())
    after = snapshot(phase.model)
    assert all(value.equal(before[key]) == (rest == 0) for key, value in after.items())


def test_unused_rows_are_those_that_old_text_hardly_retrieves(
    texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("unused", texts, out, tmp_path / "p.pt", "at_most=20", taken_after=2, index=2)
    settings = override(smoke(), "at_most=20")
    counts = sum(
        peer.count_usage(phase.model, methods.batches([texts[name]], settings, 7))[
            "blocks.1.peer.experts"
        ]
        for name in ("python", "c")
    )
    assert isinstance(counts, torch.Tensor)
    assert counts.sum() == 2 * 1024 * 2 * 4  # tokens, heads and experts per head, of two corpora
    assert phase.model.layers[0].experts.frozen.equal(counts > 20)


@pytest.mark.parametrize("measure", ["count", "weight"])
def test_specific_rows_have_a_small_share_of_the_use_by_old_text(
    measure: str, texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("specific", texts, out, tmp_path / "p.pt", f"measure={measure}", "ratio=0.9")
    layer = phase.model.layers[0]
    shares = []
    for name in ("python", "c"):
        with peer.UsageTracker(layer) as tracker, torch.no_grad():
            phase.model.eval()
            for inputs in methods.batches([texts[name]], phase.stream, 16):
                phase.model(inputs)
        use = tracker.counts if measure == "count" else tracker.mass
        shares.append(use.double() / use.sum())
    assert layer.experts.frozen.equal(~(shares[0] < 0.9 * shares[1]))


def test_grown_rows_that_old_text_uses_do_not_learn(
    texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("grow-specific", texts, out, tmp_path / "p.pt", "ratio=0.9")
    old, new = (
        peer.count_usage(phase.model, methods.batches([texts[name]], phase.stream, 16))[
            "blocks.1.peer.experts"
        ]
        for name in ("python", "c")
    )
    assert len(old) == 18 * 16
    learns = ~phase.model.layers[0].experts.frozen
    assert learns.equal(old * new.sum() < 0.9 * new * old.sum())
    assert learns[:256].any()


def test_tf_idf_is_that_of_the_definition() -> None:
    notes = Notes(torch.zeros(4), documents=9, seen=torch.tensor([9, 4, 0, 0]))
    found = methods.score_slots(torch.tensor([6, 3, 1, 0]), notes)
    expected = [0.0, 0.3 * 0.6931471805599453, 0.1 * 2.302585092994046, 0.0]
    assert found.tolist() == pytest.approx(expected)


def test_tf_idf_updates_the_best_rows_of_each_batch(
    texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("tf-idf", texts, out, tmp_path / "p.pt", "slots=5", "steps=1")
    notes = phase.notes
    assert notes is not None
    inputs, _ = phase.windows[0]
    (counts,) = peer.count_usage(phase.model, [inputs]).values()
    documents = list(methods.batches([texts["python"]], phase.stream, 4))
    assert notes.documents == len(documents) == 8
    seen = sum(
        (peer.count_usage(phase.model, [d])["blocks.1.peer.experts"] > 0).long() for d in documents
    )
    assert notes.seen.equal(seen)
    best = methods.score_slots(counts, notes).topk(5).indices.sort().values
    # The router in training has the running statistics of evaluation, because it is frozen.
    assert moved_rows(phase).nonzero()[:, 0].equal(best)


def test_notes_of_several_corpora_are_added() -> None:
    first = Notes(torch.tensor([1, 2]), 3, torch.tensor([4, 5]))
    total = methods.add_notes(first, first)
    assert total is not None
    assert (total.use.tolist(), total.documents, total.seen.tolist()) == ([2, 4], 6, [8, 10])
    assert methods.add_notes(None, first) is first


def test_after_a_phase_everything_can_learn_again(
    texts: dict[str, Corpus], out: Path, tmp_path: Path
) -> None:
    phase = start("grow", texts, out, tmp_path / "p.pt")
    assert phase.train(Interrupt())
    rows, learned = phase.count_trained()
    assert rows == 2 * 16
    # Rows of 2 * 32 numbers, and the new row keys of two heads, half as wide as a query.
    assert learned == rows * 64 + 2 * 2 * 4
    phase.finish()
    assert all(parameter.requires_grad for parameter in phase.model.parameters())
    assert phase.count_trained() == (18 * 16, sum(p.numel() for p in phase.model.parameters()))


@pytest.mark.parametrize("settings", [StreamSettings(), cuda(), smoke()])
def test_the_twins_have_equal_flops(settings: StreamSettings) -> None:
    dense, sparse = (
        sum(flops.count_model(settings.first.model_config(name)).values())
        for name in ("dense", "peer")
    )
    assert 0.97 * dense <= sparse <= dense


# Streams.


@pytest.fixture(scope="module")
def finished(folders: dict[str, Path], out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list of a run with all methods; its rows are beside it."""
    path = tmp_path_factory.mktemp("run") / "list"
    assert run_list(out, folders, path, list(METHODS)) == 0
    return path


def test_a_stream_has_a_row_for_every_test_after_every_corpus(finished: Path) -> None:
    rows = read_rows(finished.with_suffix(".csv"))
    names = list(corpora.SOURCES)
    assert [(row["method"], row["after"], row["test"]) for row in rows] == [
        (method, after, test) for method in METHODS for after in names for test in names
    ]
    assert all(0 < float(row["bits_per_byte"]) < 10 for row in rows)
    for row in rows:
        base = next(each for each in rows if each["model"] == row["model"])
        if row["after"] == "python":  # all methods begin with the same base
            same = next(
                r for r in rows if r["method"] == base["method"] and r["test"] == row["test"]
            )
            assert row["bits_per_byte"] == same["bits_per_byte"]
    assert len({row["key"] for row in rows}) == len(METHODS)


def test_methods_of_a_model_share_its_base(finished: Path, out: Path) -> None:
    settings = override(smoke(), "seed=1")
    for model in ("dense", "peer"):
        assert (out / f"base-{model}-{settings.base_key(model)}.pt").exists()
    assert {path.name.split("-")[0] for path in out.glob("*.pt")} == {"base", "corpora.pt"}


def test_lines_with_rows_are_skipped(
    finished: Path,
    folders: dict[str, Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = finished.with_suffix(".csv")
    before = rows.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(command, "run_stream", lambda *_: pytest.fail("a finished line ran again"))
        assert run_list(out, folders, finished, list(METHODS)) == 0
    assert "9 of 9 runs are done" in capsys.readouterr().out
    assert rows.read_text() == before
    assert run_list(out, folders, finished, [*METHODS, "dense rate=0.3"]) == 0
    assert rows.read_text().startswith(before)
    assert len(read_rows(rows)) == 9 * 10


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("name", ["grow", "specific", "tf-idf", "peer-replay"])
def test_a_stream_that_ctrl_c_stopped_resumes_as_if_nothing_had_happened(
    name: str,
    index: int,
    finished: Path,
    folders: dict[str, Path],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advance = stream.Phase.advance

    def stop(phase: stream.Phase) -> None:
        advance(phase)
        if phase.index == index and phase.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    path = tmp_path / "list"
    with monkeypatch.context() as patch:
        patch.setattr(stream.Phase, "advance", stop)
        assert run_list(out, folders, path, [name]) == 130
    assert not path.with_suffix(".csv").exists()
    steps = 0

    def count(phase: stream.Phase) -> None:
        nonlocal steps
        advance(phase)
        steps += 1

    monkeypatch.setattr(stream.Phase, "advance", count)
    assert run_list(out, folders, path, [name]) == 0
    assert steps == 2 + 4 * (2 - index)  # the rest of this corpus, and the next one
    assert {file.name.split("-")[0] for file in out.glob("*.pt")} == {"base", "corpora.pt"}
    whole = [row for row in read_rows(finished.with_suffix(".csv")) if row["method"] == name]
    resumed = read_rows(path.with_suffix(".csv"))
    columns = ("key", "after", "test", "bits_per_byte", "trained_rows", "trained_parameters")
    for column in columns:
        assert [row[column] for row in resumed] == [row[column] for row in whole], column


def test_a_base_that_ctrl_c_stopped_resumes(
    finished: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = stream.Base.advance
    steps = 0

    def stop(base: stream.Base) -> None:
        nonlocal steps
        advance(base)
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(stream.Base, "advance", stop)
    assert run_list(tmp_path / "out", folders, tmp_path / "list", ["peer"]) == 130
    assert steps == 3
    assert run_list(tmp_path / "out", folders, tmp_path / "list", ["peer"]) == 0
    assert steps == 6
    whole = [row for row in read_rows(finished.with_suffix(".csv")) if row["method"] == "peer"]
    resumed = read_rows(tmp_path / "list.csv")
    assert [r["bits_per_byte"] for r in resumed] == [r["bits_per_byte"] for r in whole]


@pytest.mark.parametrize(
    ("arguments", "size"),
    [((), StreamSettings()), (("--device", "cuda"), cuda()), (("--smoke",), smoke())],
)
def test_the_device_chooses_the_size(arguments: tuple[str, ...], size: StreamSettings) -> None:
    options = command.parse(["list", "--csv", "rows.csv", *arguments])
    assert command.choose_size(options) == size


@pytest.mark.parametrize("assignment", ["c", "c=", "fortran=/usr"])
def test_a_corpus_without_name_or_folder_is_refused(
    assignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse(["list", "--csv", "rows.csv", "--corpus", assignment])
    assert "NAME one of python, c, docs" in capsys.readouterr().err


def test_a_base_of_other_text_is_refused(texts: dict[str, Corpus], out: Path) -> None:
    stream.load_base("dense", smoke(), texts, out, "cpu", Interrupt())
    other = {name: replace(corpus, fingerprint="other") for name, corpus in texts.items()}
    with pytest.raises(OtherRunError, match=r"corpus = .* there, other here"):
        stream.load_base("dense", smoke(), other, out, "cpu", Interrupt())


def test_only_settings_that_a_method_uses_are_part_of_its_key() -> None:
    def key(name: str, *changes: str) -> str:
        settings = StreamSettings()
        for change in changes:
            settings = override(settings, change)
        return Trial(name, "", settings).key

    assert key("dense") == key("dense", "ratio=0.5", "base.peer.heads=2", "count_tokens=1")
    assert key("specific") == key("specific", "rows=3", "slots=5", "at_most=2")
    assert key("specific") != key("specific", "ratio=0.5")
    assert key("specific") == key("specific", "rest=0.0") != key("specific", "rest=0.1")
    for name in METHODS:
        for change in ("rate=0.5", "seed=4", "steps=3", "base.steps=3", "base.batch=3"):
            assert key(name) != key(name, change), (name, change)


def test_the_committed_list_has_every_method_and_no_line_twice() -> None:
    path = EXAMPLES / "lifelong" / "methods.txt"
    trials = read_trials(path, [1], StreamSettings(), (), tuple(METHODS))
    assert {trial.name for trial in trials} == set(METHODS)
    keys = [trial.key for trial in trials]
    assert len(set(keys)) == len(keys)


# The comparison.


def test_learning_and_forgetting_are_differences_of_bits_per_byte() -> None:
    bits = {
        ("python", "python"): 1.0,
        ("python", "c"): 4.0,
        ("python", "docs"): 5.0,
        ("c", "python"): 1.5,
        ("c", "c"): 2.0,
        ("c", "docs"): 4.5,
        ("docs", "python"): 1.75,
        ("docs", "c"): 2.5,
        ("docs", "docs"): 3.0,
    }
    found = results.score(bits)
    assert found.learning == pytest.approx(((4.0 - 2.0) + (4.5 - 3.0)) / 2)
    assert found.forgetting == pytest.approx(((1.75 - 1.0) + (2.5 - 2.0)) / 2)
    assert found.final == pytest.approx((1.75 + 2.5 + 3.0) / 3)


def make_point(
    method: str, learning: float, forgetting: float, final: float = 2.0, changes: str = ""
) -> Point:
    """A point with one seed."""
    its = METHODS.get(method, Method("peer"))
    scores = (Score(learning, forgetting, final),)
    return Point(method, changes, its.model, its.old_text, (1,), scores, 1.0, 1.0)


def test_a_frontier_begins_at_the_origin_and_has_no_beaten_points() -> None:
    points = [
        make_point("dense", *each) for each in ((1.0, 0.4), (0.5, 0.1), (0.9, 0.5), (0.4, 0.2))
    ]
    assert results.frontier(points) == [(0.0, 0.0), (0.5, 0.1), (1.0, 0.4)]


def test_forgetting_is_interpolated_at_equal_learning() -> None:
    curve = [(0.0, 0.0), (0.5, 0.1), (1.0, 0.4)]
    assert results.interpolate(curve, 0.25) == pytest.approx(0.05)
    assert results.interpolate(curve, 0.75) == pytest.approx(0.25)
    assert results.interpolate(curve, 1.0) == pytest.approx(0.4)
    assert results.interpolate(curve, 1.1) is None


def test_methods_are_compared_where_the_dense_twin_learns_as_much() -> None:
    points = [
        make_point("dense", 1.0, 0.4),
        make_point("dense", 0.5, 0.1),
        make_point("specific", 0.75, 0.05),
        make_point("grow", 1.5, 0.1),  # beyond the curve: compared with its end
        make_point("unused", 0.59, 0.0),  # learns less than 60 %
        make_point("grow-specific", 0.8, 0.0),  # counts old text
        make_point("peer-replay", 0.8, 0.0),
    ]
    shares = results.compare_without_old_text(points)
    assert {point.method: share for point, share in shares.items()} == {
        "specific": pytest.approx(0.05 / 0.25),
        "grow": pytest.approx(0.1 / 0.4),
    }


@pytest.mark.parametrize(("forgetting", "met"), [(0.0499, True), (0.0501, False)])
def test_the_goal_without_old_text_is_a_fifth(forgetting: float, met: bool) -> None:
    points = [
        make_point("dense", 1.0, 0.4),
        make_point("dense", 0.5, 0.1),
        make_point("specific", 0.75, forgetting),
    ]
    assert results.check_goals(points)[0].is_met is met


@pytest.mark.parametrize(
    ("learning", "forgetting", "met"),
    [(1.1, 0.019, True), (1.1, 0.021, False), (0.9, 0.019, False)],
)
def test_the_goal_with_replay_is_half_and_learning_more(
    learning: float, forgetting: float, met: bool
) -> None:
    points = [
        make_point("dense-replay", 1.0, 0.04, final=2.0),
        make_point("dense-replay", 2.0, 0.5, final=3.0, changes="rate=9"),  # not the best one
        make_point("peer-replay", learning, forgetting),
    ]
    assert results.check_goals(points)[1].is_met is met


def test_the_goal_of_final_means_is_one_for_each_class() -> None:
    points = [
        make_point("dense", 1.0, 0.4, final=2.0),
        make_point("grow", 1.0, 0.4, final=1.9),
        make_point("grow-specific", 1.0, 0.4, final=0.5),
        make_point("dense-replay", 1.0, 0.4, final=1.0),
        make_point("peer-replay", 1.0, 0.4, final=1.1),
    ]
    goals = results.check_goals(points)
    assert [goal.is_met for goal in goals[2:]] == [True, False]
    assert "1.9000 (grow) against 2.0000 (dense)" in goals[2].found
    assert [goal.is_met for goal in results.check_goals(points[:1])] == [None] * 4


def write_stream(path: Path, key: str, seed: int, final: float, fingerprint: str = "x") -> None:
    """Appends the rows of a stream in which only the last number varies."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        names = list(corpora.SOURCES)
        for after in names:
            for test in names:
                row = {
                    "key": key,
                    "method": "dense",
                    "changes": "rate=0.3",
                    "model": "dense",
                    "old_text": "none",
                    "seed": seed,
                    "after": after,
                    "test": test,
                    "bits_per_byte": final if after == test == "docs" else 2.0,
                    "seconds": 5.0,
                    "trained_parameters": 10,
                    "corpora": fingerprint,
                }
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                    new = False
                writer.writerow(row)


def test_seeds_of_a_method_are_one_point(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_stream(path, "a", 1, 1.0)
    write_stream(path, "b", 2, 1.5)
    (point,) = results.read_points([path])
    assert point.seeds == (1, 2)
    assert point.learning == pytest.approx((0.5 + 0.25) / 2)
    assert point.deviation("learning") == pytest.approx(0.25 / 2**0.5)
    assert point.seconds == 10.0
    (point,) = results.read_points([path], seeds=[2])
    assert point.learning == pytest.approx(0.25)
    assert "| dense | `rate=0.3` | none | 0.2500 |" in results.format_table([point])


def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_stream(path, "a", 1, 1.0)
    short = tmp_path / "short.csv"
    short.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="expected 9 rows with the key a, got 8"):
        results.read_points([short])
    write_stream(path, "b", 2, 1.0, fingerprint="y")
    with pytest.raises(ValueError, match="rows of the same corpora, got x, y"):
        results.read_points([path])


def test_the_plot_has_all_methods(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "curves.png"
    assert plot.main([str(finished.with_suffix(".csv")), "--image", str(image)]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for name in METHODS:
        assert f"| {name} |" in shown
    assert shown.count("| Without old text, a PEER method") == 1
    assert plot.main([str(tmp_path / "missing.csv")]) == 2


# The page.


@pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")
def test_the_page_describes_every_method_and_setting() -> None:
    text = PAGE.read_text()
    for name in METHODS:
        assert f"\n| `{name}` |" in text, name
    for each in fields(StreamSettings):
        if each.name not in ("seed", "base"):
            default = getattr(StreamSettings(), each.name)
            shown = f"{default:,}" if isinstance(default, int) else str(default)
            assert f"\n| `{each.name}` | {shown} |" in text, each.name
    for source in corpora.SOURCES.values():
        for package in source.packages:
            assert f"`{package}`" in text, package
    lists = re.findall(r"-m lifelong (\S+)", text)
    assert lists
    assert all((EXAMPLES / each).exists() for each in lists)
