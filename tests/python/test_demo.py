"""The language model demo: split, FLOP count, checkpoints and a complete run."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for requirement in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(requirement)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from language_model import data, flops, train  # noqa: E402
from language_model.model import LanguageModel  # noqa: E402
from language_model.settings import Settings, smoke  # noqa: E402
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
    assert sparse <= dense


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


# Complete runs.


def test_the_smoke_run_shows_table_sample_and_pictures(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = finished
    for words in ("bits per byte", "tokens/s", "usage", "unevenness", "written by the PEER model"):
        assert words in result.stdout
    assert "tokens/s" in result.stderr
    assert "loss" in result.stderr
    for picture in ("curves.png", "atlas.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["dense", "peer"]
    assert all(0 < float(row["bits_per_byte"]) < 8 for row in rows)


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
        while b"tokens/s" not in shown:
            piece = process.stderr.read1()
            assert piece, shown
            shown += piece
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"run the same command to resume" in output
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
