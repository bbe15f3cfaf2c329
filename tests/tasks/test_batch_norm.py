"""BatchNorm where there are several ranks: on GPUs all share its statistics, on CPUs each has its own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tasks.dino_head import HeadConfig
from tasks.encoder_config import EncoderConfig
from tests.tasks.dino_runs import state, tiny_task

HEAD = HeadConfig(prototypes=16, hidden_width=16, bottleneck_width=8, batch_norm=True)


def norms_on(device: str, ranks: int) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The BatchNorms of a convolutional DINO by name, as built and as a run of so many ranks has them."""
    task: Any = tiny_task(EncoderConfig(arch="timm:test_efficientnet", image_size=32, pool="mean"), HEAD)
    built, before = dict(task.model.named_modules()), state(task.model)
    strategy = SimpleNamespace(root_device=torch.device(device))
    task.trainer = SimpleNamespace(world_size=ranks, strategy=strategy)
    task.configure_model()
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    found = dict(task.model.named_modules())
    names = [name for name, part in built.items() if isinstance(part, _BatchNorm)]
    assert {name.partition(".")[0] for name in names} == {"student", "teacher"} and len(names) > 10
    return {name: built[name] for name in names}, {name: found[name] for name in names}


def test_ranks_on_gpus_share_it() -> None:
    built, found = norms_on("cuda", 2)
    assert all(isinstance(part, nn.SyncBatchNorm) for part in found.values())
    plain = nn.Identity()
    activated = [name for name, part in built.items() if not isinstance(getattr(part, "act", plain), nn.Identity)]
    assert activated, "timm puts activations into its BatchNorms; torch's own conversion keeps them, but not their use"
    assert all(isinstance(found[name], SyncBatchNormAct) and found[name].act is built[name].act for name in activated)


@pytest.mark.parametrize(("device", "ranks"), [("cpu", 2), ("cuda", 1)])
def test_elsewhere_each_has_its_own(device: str, ranks: int) -> None:
    built, found = norms_on(device, ranks)
    assert built == found and not any(isinstance(part, nn.SyncBatchNorm) for part in found.values())
