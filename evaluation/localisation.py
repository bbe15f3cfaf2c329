"""Does the class token look at the object? A box around what it attends to, against the boxes of the data.

The class token's attention in the last block, averaged over heads; the patches that together have 60% of it (Caron et
al. 2021, arXiv:2104.14294, fig. 4), of these the largest connected region, and the box around it. CorLoc is the share
of images where its IoU with a true box is at least 0.5. Images are squeezed into a square, which changes no IoU.

Axes: b = images, r k = rows and columns of patches, a = boxes of one image, t = scored images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.shard_reader import BadSampleError
from datamodules.whole_images import WholeImages
from evaluation.attention import class_attention
from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.boxes import read_boxes
from evaluation.errors import EvaluationError
from evaluation.image_data import ImageData
from evaluation.progress import progress_bar
from evaluation.ranks import interval
from tasks.encoders import Encoder

Doubles = NDArray[np.float64]
ENOUGH = 0.5
WHOLE = np.array([0.0, 0.0, 1.0, 1.0])
CENTRE = np.array([0.15, 0.15, 0.85, 0.85])
"""About half of the area of an image, in its middle."""


@dataclass(frozen=True)
class Localisation:
    """Where the boxes are.

    Args:
        boxes: a table, see `boxes.read_boxes`; empty: around what the samples' masks mark.
        mass: share of the attention that makes a region.
    """

    boxes: str = ""
    mass: float = 0.6

    def check(self) -> None:
        """EvaluationError for what is no share, and a table that is not there."""
        if self.boxes and not Path(self.boxes).is_file():
            raise EvaluationError(f"there is no table of boxes {self.boxes}")
        if not 0 < self.mass <= 1:
            raise EvaluationError(f"localisation.mass {self.mass} is a share: it must be in (0, 1]")


def localisation(encoder: Encoder, test: Path, data: ImageData, config: Localisation, seed: int = 0) -> dict[str, Any]:
    """{"corloc", "interval", "mean_iou", "mean_iou_interval", "pointing", "whole_image", "centre_box", "images"}.

    In percent. `pointing`: the patch that gets most attention has its middle in a box; `whole_image` and `centre_box`:
    CorLoc of the whole image as the box, and of a box in its middle of 0.7 of its sides, which look at nothing. The
    interval is Wilson's, that of the mean IoU a bootstrap over images.

    Args:
        encoder: a plain ViT with a class token.
        test: a folder of shards.
        data: device and workers.
        config: where boxes are.
        seed: of the bootstrap.

    Raises:
        EvaluationError: no boxes, or no class token. TaskError: no plain ViT.
    """
    config.check()
    about = encoder.config
    encoder = encoder.to(data.device).eval()
    images = WholeImages(
        test, side=about.image_size, batch_size=min(64, data.batch_size), channels=about.in_chans, bits=about.bits
    )
    rows: list[tuple[float, float, float, float]] = []
    known: dict[str, Doubles] | None = None
    if config.boxes:
        known = read_boxes(config.boxes, all_keys(images))
    with progress_bar(images.count, "img", "localisation", data.progress) as bar:
        for batch in images.batches(data.workers, data.device.startswith("cuda")):
            maps = class_attention(encoder, batch["image"].to(data.device)).weights[-1].mean(dim=1).double().cpu()
            for i, key in enumerate(batch["key"]):
                truth = batch["mask_box"][i][None].numpy() if known is None else known.get(key)
                if truth is None or not np.isfinite(truth).all():
                    continue
                height, width = batch["size"][i].tolist()
                if (truth[:, 2] > width + 1).any() or (truth[:, 3] > height + 1).any():
                    raise EvaluationError(
                        f"a box of {key} ends outside of the image of {width:g} x {height:g} pixels: boxes are in "
                        "pixels of the packed files, which `shards pack --resize` has changed"
                    )
                truth = truth / np.array([width, height, width, height])
                best = float(iou(attention_box(maps[i], config.mass), truth).max())
                whole, centre = (float(iou(box, truth).max()) for box in (WHOLE, CENTRE))
                rows.append((best, whole, centre, float(_points_into(maps[i], truth))))
            bar.update(len(batch["key"]))
    if not rows:
        raise EvaluationError(
            "localisation found no boxes: give a table (--set localisation.boxes=FILE), or test images with masks"
        )
    best_iou, whole_iou, centre_iou, pointed = np.array(rows).T
    return {
        "corloc": 100 * float((best_iou >= ENOUGH).mean()),
        "interval": interval(np.where(best_iou >= ENOUGH, 0, 1)),
        "mean_iou": 100 * float(best_iou.mean()),
        "mean_iou_interval": percentile_interval(100 * resampled_sums(best_iou[:, None], seed)[:, 0] / len(rows)),
        "pointing": 100 * float(pointed.mean()),
        "whole_image": 100 * float((whole_iou >= ENOUGH).mean()),
        "centre_box": 100 * float((centre_iou >= ENOUGH).mean()),
        "images": len(rows),
    }


def all_keys(images: WholeImages) -> list[str]:
    """ "SHARD/KEY" of every sample that is not lost."""
    keys = []
    for shard, described in enumerate(images.reader.manifest.shards):
        for sample in range(described.samples):
            try:
                keys.append(f"{images.reader.name(shard)}/{images.reader.key(shard, sample)}")
            except BadSampleError:
                continue
    return keys


def attention_box(weights: Tensor, mass: float) -> Doubles:
    """x0, y0, x1, y1 in 0..1 around the largest connected region of the patches that have `mass` of weights [r k]."""
    import cv2

    flat = weights.flatten()
    order = flat.argsort(descending=True, stable=True)
    share = flat[order].cumsum(0) / flat.sum().clamp_min(1e-300)
    kept = torch.zeros_like(flat, dtype=torch.uint8)
    kept[order[: int((share < mass).sum()) + 1]] = 1
    mask = kept.reshape(weights.shape).numpy()
    _, _, regions, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    x, y, width, height, _ = regions[1 + int(regions[1:, cv2.CC_STAT_AREA].argmax())].tolist()
    rows, columns = weights.shape
    return np.array([x / columns, y / rows, (x + width) / columns, (y + height) / rows])


def iou(box: Doubles, others: Doubles) -> Doubles:
    """Area of the intersection over that of the union of a box [4] and each of others [a 4] -> [a]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = np.maximum(high - low, 0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return np.asarray(inside / (areas - inside))


def _points_into(weights: Tensor, boxes: Doubles) -> bool:
    row, column = divmod(int(weights.argmax()), weights.shape[1])
    x, y = (column + 0.5) / weights.shape[1], (row + 0.5) / weights.shape[0]
    return bool(((boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])).any())
