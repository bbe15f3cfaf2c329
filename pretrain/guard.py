"""Stops a run whose loss or gradients are no longer finite, before they reach the weights or a checkpoint.

The loss is known when the forward pass ends, so it is copied to the host behind the forward pass and read after the
backward pass has been queued: an accelerator never waits for the check. The gradient norm is only known when the
backward pass has ended. On a CPU it is checked at once; an accelerator itself skips an optimiser step whose norm is
bad and sends the norm to the host, which reads it one step later, when the next backward pass has been queued, or
before a checkpoint is written, whichever comes first.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from pretrain.checkpoint_files import remove, take_place
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.errors import NonFiniteError
from pretrain.saving import reason, save_together
from pretrain.stop import StopRequest
from tasks.gradients import skip_step_unless_finite


class Sent:
    """A scalar that is sent to the host behind what its device has queued so far.

    Reading it (`float`) waits for that, and not for what has been queued since.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value.detach(), None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class Norm(NamedTuple):
    """Gradient norm of an optimiser step (counted from 1), perhaps still on its way, and the samples behind it."""

    step: int
    norm: Sent
    keys: list[list[str]]


class FiniteGuard(Callback):
    """Checks every loss and gradient norm; the first bad one saves the state and raises NonFiniteError on all ranks."""

    def __init__(self, directory: Path, stop: StopRequest, writer: CheckpointWriter | None = None) -> None:
        self.directory = directory
        self.stop = stop
        self.writer = writer or CheckpointWriter()
        self.grad_norm: Tensor | None = None  # of the newest optimiser step
        self._losses: list[Sent] = []
        self._keys: list[list[str]] = []
        self._unread = Norm(0, Sent(torch.zeros(())), [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which samples this micro-batch holds."""
        self._keys.append(list(batch["key"]))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Send the loss to the host without waiting for it."""
        self._losses.append(Sent(loss))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Collective: agree on bad losses, stop signals and failures of single ranks before the weights move."""
        losses = [float(loss) * trainer.accumulate_grad_batches for loss in self._losses]
        bad_micro = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        task: Any = pl_module
        self.grad_norm = task.measure_gradients().norms.norm()
        now = Norm(trainer.global_step + 1, Sent(self.grad_norm), self._keys)
        if not self.grad_norm.is_cuda:
            self._unread = now
        bad_norm = self._norm_is_bad(trainer)
        if self.stop.agree(bad_micro is not None or bad_norm):
            keys = self._unread.keys if bad_micro is None else [self._keys[bad_micro]]
            step = self._unread.step if bad_micro is None and bad_norm else trainer.global_step + 1
            self._give_up(trainer, step, losses, bad_norm and bad_micro is None, keys)
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            skip_step_unless_finite(optimizer, self.grad_norm)
        self._unread, self._losses, self._keys = now, [], []

    def check_before_saving(self, trainer: Trainer) -> None:
        """Collective: a checkpoint must not be written as if nothing were wrong."""
        if self.stop.agree(self._norm_is_bad(trainer)):
            self._give_up(trainer, self._unread.step, [], True, self._unread.keys)

    def _norm_is_bad(self, trainer: Trainer) -> bool:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return False  # a gradient scaler overflows on purpose and skips such steps itself
        return not math.isfinite(float(self._unread.norm))

    def _give_up(
        self, trainer: Trainer, step: int, losses: list[float], bad_norm: bool, micro_batches: list[list[str]]
    ) -> None:
        keys = [key for micro_batch in micro_batches for key in micro_batch]
        facts = {
            "step": step,
            "rank": trainer.global_rank,
            "losses": losses,
            "gradient_norm_bad": bad_norm,
            "keys": keys,
        }
        note = self.directory / f"non_finite_rank{trainer.global_rank}.json"
        state = self.directory / "non_finite.ckpt"
        unwritten = self._write_note(note, facts)
        listed = f"all in {note}" if unwritten is None else f"{note} could not be written: {unwritten}"
        unsaved = self._save(trainer, state)
        kept = f"was saved to {state}" if unsaved is None else f"could not be saved to {state} ({unsaved})"
        what = "a gradient" if bad_norm else "the loss"
        where = f"(samples {', '.join(keys[:4])} ..., {listed}); the state before it {kept}"
        rate = _half_the_rate(getattr(trainer, "lightning_module", None))
        other = "a longer warm-up, or bf16 or fp32 instead of fp16"
        if (self.directory / "last.ckpt").exists():
            name = rate.split()[0].lstrip("-")
            advice = (
                f"last.ckpt is untouched: the same command with {rate} --allow_changes '[{name}]' goes on from it; "
                f"if that fails, too, begin anew in another --output, with a lower rate, {other}"
            )
        else:
            advice = f"begin anew in another --output, with {rate}, {other}"
        raise NonFiniteError(f"{what} became NaN or infinite at step {step} {where}. To go on: {advice}")

    def _write_note(self, note: Path, facts: dict[str, Any]) -> str | None:
        """Why it could not be done."""
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(facts, indent=1))
        except OSError as error:
            return reason(error)
        return None

    def _save(self, trainer: Trainer, state: Path) -> str | None:
        """Collective: why it could not be done; what is saved is on the disk, also by a writer in the background.

        Written aside: half of it must not get the name, nor take it from a whole one of an earlier attempt.
        """
        failure, first, aside = None, trainer.global_rank == 0, state.with_name(f"{state.name}.part")
        with contextlib.suppress(Exception):
            self.writer.wait()  # what became of the checkpoint before does not matter any more
        try:
            save_together(trainer, aside)
            if first:
                self.writer.do(lambda: take_place(aside, state))
            self.writer.wait()
        except Exception as error:
            failure = reason(error)
            if first:
                with contextlib.suppress(OSError):
                    remove(aside)
        return next((told for told in self.stop.gather(failure) if told), None)


def _half_the_rate(task: Any) -> str:
    """The option that halves the peak learning rate of a task."""
    name = "lr" if getattr(task, "lr", None) is not None else "base_lr"
    rate = getattr(task, name, None)
    return f"--model.{name} {rate / 2:g}" if rate else "--model.lr (lower)"
