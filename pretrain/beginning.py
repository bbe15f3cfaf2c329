"""Says what a run starts from, and when the phase in which only its heads learn is over."""

import math
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from evaluation.errors import EvaluationError
from evaluation.run_files import read_run


class Beginning(Callback):
    """One line when training starts from other weights, another one when the head warm-up ends; rank 0 speaks."""

    def __init__(self) -> None:
        self._heads_until: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a beginning; a run that is being resumed began before."""
        epochs = float(getattr(pl_module, "head_warmup_epochs", 0))
        end = math.ceil(epochs * trainer.datamodule.steps_per_epoch)  # type: ignore[attr-defined]
        self._heads_until = end if end > trainer.global_step else None
        told = starting_from(pl_module)
        if trainer.is_global_zero and trainer.global_step == 0 and told:
            heads = f"; for {end:,} steps only the heads learn" if end else ""
            _say(f"starting from {told}{heads}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of the end of the head warm-up."""
        if self._heads_until is not None and trainer.global_step >= self._heads_until:
            if trainer.is_global_zero:
                _say(f"step {trainer.global_step:,}: the head warm-up is over, from here on the encoder learns, too")
            self._heads_until = None


def starting_from(settings: Any) -> str | None:
    """What weights a task begins with, in words; None for those it drew itself."""
    if source := getattr(settings, "init_checkpoint", None):
        return f"all of {named(source)}"
    if source := getattr(settings, "init_encoder", None):
        return f"the encoder of {named(source)}, everything else new"
    return None


def named(source: str) -> str:
    """A source, and its last step where it is a run."""
    try:
        step = read_run(Path(source)).step
    except EvaluationError:
        return source
    return f"{source} (step {step:,})" if step else source


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the bar
