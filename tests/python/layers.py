"""Small layers that together cover every option, and the results of one step of a layer.

New interpreters also import this module, to compare a loaded layer with the saved one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peer

DIM = 10

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "layer": {"query_norm": "layer", "query_bias": True, "activation": "relu2", "dropout": 0.25},
    "rms": {"query_norm": "rms", "scores": "sigmoid", "activation": "gelu_tanh"},
    "unnormalised": {"query_norm": None, "scores": "relu", "activation": "relu"},
    "gated": {"glu": True, "activation": "silu", "query_bias": True},
    "keys_per_head": {"share_keys": False, "dropout": 0.25, "zero_init_out": True},
    "key_norm": {"key_norm": True},
    "key_norm_16_bits": {"key_norm": True, "share_keys": False, "dtype": torch.bfloat16},
    "one_per_head": {"num_experts_per_head": 1, "scores": "sigmoid", "activation": "identity"},
    "sparse": {"sparse_grad": True, "glu": True},
    "bfloat16_tables": {"table_dtype": torch.bfloat16, "glu": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


def make_layer(name: str = "paper", **options: Any) -> peer.PEER:
    """Makes the layer with this name and additional `options`: seeded, in training mode.

    By default a head retrieves 4 of 30 experts.
    """
    options = {
        "num_experts": (6, 5),
        "heads": 3,
        "num_experts_per_head": 4,
        "dim_key": 8,
        **OPTIONS[name],
        **options,
    }
    table_dtype = options.pop("table_dtype", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = peer.PEER(DIM, **options)
        # Noise on all parameters, because a bias of zero or a weight of one has no effect.
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    if table_dtype is not None:
        layer.experts.to(table_dtype)
    return layer


def draw(layer: nn.Module, length: int, masked: bool = True) -> tuple[Tensor, Tensor | None]:
    """Four sequences of `length` tokens in the layer's dtype, and their padding mask."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(4, length, DIM, generator=generator).to(layer.router.query.weight.dtype)
    ends = torch.tensor([length, length, (length + 1) // 2, 1])
    return x, torch.arange(length) >= ends[:, None] if masked else None


def step(
    layer: nn.Module,
    x: Tensor,
    padding_mask: Tensor | None,
    call: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Runs a layer forward and backward. Returns its output, all gradients and its buffers.

    Args:
        layer: the layer with the parameters.
        x: (..., dim).
        padding_mask: (...) or None.
        call: the function that calls the layer; the layer itself by default.
    """
    torch.manual_seed(0)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    out = (layer if call is None else call)(leaf, padding_mask)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {
        "out": out.detach(),
        "gradient of x": leaf.grad,
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
        **{name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names under which two steps differ in dtype, layout or value.

    Outputs and buffers must be equal bit by bit. Gradients may differ by the rounding of a few sums
    of the largest gradient, because TorchScript and compilers use other derivative formulas.
    """
    gradients = [tensor for name, tensor in theirs.items() if name.startswith("gradient")]
    largest = max(float(tensor.to_dense().abs().max()) for tensor in gradients)

    def agree(name: str, a: Tensor, b: Tensor) -> bool:
        if (a.layout, a.dtype, a.shape) != (b.layout, b.dtype, b.shape):
            return False
        if a.is_sparse:
            a, b = a.coalesce(), b.coalesce()
            return torch.equal(a.indices(), b.indices()) and agree(name, a.values(), b.values())
        if not name.startswith("gradient"):
            return torch.equal(a, b)
        return float((a - b).abs().max()) <= 8 * torch.finfo(a.dtype).eps * largest

    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not agree(name, ours[name], theirs[name])
    ]
