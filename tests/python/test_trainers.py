"""One optimizer in the training loops of transformers, accelerate and Lightning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import peer
from peer.optim import optimizer_for

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RATES = {"lr": 1e-2, "expert_lr": 5e-2}
BATCH = 16


class Model(nn.Module):
    """A layer between two others, with the signature that `transformers.Trainer` wants."""

    def __init__(self, **options) -> None:
        super().__init__()
        options = {"sparse_grad": True, "query_norm": "layer", **options}
        sizes = {"num_experts": 36, "heads": 2, "num_experts_per_head": 4, "dim_key": 4}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(6, 8)
            self.layer = peer.PEER(8, **sizes, **options)
            self.last = nn.Linear(8, 3)

    def forward(self, x, labels):
        loss = (self.last(self.first(x) + self.layer(self.first(x))) - labels).square().mean()
        return {"loss": loss}


def make_data(batches=6):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(6, generator=generator),
            "labels": torch.randn(3, generator=generator),
        }
        for _ in range(batches * BATCH)
    ]


def make_batches(batches=6):
    data = make_data(batches)
    parts = [data[i : i + BATCH] for i in range(0, len(data), BATCH)]
    return [{key: torch.stack([each[key] for each in part]) for key in part[0]} for part in parts]


def train_plainly(model, optimizer, clip=None, batches=6, scheduler=None):
    """The loop that all others are compared with."""
    for batch in make_batches(batches):
        model(**batch)["loss"].backward()
        if clip:
            peer.optim.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return model


def assert_same(ours, theirs):
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(ours.layer.experts.weight, Model().layer.experts.weight)


# --- transformers --------------------------------------------------------------------------------


@pytest.fixture
def run_trainer(tmp_path):
    """Trains a model by `Trainer`, without shuffling; returns the trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class SparseInOrder(peer.hf.SparseGradientTrainer, InOrder):
        pass

    def run(model, optimizer, mixin=False, resume=None, **options):
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": BATCH,
                "num_train_epochs": 1,
                "lr_scheduler_type": "constant",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                "save_strategy": "no",
                "logging_steps": 1,
                **options,
            }
        )
        trainer = (SparseInOrder if mixin else InOrder)(
            model, arguments, train_dataset=make_data(), optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def test_the_unmodified_trainer_trains_a_fused_optimizer_at_its_default_clipping(run_trainer):
    ours, theirs = Model(), Model()
    trainer = run_trainer(ours, optimizer_for(ours, **RATES, fused=True))
    assert trainer.args.max_grad_norm == 1.0
    train_plainly(theirs, optimizer_for(theirs, **RATES, fused=True), clip=1.0)
    assert_same(ours, theirs)


@pytest.fixture
def clipping_of_old_torch(monkeypatch):
    """Makes torch's clipping fail on sparse gradients, as it did before 2.14."""
    clip = torch.nn.utils.clip_grad_norm_

    def clip_dense(parameters, *arguments, **options):
        parameters = [each for each in parameters if each.grad is not None]
        if any(each.grad.is_sparse for each in parameters):
            raise NotImplementedError("Sparse")
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_dense)


@pytest.mark.usefixtures("clipping_of_old_torch")
def test_the_trainer_with_the_mixin_clips_stored_sparse_gradients(run_trainer):
    ours, theirs = Model(), Model()
    run_trainer(ours, optimizer_for(ours, **RATES), mixin=True, max_grad_norm=0.1)
    train_plainly(theirs, optimizer_for(theirs, **RATES), clip=0.1)
    assert_same(ours, theirs)


def require_norms_without_clipping() -> None:
    """Skips a test if the trainer computes no norm without clipping, as in transformers 5.0."""
    trainer = pytest.importorskip("transformers").Trainer
    if not hasattr(trainer, "_get_grad_norm"):
        pytest.skip("this trainer computes no norm without clipping")


@pytest.mark.usefixtures("clipping_of_old_torch")
def test_the_trainer_with_the_mixin_trains_without_clipping(run_trainer):
    require_norms_without_clipping()
    ours, theirs = Model(), Model()
    trainer = run_trainer(ours, optimizer_for(ours, **RATES), mixin=True, max_grad_norm=0.0)
    train_plainly(theirs, optimizer_for(theirs, **RATES))
    assert_same(ours, theirs)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms
    assert all(norm > 0 for norm in norms)


def test_the_mixin_leaves_dense_gradients_to_the_trainer(run_trainer, monkeypatch):
    monkeypatch.setattr(peer.hf.trainer, "clip_grad_norm_", None)
    ours, theirs = Model(sparse_grad=False), Model(sparse_grad=False)
    run_trainer(ours, optimizer_for(ours, **RATES), mixin=True)
    train_plainly(theirs, optimizer_for(theirs, **RATES), clip=1.0)
    assert_same(ours, theirs)


@pytest.mark.usefixtures("clipping_of_old_torch")
def test_without_the_mixin_the_trainer_fails_where_torch_does(run_trainer):
    require_norms_without_clipping()
    model = Model()
    with pytest.raises(NotImplementedError, match="Sparse"):
        run_trainer(model, optimizer_for(model, **RATES), max_grad_norm=0.0)


def clips_sparse_gradients() -> bool:
    release = [int(part) for part in torch.__version__.split(".")[:2]]
    return release >= [2, 14]


@pytest.mark.skipif(not clips_sparse_gradients(), reason="torch clips sparse gradients since 2.14")
def test_the_unmodified_trainer_trains_stored_sparse_gradients(run_trainer):
    ours, theirs = Model(), Model()
    run_trainer(ours, optimizer_for(ours, **RATES))
    train_plainly(theirs, optimizer_for(theirs, **RATES), clip=1.0)
    assert_same(ours, theirs)


