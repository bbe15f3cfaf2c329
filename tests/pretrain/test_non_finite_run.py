"""NaN and infinity end a run before they reach its weights, and say where they came from (guard.py, in a run)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pretrain.config import parse
from pretrain.errors import NonFiniteError
from pretrain.run import train
from tasks import load_encoder
from tasks.errors import TaskError
from tests.pretrain.conftest import pretrain


def test_nan_stops_the_run_and_names_step_and_samples(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(*small, "--output", run, "--model.lr", "1e20", "--checkpoint_every", 1) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trivit: "))
    assert "NaN or infinite at step" in line and "last.ckpt is untouched" in line
    assert "--model.base_lr" not in line and "--model.lr 5e+19 --allow_changes '[model.lr]'" in line
    facts = json.loads((run / "checkpoints/non_finite_rank0.json").read_text())
    assert facts["step"] >= 2 and (facts["keys"] or facts["gradient_norm_bad"])
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert all(v.isfinite().all() for v in state["state_dict"].values() if v.is_floating_point())
    assert (run / "checkpoints/non_finite.ckpt").exists()
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    length = ["--trainer.max_steps", 8, "--allow_changes", "[model.lr]"]
    assert pretrain(*small, "--output", run, "--model.lr", 1e-6, *length) == 1  # these weights had left the earth
    assert f"at step {saved} of 8" in capsys.readouterr().out
    (run / "checkpoints/last.ckpt").unlink()
    with pytest.raises(TaskError, match="ended with NaN before its first checkpoint"):
        load_encoder(run)


def test_a_bad_gradient_never_reaches_the_weights_and_names_its_own_samples(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    class Poison(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            seen.append(batch["key"])

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 3:
                next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))

    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="a gradient became NaN or infinite at step 4") as caught:
        train(*parse([*small, "--output", str(run)]), [Poison()])
    assert "last.ckpt" not in str(caught.value)  # there is none yet
    facts = json.loads((run / "checkpoints/non_finite_rank0.json").read_text())
    assert facts["step"] == 4 and facts["keys"] == seen[3]
    state = torch.load(run / "checkpoints/non_finite.ckpt", weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
