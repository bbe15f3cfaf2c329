"""The LightningModule under a real Trainer: rates, seeds, self-description, and what comes back from a checkpoint."""

from dataclasses import asdict

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import load_encoder
from tasks.mae_task import MAETask
from tasks.masks import random_noise

TINY = EncoderConfig(arch="vit_tiny", width=16, depth=2, heads=1, image_size=16, patch_size=4, drop_path=0.5)


class Stream(torch.utils.data.Dataset):
    """Micro-batches as the shard stream gives them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        if index >= self.length:
            raise IndexError
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.randn(4, 3, 16, 16, generator=generator), "rng": torch.arange(4) + 4 * index}


class Data(pl.LightningDataModule):
    global_batch_size, steps_per_epoch, seed = 8, 3, 5

    def train_dataloader(self):
        return DataLoader(Stream(self.trainer.max_steps * self.trainer.accumulate_grad_batches), batch_size=None)


class Watch(pl.Callback):
    """What the optimiser was given at each step, and the losses of each micro-batch."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.rates: list[float] = []
        self.said: list[float] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.said.append(task.lr_now)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            assert all(parameter.grad is None for parameter in task.parameters())  # memory would peak with them

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        trainer.should_stop |= trainer.global_step == self.stop_at


def fit(tmp_path, steps=6, accumulate=2, ckpt_path=None, stop_at=None, **changes):
    torch.manual_seed(0)
    task, watch = MAETask(TINY, 16, 1, 1, **{"base_lr": 1e-2, "warmup_epochs": 1, **changes}), Watch(stop_at)
    trainer = pl.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, accelerator="cpu", callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, task, watch


def test_rate_is_set_once_per_optimiser_step_and_starts_at_zero(tmp_path):
    _, task, watch = fit(tmp_path)
    peak = 1e-2 * 8 / 256
    want = [task.learning_rate(step, 6, 3, 8) for step in range(6)]
    assert watch.rates == watch.said == want
    assert want[0] == 0 and want[3] == peak
    assert watch.losses[0] != watch.losses[1]


def test_what_is_drawn_in_the_model_repeats_for_the_same_place_in_the_run(tmp_path, monkeypatch):
    drawn = []
    step = MAETask.training_step
    monkeypatch.setattr(MAETask, "training_step", lambda *given: (drawn.append(torch.rand(()).item()), step(*given))[1])
    first, again = fit(tmp_path)[2].losses, fit(tmp_path)[2].losses
    assert first == again and len(set(drawn)) == 12 and drawn[:12] == drawn[12:]
    monkeypatch.setattr(Data, "seed", 6)
    assert fit(tmp_path)[2].losses == first and not set(drawn[:12]) & set(drawn[24:])  # drop path goes by the keys


def test_optimiser_is_fused_and_decays_matrices_only(tmp_path):
    task = fit(tmp_path, steps=2, weight_decay=0.3, warmup_epochs=0.5)[1]
    optimizer = task.optimizers().optimizer
    assert optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert task.model.encoder.trunk.cls_token is not None


def test_training_changes_what_is_trained_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    before = MAETask(TINY, 16, 1, 1, lr=1).state_dict()
    after = fit(tmp_path)[1].state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.encoder.trunk.pos_embed", "model.decoder_pos_embed"}


def test_checkpoint_describes_itself_and_loads_safely(tmp_path):
    trainer, task, _ = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    about = torch.load(tmp_path / "last.ckpt", weights_only=True)["trivit"]
    assert about == {
        "format": 1,
        "objective": "mae",
        "encoder": asdict(TINY),
        "encoder_prefix": "model.encoder.",
        "model": {
            "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 1, "mask_ratio": 0.75, "norm_pix_loss": True,
        },
    }  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(
        load_encoder(tmp_path / "last.ckpt").features(images), task.eval().model.encoder.features(images)
    )


def test_resumed_run_goes_on_with_the_schedule(tmp_path):
    want = fit(tmp_path)[2].rates
    trainer, _, watch = fit(tmp_path, stop_at=3)
    assert watch.rates == want[:3]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")[2].rates == want[3:]


def test_mask_follows_the_samples_key_only():
    torch.manual_seed(0)
    task = MAETask(TINY, 16, 1, 1, lr=1e-3).eval()
    batch = {"image": torch.randn(4, 3, 16, 16), "rng": torch.tensor([3, 1, 4, 1])}
    loss = task.training_step(batch, 0)["loss"]
    torch.manual_seed(99)
    assert torch.equal(task.training_step(batch, 7)["loss"], loss)
    noise = random_noise(batch["rng"], 16, "mae mask")
    assert torch.equal(task.model(batch["image"], noise, loss_only=True).loss, loss)
    assert torch.equal(noise[1], noise[3])
    other = {**batch, "rng": batch["rng"] + 1}
    assert not torch.equal(task.training_step(other, 0)["loss"], loss)


def test_a_warmup_as_long_as_the_run_stops_before_training(tmp_path):
    with pytest.raises(ValueError, match="not shorter than the run of 6"):
        fit(tmp_path, warmup_epochs=2)
