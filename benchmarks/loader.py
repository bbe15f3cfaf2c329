"""The MAE recipe from shards against the usual pipeline, ImageFolder with Pillow and torchvision v1: images per core.

The baseline is the augmentation of the MAE authors, `RandomResizedCrop(scale=(0.2, 1), bicubic)`, flip, `ToTensor` and
`Normalize`, and torch's DataLoader. Both read the same files, in one worker each, and take turns within one run. What
counts is the CPU time that the worker spent on a turn (so that other load on the machine matters little); the medians
over the turns are reported. Ours leaves normalisation to the device; what it costs on a CPU is a row of its own.

Run: python -m benchmarks.loader [--json FILE]
"""

import argparse
import io
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.table import Row, show, write
from datamodules.loader import iterate
from datamodules.manifest import load_manifest
from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from datamodules.order import Order
from datamodules.recipes import MAERecipe
from datamodules.shard_reader import ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.stream import TrainStream

# inet250/images.tar and tin40/train.tar, which are for research and not part of this repository
DATA = Path(os.environ.get("TRIVIT_BENCH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TURNS = 5


def measure() -> list[Row]:
    """Full-size photographs, the same ones resized to 256, and TIN-40; none where the data is not at hand."""
    photographs, tiny = DATA / "inet250" / "images.tar", DATA / "tin40" / "train.tar"
    if not (photographs.is_file() and tiny.is_file()):
        return []
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for setting, tar, resize, limit, crop, batch in (
            ("photographs 500 x 375", photographs, None, 250, 224, 25),
            ("photographs, shorter side 256, q90", photographs, 256, 250, 224, 25),
            ("TIN-40, 64 x 64", tiny, None, 4000, 64, 100),
        ):
            folder, shards = (Path(temporary) / name / setting.replace(" ", "_") for name in ("folder", "shards"))
            _copy(tar, folder, shards, resize, limit)
            steps = limit // batch
            ours, theirs, normalizing = [], [], []
            for turn in range(TURNS):
                theirs.append(_rate(_usual(folder, crop, batch), steps, batch))
                batches = _stream(shards, crop, batch, range(turn * steps, (turn + 1) * steps))
                ours.append(_rate(batches, steps, batch))
                normalizing.append(_seconds_an_image(crop))
            baseline, rate = statistics.median(theirs), statistics.median(ours)
            rows.append(Row("MAE loader", setting, "images/s", rate, baseline, "ImageFolder + PIL + torchvision"))
            both = 1 / (1 / rate + statistics.median(normalizing))
            rows.append(
                Row("MAE loader", f"{setting}; and normalising on that core", "images/s", both, baseline, "the same")
            )
    return rows


def _copy(tar: Path, folder: Path, shards: Path, resize: int | None, limit: int) -> None:
    """The same image files as a class folder and as shards."""
    (folder / "all").mkdir(parents=True)
    with tarfile.open(tar) as source, ShardWriter(shards, samples_per_shard=500) as writer:
        members = [member for member in source if member.isfile() and member.name.endswith(".JPEG")]
        for i, member in enumerate(random.Random(0).sample(members, limit)):
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            data = data if resize is None else _resized(data, resize)
            (folder / "all" / f"{i:06d}.jpg").write_bytes(data)
            writer.write(f"{i:06d}", {"jpg": data})


def _resized(data: bytes, size: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    file = io.BytesIO()
    shape = (round(image.width * scale), round(image.height * scale))
    image.resize(shape, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _usual(folder: Path, crop: int, batch: int) -> Callable[[], Iterable[Any]]:
    augmentation = transforms.Compose([
        transforms.RandomResizedCrop(crop, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    images = ImageFolder(str(folder), augmentation)
    return lambda: DataLoader(images, batch, shuffle=True, num_workers=1)


def _stream(shards: Path, crop: int, batch: int, steps: Sequence[int]) -> Callable[[], Iterable[Any]]:
    manifest = load_manifest(shards)
    order = Order(manifest.counts, seed=0, global_batch_size=batch)
    return lambda: iterate(TrainStream(order, ShardReader(manifest), MAERecipe(crop)), steps, workers=1)


def _rate(make: Callable[[], Iterable[Any]], steps: int, batch: int) -> float:
    """Images per second of CPU time in the worker, which has ended when the batches have."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert sum(1 for _ in make()) == steps
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return steps * batch / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _seconds_an_image(crop: int) -> float:
    images = torch.zeros((64, 3, crop, crop), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    start = time.process_time()
    normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    return (time.process_time() - start) / 64


def main() -> None:
    """Print the table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure()
    print(show(rows) if rows else f"nothing measured: {DATA} is not here")
    if arguments.json:
        write(rows, arguments.json)


if __name__ == "__main__":
    main()
