"""The probes that need the images, not their features alone: an encoder and two data sets in, a result out.

A result is as in `probes`.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.attentive import attentive
from evaluation.finetune import finetune
from evaluation.image_data import ImageData
from evaluation.linear_mae import linear_mae
from evaluation.linear_paper import Sweep, linear_paper
from evaluation.localisation import ENOUGH, localisation
from evaluation.probes import ProbeSettings, Result, tops
from evaluation.ranks import UNSEEN
from evaluation.robustness import robustness
from evaluation.segmentation import segmentation
from tasks.encoders import Encoder

Floats = NDArray[np.float32]
CROPS = "random resized crops (0.08 to 1 of the area) and flips, drawn by seed and position"


def score_linear_paper(encoder: Encoder, data: ImageData, settings: ProbeSettings) -> Result:
    """The sweep of DINOv2, its head chosen on a part of train."""
    found = linear_paper(encoder, data, settings.linear_paper, settings.seed)
    return _swept(found, data, settings, asdict(settings.linear_paper), "SGD, momentum 0.9, no decay, cosine")


def score_attentive(encoder: Encoder, data: ImageData, settings: ProbeSettings) -> Result:
    """Cross-attention and a linear layer on frozen tokens, the rate chosen on a part of train."""
    found = attentive(encoder, data, settings.attentive, settings.seed)
    return _swept(
        found, data, settings, asdict(settings.attentive), "AdamW, decay of matrices alone, warm-up and cosine"
    )


def score_linear_mae(encoder: Encoder, data: ImageData, settings: ProbeSettings) -> Result:
    """The linear probe of MAE."""
    found = linear_mae(encoder, data, settings.linear_mae, settings.seed)
    told = {"views": CROPS, "head": "BatchNorm without affine, linear", "pool": encoder.config.pool}
    return _trained(found, data, settings, asdict(settings.linear_mae) | told, "LARS, momentum 0.9, no decay")


def score_finetune(encoder: Encoder, data: ImageData, settings: ProbeSettings) -> Result:
    """All layers fine-tuned as in MAE."""
    found = finetune(encoder, data, settings.finetune, settings.seed)
    normed = ", normed by a new LayerNorm" if encoder.config.pool == "mean" else ""
    told = {"views": f"{CROPS}, then as named here", "head": f"linear on the pooled tokens{normed}"}
    return _trained(found, data, settings, asdict(settings.finetune) | told, "AdamW, layer-wise decay, cosine")


def _swept(found: Sweep, data: ImageData, settings: ProbeSettings, config: dict[str, Any], optimizer: str) -> Result:
    protocol = {
        "optimizer": optimizer,
        "views": CROPS,
        **config,
        "pool": None,
        "head_sees": found.head_sees,
        "steps": found.steps,
        "batch_size": found.batch_size,
        "head": found.best,
        "heads_tried": found.held_out,
        "heads_left_out": found.diverged or None,
        "images_not_read": _unseen(found),
        "chosen_on": f"{found.chosen_on:,} train images, stratified; the head did not learn from them",
        "seed": settings.seed,
    }
    protocol.pop("held_out", None)
    return {**tops(found.rank, data), "protocol": protocol}


def _trained(found: Any, data: ImageData, settings: ProbeSettings, config: dict[str, Any], optimizer: str) -> Result:
    steps = {"steps": found.steps, "batch_size": found.batch_size, "chosen_on": "nothing: the last step is scored",
             "images_not_read": _unseen(found), "seed": settings.seed}  # fmt: skip
    return {**tops(found.rank, data), "protocol": {"optimizer": optimizer, **config, **steps}}


def _unseen(found: Any) -> int | None:
    """Test images that have features and could not be read for this probe; None: all were."""
    return int((found.rank == UNSEEN).sum()) or None


def score_corruptions(
    encoder: Encoder, data: ImageData, settings: ProbeSettings, train: Floats, test: Floats
) -> Result:
    """What is left of the linear probe on spoiled test images; train and test are the clean features."""
    found = robustness(
        encoder, data, train, test, settings.corruptions, strengths=settings.strengths, seed=settings.seed
    )
    protocol = {
        "classifier": "the linear probe, fitted on clean train images",
        "strength": found.pop("strength"),
        "corruptions": "after ImageNet-C, written anew; lengths scaled from 224 px to the image size",
        "severities": list(settings.corruptions.severities),
        "interval": "bootstrap over test images",
        "batch_size": data.batch_size,
        "seed": settings.seed,
    }
    return {**found, "protocol": protocol}


def score_segmentation(encoder: Encoder, train: Path, test: Path, data: ImageData, settings: ProbeSettings) -> Result:
    """Mean IoU of a linear layer on patch tokens."""
    found = segmentation(encoder, train, test, data, settings.segmentation, settings.seed)
    protocol = {
        "head": "BatchNorm and a 1 x 1 convolution on the last block's patch tokens, logits bilinear to the pixels",
        "optimizer": "AdamW, warm-up and linear decay; half of the images mirrored",
        **asdict(settings.segmentation),
        "warmup_steps": settings.segmentation.warmup,
        **found.pop("learned"),
        "classes": len(found["per_class"]),
        "scored": f"centre crop of {encoder.config.image_size} px, masks resized to it",
        "ignored": "class 255" + (" and those left out" if "left_out" in found else ""),
        "left_out": {str(number): f"in {masks:,} masks" for number, masks in found.pop("left_out", {}).items()} or None,
        "interval": "bootstrap over test images",
        "seed": settings.seed,
    }
    return {**found, "protocol": protocol}


def score_localisation(encoder: Encoder, test: Path, data: ImageData, settings: ProbeSettings) -> Result:
    """CorLoc of the class token's attention."""
    found = localisation(encoder, test, data, settings.localisation, settings.seed)
    protocol = {
        "crop": None,
        "resize": None,
        "side": encoder.config.image_size,
        "interpolation": "bicubic, antialiased; squeezed into a square, without a crop",
        "precision": "float32",
        "attention": "of the class token in the last block, mean over heads",
        "region": f"the largest one of the patches with {settings.localisation.mass:.0%} of it",
        "boxes": settings.localisation.boxes or "around what the masks mark",
        "iou": ENOUGH,
        "interval": "Wilson, of corloc",
        "seed": settings.seed,
    }
    return {**found, "protocol": protocol}


IMAGE_PROBES: dict[str, Callable[[Encoder, ImageData, ProbeSettings], Result]] = {
    "linear_paper": score_linear_paper,
    "linear_mae": score_linear_mae,
    "attentive": score_attentive,
    "finetune": score_finetune,
}
