"""A small Transformer language model, optionally with PEER layers in some blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peer

from .config import ModelConfig, PeerConfig
from .flops import feed_forward_widths


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding.

    With `config.mix_keys`, token i has the key s k_i + (1 - s) k_(i-1). Each head learns its share
    s = sigmoid(`key_share`). The key before the first token is zero.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.key_share: nn.Parameter | None = None
        if config.mix_keys:
            self.key_share = nn.Parameter(torch.linspace(-2.0, 2.0, config.heads))
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
        if self.key_share is not None:
            previous = F.pad(k, (0, 0, 1, -1))
            k = torch.lerp(previous, k, self.key_share.sigmoid()[:, None, None])
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

    def __init__(self, config: ModelConfig, hidden: int, layer: peer.PEER | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.dim, bias=False)
        self.feed_forward = FeedForward(config.dim, hidden)
        self.peer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y = self.feed_forward_norm(x)
        x = x + self.feed_forward(y)
        return x if self.peer is None else x + self.peer(y)


def make_layers(dim: int, settings: PeerConfig) -> list[peer.PEER]:
    """Makes the PEER layers, whose gradients of the shared table are row-sparse."""
    rows, columns = settings.grid
    pool = peer.ExpertPool(
        dim,
        num_experts=rows * columns,
        activation=settings.activation,
        num_experts_per_token=settings.heads * settings.experts_per_head,
        sparse_grad=True,
        zero_init_out=settings.zero_init_out,
        dtype=getattr(torch, settings.table_dtype),
    )
    layers = []
    for _ in settings.blocks:
        router = peer.ProductKeyRouter(
            dim,
            num_experts=settings.grid,
            heads=settings.heads,
            num_experts_per_head=settings.experts_per_head,
            dim_key=settings.dim_key,
            share_keys=settings.share_keys,
            key_norm=settings.key_norm,
        )
        layers.append(peer.PEER(dim, router=router, experts=pool))
    return layers


class LanguageModel(nn.Module):
    """Token embedding, blocks, and logits with the tied embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        layers: dict[int, peer.PEER] = {}
        if config.peer:
            made = make_layers(config.dim, config.peer)
            layers = dict(zip(config.peer.blocks, made, strict=True))
        self.blocks = nn.ModuleList(
            Block(config, hidden, layers.get(index))
            for index, hidden in enumerate(feed_forward_widths(config))
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.reset_dense_parameters()

    def reset_dense_parameters(self) -> None:
        """Initialises all but the PEER layers. Projections into the residual start smaller."""
        dim, residual = self.config.dim, (2 * self.config.blocks) ** -0.5
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        for block in self.blocks:
            down = block.feed_forward.down
            nn.init.normal_(block.attention.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual * dim**-0.5)
            nn.init.normal_(block.feed_forward.up.weight, std=dim**-0.5)
            nn.init.normal_(down.weight, std=residual * down.in_features**-0.5)

    @property
    def layers(self) -> list[peer.PEER]:
        """The PEER layers, in the order of their blocks."""
        return [block.peer for block in self.blocks if block.peer is not None]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the next token at each position of `tokens`."""
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * self.config.dim**0.5
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
