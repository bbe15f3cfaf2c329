"""The linear probe of MAE: BatchNorm without affine, one layer, LARS and a huge batch, on augmented crops.

He et al. 2021 (arXiv:2111.06377, Table 10): LARS, base rate 0.1 (times batch / 256), batch 16,384, 90 epochs, 10 of
them warm-up, cosine, no weight decay, random resized crops and flips. Nothing is chosen, so all of train is used.

Axes: b = images, d = width, k = classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import Lars
from torch import nn

from evaluation.errors import EvaluationError
from evaluation.frozen_heads import cosine, frozen, ranks_of_heads, train_heads
from evaluation.image_data import ImageData, parts_of
from tasks.encoders import Encoder

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LinearMAE:
    """The protocol of MAE.

    Args:
        epochs: over train.
        warmup_epochs: in which the rate rises from 0.
        base_rate: times batch / 256.
        batch_size: images in a step; not more than train has.
    """

    epochs: int = 90
    warmup_epochs: int = 10
    base_rate: float = 0.1
    batch_size: int = 16_384

    def check(self) -> None:
        """EvaluationError for what cannot be trained."""
        if self.epochs < 1 or self.batch_size < 2 or self.base_rate <= 0 or not 0 <= self.warmup_epochs < self.epochs:
            raise EvaluationError(
                "linear_mae needs epochs and base_rate above 0, fewer warmup_epochs than epochs, and a batch_size of 2 "
                "at least, for its BatchNorm"
            )


class Trained(NamedTuple):
    """Rank of the true class on the test images [t], and the steps and batch that it took."""

    rank: Ints
    steps: int
    batch_size: int


def linear_mae(encoder: Encoder, data: ImageData, config: LinearMAE, seed: int = 0) -> Trained:
    """Train the head on features pooled as the encoder's config says, and rank the classes of the test images.

    Raises:
        EvaluationError: settings or data that cannot be trained on.
    """
    config.check()
    batch_size, _ = parts_of(min(config.batch_size, len(data.train_rows)), data.batch_size)
    encoder = encoder.to(data.device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(encoder.feature_width, data.classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(encoder.feature_width, affine=False, eps=1e-6), linear).to(data.device)
    steps = config.epochs * max(1, len(data.train_rows) // batch_size)
    tokens = frozen(encoder.features, data)
    train_heads(
        encoder, tokens, {"linear": head}, lars(linear, config.base_rate * batch_size / 256),
        warmup_cosine(config.warmup_epochs / config.epochs), data, data.train_rows,
        batch_size=batch_size, steps=steps, seed=seed, name="linear_mae",
    )  # fmt: skip
    rank = ranks_of_heads(encoder, tokens, {"linear": head.eval()}, data, "linear_mae: test")["linear"]
    return Trained(rank, steps, batch_size)


def lars(linear: nn.Linear, rate: float) -> Lars:
    """LARS (You et al. 2017, arXiv:1708.03888) as MAE's authors have it: the trust ratio scales the matrix alone."""
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias], "always_adapt": False}]
    return Lars(groups, lr=rate, momentum=0.9, trust_coeff=0.001)


def warmup_cosine(warmup: float) -> Callable[[float], float]:
    """Progress in [0, 1] -> factor: linear from 0 to 1 in the first `warmup` of it, then a cosine to 0."""

    def factor(progress: float) -> float:
        return progress / warmup if progress < warmup else cosine((progress - warmup) / (1 - warmup))

    return factor
