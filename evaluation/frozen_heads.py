"""Small heads that learn from a frozen encoder on augmented crops, all of them in one pass over the images.

Axes: b = images, c = classes, h = heads, t = test images.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.console import tell
from datamodules.image_set import evaluation_loader
from datamodules.labelled_batches import labelled_batches
from datamodules.normalize import normalize
from datamodules.recipes import MAERecipe, Recipe
from evaluation.errors import EvaluationError
from evaluation.image_data import ImageData, parts_of
from evaluation.progress import progress_bar
from evaluation.ranks import UNSEEN, rank_of_truth
from tasks.encoders import Encoder

Ints = NDArray[np.int64]
CHECK_EVERY = 10  # steps between looks at whether losses are finite: on a GPU each look waits for it
SCALE = (0.08, 1.0)
"""Area of a training crop as a share of the image: torchvision's RandomResizedCrop, in most protocols."""


def train_heads(
    encoder: Encoder, tokens: Callable[[Tensor], Any], heads: Mapping[str, nn.Module], optimizer: Optimizer,
    rate: Callable[[float], float], data: ImageData, rows: Ints, *, batch_size: int, steps: int, seed: int, name: str,
    recipe: Recipe | None = None, in_parts: bool = False,
) -> list[str]:  # fmt: skip
    """Train every head on the mean of its own cross-entropy; the encoder stays as it is.

    A head whose loss is not finite is left out soon after, which is said. Returns the names of these heads.

    Args:
        encoder: in evaluation mode, on the device.
        tokens: normalised images [b c h w] -> what each head takes, without gradients.
        heads: name -> module that gives logits [b c].
        optimizer: over the parameters of all heads; each group's `lr` is its peak.
        rate: progress in [0, 1] -> factor of the peak rate.
        data: what to learn from.
        rows: of data.train, those to learn from.
        batch_size: images in a step, see `parts_of`; the encoder sees about data.batch_size of them at a time.
        steps: of the optimiser.
        seed: of order and crops.
        name: for the progress bar.
        recipe: None: random resized crops and flips.
        in_parts: heads, too, see a batch in these parts: memory is that of a part. Not for a BatchNorm.

    Raises:
        EvaluationError: the loss of no head is finite any more.
    """
    config = encoder.config
    batch_size, part = parts_of(batch_size, data.batch_size)
    batches = labelled_batches(
        data.train, recipe or MAERecipe(config.image_size, SCALE), rows=rows, batch_size=part,
        steps=steps * (batch_size // part), seed=seed, workers=data.workers,
        on_accelerator=data.device.startswith("cuda"), channels=config.in_chans, bits=config.bits,
    )  # fmt: skip
    peaks = [group["lr"] for group in optimizer.param_groups]
    bar = progress_bar(steps * batch_size, "img", name, data.progress)
    learning, diverged = dict(heads), list[str]()
    fine = torch.ones(len(learning), dtype=torch.bool, device=data.device)

    def parts() -> Iterator[tuple[Any, Tensor]]:
        for _ in range(batch_size // part):
            batch = next(batches)
            yield tokens(on_device(batch["image"], encoder, data.device)), batch["label"].to(data.device)
            bar.update(len(batch["label"]))

    with bar:
        for step in range(steps):
            optimizer.zero_grad()
            losses, read = torch.zeros(len(learning), device=data.device), 0
            for seen, label in parts() if in_parts else _whole(parts()):
                each = torch.stack([F.cross_entropy(head(seen), label) for head in learning.values()])
                if in_parts:  # of the whole batch nobody knows yet how many could be read
                    each = each * (len(label) / batch_size)
                each.sum().backward()  # type: ignore[no-untyped-call]
                losses += each.detach()
                read += len(label)
            if in_parts and read < batch_size:  # now it is known: the mean is over the images that there were
                losses *= batch_size / read
                for parameter in (each for module in learning.values() for each in module.parameters()):
                    if parameter.grad is not None:
                        parameter.grad *= batch_size / read
            fine &= losses.isfinite()
            if (step % CHECK_EVERY == 0 or step == steps - 1) and not bool(fine.all()):
                lost = [head for head, good in zip(learning, fine.tolist(), strict=True) if not good]
                diverged += lost
                for head in lost:
                    learning.pop(head).zero_grad()  # of which the optimiser sees nothing any more
                if not learning:
                    raise EvaluationError(f"{name}: the loss is not finite with any head: lower the rates")
                fine = fine[fine]
                if data.progress:
                    tell(f"{name}: {len(diverged)} of {len(heads)} heads left out: loss not finite (step {step + 1:,})")
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(step / steps)
            optimizer.step()
            if step % 100 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(losses.nanmean()):.3f}")
    return diverged


def ranks_of_heads(
    encoder: Encoder, tokens: Callable[[Tensor], Any], heads: Mapping[str, nn.Module], data: ImageData, name: str
) -> dict[str, Ints]:
    """Rank of the true class of the test images for each head, {name: [t]}.

    It is last (data.classes) where the head's scores are not finite, and `UNSEEN` where the image cannot be read now.

    Raises:
        EvaluationError: no image can be read now.
    """
    config = encoder.config
    loader = evaluation_loader(
        data.test, crop_size=config.image_size, resize=config.resize, batch_size=data.batch_size, workers=data.workers,
        pin_memory=data.device.startswith("cuda"), channels=config.in_chans, bits=config.bits, rows=data.test_rows,
    )  # fmt: skip
    place = {key: i for i, key in enumerate(data.test_key)}
    ranks = {head: np.full(len(place), UNSEEN, np.int64) for head in heads}
    bar = progress_bar(loader.num_images, "img", name, data.progress)
    with bar, torch.no_grad():
        for batch in loader:
            rows = np.array([place[key] for key in batch["key"]])
            seen = tokens(on_device(batch["image"], encoder, data.device))
            for head, module in heads.items():
                logits = module(seen).float().cpu().numpy()
                fine = np.isfinite(logits).all(axis=1)
                ranks[head][rows] = np.where(fine, rank_of_truth(logits, data.test_label[rows]), data.classes)
            bar.update(len(rows))
    if any((rank == UNSEEN).all() for rank in ranks.values()):
        raise EvaluationError(f"{name}: no image of {data.test} can be read now: see trivit shards verify {data.test}")
    return ranks


def frozen(function: Callable[[Tensor], Any], data: ImageData) -> Callable[[Tensor], Any]:
    """The same without gradients, in the precision that was asked for, and float32 out of it."""

    def tokens(images: Tensor) -> Any:
        kind = torch.device(data.device).type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=data.precision == "bfloat16"):
            return _floats(function(images))

    return tokens


def cosine(progress: float) -> float:
    """1 at the beginning, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def on_device(images: Tensor, encoder: Encoder, device: str) -> Tensor:
    """Images in 0..255 as the encoder takes them, on the device."""
    return normalize(images.to(device, non_blocking=True), encoder.config.mean, encoder.config.std)


def _floats(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found.float()
    parts = [_floats(each) for each in found]
    return type(found)(*parts) if hasattr(found, "_fields") else parts


def _whole(parts: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """All parts of a batch as one."""
    seen, label = zip(*parts, strict=True)
    yield _joined(list(seen)), torch.cat(label)


def _joined(parts: list[Any]) -> Any:
    """What `tokens` gave for the parts of a batch, as for the whole: tensors, or tuples and lists of them."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    joined = [_joined(list(each)) for each in zip(*parts, strict=True)]
    return type(parts[0])(*joined) if hasattr(parts[0], "_fields") else joined
