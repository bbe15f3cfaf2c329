"""CLIP and SigLIP pretraining as a LightningModule (arXiv:2103.00020, arXiv:2303.15343; open_clip's defaults)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer

from tasks.clip import CLIP, Head, Loss
from tasks.clip_health import clip_health
from tasks.collectives import world_size
from tasks.dino_schedules import cosine
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.sharding import local
from tasks.starting_point import take_clip, take_encoder
from tasks.task import PretrainTask
from tasks.text_tower import TextConfig, trim


class CLIPTask(PretrainTask):
    """Two towers learn which image and which caption belong together.

    A batch is {"image": float [b c h w], "text": int64 [b t] from `tokenize`, "rng": int64 [b]}: all that a rank has in
    an optimiser step. The towers see `micro_batch` pairs of it at a time, the loss all pairs of all ranks.

    Args:
        encoder: any encoder; its `pool` says what of it is projected.
        text: text tower and tokenizer.
        joint_width: channels of the space in which images and texts are compared.
        loss: `softmax` over the whole batch (CLIP), or `sigmoid` of every pair (SigLIP).
        image_head: `linear`, or `map`: attention pooling without a projection (SigLIP).
        patch_drop: share of the patches that is hidden in training (FLIP: 0.5).
        lock_image: the encoder stays as `init_encoder` or `init_checkpoint` made it (LiT, arXiv:2111.07991).
        init_encoder: start from this encoder (whatever `tasks.load_encoder` takes: a MAE or DINO run, timm:NAME, ...).
        init_checkpoint: start from a whole CLIP (whatever `tasks.clip_files.load_clip` takes).
        max_logit_scale: largest factor on the cosines.
        lr: peak learning rate; exactly one of lr and base_lr.
        base_lr: peak learning rate for a global batch of 256; scaled linearly with the batch.
        min_lr: learning rate at the end.
        warmup_epochs: epochs, also fractions of one, in which the rate rises to its peak at the beginning.
        warmup_steps: the same in optimiser steps; give one of the two, null for the other (both null: no warm-up).
        weight_decay: of matrices and position tables; vectors, tokens and scalars have none.
        betas: AdamW's averaging rates.
        eps: AdamW's.
        compile_blocks: compile each block of both towers (torch.compile).
        activation_checkpointing: compute each block again in the backward pass instead of keeping what it computed.

    Raises:
        TaskError: settings that contradict each other; when training starts, also those that the run contradicts.
    """

    objective = "clip"
    learns_from = ("image", "text")
    whole_batches = True
    model: CLIP

    def __init__(
        self,
        encoder: EncoderConfig,
        text: TextConfig = TextConfig(),  # noqa: B008 (frozen)
        joint_width: int = 512,
        loss: Loss = "softmax",
        image_head: Head = "linear",
        patch_drop: float = 0.0,
        lock_image: bool = False,
        init_encoder: str | None = None,
        init_checkpoint: str | None = None,
        max_logit_scale: float = 100.0,
        lr: float | None = None,
        base_lr: float | None = None,
        min_lr: float = 0.0,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(lr, base_lr, min_lr, warmup_epochs, warmup_steps, weight_decay, betas)
        if max_logit_scale < 1:
            raise TaskError(f"max_logit_scale {max_logit_scale} must be at least 1")
        if init_encoder and init_checkpoint:
            raise TaskError("give init_encoder or init_checkpoint, not both")
        if lock_image and not (init_encoder or init_checkpoint):
            raise TaskError("lock_image would lock random weights: say with init_encoder which encoder to take")
        self.model = CLIP(Encoder(encoder), text, joint_width, loss, image_head, patch_drop)
        self.lock_image, self.max_logit_scale, self.eps = lock_image, max_logit_scale, eps
        self.init_encoder, self.init_checkpoint = init_encoder, init_checkpoint
        self.compile_blocks, self.activation_checkpointing = compile_blocks, activation_checkpointing
        # one id more than the tower reads: it tells which captions were too long
        self.tokenize = replace(self.model.text.tokenizer, context_length=text.context_length + 1)
        if lock_image:
            self.model.encoder.requires_grad_(False)

    def learning_rate(self, step: int, total: int, steps_per_epoch: int, global_batch_size: int) -> float:
        """Learning rate of an optimiser step, as open_clip has it: the first is peak / warm-up, never 0."""
        peak, warmup = self.peak_lr(global_batch_size), round(self.warmup(steps_per_epoch))
        return cosine(step, total, peak, self.min_lr, warmup, peak / max(warmup, 1))

    @property
    def blocks(self) -> list[nn.Module]:
        """Of both towers."""
        return [*self.model.encoder.blocks, *self.model.text.blocks]

    # ---- Lightning's hooks, in the order of a run

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups as open_clip makes them."""
        return clip_groups([p for p in self.model.parameters() if p.requires_grad], self.weight_decay)

    def build_optimizer(self, groups: list[dict[str, Any]], **how: Any) -> Optimizer:
        """AdamW with an epsilon of its own."""
        return AdamW(groups, betas=self.betas, eps=self.eps, **how)

    def check_trainer(self, trainer: Any, data: Any) -> None:
        """Raises TaskError for what this run contradicts."""
        if trainer.accumulate_grad_batches > 1:
            raise TaskError("CLIP accumulates by itself, with all negatives: set data.device_batch_size instead")
        words = self.model.text.tokenizer
        end, size = words.end_id, words.vocab_size  # what cannot be read or fetched is known before workers start
        if self.model.text.config.pool == "end" and end != size - 1:
            raise TaskError(
                f"the text tower finds the end of a text as its largest id, but in {words.vocabulary} the end is id "
                f"{end} of {size:,}: learn a vocabulary with tasks.tokenizer.train_bpe, or give that id the last place"
            )
        layout = data.layout(trainer.world_size)
        normed = not self.lock_image and any(isinstance(part, _BatchNorm) for part in self.model.modules())
        if normed and layout.accumulate > 1:
            raise TaskError(
                f"BatchNorm would see the {layout.micro_batch} pairs of a micro-batch, not the batch: raise "
                "data.device_batch_size, use more devices, or take an encoder without BatchNorm"
            )
        if data.global_batch_size < 2:
            raise TaskError("CLIP compares the pairs of a batch: data.global_batch_size must be at least 2")

    def take_weights(self) -> None:
        """Those of init_encoder or init_checkpoint."""
        if self.init_encoder:
            take_encoder(self.model.encoder, self.init_encoder)
        if self.init_checkpoint:
            take_clip(self.model, self.init_checkpoint)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Counts over-long captions (empty ones are bad samples) and drops ids that change nothing, on the host."""
        ids, counts = self._cut(batch["text"])
        return {**batch, "text": trim(ids) if self.model.text.trimmable else ids, "captions": counts}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A locked encoder drops nothing, and its BatchNorms stay as they are."""
        super().on_train_batch_start(batch, batch_idx)
        if self.lock_image:
            self.model.encoder.eval()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """This rank's share of the loss of an optimiser step, and its health."""
        model, micro_batch = self.model, self._data.layout(self.trainer.world_size).micro_batch
        image, text = model(batch["image"], batch["text"], batch["rng"], micro_batch)
        loss = model.contrast(image, text)
        health = clip_health(image, text) | {"logit_scale": local(model.logit_scale.detach()).exp()}
        if model.logit_bias is not None:
            health["logit_bias"] = local(model.logit_bias.detach()).clone()
        health["effective_batch"] = torch.tensor(float(len(image) * world_size()))
        return {"loss": loss, **health, **batch["captions"]}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, then the temperature within its bounds, before any callback saves."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.model.clamp(self.max_logit_scale)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another vocabulary: its ids would mean other words."""
        saved = checkpoint["trivit"]["model"]["tokenizer_json"]
        if saved != self.model.text.tokenizer.content():
            raise TaskError(f"the tokenizer {self.model.text.config.tokenizer} is no longer what this run began with")

    def model_settings(self) -> dict[str, Any]:
        """CLIP's arguments besides the encoder, the tokenizer among them."""
        return self.model.settings()

    def _cut(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids [b t+1] of `tokenize`, or [b t] -> [b t], and the shares of captions that are cut, or unlike."""
        tokenizer, vocab_size = self.model.text.tokenizer, self.model.text.trunk.vocab_size
        length, end = tokenizer.context_length, tokenizer.end_id
        if (largest := int(ids.max())) >= vocab_size:
            raise TaskError(
                f"text.vocab_size {vocab_size} has no place for id {largest} of tokenizer {tokenizer.vocabulary}"
            )
        cut = torch.zeros(len(ids), dtype=torch.bool)
        if ids.shape[1] > length:
            cut = (ids[:, length] == end) & (ids[:, length - 1] != end)
            ids = ids[:, :length].clone()
            ids[cut, length - 1] = end
        distinct = len({row.tobytes() for row in ids.numpy()}) / len(ids)
        return ids, {"caption_cut": cut.float().mean(), "caption_distinct": torch.tensor(distinct)}


def clip_groups(parameters: list[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as open_clip's: without decay what has one axis only (tokens, gains, biases, scalars), then the rest.

    Args:
        parameters: trained ones.
        weight_decay: of the second group.
    """
    decays = [sum(side > 1 for side in parameter.shape) > 1 for parameter in parameters]
    return [
        {"params": [p for p, on in zip(parameters, decays, strict=True) if on == decayed], "weight_decay": decay}
        for decayed, decay in ((False, 0.0), (True, weight_decay))
    ]
