"""Stops a run whose loss or gradients are no longer finite, before they reach the weights or a checkpoint.

The loss is known when the forward pass ends, so it is copied to the host behind the forward pass and read after the
backward pass has been queued: an accelerator never waits for the check. The gradient norm is only known when the
backward pass has ended; it is read one optimiser step later, or before a checkpoint is written, whichever comes first.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from pretrain.errors import NonFiniteError
from pretrain.stop import StopRequest


class FiniteGuard(Callback):
    """Checks every loss and gradient norm; the first bad one saves the state and raises NonFiniteError on all ranks."""

    def __init__(self, directory: Path, stop: StopRequest) -> None:
        self.directory = directory
        self.stop = stop
        self.grad_norm: Tensor | None = None  # of the newest optimiser step, not yet read
        self._losses: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._keys: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which samples this micro-batch holds."""
        self._keys.append(list(batch["key"]))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Send the loss to the host without waiting for it."""
        if not loss.is_cuda:
            self._losses.append((loss.detach(), None))
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty((), dtype=loss.dtype, pin_memory=True)
        host.copy_(loss.detach(), non_blocking=True)
        event.record()
        self._losses.append((host, event))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Collective: agree on bad losses and stop signals before the weights move."""
        losses = []
        for loss, event in self._losses:
            if event is not None:
                event.synchronize()
            losses.append(float(loss))
        bad_micro = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        bad_norm = self._norm_is_bad(trainer)
        if self.stop.agree(bad_micro is not None or bad_norm, pl_module.device):
            self._give_up(trainer, losses, bad_micro, bad_norm)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.grad_norm = torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt() if gradients else None
        self._losses.clear()
        self._keys.clear()

    def check_before_saving(self, trainer: Trainer) -> None:
        """Collective: a checkpoint must never hold what a bad gradient made of the weights."""
        if self.stop.agree(self._norm_is_bad(trainer), trainer.strategy.root_device):
            self._give_up(trainer, [], None, True)

    def _norm_is_bad(self, trainer: Trainer) -> bool:
        if self.grad_norm is None or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return False  # a gradient scaler overflows on purpose and skips such steps itself
        return not math.isfinite(float(self.grad_norm))

    def _give_up(self, trainer: Trainer, losses: list[float], bad_micro: int | None, bad_norm: bool) -> None:
        step = trainer.global_step + (0 if bad_norm else 1)
        facts = {"step": step, "rank": trainer.global_rank, "losses": losses, "gradient_norm_bad": bad_norm,
                 "keys": self._keys[bad_micro] if bad_micro is not None else []}  # fmt: skip
        note = self.directory / f"non_finite_rank{trainer.global_rank}.json"
        self.directory.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(facts, indent=1))
        state = self.directory / "non_finite.ckpt"
        trainer.save_checkpoint(state)
        what = "a gradient" if bad_norm else "the loss"
        keys = ", ".join(facts["keys"][:4]) or "see the notes of the other ranks"  # type: ignore[index]
        raise NonFiniteError(
            f"{what} became NaN or infinite at step {step} (samples {keys}, all in {note}); the state was saved to "
            f"{state}, last.ckpt is untouched. Try a lower rate, a longer warm-up, bf16 or fp32 instead of fp16"
        )
