"""A linear probe on patch tokens for dense labels: which class each pixel belongs to, scored by mean IoU.

After Oquab et al. 2023 (arXiv:2304.07193, section 7.4, "linear"): BatchNorm and one 1 x 1 convolution on the frozen
patch tokens of the last block, logits stretched bilinearly to the pixels; AdamW, batch 16, 40,000 steps, polynomial
decay. Other than there, images are learned and scored on one centre crop of the encoder's size, mirrored half of the
time in training.

Axes: b = images, c = channels, s = side of the crop, k = classes, t = test images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.mask_set import IGNORE, MaskBatches, mask_classes
from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.errors import EvaluationError
from evaluation.frozen_heads import frozen, on_device
from evaluation.image_data import ImageData
from evaluation.lost_images import check_lost
from evaluation.progress import progress_bar
from evaluation.set_facts import remembered
from tasks.encoders import Encoder

Doubles = NDArray[np.float64]
MOST_NAMED = 10


@dataclass(frozen=True)
class Segmentation:
    """How the probe is trained.

    Args:
        steps: of the optimiser.
        batch_size: images in a step.
        rate: of AdamW, at its peak; it falls linearly to 0 after the warm-up.
        weight_decay: of all that is trained.
        warmup_steps: in which the rate rises from 0; at most a tenth of all.
        classes: in the masks; 0: as found in those of train.
    """

    steps: int = 40_000
    batch_size: int = 16
    rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 1500
    classes: int = 0

    @property
    def warmup(self) -> int:
        """Steps in which the rate does rise."""
        return min(self.warmup_steps, self.steps // 10)

    def check(self) -> None:
        """EvaluationError for what cannot be trained."""
        if min(self.steps, self.batch_size) < 1 or self.rate <= 0 or not 0 <= self.classes <= IGNORE:
            raise EvaluationError("segmentation needs steps, batch_size and rate above 0, and classes up to 255")


def segmentation(encoder: Encoder, train: Path, test: Path, data: ImageData, config: Segmentation, seed: int) -> Any:
    """{"miou", "interval", "pixel_accuracy", "per_class", "majority_miou", "images"} in percent, and "learned".

    "learned" has the steps taken and the images seen: those without a mask are passed over, and so is a batch of them.
    Images that cannot be read now are, too, unless they are more than `MOST_LOST` of a set.
    With `data.drop_unknown` also "left_out": in how many test masks each class is that train lacks; these pixels count
    as 255 does.

    The interval is a bootstrap over test images; `majority_miou` is that of the most frequent class everywhere.

    Args:
        encoder: whose patches lie in a grid.
        train, test: folders of shards with masks.
        data: device, workers and precision.
        config, seed: of the training.

    Raises:
        EvaluationError, DataError: no masks, one class only, too many images that cannot be read now, or an encoder
            that cannot be used.
    """
    config.check()
    about = encoder.config
    encoder = encoder.to(data.device).eval()
    cut: dict[str, Any] = {
        "crop_size": about.image_size, "resize": about.resize, "channels": about.in_chans, "bits": about.bits
    }  # fmt: skip
    learn = MaskBatches(train, batch_size=config.batch_size, seed=seed, **cut)
    scored = MaskBatches(test, batch_size=config.batch_size, **cut)
    classes, unknown = _classes(learn, scored, config, data)
    tokens = frozen(lambda images: encoder(images).patches, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.BatchNorm2d(encoder.width), nn.Conv2d(encoder.width, classes, 1)).to(data.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    on_accelerator = data.device.startswith("cuda")
    learned = {"steps": 0, "images_seen": 0}  # fewer than asked for where images have no masks
    with progress_bar(config.steps, "step", "segmentation", data.progress) as bar:
        for step, batch in enumerate(learn.batches(config.steps, data.workers, on_accelerator)):
            check_lost(learn.lost, learn.reader.manifest)
            mask = _in_range(batch["mask"], classes, "train").to(data.device)
            logits = _logits(head, tokens(on_device(batch["image"], encoder, data.device)), encoder, mask)
            loss = F.cross_entropy(logits, mask, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            warm = min(1.0, (step + 1) / max(1, config.warmup))
            for group in optimizer.param_groups:
                group["lr"] = config.rate * warm * (1 - step / config.steps)
            optimizer.step()
            learned = {"steps": step + 1, "images_seen": learned["images_seen"] + len(mask)}
            bar.update()
            if (step % 100 == 0 or step == config.steps - 1) and not torch.isfinite(loss):
                raise EvaluationError(
                    f"segmentation: the loss is not finite at step {step}: the encoder has diverged, or lower the rate"
                )
    check_lost(learn.lost, learn.reader.manifest)
    if not learned["steps"]:
        raise EvaluationError("segmentation: no train image has a mask of its size")
    head.eval()
    found: list[Doubles] = []
    with torch.no_grad():
        for batch in scored.batches(workers=data.workers, on_accelerator=on_accelerator):
            mask = batch["mask"]
            mask[torch.isin(mask, torch.tensor(list(unknown)))] = IGNORE
            mask = _in_range(mask, classes, "test").to(data.device)
            logits = _logits(head, tokens(on_device(batch["image"], encoder, data.device)), encoder, mask)
            found += [pixel_counts(p, m, classes) for p, m in zip(logits.argmax(1), mask, strict=True)]
    check_lost(scored.lost, scored.reader.manifest)
    if not found:
        raise EvaluationError("segmentation: no test image has a mask of its size")
    counts = np.stack(found)
    if not counts.any():
        raise EvaluationError("segmentation: no pixel of test has a class of train")
    return iou_result(counts, seed) | {"learned": learned} | ({"left_out": unknown} if unknown else {})


def _logits(head: nn.Module, patches: Tensor, encoder: Encoder, mask: Tensor) -> Tensor:
    """[b n d] -> [b k s s]."""
    rows, columns = encoder.grid
    if patches.shape[1] != rows * columns:
        rows = columns = round(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).reshape(len(patches), -1, rows, columns)
    return F.interpolate(head(grid), mask.shape[-2:], mode="bilinear", align_corners=False)


def _in_range(mask: Tensor, classes: int, what: str) -> Tensor:
    """The same masks. EvaluationError when they have a class beyond those that the head tells apart."""
    if len(over := mask[(mask >= classes) & (mask != IGNORE)]):
        raise EvaluationError(
            f"segmentation: a mask of {what} has class {int(over[0])}, but none had it when the masks were counted, "
            "when not all could be read: run the same command again"
        )
    return mask


def _classes(
    train: MaskBatches, test: MaskBatches, config: Segmentation, data: ImageData
) -> tuple[int, dict[int, int]]:
    """How many classes the head tells apart, from all masks, before anything is learned; and those to leave out.

    Raises:
        EvaluationError: train has one class only, test has others than train, there are more than was said, or too many
            images cannot be read now.
    """
    known, asked = (_found(images, data) for images in (train, test))
    if not known:
        raise EvaluationError("segmentation: no train image has a mask of its size that names a class")
    if len(known) < 2:
        raise EvaluationError("segmentation: the masks of train have one class only")
    if config.classes and max(known) >= config.classes:
        raise EvaluationError(
            f"segmentation: a mask has class {max(known)}, but {config.classes} were expected: say how many with "
            "--set segmentation.classes=N, or leave that out"
        )
    unknown = {number: masks for number, masks in asked.items() if number not in known}
    if unknown and not data.drop_unknown:
        lost = [f"{number} (in {masks:,})" for number, masks in unknown.items()]
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        raise EvaluationError(
            f"segmentation: masks of test have classes that no mask of train has: {', '.join(lost[:MOST_NAMED])}{more}"
            ": add such images to train, or leave these pixels out with --drop-unknown-classes"
        )
    return config.classes or max(known) + 1, unknown


def _found(images: MaskBatches, data: ImageData) -> dict[int, int]:
    reader = images.reader
    manifest = reader.manifest

    def read() -> tuple[list[tuple[int, int]], bool]:
        with progress_bar(manifest.num_samples, "img", f"masks of {manifest.name}", data.progress) as bar:
            found = mask_classes(images, data.workers, bar.update)
        check_lost(found.lost, manifest)
        return list(found.masks.items()), not found.lost

    question = f"masks 2, images of {reader.channels} channels and {reader.bits} bits"
    return dict(remembered(question, [manifest.fingerprint], read, data.cache_dir))


def pixel_counts(predicted: Tensor, mask: Tensor, classes: int) -> Doubles:
    """Pixels of one image: right, predicted and true ones of each class [3k]."""
    known = mask != IGNORE
    p, m = predicted[known], mask[known]
    parts = [torch.bincount(each, minlength=classes) for each in (m[p == m], p, m)]
    return torch.cat(parts).double().cpu().numpy()


def _miou(sums: Doubles) -> Doubles:
    """Mean over the classes that occur of |right| / |predicted or true|, in percent; sums [r 3k] -> [r]."""
    right, predicted, true = np.split(sums, 3, axis=1)
    union = predicted + true - right
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * np.nanmean(np.where(union > 0, right / union, np.nan), axis=1))


def iou_result(counts: Doubles, seed: int) -> dict[str, Any]:
    """What `segmentation` returns, from the pixels of each image [t 3k]."""
    total = counts.sum(0)
    right, predicted, true = np.split(total, 3)
    union = predicted + true - right
    all_one = np.where(true == true.max(), true.max() / true.sum(), 0.0)[true > 0]
    return {
        "miou": float(_miou(total[None])[0]),
        "interval": percentile_interval(_miou(resampled_sums(counts, seed))),
        "pixel_accuracy": 100 * float(right.sum() / true.sum()),
        "per_class": [100 * float(r / u) if u else None for r, u in zip(right, union, strict=True)],
        "majority_miou": 100 * float(all_one.mean()),
        "images": len(counts),
    }
