"""The progress bar: images/s, time left, loss and rate."""

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from pretrain.metrics import Metrics


class Progress(Callback):
    """One bar over all images of the run; the loss shown is that of the newest row of metrics.csv."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._bar: Any = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the run begins or goes on."""
        if not trainer.is_global_zero:
            return
        self._step = trainer.global_step
        batch = trainer.datamodule.global_batch_size  # type: ignore[attr-defined]
        self._bar = tqdm(
            total=trainer.max_steps * batch, initial=self._step * batch, unit="img", unit_scale=True,
            desc="pretrain", dynamic_ncols=True, smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants few lines
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on by one global batch per optimiser step."""
        if self._bar is None or trainer.global_step == self._step:
            return
        self._bar.update((trainer.global_step - self._step) * trainer.datamodule.global_batch_size)  # type: ignore[attr-defined]
        self._step = trainer.global_step
        if self.metrics.newest.get("step") == self._step:
            newest = self.metrics.newest
            self._bar.set_postfix_str(
                f"step {self._step}/{trainer.max_steps} loss {newest['train/loss']:.4f} lr {newest['train/lr']:.2e}",
                refresh=False,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the screen clean for the message that follows."""
        self.close()

    def close(self) -> None:
        """Close the bar, if it is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
