"""What every pretraining objective shares as a LightningModule: optimiser, rate, randomness, self-description."""

import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tasks.blocks import compile_forward, recompute
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.gradients import Measured, measure_gradients
from tasks.param_groups import weight_decay_groups
from tasks.schedules import set_learning_rate, warmup_cosine
from tasks.sharding import everything, is_sharded, materialize, shard


class PretrainTask(pl.LightningModule):
    """Trains `self.model` with AdamW under a warm-up and a cosine.

    Where the strategy has a device mesh (`fsdp2`) the model is sharded over the ranks: `blocks` and `heads` each by
    itself. With `compile_blocks` every block is compiled, with `activation_checkpointing` it is computed twice instead
    of remembered.

    A subclass sets `model`, `objective` and `learns_from`, the parts of a batch that it cannot do without; its
    `training_step` returns {"loss": ..., name: detached scalar}. One that learns from texts has `tokenize`; one with
    `whole_batches` gets all of a rank's optimiser step at once and cuts it into micro-batches itself.
    The trainer must have max_steps and a datamodule with global_batch_size, steps_per_epoch and seed.

    Args:
        lr: peak learning rate; exactly one of lr and base_lr.
        base_lr: peak learning rate for a global batch of 256; scaled linearly with the batch.
        min_lr: learning rate at the end.
        warmup_epochs: epochs, also fractions of one, in which the rate rises to its peak at the beginning.
        warmup_steps: the same in optimiser steps; give one of the two, null for the other (both null: no warm-up).
        weight_decay: of matrices and tokens; vectors and biases have none.
        betas: AdamW's averaging rates.

    Raises:
        TaskError: settings that contradict each other, and, when training starts, a warm-up as long as the run.
    """

    objective = ""
    learns_from: tuple[str, ...] = ("image",)
    tokenize: Callable[[list[str]], Tensor] | None = None
    whole_batches = False
    compile_blocks = False
    activation_checkpointing = False
    encoder_prefix = "model.encoder."
    model: nn.Module

    def __init__(
        self,
        lr: float | None = None,
        base_lr: float | None = None,
        min_lr: float = 0.0,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__()
        if (lr is None) == (base_lr is None):
            raise TaskError("give exactly one of lr and base_lr (base_lr is multiplied by global_batch_size / 256)")
        if warmup_epochs is not None and warmup_steps is not None:
            raise TaskError("give warmup_epochs or warmup_steps, not both")
        if min(lr or 0, base_lr or 0, min_lr, warmup_epochs or 0, warmup_steps or 0, weight_decay) < 0:
            raise TaskError("lr, base_lr, min_lr, warm-up and weight_decay cannot be negative")
        self.lr, self.base_lr, self.min_lr = lr, base_lr, min_lr
        self.warmup_epochs, self.warmup_steps = warmup_epochs, warmup_steps
        self.weight_decay, self.betas = weight_decay, betas
        self.lr_now = 0.0
        self._measured: Measured | None = None
        self._prepared = False

    def peak_lr(self, global_batch_size: int) -> float:
        """The largest learning rate of a run with that batch."""
        if self.lr is not None:
            return self.lr
        assert self.base_lr is not None
        return self.base_lr * global_batch_size / 256

    def warmup(self, steps_per_epoch: int) -> float:
        """Length of the warm-up in optimiser steps."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs * steps_per_epoch
        return float(self.warmup_steps or 0)

    def learning_rate(self, step: int, total: int, steps_per_epoch: int, global_batch_size: int) -> float:
        """Learning rate of the optimiser step number `step`, counted from 0, of `total`."""
        return warmup_cosine(step, total, self.warmup(steps_per_epoch), self.peak_lr(global_batch_size), self.min_lr)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts of `model`: compiled, computed again and sharded one at a time."""
        encoder: Any = self.get_submodule(self.encoder_prefix.removesuffix("."))
        return list(encoder.blocks)

    @property
    def heads(self) -> list[nn.Module]:
        """Other large parts that are called as modules: sharded one at a time, in full precision."""
        return []

    def setup(self, stage: str) -> None:
        """Freezes what would get no gradient, compiles and wraps what is to be compiled or computed again; once."""
        if self._prepared:
            return
        self._prepared = True
        self.freeze_unused()
        if self.compile_blocks:
            compile_forward(self.blocks)
        if self.activation_checkpointing:
            recompute(self.blocks)

    def freeze_unused(self) -> None:
        """No gradient for parameters of encoders on which nothing depends: DDP would wait for it."""
        for part in self.model.modules():
            if isinstance(part, Encoder):
                part.freeze_unused()

    def configure_model(self) -> None:
        """Ranks share the statistics of BatchNorm where there is any, and the model where the strategy shards it."""
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and strategy.root_device.type == "cuda":
            convert_sync_batchnorm(self.model)
        if self.device_mesh is not None and not is_sharded(self.model):
            whole = everything(self.model) if self.global_rank == 0 else None
            self.model.to("meta")
            low = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else None
            shard(self.model, self.blocks, self.heads, self.device_mesh["data_parallel"], low)
            materialize(self.model, whole, strategy.root_device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of what is trained, with their weight decay."""
        return weight_decay_groups(self.named_parameters(), self.weight_decay)

    def build_optimizer(self, groups: list[dict[str, Any]], **how: Any) -> Optimizer:
        """AdamW; `how`: the rate to begin with, and which kernels."""
        return AdamW(groups, betas=self.betas, **how)

    def configure_optimizers(self) -> Optimizer:
        """The optimiser, one kernel per group where the device has it."""
        groups = self.parameter_groups()
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        # A fused optimiser takes the gradient scaler's factor off itself, after clipping, which must see it off.
        scaled = self._trainer is not None and getattr(self.trainer.precision_plugin, "scaler", None) is not None
        fused = devices <= {"cpu", "cuda"} and len(devices) == 1 and not scaled
        rate = self.lr if self.lr is not None else self.base_lr
        return self.build_optimizer(groups, lr=rate, fused=fused, foreach=None if fused else True)

    def check_schedule(self, total: int, steps_per_epoch: int) -> None:
        """Raises TaskError for phases that are not shorter than the run of `total` optimiser steps, all at once.

        With `steps_per_epoch` 0, not known yet, those that are given in epochs pass.
        """
        if faults := self.too_long(total, steps_per_epoch):
            told = "; ".join(fault for fault, _ in faults.values())
            values = " ".join(f"--model.{name} {value}" for name, (_, value) in faults.items())
            raise TaskError(f"{told}; shorten {'it' if len(faults) == 1 else 'them'}, for example {values}")

    def too_long(self, total: int, steps_per_epoch: int) -> dict[str, tuple[str, str]]:
        """Setting -> what is wrong with it in a run of `total` optimiser steps, and a value that would do."""
        warmup = self.warmup(steps_per_epoch)
        if warmup < total:
            return {}
        name, value, tenth = "warmup_steps", warmup, f"{total // 10}"
        if self.warmup_epochs is not None:
            name, value, tenth = "warmup_epochs", self.warmup_epochs, f"{0.1 * total / steps_per_epoch:.2g}"
        of = f"of {warmup:g} steps is not shorter than the run of {total} steps"
        return {name: (f"model.{name} {value:g}: a warm-up {of}", tenth)}

    def check_trainer(self, trainer: Any, data: Any) -> None:
        """Raises TaskError for what a trainer, before it begins, would do that the task cannot bear.

        Args:
            trainer: its accumulate_grad_batches, gradient_clip_val, precision and world_size are looked at.
            data: the datamodule; its global_batch_size and layout, for which it need not have been set up.
        """

    def take_weights(self) -> None:
        """Takes over the weights that a new run starts from, if any; TaskError: not there, or they do not fit."""

    def notes(self) -> list[str]:
        """What works, but hardly as it was meant."""
        return []

    def on_train_start(self) -> None:
        """Takes over the weights to start from; a run that is being resumed has its own and is past step 0."""
        if not self.trainer.global_step:
            self.take_weights()

    def on_fit_start(self) -> None:
        """Refuses a schedule and a trainer that cannot work."""
        self.check_schedule(self.trainer.max_steps, self._data.steps_per_epoch)
        self.check_trainer(self.trainer, self._data)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds what else is random inside the model by place in the run, so that a resumed run repeats it."""
        micro = batch_idx % self.trainer.accumulate_grad_batches
        place = (self._data.seed, self.trainer.global_step, micro, self.trainer.global_rank)
        torch.manual_seed(zlib.crc32(repr(place).encode()))

    def measure_gradients(self) -> Measured:
        """Collective where they are sharded: lengths of the gradients of this optimiser step, before they are clipped.

        Clipping uses what was measured since the backward pass, so that nothing is measured twice.
        """
        self._measured = measure_gradients(self.parameters())
        return self._measured

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Sets the learning rate of this optimiser step, takes it, and frees the gradients."""
        data = self._data
        self.lr_now = self.learning_rate(
            self.trainer.global_step, self.trainer.max_steps, data.steps_per_epoch, data.global_batch_size
        )
        set_learning_rate(optimizer, self.lr_now)
        self._measured = None
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep them through the next forward pass, at the end of which memory peaks.
        optimizer.zero_grad(set_to_none=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says in the checkpoint what it holds, so that it can be read without the run's config."""
        checkpoint["trivit"] = {
            "format": 1,
            "objective": self.objective,
            "encoder": asdict(self.encoder_config),
            "encoder_prefix": self.encoder_prefix,
            "model": self.model_settings(),
        }

    @property
    def encoder_config(self) -> EncoderConfig:
        """The config of the encoder that evaluation will use."""
        encoder: Any = self.get_submodule(self.encoder_prefix.removesuffix("."))
        return encoder.config  # type: ignore[no-any-return]

    def model_settings(self) -> dict[str, Any]:
        """What builds `model` around the encoder again; plain values only."""
        return {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of one micro-batch and scalars to log."""
        raise NotImplementedError

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]
