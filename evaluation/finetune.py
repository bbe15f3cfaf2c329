"""Fine-tuning as in MAE: all layers learn, the lower ones slower, from strongly augmented and mixed images.

He et al. 2021 (arXiv:2111.06377, Table 9): AdamW, base rate 5e-4 (times batch / 256), decay 0.05, layer decay 0.65,
batch 1,024, 100 epochs, 5 of them warm-up, cosine, RandAugment (9, 0.5), label smoothing 0.1, mixup 0.8, cutmix 1.0,
drop path 0.1, random erasing 0.25. These are the values of ViT-B; the authors give ViT-L and H 50 epochs, rate 1e-3,
layer decay 0.75 and drop path 0.2 and 0.3. The last epoch is scored; nothing is chosen.

Axes: b = images, c = channels, h w = pixels, d = width, k = classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import Parameter

from datamodules.labelled_batches import labelled_batches
from evaluation.errors import EvaluationError
from evaluation.finetune_views import FinetuneRecipe, seeded
from evaluation.frozen_heads import frozen, on_device, ranks_of_heads
from evaluation.image_data import ImageData, parts_of
from evaluation.linear_mae import Trained, warmup_cosine
from evaluation.progress import progress_bar
from tasks.encoder_files import load_strictly
from tasks.encoders import Encoder
from tasks.param_groups import layer_decay_groups

MIN_RATE = 1e-6


@dataclass(frozen=True)
class Finetune:
    """The protocol of MAE for ViT-B; see the paper's table for each."""

    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 1024
    base_rate: float = 5e-4
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25

    def check(self) -> None:
        """EvaluationError for what cannot be trained."""
        if min(self.epochs, self.batch_size) < 1 or self.base_rate <= 0 or not 0 <= self.warmup_epochs < self.epochs:
            raise EvaluationError("finetune needs epochs, batch_size, base_rate above 0, warmup_epochs below epochs")
        shares = (self.drop_path, self.label_smoothing, self.erase)
        if (
            not 0 < self.layer_decay <= 1
            or any(not 0 <= share < 1 for share in shares)
            or min(self.mixup, self.cutmix) < 0
        ):
            raise EvaluationError(
                "finetune needs layer_decay in (0, 1], drop_path, label_smoothing, erase in [0, 1), mixup, cutmix >= 0"
            )


class Classifier(nn.Module):
    """An encoder with a linear layer on top.

    The mean of the patch tokens is taken before the norm, which is a new one, as MAE's authors do; a class token is
    normed by the encoder's own.
    """

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.fc_norm: nn.Module = nn.Identity()
        if encoder.config.pool == "mean":
            encoder.trunk.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(encoder.width, eps=encoder.config.norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [b c h w] -> logits [b k]."""
        return self.head(self.fc_norm(self.encoder.features(images)))  # type: ignore[no-any-return]

    def named(self) -> Iterable[tuple[str, Parameter]]:
        """Parameters by the names that `layer_decay_groups` knows."""
        return [(name.removeprefix("encoder."), parameter) for name, parameter in self.named_parameters()]


def classifier(encoder: Encoder, classes: int, drop_path: float) -> Classifier:
    """A copy of the encoder that drops paths and learns all its parameters, positions included, with a new head."""
    if not encoder.maskable:
        raise EvaluationError(f"finetune with layer decay needs a plain Vision Transformer, not {encoder.config.arch}")
    copy = Encoder(replace(encoder.config, drop_path=drop_path))
    load_strictly(copy.trunk, encoder.trunk.state_dict(), "the encoder")
    copy.requires_grad_(True)
    return Classifier(copy, classes)


def finetune(encoder: Encoder, data: ImageData, config: Finetune, seed: int = 0) -> Trained:
    """Fine-tune a copy of the encoder on train, and rank the classes of the test images.

    Raises:
        EvaluationError: settings, data or an encoder that cannot be trained, or a loss that is not finite.
    """
    config.check()
    about = encoder.config
    if config.randaugment and (about.in_chans, about.bits) != (3, 8):
        raise EvaluationError("RandAugment is for images of 3 channels and 8 bits: --set finetune.randaugment=''")
    batch_size, part = parts_of(min(config.batch_size, len(data.train_rows)), data.batch_size)
    if batch_size < 2:
        raise EvaluationError("finetune needs batches of two images at least: mixing goes by pairs")
    steps = config.epochs * max(1, len(data.train_rows) // batch_size)
    with torch.random.fork_rng(), seeded(seed):
        torch.manual_seed(seed)
        model = classifier(encoder, data.classes, config.drop_path).to(data.device).train()
        optimizer = torch.optim.AdamW(groups_of(model, config, batch_size))
        batches = labelled_batches(
            data.train, FinetuneRecipe(about.image_size, config.randaugment, about.mean), rows=data.train_rows,
            batch_size=part, steps=steps * (batch_size // part), seed=seed, workers=data.workers,
            on_accelerator=data.device.startswith("cuda"), channels=about.in_chans, bits=about.bits,
        )  # fmt: skip
        _train(model, optimizer, batches, steps, batch_size // part, config, data)
    logits = frozen(model.eval(), data)
    rank = ranks_of_heads(encoder, logits, {"model": nn.Identity()}, data, "finetune: test")["model"]
    return Trained(rank, steps, batch_size)


def groups_of(model: Classifier, config: Finetune, batch_size: int) -> list[dict[str, Any]]:
    """Parameter groups with their peak rates."""
    depth = len(model.encoder.blocks)
    groups = layer_decay_groups(model.named(), depth, config.weight_decay, config.layer_decay)
    rate = config.base_rate * batch_size / 256
    return [group | {"lr": rate * group["lr_scale"]} for group in groups]


def _train(
    model: Classifier, optimizer: torch.optim.Optimizer, batches: Any, steps: int, parts: int, config: Finetune,
    data: ImageData,
) -> None:  # fmt: skip
    mix: Any = None
    if config.mixup > 0 or config.cutmix > 0 or config.label_smoothing > 0:
        mix = Mixup(
            config.mixup, config.cutmix, prob=float(config.mixup > 0 or config.cutmix > 0),
            label_smoothing=config.label_smoothing, num_classes=data.classes,
        )  # fmt: skip
    erase = RandomErasing(config.erase, mode="pixel", device=data.device)
    loss_of = SoftTargetCrossEntropy() if mix is not None else nn.CrossEntropyLoss()
    factor = warmup_cosine(config.warmup_epochs / config.epochs)
    kind = torch.device(data.device).type
    with progress_bar(steps, "step", "finetune", data.progress) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                low = MIN_RATE * group["lr_scale"]
                peak = group.setdefault("peak", group["lr"])
                group["lr"] = peak * factor(step / steps) if step < steps * config.warmup_epochs / config.epochs else (
                    low + (peak - low) * factor(step / steps)
                )  # fmt: skip
            optimizer.zero_grad()
            for _ in range(parts):
                batch = next(batches)
                images, label = on_device(batch["image"], model.encoder, data.device), batch["label"].to(data.device)
                images = erase(images) if config.erase else images
                if mix is not None:
                    images, label = mix(images[: len(label) // 2 * 2], label[: len(label) // 2 * 2])
                with torch.autocast(kind, torch.bfloat16, enabled=data.precision == "bfloat16"):
                    loss = loss_of(model(images), label)
                (loss / parts).backward()
            optimizer.step()
            bar.update()
            if step % 50 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
                if not torch.isfinite(loss):
                    raise EvaluationError(f"finetune: the loss is not finite at step {step}: lower finetune.base_rate")
