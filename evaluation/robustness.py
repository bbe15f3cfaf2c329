"""How much of the linear probe is left when the test images are spoiled: it learns from clean images, as usual.

Axes: n = train images, t = test images, d = width, k = pairs of a corruption and a severity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules.image_set import evaluation_loader
from evaluation.bootstrap import percentile_interval, resampled_sums
from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.errors import EvaluationError
from evaluation.frozen_heads import frozen, on_device
from evaluation.image_data import ImageData
from evaluation.linear import STRENGTHS, Scaler, linear_probe, scores
from evaluation.progress import progress_bar
from evaluation.ranks import rank_of_truth, top
from tasks.encoders import Encoder


@dataclass(frozen=True)
class Corruptions:
    """Which corruptions, and how severe.

    Args:
        kinds: names in `corruptions.CORRUPTIONS`.
        severities: from 1 to 5.
    """

    kinds: Sequence[str] = tuple(CORRUPTIONS)
    severities: Sequence[int] = SEVERITIES

    def check(self, channels: int) -> None:
        """EvaluationError for what there is not."""
        if wrong := [kind for kind in self.kinds if kind not in CORRUPTIONS]:
            raise EvaluationError(f"there is no corruption {wrong[0]}, but {', '.join(CORRUPTIONS)}")
        if not self.kinds or not self.severities or any(severity not in SEVERITIES for severity in self.severities):
            raise EvaluationError("corruptions need kinds, and severities from 1 to 5")
        if "jpeg" in self.kinds and channels not in (1, 3):
            kinds = ",".join(kind for kind in self.kinds if kind != "jpeg")
            raise EvaluationError(f"JPEG has 1 or 3 channels, not {channels}: --set corruptions.kinds={kinds}")


def robustness(
    encoder: Encoder, data: ImageData, train: NDArray[np.float32], test: NDArray[np.float32], config: Corruptions,
    *, strengths: Sequence[float] = STRENGTHS, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """{"top1": mean over all corruptions and severities, "interval", "clean", "by_kind": {kind: [of each severity]}}.

    In percent; the interval is a bootstrap over test images. All corruptions are made in one pass over the images.

    Args:
        encoder: whose features are probed.
        data: labels, test images, device.
        train, test: clean features [n d], [t d].
        config: which corruptions.
        strengths, seed: of the linear probe.

    Raises:
        EvaluationError: as `Corruptions.check` and `linear_probe`.
    """
    about = encoder.config
    config.check(about.in_chans)
    probe = linear_probe(
        train, data.train_label, test, data.test_label, classes=data.classes, strengths=strengths, seed=seed,
        device=data.device, progress=data.progress,
    )  # fmt: skip
    scaler, weight = Scaler.of(train), probe.fit.point
    encoder = encoder.to(data.device).eval()
    features = frozen(encoder.features, data)
    pairs = list(product(config.kinds, config.severities))
    right = np.zeros((len(data.test_label), len(pairs)), dtype=bool)
    place = {key: i for i, key in enumerate(data.test_key)}
    loader = evaluation_loader(
        data.test, crop_size=about.image_size, resize=about.resize, batch_size=data.batch_size, workers=data.workers,
        pin_memory=data.device.startswith("cuda"), channels=about.in_chans, bits=about.bits, rows=data.test_rows,
    )  # fmt: skip
    total = loader.num_images * len(pairs)
    with progress_bar(total, "img", "corruptions", data.progress) as bar:
        for number, batch in enumerate(loader):
            rows = np.array([place[key] for key in batch["key"]])
            images = batch["image"].to(data.device).float() / 255
            for column, (kind, severity) in enumerate(pairs):
                spoiled = corrupt(images, kind, severity, seed=seed + 1000 * number + column)
                x: Tensor = features(on_device(spoiled * 255, encoder, data.device))
                logits = scores(scaler(x.cpu().numpy()).to(data.device), weight).cpu().numpy()
                right[rows, column] = rank_of_truth(logits, data.test_label[rows]) < 1
                bar.update(len(rows))
    of_pairs = 100 * right.mean(axis=0)
    each = len(config.severities)
    sums = resampled_sums(right.mean(axis=1)[:, None], seed)[:, 0]
    return {
        "top1": float(of_pairs.mean()),
        "interval": percentile_interval(100 * sums / len(right)),
        "clean": top(probe.rank),
        "by_kind": {kind: of_pairs[i * each : (i + 1) * each].tolist() for i, kind in enumerate(config.kinds)},
        "strength": probe.strength,
    }
