"""Costs told beforehand against those of a real step."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jsonargparse import Namespace
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain import cost, hardware
from pretrain.checks import fill_in
from pretrain.config import PretrainCLI, instantiate, parse
from pretrain.cost import peak_rate, step_cost
from tasks.sharding import shard
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


def most_allocated(task: Any, batch: Any, optimizer: Any, folder: Path) -> int:
    """Bytes at the worst moment of two steps, besides what was there before."""
    gc.collect()  # else what an earlier test's profile saw come may go in this one, and count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cost.take_step(task, batch, optimizer, None, None)  # makes the gradients and moments that the next one finds
        cost.take_step(task, batch, optimizer, None, None)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]  # of another profile of this process
    return max(event["args"]["Total Allocated"] for event in memory) - before


@pytest.mark.parametrize("name", ["mae", "dino", "clip"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_memory_is_what_torch_allocates_in_a_real_step(name: str, recomputed: bool, tmp_path: Path) -> None:
    cli, config = parsed(*CONFIGS[name], "--model.activation_checkpointing", str(recomputed).lower())
    told = step_cost(cli, config, IMAGES)
    task, batch, optimizer = real_step(cli, config)
    task.setup("fit")
    most = most_allocated(task, batch, optimizer, tmp_path)
    inputs = sum(t.numel() * t.element_size() for t in batch.values() if isinstance(t, torch.Tensor))
    # What attention's kernel takes for itself is not seen, and is much where little else is kept.
    assert told.memory == pytest.approx(most + inputs + told.weights, rel=0.15)
    assert told.optimizer == pytest.approx(2 * told.gradients, rel=0.01)
    kept = sum(t.numel() * t.element_size() for t in (*task.parameters(), *task.buffers()))
    assert told.weights == kept
    if recomputed:
        cli, config = parsed(*CONFIGS[name])
        plain = step_cost(cli, config, IMAGES)
        assert told.activations < 0.8 * plain.activations
        assert (told.flops, told.forward) == (plain.flops, plain.forward)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "dino", "clip"])
def test_memory_of_a_rank_that_holds_a_quarter_of_the_model(name: str, tmp_path: Path) -> None:
    """FSDP2 on one of four ranks whose others are not there: what they would send is never read, only held."""
    deep = ["--model.encoder.depth", "12" if name == "mae" else "8", "--model.encoder.width", "192"]
    cli, config = parsed(*CONFIGS[name], *deep)
    told = step_cost(cli, config, IMAGES)
    task, batch, _ = real_step(cli, config)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        shard(task.model, task.blocks, task.heads, mesh)
        optimizer = task.configure_optimizers()
        most = most_allocated(task, batch, optimizer, tmp_path)
    finally:
        dist.destroy_process_group()
    inputs = sum(t.numel() * t.element_size() for t in tree_leaves(batch) if isinstance(t, torch.Tensor))
    wanted = most + inputs + told.weights / 4
    found = (told.weights + told.gradients + told.optimizer) / 4 + told.in_full + told.apart
    assert found == pytest.approx(wanted, rel=0.15)
    assert found < told.memory


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
