"""RankMe of the encoder during training, on a few fixed images, for less than a hundredth of the time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from datamodules.errors import DataError
from datamodules.first_images import first_images
from datamodules.normalize import normalize
from evaluation.rankme import rankme
from pretrain.metrics import Metrics
from tasks.blocks import is_compiled
from tasks.sharding import gathered, is_sharded

IMAGES = 256
SHARE = 0.01
_TRIAL = 8


class RankWatch(Callback):
    """Adds the column `rankme` to rows of metrics.csv: of the encoder that evaluation will use, in evaluation mode.

    The images are the first of the run's order, cut as in evaluation, so they depend on data and seed alone, and so
    does the value at a step. How often there is one depends on the machine: a pass is made at the next row for which
    all that was spent on this (reading, and passes; their cost is measured), the pass included, is below SHARE of the
    time since training began. Weights, random state and stream are not touched. Rank 0 works alone and the others wait
    for it in the next collective; a sharded encoder needs them all for a pass, and rank 0 tells them which images.

    Args:
        metrics: it stands behind this callback and writes the rows.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.share: float | None = None  # None: SHARE
        self.spent = 0.0  # seconds
        self._images: list[Tensor] = []
        self._source: Iterator[Tensor] | None = None
        self._batch: Tensor | None = None  # [n c h w] on the host
        self._began = 0.0
        self._first_step = 0
        self._pass_seconds: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts."""
        self._began, self._first_step = time.perf_counter(), trainer.global_step
        self._source = self.images(trainer, pl_module.encoder_config)

    def images(self, trainer: Trainer, config: Any) -> Iterator[Tensor]:
        """The images [c h w], read one by one when asked for."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return first_images(
            data.order, data.manifest, IMAGES, crop_size=config.image_size, resize=config.resize,
            channels=config.in_chans, bits=config.bits,
        )  # fmt: skip

    def score(self, features: Tensor) -> dict[str, float]:
        """Columns and values from the features of all images [n d]."""
        return {"rankme": rankme(features)}

    def due(self, trainer: Trainer) -> bool:
        """Whether this step is one to measure at, if there is time."""
        return self.metrics.due(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads an image as long as there is time for it; then measures, when a row is due and there is time for it."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        while trainer.is_global_zero and self._source is not None and self._may_spend(0):
            self._timed(self._read)
        if not self.due(trainer):
            return
        encoder: Any = pl_module.get_submodule(str(pl_module.encoder_prefix).removesuffix("."))
        together = is_sharded(encoder)
        if not (trainer.is_global_zero or together):
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()  # what is still queued is training
        if trainer.is_global_zero:
            self._spend(trainer, encoder)
            if together:
                trainer.strategy.broadcast(None)
            return
        told: Any = trainer.strategy.broadcast
        while (images := told(None)) is not None:
            self._encode(trainer, encoder, images)

    def _spend(self, trainer: Trainer, encoder: Any) -> None:
        """Measures, if there is time for it."""
        if self._batch is None:
            return
        count = len(self._batch)
        if self._pass_seconds is None:
            if not self._may_spend(self._at_most(trainer, min(_TRIAL, count))):
                return
            _, seconds = self._timed(lambda: self._measure(trainer, encoder, min(_TRIAL, count)))
            self._pass_seconds = seconds * count / min(_TRIAL, count)
        if self._batch is not None and self._may_spend(self._pass_seconds):
            found, self._pass_seconds = self._timed(lambda: self._measure(trainer, encoder, count))
            self.metrics.extra |= found or {}

    def _may_spend(self, seconds: float) -> bool:
        share = SHARE if self.share is None else self.share
        return self.spent + seconds <= share * self._elapsed()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    def _at_most(self, trainer: Trainer, count: int) -> float:
        """Seconds that a pass over so many images will not exceed: a step goes forwards and backwards over its own."""
        a_step = self._elapsed() / max(trainer.global_step - self._first_step, 1)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return float(count * a_step * trainer.world_size / data.global_batch_size)

    def _timed(self, action: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - start
        self.spent += seconds
        return result, seconds

    def _read(self) -> None:
        assert self._source is not None
        try:
            image = next(self._source, None)
        except DataError:  # a full disk, say; not worth a run, and the other ranks would wait for this one
            image = None
        if image is not None:
            self._images.append(image)
            return
        self._source = None
        if len(self._images) > 1:
            self._batch = torch.stack(self._images)
        self._images = []

    def _measure(self, trainer: Trainer, encoder: Any, count: int) -> dict[str, float] | None:
        """Of the first `count` images; None where there is no memory for it, and then never again."""
        assert self._batch is not None
        images, together = self._batch[:count], is_sharded(encoder)
        if together:
            trainer.strategy.broadcast(images)
        try:
            features = self._encode(trainer, encoder, images)
        except torch.OutOfMemoryError:
            if together:
                raise  # the other ranks are in the middle of the pass
            self._batch = None
            return None
        return self.score(features) if count == len(self._batch) else None

    def _encode(self, trainer: Trainer, encoder: Any, images: Tensor) -> Tensor:
        """Features [n d]; collective where the encoder is sharded."""
        micro_batch = trainer.datamodule.layout(trainer.world_size).micro_batch  # type: ignore[attr-defined]
        config, device = encoder.config, trainer.strategy.root_device
        dtype = next(encoder.parameters()).dtype
        model: Any = trainer.lightning_module.model
        # What is gathered in 16 bits needs autocast around it. Not inference_mode: what an encoder keeps for later
        # (rotary tables) will be needed with gradients.
        precision = trainer.precision_plugin.train_step_context() if is_sharded(encoder) else contextlib.nullcontext()
        with torch.no_grad(), evaluating(encoder), gathered(model), precision:
            parts = images.split(micro_batch)  # type: ignore[no-untyped-call]
            rows = [encoder.features(normalize(part.to(device), config.mean, config.std, dtype)) for part in parts]
        return torch.cat(rows).to(dtype)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, uncompiled, for a while: another batch size would have compiled blocks compiled anew.

    Parts of one module may be in different modes before (locked, BatchNorm).
    """
    modes = [(part, part.training) for part in module.modules()]
    compiled = is_compiled(module)
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
