"""A DINO training step, as a run takes it, against a plain PyTorch rendering of the original loop (`dino_plain`).

Same sizes, images (synthetic) and schedules, one thread; a test holds that both train alike. Ours computes its
health figures, as in a run. Images per CPU second, in turns within one run; memory is what a process of its own grows
to. End to end, both also read 64-pixel images: ours its shards with one worker, the plain loop an ImageFolder with
Pillow crops and one worker; CPU time of both processes.

Run: python -m benchmarks.dino_step
"""

import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.augmentations import DINOAugmentation
from benchmarks.dino_plain import PlainDINO
from benchmarks.steps import TaskStep, step_rows, task_of
from benchmarks.table import Row, compared, show
from datamodules.loader import iterate
from datamodules.synth import synth
from pretrain.config import SHIPPED

AGAINST = "plain PyTorch"
TURNS, STEPS = 3, 3  # end to end: a worker's start costs both sides


class Setting(NamedTuple):
    """`views`: global and local size in pixels, and how many local ones."""

    name: str
    config: str
    size: tuple[int, int, int]
    views: tuple[int, int, int]
    batch: int


TIN40 = Setting("TIN-40 sizes, 2x64 + 4x32, batch 64", "dino_tin40", (192, 6, 3), (64, 32, 4), 64)
SMALL = Setting("ViT-S/16, 65,536 prototypes, 2x224 + 8x96, batch 4", "dino_vits16_in1k", (384, 12, 6), (224, 96, 8), 4)


def measure(rounds: int = 3) -> list[Row]:
    """Images per CPU second and peak memory of each setting; then with reading, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [row for setting in (TIN40, SMALL) for row in step_rows("DINO step", setting, ours, plain, AGAINST, rounds)]
    rates = end_to_end()
    rows.append(compared("DINO step", f"{TIN40.name}; with loading", "images/s", *rates, f"{AGAINST}, PIL"))
    torch.set_num_threads(threads)
    return rows


def views_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random global and local views, [2 b 3 g g] and [v b 3 l l]."""
    large, small, local = setting.views
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, setting.batch, 3, large, large), (local, setting.batch, 3, small, small))
    return torch.randn(shapes[0], generator=draw, device="cpu"), torch.randn(shapes[1], generator=draw, device="cpu")


def ours(setting: Setting, *options: str, device: str = "cpu", autocast: torch.dtype | None = None) -> TaskStep:
    """Our task as the run of a YAML builds it."""
    views, local = (each.to(device) for each in views_of(setting))
    batch = {"global_views": views, "local_views": local, "rng": torch.arange(setting.batch, device="cpu")}
    return TaskStep(task_of(setting.config, *options).model, setting.batch, lambda: dict(batch), device, autocast)


def plain(setting: Setting) -> PlainDINO:
    """The plain loop with the sizes and schedules of that YAML."""
    torch.manual_seed(0)
    views = [view for kind in views_of(setting) for view in kind.to(torch.get_default_device())]
    return _plain(setting, lambda: views)


def _plain(setting: Setting, next_views: Callable[[], Sequence[Tensor]]) -> PlainDINO:
    told = yaml.safe_load((SHIPPED / f"{setting.config}.yaml").read_text())["model"]["init_args"]
    return PlainDINO(told, setting.views[0], setting.size, setting.batch, next_views)


def end_to_end() -> tuple[list[float], list[float]]:
    """Images per CPU second of both sides, reading included."""
    with tempfile.TemporaryDirectory() as temporary:
        shards, folder = Path(temporary) / "shards", Path(temporary) / "folder"
        synth(shards, samples=STEPS * TIN40.batch, size=TIN40.views[0], seed=0)
        (folder / "all").mkdir(parents=True)
        for tar in sorted(shards.glob("*.tar")):
            with tarfile.open(tar) as source:
                for member in source:
                    if member.name.endswith(".jpg"):
                        content = source.extractfile(member)
                        assert content is not None
                        (folder / "all" / Path(member.name).name).write_bytes(content.read())
        sides = (_reading_ours(shards), _reading_plain(folder))
        seconds: list[list[float]] = [[] for _ in sides]
        for turn in range(TURNS):
            for run, spent in zip(sides, seconds, strict=True):
                before = _cpu()
                run(turn)
                spent.append(_cpu() - before)
    images = STEPS * TIN40.batch
    return [images / each for each in seconds[0]], [images / each for each in seconds[1]]


def _reading_ours(shards: Path) -> Callable[[int], None]:
    parts = task_of(TIN40.config, "--data.train", str(shards))
    stream = parts.data.stream(1, 0)
    batches: Iterator[Any] = iter(())
    step = TaskStep(parts.model, TIN40.batch, lambda: parts.data.on_after_batch_transfer(next(batches), 0))

    def run(turn: int) -> None:
        nonlocal batches
        batches = iter(iterate(stream, range(turn * STEPS, (turn + 1) * STEPS), workers=1))
        for _ in range(STEPS):
            step()
        assert next(batches, None) is None  # the worker ends, and its time counts

    return run


def _reading_plain(folder: Path) -> Callable[[int], None]:
    images = ImageFolder(str(folder), DINOAugmentation(*TIN40.views))
    batches: Iterator[Any] = iter(())
    step = _plain(TIN40, lambda: next(batches)[0])

    def run(turn: int) -> None:
        nonlocal batches
        batches = iter(DataLoader(images, TIN40.batch, shuffle=True, num_workers=1, drop_last=True))
        for _ in range(STEPS):
            step()
        assert next(batches, None) is None

    return run


def _cpu() -> float:
    """Seconds of this process and of the workers that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def main() -> None:
    """Print the table."""
    print(show(measure()))


if __name__ == "__main__":
    main()
