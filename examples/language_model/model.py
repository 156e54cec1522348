"""A small Transformer language model, optionally with a PEER layer in one block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peer


@dataclass(frozen=True)
class PeerConfig:
    """The position and the options of a model's PEER layer.

    Attributes:
        block: index of the block with the PEER layer.
        grid: rows and columns of the expert grid.
        heads: routing heads.
        experts_per_head: experts retrieved per head.
        dim_key: query width per head.
        activation: the experts' activation.
        hidden: hidden width of the narrow feed-forward layer in the same block.
    """

    block: int = 1
    grid: tuple[int, int] = (1024, 1024)
    heads: int = 4
    experts_per_head: int = 16
    dim_key: int = 16
    activation: str = "identity"
    hidden: int = 128


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a language model; `peer` is None for the dense one."""

    vocabulary: int = 2048
    context: int = 256
    dim: int = 128
    blocks: int = 4
    heads: int = 4
    hidden: int = 512
    peer: PeerConfig | None = None


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        half = config.dim // config.heads // 2
        angles = torch.outer(torch.arange(config.context), 10_000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates pairs of features by the angle of their position; x is (batch, heads, n, d)."""
        length = x.shape[-2]
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[:length], self.sin[:length]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (batch, length, dim) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The dense layer that PEER replaces."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., dim) to the same shape."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: attention, a feed-forward layer and optionally a PEER layer."""

    def __init__(self, config: ModelConfig, settings: PeerConfig | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim, bias=False)
        self.feed_forward = FeedForward(config.dim, settings.hidden if settings else config.hidden)
        self.peer = make_peer(config.dim, settings) if settings else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y = self.feed_forward_norm(x)
        x = x + self.feed_forward(y)
        return x if self.peer is None else x + self.peer(y)


def make_peer(dim: int, settings: PeerConfig) -> peer.PEER:
    """Makes the PEER layer, with keys per head and row-sparse table gradients."""
    return peer.PEER(
        dim,
        num_experts=settings.grid,
        heads=settings.heads,
        num_experts_per_head=settings.experts_per_head,
        dim_key=settings.dim_key,
        activation=settings.activation,
        share_keys=False,
        sparse_grad=True,
    )


class LanguageModel(nn.Module):
    """Token embedding, blocks, and logits with the tied embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(
            Block(config, config.peer if config.peer and config.peer.block == index else None)
            for index in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.reset_dense_parameters()

    def reset_dense_parameters(self) -> None:
        """Initialises all but the PEER layer. Projections into the residual start smaller."""
        dim, residual = self.config.dim, (2 * self.config.blocks) ** -0.5
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        for block in self.blocks:
            down = block.feed_forward.down
            nn.init.normal_(block.attention.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual * dim**-0.5)
            nn.init.normal_(block.feed_forward.up.weight, std=dim**-0.5)
            nn.init.normal_(down.weight, std=residual * down.in_features**-0.5)

    @property
    def peer(self) -> peer.PEER | None:
        """The PEER layer, if there is one."""
        return self.blocks[self.config.peer.block].peer if self.config.peer else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the next token at each position of `tokens`."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


@torch.no_grad()
def sample(
    model: LanguageModel,
    tokens: Tensor,
    count: int,
    generator: torch.Generator,
    temperature: float = 0.8,
) -> Tensor:
    """Extends `tokens` (n,) by `count` sampled tokens."""
    for _ in range(count):
        logits = model(tokens[None, -model.config.context :])[0, -1]
        probabilities = (logits / temperature).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)))
    return tokens
