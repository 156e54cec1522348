"""The language model demo: split, FLOP count, checkpoints and a complete run."""

from __future__ import annotations

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for requirement in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(requirement)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from language_model import data, flops, names, report, search, train  # noqa: E402
from language_model.config import ModelConfig  # noqa: E402
from language_model.model import Attention, LanguageModel  # noqa: E402
from language_model.settings import PeerTraining, Settings, override, smoke  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import peer  # noqa: E402

COMMAND = (sys.executable, "-m", "language_model", "--smoke")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
}


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the smoke demo to its end."""
    command = (*COMMAND, *map(str, arguments))
    return subprocess.run(
        command,
        cwd=EXAMPLES,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def read_losses(path: Path) -> list[float]:
    """The training losses in a checkpoint."""
    return torch.load(path, weights_only=True)["progress"]["losses"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> data.Corpus:
    """The corpus of the smoke run."""
    settings = smoke()
    path = tmp_path_factory.mktemp("corpus") / "corpus.pt"
    return data.prepare(path, settings.model.vocabulary, settings.megabytes)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A complete smoke run: its folder and its output."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_demo("--out", folder, "--csv", folder / "rows.csv")
    assert result.returncode == 0, result.stderr
    return folder, result


# The split.


def test_no_file_and_no_text_is_on_both_sides_of_the_split() -> None:
    train_files, held_out = data.split(data.read_library())
    assert len(held_out) >= 20
    assert not {file.path for file in train_files} & {file.path for file in held_out}
    assert not {file.text for file in train_files} & {file.text for file in held_out}


def test_most_long_lines_of_a_held_out_file_occur_in_no_training_file() -> None:
    train_files, held_out = data.split(data.read_library())
    text = "\n".join(line.strip() for file in train_files for line in file.text.splitlines())
    known = set(text.splitlines())
    for file in held_out:
        stripped = (line.strip() for line in file.text.splitlines())
        lines = {line for line in stripped if len(line) >= 20}
        assert sum(line in known for line in lines) <= len(lines) / 2, file.path


def test_the_split_does_not_depend_on_the_order_of_the_files() -> None:
    files = data.read_library()
    assert data.split(files) == data.split(files[::-1])


def test_copies_never_cross_the_split() -> None:
    text = "".join(f"value_{i} = compute_something({i})\n" for i in range(50))
    copies = [data.SourceFile(f"package/module_{i}.py", text) for i in range(200)]
    near = [
        data.SourceFile(f"package/variant_{i}.py", text + f"the_only_new_line_of_file_{i} = {i}\n")
        for i in range(200)
    ]
    train_files, held_out = data.split(copies + near)
    assert sum(file.text == text for file in train_files + held_out) == 1
    assert train_files
    assert not held_out


# Tokens and bytes.


def test_encoding_loses_nothing_and_its_bytes_add_up() -> None:
    text = "def f(x):\n\treturn 'é λ 🐍' + x\r\n\n"
    tokenizer = data.train_tokenizer([text * 3], 300)
    tokens = data.encode([data.SourceFile("a.py", text), data.SourceFile("b.py", text)], tokenizer)
    assert int(data.count_bytes(tokenizer)[tokens].sum()) == 2 * len(text.encode())
    assert tokenizer.decode(tokens.tolist()) == text + text


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_per_token() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 256)

    tokens = torch.randint(256, (1001,), generator=torch.Generator().manual_seed(0))
    corpus = data.Corpus(tokens, tokens, torch.full((256,), 2), None, 1, 1, "")  # type: ignore[arg-type]
    assert train.evaluate(Uniform(), corpus, context=10) == pytest.approx(8 / 2)


def test_a_part_of_the_held_out_text_is_spread_over_all_of_it() -> None:
    tokens = torch.arange(101)
    windows = [
        inputs[:, 0].tolist() for inputs, _ in data.held_out_batches(tokens, 10, 2, limit=30)
    ]
    assert windows == [[0, 30], [60]]
    every = [targets for _, targets in data.held_out_batches(tokens, 10, 4)]
    assert torch.cat(every).flatten().tolist() == list(range(1, 101))


def test_the_order_of_batches_depends_on_seed_and_step_alone() -> None:
    tokens = torch.arange(1000)
    first, again = data.Windows(tokens, 8, 4, seed=3), data.Windows(tokens, 8, 4, seed=3)
    for step in (40, 7, 0):  # out of order, across an epoch
        assert torch.equal(first[step][0], again[step][0])
        assert torch.equal(first[step][0] + 1, first[step][1])
    assert not torch.equal(first[0][0], data.Windows(tokens, 8, 4, seed=4)[0][0])


def test_an_epoch_sees_every_token_at_most_once() -> None:
    windows = data.Windows(torch.arange(1000), 8, 4, seed=0)
    seen = torch.cat([windows[step][0].flatten() for step in range(windows.steps_per_epoch)])
    assert len(seen.unique()) == len(seen) > 900


# FLOPs.


@pytest.mark.parametrize("settings", [Settings(), smoke()], ids=["demo", "smoke"])
def test_the_peer_model_uses_no_more_flops_per_token_than_the_dense_one(settings: Settings) -> None:
    dense, sparse = (
        sum(flops.count_model(settings.model_config(name)).values()) for name in ("dense", "peer")
    )
    assert 0.98 * dense <= sparse <= dense


@pytest.mark.parametrize("blocks", [(0,), (0, 1)])
def test_the_thin_layers_take_what_the_peer_layers_leave(blocks: tuple[int, ...]) -> None:
    settings = replace(smoke(), peer=replace(smoke().peer, blocks=blocks))
    dense, sparse = (settings.model_config(name) for name in ("dense", "peer"))
    widths = flops.feed_forward_widths(sparse)
    assert [width < 128 for width in widths] == [index in blocks for index in range(2)]
    total = sum(flops.count_model(dense).values())
    assert sum(flops.count_model(sparse).values()) <= total
    wider = replace(settings.peer, hidden=widths[0] + flops.WIDTH_STEP)
    assert sum(flops.count_model(replace(sparse, peer=wider)).values()) > total


def test_a_peer_layer_that_costs_more_than_the_dense_layer_is_refused() -> None:
    settings = override(smoke(), "peer.dim_key=256")
    with pytest.raises(ValueError, match="fewer FLOPs"):
        flops.match_hidden(settings.model_config("peer"))


def test_the_dense_count_is_what_torch_counts() -> None:
    config = smoke().model_config("dense")
    model = LanguageModel(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(3, config.context, dtype=torch.int64))
    total = 0.0
    for operator, count in counter.get_flop_counts()["Global"].items():
        # Batched products are attention's. Torch counts the square, the model the lower half.
        causal = operator is torch.ops.aten.bmm
        total += count * ((config.context + 1) / (2 * config.context) if causal else 1)
    assert total / (3 * config.context) == sum(flops.count_model(config).values())


def test_the_peer_count_is_what_torch_counts_for_plain_operations() -> None:
    settings = smoke().peer
    dim, tokens = 32, 5
    layer = peer.PEER(
        dim,
        num_experts=settings.grid,
        heads=settings.heads,
        num_experts_per_head=settings.experts_per_head,
        dim_key=settings.dim_key,
    )
    x = torch.randn(tokens, dim)
    weights, indices = layer.router(x)
    with FlopCounterMode(display=False) as counter:
        query = layer.router.query(x).unflatten(-1, (settings.heads, 2, -1))
        torch.einsum("thd,rd->thr", query[:, :, 0], layer.router.row_keys)
        torch.einsum("thd,cd->thc", query[:, :, 1], layer.router.col_keys)
        peer.reference.expert_mlp(x, weights, indices, layer.experts.weight)
    parts = flops.count_peer(dim, settings)
    assert counter.get_total_flops() / tokens == sum(parts.values()) - parts["selection"]


# Models and their training.


@pytest.mark.parametrize("mix_keys", [False, True])
def test_no_logits_depend_on_a_later_token(mix_keys: bool) -> None:
    settings = override(smoke(), f"model.mix_keys={mix_keys}")
    model = LanguageModel(settings.model_config("dense"))
    tokens = torch.randint(settings.model.vocabulary, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % settings.model.vocabulary
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 8 + [False] * 4


def test_keys_are_mixed_with_those_of_the_previous_token() -> None:
    config = ModelConfig(dim=16, heads=2, context=8)
    attention = Attention(config).double()
    attention.key_share.data = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x)[0].view(8, 3, 2, 8).unbind(1)
    heads = []
    for head, share in enumerate(attention.key_share.sigmoid()):
        keys = torch.stack(
            [share * k[i, head] + ((1 - share) * k[i - 1, head] if i else 0) for i in range(8)]
        )
        scores = attention.rotate(q[:, head]) @ attention.rotate(keys).T / 8**0.5
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head])
    torch.testing.assert_close(attention(x)[0], attention.out(torch.cat(heads, -1)))


def test_layers_in_two_blocks_share_one_table_in_the_chosen_dtype() -> None:
    settings = override(override(smoke(), "peer.blocks=(0, 1)"), "peer.table_dtype=bfloat16")
    settings = override(settings, "peer.key_norm=True")
    first, second = LanguageModel(settings.model_config("peer")).layers
    assert first.experts is second.experts
    assert first.router is not second.router
    assert first.experts.weight.dtype == torch.bfloat16
    assert first.router.key_norm


@pytest.mark.parametrize("changes", [(), ("peer.blocks=(0, 1)",), ("peer.table_dtype=bfloat16",)])
@pytest.mark.parametrize("table_optimizer", ["RowwiseAdam", "RowwiseAdagrad"])
def test_training_moves_the_retrieved_rows_and_no_others(
    changes: tuple[str, ...], table_optimizer: str, corpus: data.Corpus, tmp_path: Path
) -> None:
    settings = override(smoke(), f"peer_training.table_optimizer={table_optimizer}")
    for change in (*changes, "steps=2", "batch=1", "curve_tokens=64"):
        settings = override(settings, change)
    run = train.Run("peer", settings, corpus, tmp_path / "peer.pt")
    table = run.model.layers[0].experts.weight
    before = table.detach().clone()
    with peer.UsageTracker(*run.model.layers) as tracker:
        assert train.train([run], train.Interrupt())
    moved = (table != before).flatten(1).any(1)
    assert 0.2 < moved.double().mean() < 1
    assert not bool(moved[tracker.counts == 0].any())


def test_models_train_in_turns(corpus: data.Corpus, tmp_path: Path) -> None:
    settings = replace(smoke(), steps=2 * train.TURN + 3)
    runs = [train.Run(name, settings, corpus, tmp_path / name) for name in ("dense", "peer")]
    order: list[str] = []

    class Watch(train.Interrupt):
        """An interrupt that notes the run of every step."""

        @property
        def requested(self) -> bool:  # type: ignore[override]
            order.extend(
                run.name for run in runs for _ in range(run.progress.step - order.count(run.name))
            )
            return False

        @requested.setter
        def requested(self, value: bool) -> None: ...

    assert train.train(runs, Watch())
    turns = [(name, len(list(steps))) for name, steps in itertools.groupby(order)]
    assert turns == [(name, n) for n in (10, 10, 3) for name in ("dense", "peer")]


def test_a_curve_has_tokens_seconds_and_bits_at_regular_steps_and_at_the_end(
    corpus: data.Corpus, tmp_path: Path
) -> None:
    settings = replace(smoke(), steps=10)
    run = train.Run("dense", settings, corpus, tmp_path / "dense.pt")
    train.train([run], train.Interrupt())
    points = run.progress.points
    assert [point.tokens for point in points] == [step * 4 * 64 for step in (3, 6, 9, 10)]
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(points))
    assert points[-1].seconds == run.progress.seconds
    assert points[-1].bits == train.evaluate(run.model, corpus, 64, settings.curve_tokens)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_rises_to_its_peak_and_decays_to_zero(decay: str) -> None:
    training = train.Training(warm_up=10, decay=decay)
    factors = [train.schedule(step, 100, training) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.85
    assert factors[-1] < 0.02
    with pytest.raises(ValueError, match="cosine"):
        train.schedule(0, 100, replace(training, decay="none"))


# Settings.


def test_an_override_replaces_one_value_by_its_path() -> None:
    settings = override(Settings(), "peer_training.lr=1")
    assert settings == replace(Settings(), peer_training=replace(PeerTraining(), lr=1.0))
    assert override(Settings(), "peer.blocks=(0, 2)").peer.blocks == (0, 2)
    assert override(Settings(), "peer.hidden=64").peer.hidden == 64


@pytest.mark.parametrize(
    "assignment",
    ["lr=1", "peer.lr=1", "peer.blocks=1", "peer_training.lr=fast", "steps.x=1", "steps", "peer=1"],
)
def test_an_override_of_nothing_or_of_another_type_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        override(Settings(), assignment)


# The report.


def make_run(name: str, curve: list[tuple[int, float, float]], seconds: float) -> train.Run:
    """A finished run of which only the progress exists."""
    run = train.Run.__new__(train.Run)
    run.name, run.settings = name, Settings()
    run.progress = train.Progress(curve=curve, seconds=seconds)
    return run


def test_the_comparison_at_equal_time_ends_with_the_faster_run() -> None:
    fast = make_run("dense", [(1, 10.0, 3.0), (2, 20.0, 2.0)], 20.0)
    slow = make_run("peer", [(1, 15.0, 2.8), (2, 30.0, 1.6)], 30.0)
    seconds, bits = report.compare_times([fast, slow])
    assert seconds == 20.0
    assert bits == {"dense": 2.0, "peer": pytest.approx(2.4)}


def test_rows_are_not_appended_to_a_file_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    report.append_rows([{"a": 1, "b": 2}], path)
    report.append_rows([{"a": 3, "b": 4}], path)
    with pytest.raises(ValueError, match="to have the columns a, c, got a, b"):
        report.append_rows([{"a": 5, "c": 6}], path)
    assert path.read_text() == "a,b\n1,2\n3,4\n"


def test_the_atlas_is_sorted_by_use_and_keeps_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(512 * 256, generator=generator, dtype=torch.float64)
    cells = report.bin_atlas(mass, (512, 256))
    assert cells.shape == (128, 128)
    assert float(cells.mean()) == pytest.approx(1.0)
    for direction in (0, 1):
        lines = cells.mean(direction)
        assert bool((lines[1:] <= lines[:-1]).all())


# Names that are remembered from training.


@pytest.fixture
def small_corpus() -> data.Corpus:
    """A corpus with a rare name, and the held-out text that uses it."""
    filler = "".join(f"x{i} = {i}\n" for i in range(60))
    train_text = filler + "import mandrake_root\n" * 3 + "import common_thing\n" * 200
    held_out = filler + "import mandrake_root\nuse(mandrake_root)\nimport common_thing\n" + filler
    tokenizer = data.train_tokenizer([train_text], 300)
    parts = (data.encode([data.SourceFile("a.py", t)], tokenizer) for t in (train_text, held_out))
    return data.Corpus(*parts, data.count_bytes(tokenizer), tokenizer, 1, 1, "")


def text_of(corpus: data.Corpus, name: names.Name) -> str:
    targets = corpus.held_out[1:][name.first : name.last + 1]
    return corpus.tokenizer.decode(targets.tolist())


def test_names_are_found_with_their_tokens_once_in_a_window(small_corpus: data.Corpus) -> None:
    context = len(small_corpus.held_out) - 1
    found = names.find_names(small_corpus, context)
    assert [(name.text, name.count) for name in found] == [
        ("mandrake_root", 3),
        ("common_thing", 200),
    ]
    for name in found:
        assert text_of(small_corpus, name).strip() == name.text


def test_the_example_is_the_rare_name_with_the_largest_gain(small_corpus: data.Corpus) -> None:
    context = len(small_corpus.held_out) - 1
    found = names.find_names(small_corpus, context)
    targets = small_corpus.held_out[1:]
    worse = train.HeldOut(torch.ones(len(targets)), torch.full_like(targets, -1))
    nats = torch.ones(len(targets))
    for name, gain in zip(found, (0.1, 0.5), strict=True):
        nats[name.first : name.last + 1] -= gain
    better = train.HeldOut(nats, targets.clone())
    example = names.find_example(found, targets, better, worse)
    assert example is not None
    assert example.text == "mandrake_root"  # the other one is not rare
    bits = names.code_lengths([example], worse.nats)
    assert float(bits) == pytest.approx((example.last - example.first + 1) / math.log(2))

    better.best[example.last] = -1  # not predicted to its end
    assert names.find_example(found, targets, better, worse) is None
    better.best[example.last] = targets[example.last]
    assert names.find_example(found, targets, worse, worse) is None


def test_groups_of_names_have_the_mean_code_length_of_each_model(
    small_corpus: data.Corpus,
) -> None:
    found = names.find_names(small_corpus, len(small_corpus.held_out) - 1)
    nats = torch.arange(1.0, len(small_corpus.held_out))
    held_out = {"dense": train.HeldOut(nats, nats), "peer": train.HeldOut(2 * nats, nats)}
    groups = names.group_by_count(found, held_out)
    assert [(group.counts, group.names) for group in groups] == [
        (range(1, 11), 1),
        (range(101, 1001), 1),
    ]
    for group, name in zip(groups, found, strict=True):
        bits = sum(range(name.first + 1, name.last + 2)) / math.log(2)
        assert group.bits == {"dense": pytest.approx(bits), "peer": pytest.approx(2 * bits)}


# The search.


def run_search(folder: Path, lines: list[str], *arguments: str) -> int:
    (folder / "list.txt").write_text("\n".join(lines))
    files = ("--csv", str(folder / "rows.csv"), "--out", str(folder / "out"))
    return search.main([str(folder / "list.txt"), *files, "--smoke", *arguments])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_search_runs_what_has_no_row_yet(tmp_path: Path) -> None:
    lines = ["# rates", "dense", "peer peer.blocks=(0,)  # first"]
    assert run_search(tmp_path, lines[:2], "--seeds", "1,2", "--set", "steps=2") == 0
    first = read_rows(tmp_path / "rows.csv")
    assert [(row["model"], row["seed"]) for row in first] == [("dense", "1"), ("dense", "2")]
    assert run_search(tmp_path, lines, "--set", "steps=2") == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert rows[:2] == first
    assert [row["changes"] for row in rows[2:]] == ["steps=2 peer.blocks=(0,)"]
    assert all(0 < float(row["bits_per_byte"]) < 8 for row in rows)
    assert not list((tmp_path / "out").glob("*/*.pt"))
    assert [path.name for path in (tmp_path / "out").glob("*.pt")] == ["corpus.pt"]


def test_a_stopped_search_goes_on_in_the_middle_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["peer steps=8"]
    advance = train.Run.advance
    stopping = True

    def stop_after_five(run: train.Run) -> None:
        advance(run)
        if stopping and run.progress.step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "advance", stop_after_five)
    assert run_search(tmp_path, line) == 130
    assert not (tmp_path / "rows.csv").exists()
    stopping = False
    assert run_search(tmp_path, line) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run_search(whole, line) == 0
    (resumed,), (uninterrupted,) = (read_rows(f / "rows.csv") for f in (tmp_path, whole))
    for column in ("key", "bits_per_byte", "usage", "unevenness"):
        assert resumed[column] == uninterrupted[column], column


@pytest.mark.parametrize("line", ["sparse lr=1", "dense lr=1", "peer steps"])
def test_a_search_names_the_line_that_it_cannot_read(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_search(tmp_path, ["dense steps=1", line]) == 2
    assert "list.txt:2: expected" in capsys.readouterr().err


# Complete runs.


def test_the_smoke_run_shows_table_sample_and_pictures(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = finished
    for words in (
        "What: ",
        "How long: ",
        "Look for: ",
        "bits per byte at equal tokens and FLOPs",
        "on this part at equal time",
        "occurrences in training",
        "The rule: ",
        "usage",
        "unevenness",
        "written by the PEER model",
    ):
        assert words in result.stdout
    assert "loss: dense" in result.stderr
    for picture in ("curves.png", "atlas.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["dense", "peer"]
    assert all(0 < float(row["bits_per_byte"]) < 8 for row in rows)
    assert rows[0]["equal_seconds"] == rows[1]["equal_seconds"]
    # The faster run is at its end.
    column = "bits_per_byte_part"
    assert any(row[f"{column}_at_equal_seconds"] == row[column] for row in rows)
    for row in rows:
        points = [p for p in read_rows(folder / "rows-curves.csv") if p["model"] == row["model"]]
        assert [int(point["tokens"]) for point in points] == [8 * 256, 16 * 256, 24 * 256]
        assert points[-1]["bits_per_byte_part"] == row["bits_per_byte_part"]
        assert float(points[-1]["seconds"]) == pytest.approx(
            float(row["training_seconds"]), abs=0.06
        )


def test_a_finished_run_says_so_and_shows_the_same_numbers(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = finished
    again = run_demo("--out", folder)
    assert again.returncode == 0
    assert again.stdout.count("already trained") == 2
    table = result.stdout[result.stdout.index("parameters") :]
    assert table == again.stdout[again.stdout.index("parameters") :]


@pytest.mark.long
def test_a_folder_with_other_settings_is_refused_until_restart(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert run_demo("--out", folder, "--models", "dense", "--steps", "4").returncode == 0
    refused = run_demo("--out", folder, "--models", "dense", "--steps", "5")
    assert refused.returncode == 2
    assert "steps = 4 there, 5 here" in refused.stderr
    assert "--restart" in refused.stderr
    restarted = run_demo("--out", folder, "--models", "dense", "--steps", "5", "--restart")
    assert restarted.returncode == 0
    assert len(read_losses(folder / "dense.pt")) == 5


@pytest.mark.long
def test_models_need_one_another_only_for_the_comparison(tmp_path: Path) -> None:
    result = run_demo("--out", tmp_path, "--models", "peer", "--set", "peer_training.lr=1e-3")
    assert result.returncode == 0, result.stderr
    assert "PEER" in result.stdout
    assert "The rule: " not in result.stdout


@pytest.mark.long
def test_a_run_that_ctrl_c_stopped_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    steps = 150
    arguments = ("--models", "peer", "--steps", str(steps))
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with subprocess.Popen(
        (*COMMAND, *arguments, "--out", str(stopped)),
        cwd=EXAMPLES,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = b""
        while b"loss: peer" not in shown:
            piece = process.stderr.read1()
            assert piece, shown
            shown += piece
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Run the same command to resume" in output
    done = len(read_losses(stopped / "peer.pt"))
    assert 0 < done < steps

    resumed = run_demo(*arguments, "--out", stopped)
    assert f"resuming after step {done} of {steps}" in resumed.stdout
    assert run_demo(*arguments, "--out", whole).returncode == 0
    assert read_losses(stopped / "peer.pt") == read_losses(whole / "peer.pt")
    kept, other = (torch.load(folder / "peer.pt", weights_only=True) for folder in (stopped, whole))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in kept["model"].items())
    assert (
        kept["progress"]["results"]["row"]["bits_per_byte"]
        == other["progress"]["results"]["row"]["bits_per_byte"]
    )
