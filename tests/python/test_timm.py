"""Vision transformers of timm with PEER layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peer

timm = pytest.importorskip("timm")

CONFIG = peer.PEERConfig(
    num_experts=(6, 5), heads=2, num_experts_per_head=3, dim_key=4, query_norm="rms"
)
# A plain MLP, one with both projections of a gate in one, and one that normalises hidden features.
MODELS = {
    "vit_tiny_patch16_224": "Mlp",
    "eva02_tiny_patch14_224": "GluMlp",
    "eva02_base_patch14_448": "SwiGLU",
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.create_model(name, **options, num_classes=5).eval()


def replace(model: torch.nn.Module, **options):
    return peer.replace_ffn_(model, CONFIG, lambda module, name: ".1." not in name, **options)


def test_the_blocks_of_a_model_are_replaced(name: str, images: torch.Tensor):
    model = make_model(name)
    before = model(images)
    table = replace(model)
    assert table.names == ["blocks.0.mlp", "blocks.2.mlp"]
    assert [entry.before for entry in table] == [MODELS[name]] * 2
    assert not torch.equal(model(images), before)
    model.train()(images).sum().backward()
    assert model.blocks[2].mlp.experts.weight.grad.count_nonzero() > 0


def test_beside_a_block_outputs_do_not_change_by_a_bit(name: str, images: torch.Tensor):
    model = make_model(name)
    before = model(images)
    replace(model, mode="beside")
    assert torch.equal(model(images), before)


def test_a_saved_model_loads_to_the_bit(name: str, images: torch.Tensor, tmp_path: Path):
    model = make_model(name)
    replace(model)
    peer.save_config(model, tmp_path / "peer.json")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = make_model(name)
    peer.replace_from_config_(fresh, tmp_path / "peer.json")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(images), model(images))


def test_a_model_scripts(images: torch.Tensor):
    model = make_model("vit_tiny_patch16_224")
    replace(model)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
