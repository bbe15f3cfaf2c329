"""A MAE training step, as a run takes it, against a plain PyTorch rendering of the original loop (`mae_plain`).

Same sizes, images (synthetic), masks and schedules, one thread; a test holds that both train alike. Images per CPU
second, in turns within one run; memory is what a process of its own grows to. Both sides in float32, ours in bfloat16
autocast as well where the CPU multiplies such numbers.

Run: python -m benchmarks.mae_step
"""

from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from benchmarks.mae_plain import PlainMAEStep
from benchmarks.steps import TaskStep, step_rows, task_of
from benchmarks.table import Row, show
from pretrain.config import SHIPPED
from tasks.masks import random_noise

AGAINST = "plain PyTorch"


class Setting(NamedTuple):
    """`size`: width, depth and heads of the encoder; `options`: of our command line, for the same."""

    name: str
    config: str
    options: tuple[str, ...]
    size: tuple[int, int, int]
    image_size: int
    batch: int


TIN40 = Setting("TIN-40 sizes, 64 px, batch 128", "mae_tin40", (), (192, 6, 3), 64, 128)
SMALL = Setting(
    "ViT-S/16, 224 px, batch 16", "mae_vitb16_in1k", ("--model.encoder.arch", "vit_small"), (384, 12, 6), 224, 16
)


def measure(rounds: int = 3) -> list[Row]:
    """Images per CPU second and peak memory of each setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [row for setting in (TIN40, SMALL) for row in step_rows("MAE step", setting, ours, plain, AGAINST, rounds)]
    torch.set_num_threads(threads)
    return rows


def images_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random images [b 3 h h] and keys [b]."""
    shape = (setting.batch, 3, setting.image_size, setting.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return images, torch.arange(setting.batch, device="cpu")


def ours(setting: Setting, *options: str, device: str = "cpu", autocast: torch.dtype | None = None) -> TaskStep:
    """Our task as the run of a YAML builds it."""
    images, keys = images_of(setting)
    images = images.to(device)
    crop = ("--data.recipe.crop_size", str(setting.image_size))
    task = task_of(setting.config, *setting.options, *crop, *options).model
    return TaskStep(task, setting.batch, lambda: {"image": images, "rng": keys}, device, autocast)


def plain(setting: Setting) -> PlainMAEStep:
    """The plain loop with the sizes, masks and schedules of that YAML."""
    torch.manual_seed(0)
    device = torch.get_default_device()
    images, keys = (each.to(device) for each in images_of(setting))
    told = yaml.safe_load((SHIPPED / f"{setting.config}.yaml").read_text())["model"]["init_args"]
    patches = (setting.image_size // told["encoder"]["patch_size"]) ** 2
    noise = random_noise(keys, patches, "mae mask")
    return PlainMAEStep(told, setting.image_size, setting.size, setting.batch, lambda: (images, noise))


def main() -> None:
    """Print the table."""
    print(show(measure()))


if __name__ == "__main__":
    main()
