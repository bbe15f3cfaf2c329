"""`samples.jsonl`: which samples each optimiser step was trained on, for users who want to check the order."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pretrain.cut_back import cut_back
from pretrain.errors import RunFailure
from pretrain.stop import StopRequest


class KeyLog(Callback):
    """Writes {"step": after which, "keys": ["SHARD/KEY", ...]}, the global batch in its order, one line a step."""

    def __init__(self, path: Path, stop: StopRequest) -> None:
        self.path = path
        self.stop = stop
        self._keys: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file back to the step that training goes on from."""
        if trainer.is_global_zero:
            try:
                cut_back(self.path, trainer.global_step)
            except OSError as error:
                self.stop.fail(RunFailure(f"cannot write {self.path}: {error.strerror or error}"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the keys of a micro-batch; write those of all ranks at the end of the optimiser step."""
        self._keys += batch["key"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        keys = [key for rank in self.stop.gather(self._keys) for key in rank]
        self._keys = []
        if trainer.is_global_zero:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": trainer.global_step, "keys": keys}) + "\n")
            except OSError as error:
                self.stop.fail(RunFailure(f"cannot write {self.path}: {error.strerror or error}"))
