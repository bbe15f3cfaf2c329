"""A tiny DINO, random views, and a Trainer that runs it for some steps in about a second."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from tasks.dino_head import HeadConfig
from tasks.dino_task import DINOTask
from tasks.encoder_config import EncoderConfig

TINY = EncoderConfig(
    arch="vit_tiny", width=24, depth=2, heads=2, image_size=16, patch_size=4, positions="learned",
    position_resize="dino", pool="cls",
)  # fmt: skip
HEAD = HeadConfig(prototypes=16, hidden_width=16, bottleneck_width=8)


def tiny_task(encoder: EncoderConfig = TINY, head: HeadConfig = HEAD, **changes: Any) -> DINOTask:
    torch.manual_seed(0)
    settings = {"lr": 1e-2, "freeze_last_layer_epochs": 0, "teacher_momentum": 0.9}
    return DINOTask(encoder, head, **{**settings, **changes})


class Views(LightningDataModule):
    """Random views, the same for a micro-step whatever the rank count; goes on where the Trainer is."""

    seed = 0
    steps_per_epoch = 2

    def __init__(self, batch: int = 4, size: int = 16, small: int = 8, local_views: int = 2) -> None:
        super().__init__()
        self.global_batch_size = batch
        self.size, self.small, self.local_views = size, small, local_views

    def batch(self, micro_step: int) -> dict[str, Any]:
        trainer = self.trainer
        assert trainer is not None
        b = self.global_batch_size // trainer.accumulate_grad_batches
        draw = torch.Generator().manual_seed(micro_step)
        views = {
            "global_views": torch.randn(2, b, 3, self.size, self.size, generator=draw),
            "local_views": torch.randn(self.local_views, b, 3, self.small, self.small, generator=draw),
        }
        mine = torch.arange(b).chunk(trainer.world_size)[trainer.global_rank]
        return {**{k: v[:, mine] for k, v in views.items() if len(v)}, "rng": micro_step * b + mine}

    def train_dataloader(self) -> "Loader":
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        return Loader(self, self.trainer.global_step * accumulate, self.trainer.max_steps * accumulate)


class Loader:
    def __init__(self, data: Views, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.data.batch(i) for i in range(self.start, self.stop))


class Stop(Callback):
    """Saves and ends the run after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def fit(
    task: DINOTask, steps: int, data: Views | None = None, callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None, **settings: Any,
) -> Trainer:  # fmt: skip
    own: dict[str, Any] = {"accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    own |= {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks}
    trainer = Trainer(max_steps=steps, **{**own, **settings})
    trainer.fit(task, datamodule=data or Views(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