def test_the_trainer_s_schedule_moves_both_rates(run_trainer):
    ours, theirs = Model(), Model()
    optimizer = optimizer_for(ours, **RATES, fused=True)
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    run_trainer(ours, optimizer, **options)
    reference = optimizer_for(theirs, **RATES, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        reference, lambda step: step / 2 if step < 2 else max(0.0, (6 - step) / 4)
    )
    train_plainly(theirs, reference, clip=1.0, scheduler=schedule)
    assert_same(ours, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
def test_the_trainer_resumes_from_a_checkpoint(run_trainer, tmp_path, fused):
    model = Model()
    options = {"save_strategy": "steps", "save_steps": 3, "mixin": not fused}
    run_trainer(model, optimizer_for(model, **RATES, fused=fused), **options)
    resumed = Model()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    optimizer = optimizer_for(resumed, **RATES, fused=fused)
    run_trainer(resumed, optimizer, resume=str(checkpoint), **options)
    assert_same(resumed, model)


def test_accumulation_in_the_trainer_is_right_or_an_error(run_trainer):
    ours, theirs = Model(), Model()
    options = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    run_trainer(ours, optimizer_for(ours, **RATES), mixin=True, **options)
    train_plainly(theirs, optimizer_for(theirs, **RATES), clip=1.0)
    assert_same(ours, theirs)
    model = Model()
    with pytest.raises(RuntimeError, match="second backward pass"):
        run_trainer(model, optimizer_for(model, **RATES, fused=True), **options)


def test_the_trainer_trains_in_bfloat16(run_trainer):
    model = Model()
    run_trainer(model, optimizer_for(model, **RATES, fused=True), bf16=True)
    assert not torch.equal(model.layer.experts.weight, Model().layer.experts.weight)


# --- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def make_accelerator(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    # Trainers of transformers 4 leave it behind.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    states = accelerate.state.AcceleratorState, accelerate.state.GradientState

    def make(**options):
        for state in states:
            state._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    for state in states:
        state._reset_state()


@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
def test_accelerate_trains(make_accelerator, fused):
    accelerator = make_accelerator()
    ours, theirs = Model(), Model()
    prepared, optimizer = accelerator.prepare(ours, optimizer_for(ours, **RATES, fused=fused))
    for batch in make_batches():
        accelerator.backward(prepared(**batch)["loss"])
        if fused:
            accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
        else:
            peer.optim.clip_grad_norm_(prepared.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    train_plainly(theirs, optimizer_for(theirs, **RATES, fused=fused), clip=0.1)
    assert_same(ours, theirs)


def test_accelerate_accumulates_or_raises(make_accelerator):
    def run(model, fused):
        accelerator = make_accelerator(gradient_accumulation_steps=2)
        prepared, optimizer = accelerator.prepare(model, optimizer_for(model, **RATES, fused=fused))
        for batch in make_batches():
            for half in range(2):
                part = {key: value[half * 8 : half * 8 + 8] for key, value in batch.items()}
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**part)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()

    ours, theirs = Model(), Model()
    run(ours, fused=False)
    train_plainly(theirs, optimizer_for(theirs, **RATES))
    assert_same(ours, theirs)
    with pytest.raises(RuntimeError, match="second backward pass"):
        run(Model(), fused=True)


def test_accelerate_s_optimizer_grows(make_accelerator):
    accelerator = make_accelerator()
    model = Model()
    prepared, optimizer = accelerator.prepare(model, optimizer_for(model, **RATES, fused=True))
    accelerator.backward(prepared(**make_batches()[0])["loss"])
    optimizer.step()
    optimizer.zero_grad()
    model.layer.grow(2)
    peer.optim.grow_(optimizer)
    accelerator.backward(prepared(**make_batches()[1])["loss"])
    optimizer.step()
    assert len(optimizer.state[model.layer.experts.weight]["sum_of_squares"]) == 48


# --- Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def run_lightning(lightning, path, model, fused, clip_stored=False, **options):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_for(self, **RATES, fused=fused)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **rest):
            if clip_stored:
                peer.optim.clip_grad_norm_(self.parameters(), gradient_clip_val)
            else:
                super().configure_gradient_clipping(optimizer, gradient_clip_val, **rest)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **options,
    )
    loader = torch.utils.data.DataLoader(make_batches(), batch_size=None)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True], ids=["stored", "fused"])
def test_lightning_trains_by_automatic_optimisation(lightning, tmp_path, fused, clip):
    ours, theirs = Model(), Model()
    options = {"gradient_clip_val": clip, "clip_stored": bool(clip and not fused)}
    run_lightning(lightning, tmp_path, ours, fused, **options)
    train_plainly(theirs, optimizer_for(theirs, **RATES, fused=fused), clip=clip)
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_in_bfloat16_with_clipping(lightning, tmp_path):
    model = Model()
    options = {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    run_lightning(lightning, tmp_path, model, fused=True, **options)
    assert not torch.equal(model.layer.experts.weight, Model().layer.experts.weight)


@pytest.mark.filterwarnings("ignore")
def test_lightning_accumulates_or_raises(lightning, tmp_path):
    model = Model()
    run_lightning(lightning, tmp_path, model, fused=False, accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="second backward pass"):
        run_lightning(lightning, tmp_path, Model(), fused=True, accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", [False, True], ids=["fused", "stored"])
def test_the_lightning_example_learns(lightning, tmp_path, monkeypatch, stored):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import with_lightning

    sizes = ["--steps", "40", "--batch", "16", "--length", "16", "--experts", "1024", "--dim", "32"]
    options = ["--stored", "--clip", "1.0"] if stored else []
    loss = with_lightning.main([*sizes, *options, "--accelerator", "cpu", "--out", str(tmp_path)])
    assert loss < 4.1  # log(64) is 4.16
