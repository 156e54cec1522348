"""Puts PEER layers into a small Llama, trains it on real text, saves it and loads it again.

The model comes from a configuration and the text from the Python library on this machine, so
nothing is downloaded. A second process loads the saved model and must write the same text.

    pip install transformers accelerate
    python huggingface.py --steps 200
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers import LlamaForCausalLM as Llama

import peer

CONTEXT = 128
PROMPT = "def read_"


def make_model() -> Llama:
    """A Llama of six layers over bytes."""
    return Llama(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def read_examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Windows of bytes from the modules of the Python library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text, size = bytearray(), count * CONTEXT
    for file in files:
        text += file.read_bytes()
        if len(text) >= size:
            break
    tokens = torch.frombuffer(text, dtype=torch.uint8)[:size].long()
    return [{"input_ids": row, "labels": row} for row in tokens.view(-1, CONTEXT)]


def write(folder: Path) -> str:
    """Loads a model and lets it continue the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([list(PROMPT.encode())])
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=False
    )
    return bytes(tokens[0].tolist()).decode(errors="replace")


def train(folder: Path, steps: int) -> float:
    """Replaces two feed-forward blocks, trains and saves the model. Returns the last loss."""
    torch.manual_seed(0)
    model = make_model().to("cuda" if torch.cuda.is_available() else "cpu")
    # Every token is normalised alone, so training and generation see the same queries.
    config = peer.PEERConfig(
        num_experts=128**2, heads=4, num_experts_per_head=8, dim_key=64, query_norm="rms"
    )
    print(peer.replace_ffn_(model, config, lambda module, name: name.split(".")[2] in ("2", "4")))
    # The backward pass updates the tables, so there is no gradient of a table to store or to clip.
    optimizer = peer.optim.optimizer_for(model, lr=2e-3, expert_lr=1e-2, fused=True)
    batch = 8
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            warmup_steps=min(20, steps // 4),
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=read_examples(steps * batch),
        optimizers=(optimizer, None),
    )
    loss = trainer.train().training_loss
    model.save_pretrained(folder / "model")
    return loss


def main() -> None:
    """Trains here and writes in another process, or only writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder for the model; a temporary one by default")
    parser.add_argument("--write", type=Path, metavar="MODEL", help="only load a model and write")
    options = parser.parse_args()
    if options.write is not None:
        print(write(options.write))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        print(f"mean loss {train(folder, options.steps):.2f} nats per byte")
        here = write(folder / "model")
        command = [sys.executable, __file__, "--write", str(folder / "model")]
        there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(here)
    if there != here + "\n":
        raise SystemExit(f"the model wrote another text in a new process: {there!r}")
    print("A new process wrote the same text.")


if __name__ == "__main__":
    main()
