"""Checkpoints: how long a run stands still for one, written at once or in the background, and how long going on takes.

A MAE with ViT-S/16 and the published decoder (47 million parameters: 0.57 GB with AdamW's averages) on crops of two by
two patches, so that a step takes little beside the checkpoint. In the background a pause is a copy in memory; the one
before it has ended. The file system is that of the temporary folder. Start to first step is that of `train`,
with the checksums of the whole file.

Run: python -m benchmarks.checkpoint
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.table import Row, compared, show
from datamodules.synth import synth
from pretrain.checkpoints import Checkpoints
from pretrain.config import parse
from pretrain.run import train

SAVES = 3
EVERY = 12  # steps


class _Clock(Callback):
    """Milliseconds of each save, and seconds to the first step."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first = 0.0
        self.pauses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saving = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]
        save = saving.save

        def timed(trainer: Trainer) -> None:
            saving.finish(trainer)
            start = time.perf_counter()
            save(trainer)
            self.pauses.append(1e3 * (time.perf_counter() - start))

        saving.save = timed  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.first = self.first or time.perf_counter() - self.began


def measure() -> list[Row]:
    """Milliseconds of a pause in the background against those of a plain save; seconds to go on against to begin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        synth(data, samples=256, size=32, seed=0)
        plain, begins = _run(data, Path(folder) / "plain", 0)
        background, _ = _run(data, Path(folder) / "background", 0, "--checkpoint_async", "true")
        _, goes_on = _run(data, Path(folder) / "plain", 1)
        size = (Path(folder) / "plain/checkpoints/last.ckpt").stat().st_size / 1e9
    torch.set_num_threads(threads)
    about = f"{size:.2g} GB, one file"
    rows = [compared("checkpoint", f"pause in the background, {about}", "ms", background, plain, "written at once")]
    rows.append(replace(
        compared("checkpoint", f"start to first step, {about}", "s", [goes_on], [begins], "a new run"),
        note=f"{statistics.median(plain):,.0f} ms a save",
    ))  # fmt: skip
    return rows


def _run(data: Path, output: Path, more_steps: int, *more: str) -> tuple[list[float], float]:
    """Pauses in ms; seconds to the first step."""
    steps = str(EVERY * SAVES + more_steps)
    clock = _Clock()
    train(*parse(["--config", "mae_vitb16_in1k", "--model.encoder.arch", "vit_small", "--data.train", str(data),
                  "--output", str(output), "--data.recipe.crop_size", "32", "--data.global_batch_size", "4",
                  "--data.device_batch_size", "4", "--data.workers", "0", "--epochs", "null", "--trainer.max_steps",
                  steps, "--model.warmup_epochs", "0.01", "--trainer.accelerator", "cpu", "--trainer.precision",
                  "32-true", "--checkpoint_every", str(EVERY), "--allow_changes", "[trainer.max_steps]", *more]),
          [clock])  # fmt: skip
    return clock.pauses, clock.first


def main() -> None:
    """Print the table."""
    print(show(measure()))


if __name__ == "__main__":
    main()
