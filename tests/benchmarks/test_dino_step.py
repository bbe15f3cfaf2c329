"""The DINO benchmark compares like with like: our task's steps are those of the plain loop, drop path included."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import dino_step
from benchmarks.dino_plain import ViT
from tasks.masks import random_noise, view_keys


class OurDraws(nn.Module):
    """In the place of a plain block's drop path: what ours draws for these images, path after path."""

    def __init__(self, share: float, noise: Iterator[Tensor]) -> None:
        super().__init__()
        self.share, self.noise = share, noise

    def forward(self, x: Tensor) -> Tensor:
        kept = next(self.noise)[:, None, None] >= self.share
        return torch.where(kept, x / (1 - self.share), 0)


def draw_alike(vit: ViT, keys: Tensor, views: tuple[int, int]) -> None:
    """Two paths a block, global views first."""

    def noise() -> Iterator[Tensor]:
        while True:
            for part in view_keys(keys, sum(views)).split(views):
                yield from random_noise(part.flatten(), 2 * len(vit.blocks), "drop path").unbind(1)

    drawn = noise()
    for block in vit.blocks:
        plain: Any = block
        plain.drop_path = OurDraws(plain.drop_path.drop_prob, drawn)


def test_our_steps_are_the_plain_loops() -> None:
    """From the same weights and draws, in float64: losses, student, teacher and centre agree."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        setting = dino_step.TIN40._replace(batch=3)
        ours, plain = dino_step.ours(setting), dino_step.plain(setting)
        model = ours.task.model
        model.student.load_state_dict(plain.student.state_dict())
        model.copy_student()
        trunk: Any = plain.student.encoder["trunk"]
        draw_alike(trunk, torch.arange(setting.batch), (2, setting.views[2]))
        for _ in range(4):
            loss = plain()
            assert ours() == pytest.approx(loss, abs=1e-9)
        for own, other in ((model.student, plain.student), (model.teacher, plain.teacher)):
            for name, value in other.state_dict().items():
                torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=1e-9)
        torch.testing.assert_close(model.dino_targets.center, plain.center, rtol=0, atol=1e-9)
    finally:
        torch.set_default_dtype(default)
