"""Costs told beforehand against those of a real step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pretrain import cost, hardware
from pretrain.checks import fill_in
from pretrain.config import PretrainCLI, instantiate, parse
from pretrain.cost import peak_rate, step_cost
from tests.pretrain.conftest import SMALL

IMAGES = 16
SIZES = ["--model.encoder.width", "96", "--model.encoder.depth", "3", "--model.encoder.heads", "3"]
DINO = ["--config", "dino_tin40", *SIZES, "--model.head.prototypes", "512", "--model.head.hidden_width", "128"]
CONFIGS = {
    "mae": ["--config", "mae_tin40", *SIZES],
    "dino": DINO,
    "dinov2": [*DINO, "--model.ibot", "{}", "--model.koleo_weight", "0.1", "--model.targets", "sinkhorn"],
    "clip": ["--config", "clip_tin40", *SIZES],
    "convnet": ["--config", "clip_demo"],
}


def parsed(*options: str) -> tuple[PretrainCLI, Namespace]:
    cli, config = parse([*options, "--output", "nowhere", "--data.train", "nowhere"])
    fill_in(config)
    return cli, config


def real_step(cli: PretrainCLI, config: Namespace) -> tuple[Any, Any, Any]:
    parts = instantiate(cli, config)
    task: Any = parts.model
    task.trainer = cost.trainer_stand_in(IMAGES)
    batch = task.on_before_batch_transfer(cost.blank_batch(task, parts.data.recipe, 3, IMAGES), 0)
    batch = {k: torch.randn(v.shape) if k in parts.data.recipe.views else v for k, v in batch.items()}
    return task, batch, task.configure_optimizers()


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts_in_a_real_step(name: str) -> None:
    cli, config = parsed(*CONFIGS[name])
    told = step_cost(cli, config, IMAGES)
    task, batch, optimizer = real_step(cli, config)
    with FlopCounterMode(display=False) as counter:
        cost.take_step(task, batch, optimizer, None, None)
    assert told.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 0.3 * told.flops < told.forward < 0.6 * told.flops
    assert told.trained == sum(p.numel() for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mae", "dino", "clip"])
def test_memory_is_what_torch_allocates_in_a_real_step(name: str, tmp_path: Path) -> None:
    cli, config = parsed(*CONFIGS[name])
    told = step_cost(cli, config, IMAGES)
    task, batch, optimizer = real_step(cli, config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cost.take_step(task, batch, optimizer, None, None)  # makes the gradients and moments that the next one finds
        cost.take_step(task, batch, optimizer, None, None)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]  # of another profile of this process
    most = max(event["args"]["Total Allocated"] for event in memory) - before
    inputs = sum(t.numel() * t.element_size() for t in batch.values() if isinstance(t, torch.Tensor))
    assert told.activations == pytest.approx(most + inputs - told.present - told.optimizer, rel=0.1)
    assert told.optimizer == pytest.approx(2 * told.gradients, rel=0.01)
    kept = sum(t.numel() * t.element_size() for t in (*task.parameters(), *task.buffers()))
    assert told.weights == kept


def test_half_the_bytes_in_half_precision() -> None:
    cli, config = parsed(*CONFIGS["mae"])
    full = step_cost(cli, config, IMAGES)
    cli, config = parsed(*CONFIGS["mae"], "--trainer.precision", "bf16-true")
    half = step_cost(cli, config, IMAGES)
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
    assert half.activations < 0.75 * full.activations
    cli, config = parsed(*CONFIGS["mae"], "--trainer.precision", "bf16-mixed")
    mixed = step_cost(cli, config, IMAGES)
    assert mixed.weights == full.weights and mixed.activations < full.activations
    assert mixed.flops == full.flops


def test_peak_of_a_gpu_in_images(monkeypatch: pytest.MonkeyPatch) -> None:
    cli, config = parsed(*SMALL)
    assert torch.cuda.is_available() or peak_rate(cli, config) is None
    monkeypatch.setattr(cost, "gpu_here", lambda: hardware.GPUS["H100"])
    each = step_cost(cli, config, IMAGES).flops / IMAGES
    assert peak_rate(cli, config) == pytest.approx(989e12 / each, rel=0.01)
