"""The examples with models of other packages run at small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    """Runs an example to its end and returns what it prints."""
    paths = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_llama_trains_and_writes_the_same_text_in_a_new_process(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = run("huggingface.py", "--steps", "4", "--out", str(tmp_path))
    assert "model.layers.2.mlp  LlamaMLP" in text
    assert "model.layers.4.mlp  LlamaMLP" in text
    assert text.endswith("A new process wrote the same text.\n")


def test_a_vision_transformer_trains_and_loads(tmp_path: Path):
    pytest.importorskip("timm")
    text = run("vision.py", "--steps", "3", "--out", str(tmp_path))
    assert "blocks.2.mlp  Mlp" in text
    before, after = text.splitlines()[-1].split(" of new images recognised, ")
    assert after == f"{before} after loading"
