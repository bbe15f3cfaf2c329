"""kNN accuracy of the encoder during training, on a small fixed set, for at most a stated share of the time."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datamodules.image_set import evaluation_loader
from datamodules.manifest import load_manifest
from datamodules.open_shards import open_shards
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.errors import EvaluationError
from evaluation.knn import knn_ranks
from evaluation.labels import check_labelled, match_labels
from evaluation.ranks import top
from pretrain.errors import RunError
from pretrain.metrics import Metrics
from pretrain.probe_config import ProbeConfig
from pretrain.rank_watch import RankWatch

Ints = NDArray[np.int64]


class ProbeWatch(RankWatch):
    """Adds the column `probe/knn`, top-1 in percent, to rows of metrics.csv; else as RankWatch.

    Args:
        metrics: it stands behind this callback and writes the rows.
        config: which images, and how much time.

    Raises:
        RunError, DataError: no such data, or classes that cannot be matched.
    """

    def __init__(self, metrics: Metrics, config: ProbeConfig) -> None:
        config.check()
        super().__init__(metrics)
        self.config, self.share = config, config.share
        self._sets = [
            _Chosen.of(config.train, config.train_images), _Chosen.of(config.test, config.test_images)
        ]  # fmt: skip
        try:
            check_labelled(self._sets[0].label, "train", config.train)
            check_labelled(self._sets[1].label, "test", config.test)
            self._matched(*(chosen.label for chosen in self._sets))
        except EvaluationError as error:
            raise RunError(f"probe: {error} (of the {config.train_images} train images: probe.train_images)") from error
        self._label: list[list[int]] = [[], []]
        self._scored = False

    def images(self, trainer: Trainer, config: Any) -> Iterator[Tensor]:
        """Those of train, then those of test; their labels are remembered, since some may be bad."""
        self._label = [[], []]
        for label, chosen in zip(self._label, self._sets, strict=True):
            loader = evaluation_loader(
                chosen.root, crop_size=config.image_size, resize=config.resize, batch_size=1, workers=0,
                rows=chosen.rows, channels=config.in_chans, bits=config.bits,
            )  # fmt: skip
            for batch in loader:
                label.append(int(batch["label"][0]))
                yield batch["image"][0]

    def due(self, trainer: Trainer) -> bool:
        """At every `every`-th step at which a row is written; without it at every row."""
        every = self.config.every
        return super().due(trainer) and (not every or trainer.global_step % every == 0)

    def score(self, features: Tensor) -> dict[str, float]:
        """Train features, then test features [n d]."""
        self._scored = True
        train, test = (np.array(label, np.int64) for label in self._label)
        try:
            truth, classes = self._matched(train, test)
        except EvaluationError:  # so many images have become unreadable; not worth a run
            return {}
        x = features.float().cpu().numpy()
        if not np.isfinite(x).all():
            return {"probe/knn": float("nan")}
        k = min(self.config.k, len(train))
        rank = knn_ranks(x[: len(train)], train, x[len(train) :], truth, classes=classes, ks=(k,))[k]
        return {"probe/knn": top(rank)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where there was no time for a single probe, and what share of it there should have been."""
        out_of_memory = self._source is None and self._batch is None
        resumed = self._first_step > 0  # then there may be rows from before
        if not trainer.is_global_zero or self._scored or resumed or out_of_memory:
            return
        images, read = sum(len(chosen.rows) for chosen in self._sets), sum(map(len, self._label))
        reading = self.spent * images / max(read, 1) if self._source is not None else self.spent
        needed = (reading + (self._pass_seconds or self._at_most(trainer, images))) / self._elapsed()
        if needed <= self.config.share:
            why = "no row of metrics.csv was due when there was time (--probe.every, --log_every)"
        elif needed < 0.9:
            why = f"{images} images need --probe.share {1.1 * needed:.2g} of so short a run, not {self.config.share:g}"
        else:
            why = f"{images} images may take as long as the run: lower --probe.train_images and --probe.test_images"
        tqdm.write(f"probe/knn was never measured: {why}", file=sys.stderr)

    def _matched(self, train: Ints, test: Ints) -> tuple[Ints, int]:
        """Labels of test in the numbering of train, and how many classes there are."""
        label, names = match_labels(self._sets[0].classes, train, self._sets[1].classes, test)
        return label, len(names)


class _Chosen(NamedTuple):
    """Numbers and labels of the images that are taken of a set."""

    root: Path
    rows: Ints
    label: Ints
    classes: tuple[str, ...]

    @classmethod
    def of(cls, path: str, count: int) -> "_Chosen":
        root = open_shards(path)
        manifest = load_manifest(root)
        reader, total = ShardReader(manifest), manifest.num_samples
        rows = np.arange(min(count, total), dtype=np.int64) * total // min(count, total)
        starts = np.cumsum(manifest.counts) - manifest.counts
        shards = np.searchsorted(starts, rows, side="right") - 1
        label = []
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            with contextlib.suppress(BadSampleError):  # it will be left out
                label.append(reader.label(shard, row - int(starts[shard])))
        return cls(root, rows, np.array(label, np.int64), manifest.classes)
