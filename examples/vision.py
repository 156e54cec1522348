"""Puts PEER layers into a vision transformer of timm, trains it, saves it and loads it again.

The images are digits drawn from a font of 5 x 3 dots at random places, with noise, so nothing is
downloaded.

    pip install timm
    python vision.py --steps 300
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peer

SIZE = 32
# Five rows of three dots for each digit.
FONT = """
111 010 111 111 101 111 111 111 111 111
101 110 001 001 101 100 100 001 101 101
101 010 111 111 111 111 111 010 111 111
101 010 100 001 001 001 101 010 101 001
111 111 111 111 001 111 111 010 111 111
"""


def make_model() -> nn.Module:
    """A vision transformer of four layers, without PEER layers."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=4,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
    )


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIZE, SIZE) of digits, and the digits."""
    rows = [[list(map(int, dots)) for dots in line.split()] for line in FONT.split("\n") if line]
    font = torch.tensor(rows, dtype=torch.float32).transpose(0, 1)  # (10, 5, 3)
    glyphs = font.repeat_interleave(4, 1).repeat_interleave(4, 2)  # (10, 20, 12)
    digits = torch.randint(10, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    height, width = glyphs.shape[1:]
    for image, digit in zip(images, digits, strict=True):
        top = int(torch.randint(SIZE - height + 1, (), generator=generator))
        left = int(torch.randint(SIZE - width + 1, (), generator=generator))
        image[0, top : top + height, left : left + width] += glyphs[digit]
    return images, digits


def train(model: nn.Module, steps: int) -> None:
    """Trains a model, with an optimizer of its own for the tables of the experts."""
    generator = torch.Generator().manual_seed(0)
    dense, tables = peer.param_groups(model, lr=1e-3, expert_lr=1e-2)
    optimizers = [torch.optim.AdamW([dense]), peer.optim.RowwiseAdam([tables])]
    model.train()
    for step in range(steps):
        images, digits = draw(64, generator)
        loss = F.cross_entropy(model(images), digits)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}")


@torch.no_grad()
def measure(model: nn.Module) -> float:
    """The fraction of new images that a model recognises."""
    images, digits = draw(500, torch.Generator().manual_seed(1))
    correct: Tensor = model.eval()(images).argmax(1) == digits
    return correct.float().mean().item()


def main() -> None:
    """Replaces, trains, saves and loads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="folder for the model; a temporary one by default")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = make_model()
    config = peer.PEERConfig(
        num_experts=64**2,
        heads=4,
        num_experts_per_head=8,
        dim_key=32,
        query_norm="rms",
        sparse_grad=True,
        share_experts=True,  # the last two blocks share one pool
    )
    print(
        peer.replace_ffn_(model, config, lambda module, name: name[:8] in ("blocks.2", "blocks.3"))
    )
    train(model, options.steps)
    accuracy = measure(model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        peer.save_config(model, folder / "peer.json")
        save_file(model.state_dict(), folder / "model.safetensors")

        loaded = make_model()
        peer.replace_from_config_(loaded, folder / "peer.json")
        loaded.load_state_dict(load_file(folder / "model.safetensors"))
    print(f"{accuracy:.1%} of new images recognised, {measure(loaded):.1%} after loading")


if __name__ == "__main__":
    main()
