"""A small Transformer language model whose feed-forward layers can be replaced by PEER layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peer


@dataclass(frozen=True)
class PeerConfig:
    """The PEER layers of a model: where they sit and what they are made of.

    Attributes:
        blocks: indices of the blocks whose feed-forward layer is replaced.
        grid: rows and columns of the expert grid.
        heads: routing heads.
        experts_per_head: experts retrieved per head.
        dim_key: query width per head.
        activation: the experts' activation.
        glu: whether experts are gated.
        share_pool: whether all the layers use the first one's experts.
        hidden: width of a thinner feed-forward layer kept beside each PEER layer; 0 for none.
    """

    blocks: tuple[int, ...] = (1,)
    grid: tuple[int, int] = (1024, 1024)
    heads: int = 4
    experts_per_head: int = 16
    dim_key: int = 16
    activation: str = "gelu"
    glu: bool = False
    share_pool: bool = True
    hidden: int = 0
    query_norm: str | None = "batch"
    query_bias: bool = False
    share_keys: bool = True
    scores: str = "softmax"
    zero_init_out: bool = False


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
    """Causal self-attention with rotary positions."""

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
        """Turns pairs of features by their position's angle; x (batch, heads, length, width)."""
        length = x.shape[-2]
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[:length], self.sin[:length]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """X (batch, length, dim) to the same shape."""
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
        """X (..., dim) to the same shape."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then the sum of the layers in `mixers`."""

    def __init__(self, config: ModelConfig, mixers: list[nn.Module]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = Attention(config)
        self.mixer_norm = nn.LayerNorm(config.dim, bias=False)
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor) -> Tensor:
        """X (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y = self.mixer_norm(x)
        for mixer in self.mixers:
            x = x + mixer(y)
        return x


class LanguageModel(nn.Module):
    """Token embedding, blocks, and logits by the same embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(
            Block(config, self.make_mixers(config, index)) for index in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.dim, bias=False)
        if config.peer is not None and config.peer.share_pool:
            for layer in self.peer_layers[1:]:
                layer.experts = self.peer_layers[0].experts
        self.reset_dense_parameters()

    @staticmethod
    def make_mixers(config: ModelConfig, index: int) -> list[nn.Module]:
        """What stands in block `index` after its attention."""
        settings = config.peer
        if settings is None or index not in settings.blocks:
            return [FeedForward(config.dim, config.hidden)]
        layer = peer.PEER(
            config.dim,
            num_experts=settings.grid,
            heads=settings.heads,
            num_experts_per_head=settings.experts_per_head,
            dim_key=settings.dim_key,
            activation=settings.activation,
            glu=settings.glu,
            query_norm=settings.query_norm,
            query_bias=settings.query_bias,
            share_keys=settings.share_keys,
            scores=settings.scores,
            zero_init_out=settings.zero_init_out,
            sparse_grad=True,
        )
        return [layer] + ([FeedForward(config.dim, settings.hidden)] if settings.hidden else [])

    def reset_dense_parameters(self) -> None:
        """Initialises all but the PEER layers; what ends in the residual stream starts smaller."""
        dim, residual = self.config.dim, (2 * self.config.blocks) ** -0.5
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=dim**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual * dim**-0.5)
            for mixer in block.mixers:
                if isinstance(mixer, FeedForward):
                    nn.init.normal_(mixer.up.weight, std=dim**-0.5)
                    nn.init.normal_(mixer.down.weight, std=residual * mixer.down.in_features**-0.5)

    @property
    def peer_layers(self) -> list[peer.PEER]:
        """The PEER layers, in the order of the blocks."""
        return [
            mixer for block in self.blocks for mixer in block.mixers if isinstance(mixer, peer.PEER)
        ]

    def tables(self) -> list[nn.Parameter]:
        """The expert tables: the parameters with sparse gradients."""
        return list(
            dict.fromkeys(p for layer in self.peer_layers for p in layer.experts.parameters())
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the token after each of tokens (batch, length)."""
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
    """Continues `tokens` (n,) by `count` tokens drawn one after another."""
    for _ in range(count):
        logits = model(tokens[None, -model.config.context :])[0, -1]
        probabilities = (logits / temperature).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)))
    return tokens
