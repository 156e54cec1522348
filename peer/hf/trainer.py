"""Clipping of sparse gradients in the trainers of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from peer.optim import clip_grad_norm_

__all__ = ["SparseGradientTrainer"]


class SparseGradientTrainer:
    """Makes a trainer of transformers clip sparse gradients, too.

    `transformers.Trainer` calls torch's clipping in every step. With `max_grad_norm=0`, that of
    transformers 5.24 does so with an infinite norm, and that of 5.0 does not. Before torch 2.14,
    torch's function fails on sparse gradients. Later versions take them, but compute norms of
    16-bit gradients in 16 bits. This class replaces the clipping of the trainer's accelerator by
    `peer.optim.clip_grad_norm_` for steps that have a sparse gradient. It is a mixin, for `Trainer`
    and all classes that derive from it. An optimizer whose updates are fused into the backward pass
    has no sparse gradients and does not need it.

    Example:
        Needs transformers:

            class Trainer(peer.hf.SparseGradientTrainer, transformers.Trainer):
                pass

            optimizer = peer.optim.optimizer_for(model, lr=1e-3, expert_lr=1e-2)
            Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    """

    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator as the trainer does, and replaces its clipping."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        accelerator = self.accelerator
        clip_dense = accelerator.clip_grad_norm_

        def clip(
            parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
        ) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            if not any(each.grad is not None and each.grad.is_sparse for each in parameters):
                return clip_dense(parameters, max_norm, norm_type)
            accelerator.unscale_gradients()
            return clip_grad_norm_(parameters, max_norm, norm_type)

        accelerator.clip_grad_norm_ = clip
