"""Atomic checkpoints at optimiser steps: `checkpoints/last.ckpt` is always a whole one."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.errors import DataError
from pretrain.checkpoint_files import LAST, PART, PREVIOUS, load_pieces, put_in_place, remove
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.errors import AgreedFailure, RunError, RunFailure, remedy
from pretrain.guard import FiniteGuard
from pretrain.saving import reason, save_together
from pretrain.stop import StopRequest


class Checkpoints(Callback):
    """Saves `last.ckpt` every `every` optimiser steps, at the end, and when the ranks agreed to stop.

    `resumed`: the checkpoint that training goes on from, until there is a newer one. Where it is not last.ckpt, that is
    damaged or not there, and not worth keeping as the one before.
    """

    def __init__(
        self, directory: Path, every: int, stop: StopRequest, guard: FiniteGuard, writer: CheckpointWriter | None = None
    ) -> None:
        self.directory = directory
        self.every = every
        self.stop = stop
        self.guard = guard
        self.writer = writer or CheckpointWriter()
        self.resumed: Path | None = None
        self._saved_step = sys.maxsize  # nothing can be worth saving before training starts
        self._first = True  # rank
        self._whole_step = 0  # of the newest in its place; behind the other while that is written in the background
        self._whole_part: int | None = None  # step of a last.ckpt.part that could not be put in its place

    @property
    def last(self) -> Path:
        """The newest whole checkpoint."""
        return self.directory / LAST

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective: nothing new to save before the first step; from here on signals wait for the end of a step.

        A checkpoint that was whole when the run was killed, but not yet in its place, gets there now that all ranks
        have read it: the next save begins by writing under its name.
        """
        self._saved_step = self._whole_step = trainer.global_step
        self._first = trainer.is_global_zero
        if self._first and self.resumed is not None and self.resumed.name == PART:
            try:
                self._put_in_place(self.resumed, trainer.global_step)
            except OSError as error:
                self._fail(error)
        self.stop.agree()
        self.stop.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; end the run after the step in which the ranks agreed to stop."""
        step = trainer.global_step
        if self.writer.failed:
            self._wait()
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.every == 0 or step == trainer.max_steps or self.stop.agreed is not None:
            self.save(trainer)
        if step == trainer.max_steps or self.stop.agreed is not None:
            self.finish(trainer)
        if self.stop.agreed is not None:
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Too many bad samples, say, end a run between two steps: keep what was learned, if all ranks are here."""
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self.writer.wait()
        if self._whole_part is not None:  # a save would begin by removing it
            try:
                self._put_in_place(self.directory / PART, self._whole_part)
            except OSError as error:
                self._fail(error)
        together = isinstance(exception, AgreedFailure) or trainer.world_size == 1
        if together and isinstance(exception, AgreedFailure | DataError) and trainer.global_step > self._saved_step:
            with contextlib.suppress(RunError):  # the disk may be full
                self.save(trainer)
                self.finish(trainer)

    def save(self, trainer: Trainer) -> None:
        """Collective: write aside, flush to the disk, rename; a full disk leaves the previous checkpoint as it is.

        In the background, if the writer does so, behind the one before it.
        """
        self.guard.check_before_saving(trainer)
        self.finish(trainer)
        aside, step = self.directory / PART, trainer.global_step
        try:
            save_together(trainer, aside)
            if trainer.is_global_zero:
                self.writer.do(lambda: self._put_in_place(aside, step))
        except Exception as error:
            self._fail(error)
        self.stop.agree()
        self._saved_step = step
        if not self.writer.background:
            self._whole_step = step  # the first rank has put it in its place

    def finish(self, trainer: Trainer) -> None:
        """Collective where checkpoints are written in the background: the last one is in its place, or has failed."""
        if self.writer.background:
            with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
                self._wait()
            self.stop.agree()
            self._whole_step = self._saved_step

    def _wait(self) -> None:
        """What went wrong in the background is raised where the ranks agree next."""
        try:
            self.writer.wait()
        except Exception as error:
            self._fail(error)

    def _put_in_place(self, aside: Path, step: int) -> None:
        self._whole_part = step
        put_in_place(aside, keep=self.resumed is None or self.resumed.name == LAST)
        self._whole_part, self.resumed, self._whole_step = None, None, step

    def _fail(self, error: Exception) -> None:
        if self._first and self._whole_part is None:
            with contextlib.suppress(OSError):
                remove(self.directory / PART)
        kept = f"the checkpoint of step {self._whole_step} is whole" if self._whole_step else "there is no other"
        self.stop.fail(RunFailure(
            f"could not write a checkpoint to {self.directory} ({reason(error)}); {kept}. "
            f"{remedy(error)} and run the same command again"
        ))  # fmt: skip


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors mapped and not yet read; RunError when the file is damaged."""
    try:
        state = load_pieces(checkpoint)
        int(state["global_step"])
        return state
    except Exception as error:
        before = checkpoint.with_name(PREVIOUS)
        then = f"go on from {before}" if checkpoint != before and before.exists() else "begin this run anew"
        raise RunError(
            f"{checkpoint} cannot be read ({type(error).__name__}); remove it to {then}, or restore a copy"
        ) from error
