"""What stands in the place of a feed-forward block if that is not a bare PEER layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peer.modules import PEER

__all__ = ["BesidePEER", "Function", "WithMoreOutputs"]


class BesidePEER(nn.Module):
    """A feed-forward block and a PEER layer, added.

    Args:
        block: the block. If it returns a tuple, the layer is added to the first element.
        peer: the layer.

    Example:
        >>> import torch, peer
        >>> options = dict(num_experts=64, heads=2, num_experts_per_head=4, dim_key=8)
        >>> block = torch.nn.Linear(16, 16)
        >>> both = peer.swap.BesidePEER(block, peer.PEER(16, zero_init_out=True, **options))
        >>> x = torch.randn(3, 16)
        >>> torch.equal(both(x), block(x))
        True
    """

    def __init__(self, block: nn.Module, peer: PEER) -> None:
        super().__init__()
        self.block = block
        self.peer = peer
        self.training = block.training

    def forward(self, x: Tensor) -> Any:
        """Applies both to every token: (..., dim), in a tuple if the block returns one."""
        # The block goes first: mixtures with jitter change their input in place, which autograd
        # does not allow once the layer has saved it.
        out = self.block(x)
        if isinstance(out, tuple):
            return (out[0] + self.peer(x), *out[1:])
        return out + self.peer(x)


class WithMoreOutputs(nn.Module):
    """A PEER layer in the place of a block that returns a tuple.

    Args:
        peer: the layer.
        outputs: the number of elements of the tuple. The first is the output of the layer, the
            others are None: the layer has no router logits.
    """

    def __init__(self, peer: PEER, outputs: int) -> None:
        super().__init__()
        self.peer = peer
        self.outputs = outputs
        self.training = peer.training

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Applies the layer to every token (..., dim)."""
        return (self.peer(x), *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """The option, for `repr`."""
        return f"outputs={self.outputs}"


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor], training: bool) -> None:
        super().__init__()
        self.function = function
        self.training = training

    def forward(self, x: Tensor) -> Tensor:
        """Applies the function."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The function, for `repr`."""
        return getattr(self.function, "__name__", repr(self.function))
