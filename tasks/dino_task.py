"""DINO pretraining as a LightningModule (Caron et al. 2021, arXiv:2104.14294; the defaults of its authors' code)."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from tasks.block_masks import Hidden, hide_blocks
from tasks.dino import DINO, IBOTConfig, Targets
from tasks.dino_groups import dino_groups
from tasks.dino_head import HeadConfig
from tasks.dino_schedules import cosine, ramp
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.gradients import clip_gradients, skip_step_unless_finite
from tasks.starting_point import take_dino, take_encoder
from tasks.task import PretrainTask


class DINOTask(PretrainTask):
    """Self-distillation: a student learns what a slowly moving teacher says of other views of the same image.

    A batch is {"global_views": float [g b c h w], "local_views": float [l b c h' w'] or absent, "rng": int64 [b]}.

    Args:
        encoder: any encoder; iBOT needs a plain Vision Transformer. Its class token is trained, or the mean of its
            patches where it has none.
        head: projection head.
        ibot: loss on hidden patches (iBOT, DINOv2); None: none.
        koleo_weight: of KoLeo (DINOv2: 0.1); 0: none. It sees one micro-batch only and refuses accumulation.
        targets: `centering`, or `sinkhorn` for Sinkhorn-Knopp (DINOv2), which refuses accumulation likewise.
        student_temp: temperature of the student.
        teacher_temp: temperature of the teacher after its warm-up.
        warmup_teacher_temp: temperature of the teacher in epoch 0.
        warmup_teacher_temp_epochs: epochs in which it rises, in equal steps; it changes between epochs only.
        center_momentum: share of the old centre that an update keeps.
        teacher_momentum: share of the teacher that a step keeps, at the start; it rises to 1 along a cosine.
        freeze_last_layer_epochs: epochs, also fractions, in which prototypes do not move.
        clip_grad: largest length of a gradient; 0: no clipping.
        clip: what is clipped together: each `parameter` (DINO), or each `module`, encoder and heads (DINOv2).
        optimizer: `adamw`, or `sgd` with the first of betas as momentum.
        lr: peak learning rate; exactly one of lr and base_lr.
        base_lr: peak learning rate for a global batch of 256; scaled linearly with the batch.
        min_lr: learning rate at the end.
        warmup_epochs: epochs, also fractions of one, in which the rate rises to its peak at the beginning.
        warmup_steps: the same in optimiser steps; give one of the two, null for the other (both null: no warm-up).
        weight_decay: of matrices and tokens, at the start.
        weight_decay_end: at the end, along a cosine; None: constant.
        betas: AdamW's averaging rates.
        layer_decay: factor on the learning rate of each layer below the heads (DINOv2: 0.9); 1: none.
        patch_embed_lr_scale: further factor for the patch embedding (DINOv2: 0.2).
        init_encoder: start from this encoder (whatever `tasks.load_encoder` takes), with new heads.
        init_checkpoint: start from a whole DINO, heads and centre too: a run, a checkpoint, or the authors' full one.
        head_warmup_epochs: epochs, also fractions, in which only the heads learn.
        compile_blocks: compile each block of the encoders (torch.compile).
        activation_checkpointing: compute each block again in the backward pass instead of keeping what it computed.

    Raises:
        TaskError: settings that contradict each other; when training starts, also those that the run contradicts.
    """

    objective = "dino"
    learns_from = ("global_views",)
    encoder_prefix = "model.teacher.encoder."
    model: DINO

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig = HeadConfig(),  # noqa: B008 (frozen)
        ibot: IBOTConfig | None = None,
        koleo_weight: float = 0.0,
        targets: Targets = "centering",
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        center_momentum: float = 0.9,
        teacher_momentum: float = 0.996,
        freeze_last_layer_epochs: float = 1,
        clip_grad: float = 3.0,
        clip: Literal["parameter", "module"] = "parameter",
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float | None = None,
        base_lr: float | None = None,
        min_lr: float = 1e-6,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float = 0.04,
        weight_decay_end: float | None = 0.4,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float = 1.0,
        patch_embed_lr_scale: float = 1.0,
        init_encoder: str | None = None,
        init_checkpoint: str | None = None,
        head_warmup_epochs: float = 0,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(lr, base_lr, min_lr, warmup_epochs, warmup_steps, weight_decay, betas)
        for name, temp in (("teacher_temp", teacher_temp), ("warmup_teacher_temp", warmup_teacher_temp)):
            if temp <= 0:
                raise TaskError(f"{name} must be above 0, not {temp:g}")
        if not 0 <= teacher_momentum <= 1:
            raise TaskError(f"teacher_momentum must be from 0 to 1, not {teacher_momentum:g}")
        for name, value in (
            ("freeze_last_layer_epochs", freeze_last_layer_epochs), ("head_warmup_epochs", head_warmup_epochs),
            ("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs), ("clip_grad", clip_grad),
        ):  # fmt: skip
            if value < 0:
                raise TaskError(f"{name} cannot be negative, but is {value:g}")
        if init_encoder and init_checkpoint:
            raise TaskError("give init_encoder or init_checkpoint, not both")
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_epochs, self.teacher_momentum = warmup_teacher_temp_epochs, teacher_momentum
        self.freeze_last_layer_epochs, self.head_warmup_epochs = freeze_last_layer_epochs, head_warmup_epochs
        self.clip_grad, self.clip, self.optimizer = clip_grad, clip, optimizer
        self.weight_decay_end = weight_decay if weight_decay_end is None else weight_decay_end
        self.layer_decay, self.patch_embed_lr_scale = layer_decay, patch_embed_lr_scale
        self.init_encoder, self.init_checkpoint = init_encoder, init_checkpoint
        self.compile_blocks, self.activation_checkpointing = compile_blocks, activation_checkpointing
        self._skipped = False
        self.model = DINO(Encoder(encoder), head, ibot, koleo_weight, targets, student_temp, center_momentum)
        if (layer_decay, patch_embed_lr_scale) != (1, 1) and not self.model.student.encoder.maskable:
            raise TaskError(f"layer_decay and patch_embed_lr_scale know plain ViTs only, not {encoder.arch}")
        self._settings = {
            "head": asdict(head), "ibot": ibot and asdict(ibot), "koleo_weight": koleo_weight, "targets": targets,
            "student_temp": student_temp, "center_momentum": center_momentum,
        }  # fmt: skip

    # ---- schedules: of the optimiser step, counted from 0

    def learning_rate(self, step: int, total: int, steps_per_epoch: int, global_batch_size: int) -> float:
        """Learning rate of an optimiser step."""
        warmup = round(self.warmup(steps_per_epoch))
        return cosine(step, total, self.peak_lr(global_batch_size), self.min_lr, warmup)

    def weight_decay_at(self, step: int, total: int) -> float:
        """Weight decay of an optimiser step, for the parameters that have any."""
        return cosine(step, total, self.weight_decay, self.weight_decay_end)

    def momentum_at(self, step: int, total: int) -> float:
        """Share of the teacher that stays after an optimiser step."""
        return cosine(step, total, self.teacher_momentum, 1.0)

    def teacher_temp_at(self, epoch: int) -> float:
        """Temperature of the teacher in an epoch."""
        return ramp(epoch, self.warmup_teacher_temp_epochs, self.warmup_teacher_temp, self.teacher_temp)

    def too_long(self, total: int, steps_per_epoch: int) -> dict[str, tuple[str, str]]:
        """The phases that are not shorter than a run of `total` optimiser steps, and values that would do."""
        faults = super().too_long(total, steps_per_epoch)
        for name in ("freeze_last_layer_epochs", "head_warmup_epochs", "warmup_teacher_temp_epochs"):
            epochs: float = getattr(self, name)
            steps = epochs * steps_per_epoch
            whole = name == "warmup_teacher_temp_epochs"  # it rises between epochs only, and may do so up to the end
            if steps > total or (steps == total and not whole):
                wrong = f"model.{name} {epochs:g} ({steps:g} steps) is not shorter than the run of {total} steps"
                tenth = 0.1 * total / steps_per_epoch
                faults[name] = wrong, f"{int(tenth)}" if whole else f"{tenth:.2g}"
        return faults

    @property
    def blocks(self) -> list[nn.Module]:
        """Of the student's and the teacher's encoder."""
        return [block for branch in (self.model.student, self.model.teacher) for block in branch.encoder.blocks]

    @property
    def heads(self) -> list[nn.Module]:
        """Of both branches."""
        branches = (self.model.student, self.model.teacher)
        return [head for branch in branches for head in (branch.head, branch.patch_head) if head is not None]

    # ---- Lightning's hooks, in the order of a run

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the student, slower ones below if so set."""
        named, depth = self.model.student.named_parameters(), len(self.model.student.encoder.blocks)
        return dino_groups(named, depth, self.weight_decay, self.layer_decay, self.patch_embed_lr_scale)

    def build_optimizer(self, groups: list[dict[str, Any]], **how: Any) -> Optimizer:
        """AdamW or SGD."""
        if self.optimizer == "sgd":
            return SGD(groups, momentum=self.betas[0], **how)
        return super().build_optimizer(groups, **how)

    def check_trainer(self, trainer: Any, data: Any) -> None:
        """Raises TaskError for what the trainer would do to DINO."""
        wrong = []
        if trainer.accumulate_grad_batches > 1:
            alone = [n for n, on in (("KoLeo", self.model.koleo_weight), ("Sinkhorn-Knopp", not self._centred)) if on]
            if alone:
                here, times = trainer.world_size, trainer.accumulate_grad_batches
                wrong.append(
                    f"{' and '.join(alone)} cannot see across {times} accumulated micro-batches: raise "
                    f"data.device_batch_size to {data.global_batch_size // here}, use {here * times} devices instead "
                    f"of {here}, or go without"
                )
        if trainer.gradient_clip_val is not None:
            wrong.append("trainer.gradient_clip_val clips all gradients together; DINO has clip_grad: set that")
        halved = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        if halved or str(trainer.precision) in ("16-true", "bf16-true"):
            wrong.append("16-bit weights cannot follow an EMA: set trainer.precision to bf16-mixed or 32-true")
        if wrong:
            raise TaskError("; ".join(wrong))

    def notes(self) -> list[str]:
        """A teacher that is not sharper than the student."""
        student, name = self.student_temp, "teacher_temp"
        warmest = self.teacher_temp
        if self.warmup_teacher_temp_epochs and self.warmup_teacher_temp > warmest:
            name, warmest = "warmup_teacher_temp", self.warmup_teacher_temp
        if warmest < student:
            return []
        return [
            f"model.{name} {warmest:g} is not below student_temp {student:g}: a teacher that is not sharper than the "
            "student leads to uniform answers (collapse); usual are 0.04 to 0.07 beside 0.1"
        ]

    def take_weights(self) -> None:
        """Those of init_encoder or init_checkpoint."""
        if self.init_encoder:
            take_encoder(self.model.student.encoder, self.init_encoder)
            self.model.copy_student()
        if self.init_checkpoint:
            take_dino(self.model, self.model_settings(), self.init_checkpoint)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws iBOT's masks while the batch is on the host, so that no device waits for their number."""
        return batch if self.model.ibot is None else {**batch, "hidden": self.hide(batch)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The loss of one micro-batch, its parts and its health."""
        epoch = self.trainer.global_step // self._data.steps_per_epoch
        views = (batch["global_views"], batch.get("local_views"))
        out = self.model(*views, self.teacher_temp_at(epoch), batch.get("hidden"), batch["rng"])
        self.model.observe(out)
        parts = {f"{name}_loss": value for name, value in out.parts.items()} if len(out.parts) > 1 else {}
        return {"loss": out.loss, **parts, **out.health}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips, then takes away the gradients of what must not move yet; a step that is not finite does not happen."""
        student, groups = self.model.student, dict[str, list[Parameter]]()
        for name, parameter in student.named_parameters():
            part = name.split(".")[0]
            module = part if part in ("head", "patch_head") else "encoder"
            groups.setdefault(name if self.clip == "parameter" else module, []).append(parameter)
        measured, self._measured = self._measured or self.measure_gradients(), None  # clipping changes them
        norms = clip_gradients(groups.values(), self.clip_grad, measured)
        self._skipped = skip_step_unless_finite(optimizer, norms)
        done = self.trainer.global_step / self._data.steps_per_epoch
        for name, parameter in student.named_parameters():
            frozen = done < self.freeze_last_layer_epochs and "last_layer" in name
            if frozen or (done < self.head_warmup_epochs and name.startswith("encoder.")):
                parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Collective: the student takes its step, then the teacher and the centres move, before any callback saves.

        They stay where they are if the step is skipped, as with a gradient scaler after an overflow (the authors' move
        on): what such micro-batches gave is not to be trusted. Of a fused optimiser, which goes without a scaler, only
        the device knows; there a run ends a step later.
        """
        step, total = self.trainer.global_step, self.trainer.max_steps
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = self.weight_decay_at(step, total)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._skipped:
            self.model.forget()
            return
        self.model.update_teacher(self.momentum_at(step, total))
        self.model.update_centers()

    def model_settings(self) -> dict[str, Any]:
        """DINO's arguments besides the encoder."""
        return self._settings

    def hide(self, batch: dict[str, Any]) -> Hidden:
        """The patches to hide in a batch's global views, on the host."""
        ibot, views = self.model.ibot, len(batch["global_views"])
        assert ibot is not None
        grid = self.model.student.encoder.grid
        return hide_blocks(batch["rng"].cpu(), views, grid, ibot.mask_ratio, ibot.mask_probability)

    @property
    def _centred(self) -> bool:
        return hasattr(self.model.dino_targets, "center")
