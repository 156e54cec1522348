"""The sizes of a language model and of its PEER layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerConfig:
    """The positions and the options of a model's PEER layers.

    Attributes:
        blocks: indices of the blocks with a PEER layer. Several layers share one pool of experts.
        grid: rows and columns of the expert grid.
        heads: routing heads.
        experts_per_head: experts retrieved per head.
        dim_key: query width per head.
        activation: the experts' activation.
        share_keys: whether all heads use the same keys.
        key_norm: whether keys keep their length in training.
        zero_init_out: whether the up vectors of the experts start at zero, so that an expert has no
            influence before it is trained.
        table_dtype: dtype of the expert table, as the name of a torch dtype.
        hidden: hidden width of the thin feed-forward layer beside each PEER layer; None for the
            largest that costs no more FLOPs than the dense model, see `flops.match_hidden`.
    """

    blocks: tuple[int, ...] = (0,)
    grid: tuple[int, int] = (1024, 1024)
    heads: int = 1
    experts_per_head: int = 64
    dim_key: int = 64
    activation: str = "identity"
    share_keys: bool = False
    key_norm: bool = False
    zero_init_out: bool = False
    table_dtype: str = "float32"
    hidden: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a language model; `peer` is None for the dense one.

    Attributes:
        vocabulary: number of tokens.
        context: number of tokens in a window.
        dim: width of the residual stream.
        blocks: number of Transformer blocks.
        heads: attention heads.
        hidden: hidden width of the feed-forward layers.
        scale_embedding: whether the embedding is multiplied by sqrt(dim) at the input, so that it
            starts at the scale of what the blocks add to it.
        mix_keys: whether a head's attention keys are mixed with those of the previous token, by a
            learned share ("smeared keys" of Olsson et al., 2022). A head that looks for what
            followed an earlier occurrence of a token then needs no help from an earlier block.
        peer: the PEER layers.
    """

    vocabulary: int = 2048
    context: int = 256
    dim: int = 256
    blocks: int = 1
    heads: int = 4
    hidden: int = 1024
    scale_embedding: bool = True
    mix_keys: bool = True
    peer: PeerConfig | None = None
