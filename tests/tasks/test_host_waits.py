"""No step waits for its device: nothing is read back from it, and what is sent to it is sent without waiting.

The device is a GPU that is not there: fake tensors know where they would be, and refuse to say what they would hold.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pretrain import cost
from pretrain.checks import fill_in
from pretrain.config import instantiate, parse

VIT = ["--model.encoder.width", "96", "--model.encoder.depth", "2", "--model.encoder.heads", "3"]
DINO = ["dino_tin40", *VIT, "--model.head.prototypes", "512", "--model.head.hidden_width", "128"]
CONFIGS = {
    "MAE": ["mae_tin40", *VIT],
    "DINO": DINO,
    "DINOv2": [*DINO, "--model.ibot", "{}", "--model.koleo_weight", "0.1", "--model.targets", "sinkhorn"],
    "CLIP": ["clip_tin40", *VIT, "--model.patch_drop", "0.5"],
    "SigLIP": ["clip_tin40", *VIT, "--model.loss", "sigmoid"],
    "CLIP of a convolutional net": ["clip_demo"],
}


class Crossings(TorchDispatchMode):
    """Notes operations that have tensors of both sides, but for copies to the device that nobody waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sides = [
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim}
            for tree in ((args, kwargs), out)
        ]
        sent = sides == [{"cpu"}, {"cuda"}] and (kwargs or {}).get("non_blocking")
        if len(sides[0] | sides[1]) > 1 and not sent:
            self.waits.append(str(func))
        return out


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step(name: str) -> None:
    """Of the backward pass, which needs a real device, only that its operations on the CPU ask for no value."""
    cli, config = parse(["--config", *CONFIGS[name], "--output", "nowhere", "--data.train", "nowhere"])
    fill_in(config)
    with torch.device("meta"):
        parts = instantiate(cli, config)
    task: Any = parts.model
    task.trainer = cost.trainer_stand_in(8)
    batch = task.on_before_batch_transfer(cost.blank_batch(task, parts.data.recipe, 3, 8), 0)
    crossings = Crossings()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        task.to_empty(device="cuda").train()
        batch = tree_map(lambda leaf: _on_gpu(fake, leaf) if isinstance(leaf, Tensor) else leaf, batch)
        optimizer = task.configure_optimizers()
        for _ in range(2):
            with crossings:
                out = task.training_step(dict(batch), 0)
            assert out["loss"].is_cuda
            for parameter in (p for p in task.parameters() if p.requires_grad):
                parameter.grad = torch.empty_like(parameter)
            with crossings:
                if task.objective == "dino":
                    task.configure_gradient_clipping(optimizer)
                optimizer.step()
                if task.objective == "dino":
                    task.model.update_teacher(0.99)
                    task.model.update_centers()
    assert not crossings.waits
    cost.step_cost(cli, config, 8)


def test_what_the_test_above_would_find() -> None:
    with FakeTensorMode(), Crossings() as crossings:
        there = torch.empty(4, device="cuda")
        torch.empty(4).to("cuda", non_blocking=True)
        assert not crossings.waits
        there.cpu()
        torch.empty(4).to("cuda")
        assert len(crossings.waits) == 2
        with pytest.raises(DataDependentOutputException):
            float(there.sum())


def _on_gpu(fake: FakeTensorMode, leaf: Tensor) -> Tensor:
    return torch.empty_like(fake.from_tensor(leaf), device="cuda")
