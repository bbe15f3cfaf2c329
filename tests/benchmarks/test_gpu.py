"""`make bench-gpu` in small: both sides take steps and the program runs, on the CPU and, where there is one, a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import clip_step, dino_step, gpu, mae_step
from benchmarks.gpu import Setting, end_to_end, measure, show
from benchmarks.steps import task_of

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_CLIP = clip_step.SETTINGS[2]._replace(batch=4)
TINY = {
    "mae": Setting("MAE", mae_step.TIN40._replace(batch=4), mae_step.ours, mae_step.plain),
    "dino": Setting("DINO", dino_step.TIN40._replace(batch=4), dino_step.ours, dino_step.plain),
    "clip": Setting("CLIP", _CLIP, clip_step.ours, clip_step.theirs),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for the CPU takes a minute a model."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "COMPILED", ())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", TINY)
def test_steps_of_both_sides(objective: str, device: str) -> None:
    results = measure(TINY[objective], device, rounds=1, steps=1)
    assert [result.side for result in results] == ["trivit", "trivit, compiled", "plain PyTorch, AMP"]
    assert all(result.images_per_second > 0 and result.milliseconds > 0 for result in results)
    assert all((result.memory is not None) == (device == "cuda") for result in results)
    table = show(results).splitlines()
    assert len(table) == 5 and table[-1].endswith("| 1.00 |")


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_program_from_tars(device: str) -> None:
    crop = ("--data.recipe.crop_size", "64", "--data.workers", "0", "--model.warmup_steps", "1")
    before = torch.get_float32_matmul_precision()
    try:
        result = end_to_end(TINY["mae"], device, steps=12, samples=64, options=(*crop, "--float32_matmul", "medium"))
        assert torch.get_float32_matmul_precision() == (before if device == "cpu" else "medium")
    finally:
        torch.set_float32_matmul_precision(before)
    assert result.images_per_second > 0
    assert result.shares and sum(result.shares.values()) == pytest.approx(1)
    plain = result.__class__("MAE", "plain PyTorch, AMP", 1.0, 4000.0, None, None)
    assert "Time of MAE, trivit pretrain, from tars: waiting" in show([result, plain]).replace("data", "waiting")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--objective", "mae"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no GPU that torch can use" in done.stderr


def test_settings_are_those_of_the_configs() -> None:
    """Widths that are written twice agree: the plain side's, and what the YAML builds."""
    for setting in [setting for each in gpu.SETTINGS.values() for setting in each]:
        with torch.device("meta"):
            task = task_of(setting.sizes.config).model
        encoder = task.get_submodule(task.encoder_prefix.rstrip("."))
        size = getattr(setting.sizes, "size", None)
        width, depth = size[:2] if size else (setting.sizes.theirs["vision_cfg"][name] for name in ("width", "layers"))
        assert (encoder.width, len(encoder.blocks)) == (width, depth)
