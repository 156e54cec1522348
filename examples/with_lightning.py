"""Trains a model with PEER layers by Lightning, with one optimizer and automatic optimisation.

`python with_lightning.py --help` lists the options. It needs the package `lightning`. The task is
to continue sequences of symbols. The next symbol is a random function of the last two, so a model
that remembers this function reaches a loss of zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import peer

SYMBOLS = 64


class Sequences(IterableDataset):
    """Endless sequences of symbols (length + 1,), each of which two symbols determine."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        generator = torch.Generator().manual_seed(0)
        self.next = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS), generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            symbols = torch.randint(SYMBOLS, (2,), generator=generator).tolist()
            while len(symbols) <= self.length:
                symbols.append(int(self.next[symbols[-2], symbols[-1]]))
            yield torch.tensor(symbols)


class Model(lightning.LightningModule):
    """Predicts a symbol from the two before it, by PEER layers in residual blocks.

    Args:
        dim: width.
        layers: number of PEER layers.
        num_experts: N of each layer.
        fused: whether the tables are updated inside the backward pass.
        lr: learning rate of AdamW.
        expert_lr: learning rate of the tables.
        steps: steps of training, for the schedule.
    """

    def __init__(
        self,
        dim: int = 64,
        layers: int = 2,
        num_experts: int = 128**2,
        fused: bool = True,
        lr: float = 3e-3,
        expert_lr: float = 3e-2,
        steps: int = 300,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(SYMBOLS, dim)
        self.pair = nn.Linear(2 * dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.layers = nn.ModuleList(
            peer.PEER(
                dim,
                num_experts=num_experts,
                heads=4,
                num_experts_per_head=8,
                dim_key=32,
                sparse_grad=True,
            )
            for _ in range(layers)
        )
        self.logits = nn.Linear(dim, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits (batch, length - 1, symbols) of the symbol after each pair of neighbours."""
        embedded = self.embedding(symbols)
        hidden = self.pair(torch.cat([embedded[:, :-1], embedded[:, 1:]], dim=-1))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + layer(norm(hidden))
        return self.logits(hidden)

    def training_step(self, symbols: Tensor) -> Tensor:
        """The loss of a batch."""
        loss = nn.functional.cross_entropy(
            self(symbols[:, :-1]).flatten(0, 1), symbols[:, 2:].flatten()
        )
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, symbols: Tensor) -> None:
        """Logs the loss of a batch that was not trained on."""
        loss = nn.functional.cross_entropy(
            self(symbols[:, :-1]).flatten(0, 1), symbols[:, 2:].flatten()
        )
        self.log("validation_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """One optimizer for all parameters, and a schedule for the rates of both groups."""
        options = self.hparams
        optimizer = peer.optim.optimizer_for(
            self, lr=options.lr, expert_lr=options.expert_lr, weight_decay=0.01, fused=options.fused
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the total norm. Before 2.14, torch's function takes no sparse gradients."""
        if gradient_clip_val:
            peer.optim.clip_grad_norm_(self.parameters(), gradient_clip_val)


def main(arguments: list[str] | None = None) -> float:
    """Trains, and returns the loss on sequences that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--length", type=int, default=32, help="symbols that are predicted")
    parser.add_argument("--experts", type=int, default=128**2, help="experts of a layer")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--stored", action="store_true", help="store gradients: no fused update")
    parser.add_argument("--clip", type=float, help="largest norm of the gradients")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--out", default="lightning-output", help="folder for checkpoints")
    given = parser.parse_args(arguments)
    lightning.seed_everything(0)
    model = Model(
        dim=given.dim, num_experts=given.experts, fused=not given.stored, steps=given.steps
    )
    trainer = lightning.Trainer(
        max_steps=given.steps,
        gradient_clip_val=given.clip,
        precision=given.precision,
        accelerator=given.accelerator,
        devices=1,
        default_root_dir=given.out,
        limit_val_batches=4,
        logger=False,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    training, validation = (
        DataLoader(Sequences(given.length + 1, seed), batch_size=given.batch) for seed in (1, 2)
    )
    trainer.fit(model, training)
    (result,) = trainer.validate(model, validation)
    return result["validation_loss"]


if __name__ == "__main__":
    main()
