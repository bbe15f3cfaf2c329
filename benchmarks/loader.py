"""The recipes from shards against the usual pipeline, ImageFolder with Pillow and torchvision v1: images per core.

Both read the same files through torch's DataLoader, in one worker each, and take turns within one run; the baseline's
augmentations (`benchmarks/augmentations.py`) are those of the authors of each objective. What counts is the CPU time
that the worker spent on a turn, so that other load on the machine matters little; reported are the medians over the
turns. Ours leaves normalisation to the device, and so colours unless the row says otherwise; what normalising costs on
a CPU is a row of its own.

Run: python -m benchmarks.loader [--json FILE] [--only WORD]
"""

import argparse
import io
import os
import random
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import ImageFolder

from benchmarks import augmentations
from benchmarks.table import Row, compared, show, write
from datamodules.loader import iterate
from datamodules.manifest import load_manifest
from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize
from datamodules.order import Order
from datamodules.recipes import CLIPRecipe, DINORecipe, MAERecipe, Recipe
from datamodules.shard_reader import ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.stream import TrainStream
from tasks.tokenizer import Tokenizer

# inet250/images.tar and tin40/train.tar, which are for research and not part of this repository
DATA = Path(os.environ.get("TRIVIT_BENCH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TURNS, PASSES = 3, 2  # so many passes over the images a turn that starting a worker hardly counts


class Images(NamedTuple):
    """Some image files, as a class folder and as shards."""

    setting: str
    folder: Path
    shards: Path
    count: int
    batch: int


def measure(only: str = "") -> list[Row]:
    """The rows whose name or setting has `only` in it; none where the data is not at hand."""
    photographs, tiny = DATA / "inet250" / "images.tar", DATA / "tin40" / "train.tar"
    if not (photographs.is_file() and tiny.is_file()):
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        full = _copy(photographs, root / "full", "photographs 500 x 375", None, 250, 25)
        small = _copy(photographs, root / "small", "photographs, shorter side 256, q90", 256, 250, 25)
        tin40 = _copy(tiny, root / "tin40", "TIN-40, 64 x 64", None, 4000, 100)
        rows = [row for make in (_mae, _dino, _clip) for row in make(only, full, small, tin40)]
    torch.set_num_threads(threads)
    return rows


def _mae(only: str, *sets: Images) -> Iterator[Row]:
    for images in sets:
        if only in f"MAE loader {images.setting}":
            size = 64 if images.batch == 100 else 224
            ours, theirs = _in_turns(images, [MAERecipe(size)], augmentations.mae(size))
            yield compared("MAE loader", images.setting, "images/s", ours[0], theirs, "ImageFolder + PIL + torchvision")
            more = _seconds_an_image(size)
            both = [1 / (1 / rate + more) for rate in ours[0]]
            yield compared(
                "MAE loader", f"{images.setting}; and normalising on that core", "images/s", both, theirs, "the same"
            )


def _dino(only: str, full: Images, small: Images, _: Images) -> Iterator[Row]:
    for images in (full, small):
        if only in f"DINO loader {images.setting}":
            recipes = [DINORecipe(color_on="device"), DINORecipe(color_on="workers")]
            ours, theirs = _in_turns(images, recipes, augmentations.DINOAugmentation())
            for rate, where in zip(ours, ("colours left to the device", "colours, too"), strict=True):
                setting = f"2x224 + 8x96, {images.setting}; {where}"
                yield compared("DINO loader", setting, "images/s", rate, theirs, "ImageFolder + PIL + torchvision")


def _clip(only: str, full: Images, small: Images, _: Images) -> Iterator[Row]:
    for images in (full, small):
        if only in f"CLIP loader {images.setting}":
            ours, theirs = _in_turns(images, [CLIPRecipe(224)], augmentations.clip(224), Tokenizer())
            setting = f"{images.setting}, and their captions as tokens"
            yield compared(
                "CLIP loader", setting, "images/s", ours[0], theirs, "ImageFolder + PIL + torchvision + open_clip"
            )


class _Captioned(Dataset[Any]):
    """The usual pairs: an image and, from the file beside it, its caption through open_clip's tokenizer."""

    def __init__(self, images: ImageFolder) -> None:
        from open_clip import get_tokenizer

        self.images, self.tokenizer = images, get_tokenizer("ViT-B-16")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        caption = Path(self.images.samples[i][0]).with_suffix(".txt").read_text()
        return self.images[i][0], self.tokenizer([caption])[0]


def _in_turns(
    images: Images, recipes: Sequence[Recipe], augmentation: Any, tokenize: Tokenizer | None = None
) -> tuple[list[list[float]], list[float]]:
    """Rates of each turn, of each recipe and of the baseline."""
    if tokenize is not None:
        assert tokenize.vocab_size  # read before the workers are forked, as a run does
    steps = PASSES * images.count // images.batch
    folder = ImageFolder(str(images.folder), augmentation)
    usual: Dataset[Any] = folder if tokenize is None else _Captioned(folder)
    repeated = ConcatDataset([usual] * PASSES)
    manifest = load_manifest(images.shards)
    order = Order(manifest.counts, seed=0, global_batch_size=images.batch)
    streams = [TrainStream(order, ShardReader(manifest), recipe, tokenize=tokenize) for recipe in recipes]
    rates: list[list[float]] = [[] for _ in streams]
    baseline = []
    for turn in range(TURNS):
        baseline.append(_rate(lambda: DataLoader(repeated, images.batch, shuffle=True, num_workers=1), images))
        which = range(turn * steps, (turn + 1) * steps)
        for stream, rate in zip(streams, rates, strict=True):
            rate.append(_rate(partial(iterate, stream, which, workers=1), images))
    return rates, baseline


def _rate(make: Callable[[], Iterable[Any]], images: Images) -> float:
    """Images per second of CPU time in the worker, which has ended when the batches have."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert sum(1 for _ in make()) == PASSES * images.count // images.batch
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return PASSES * images.count / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _copy(tar: Path, root: Path, setting: str, resize: int | None, limit: int, batch: int) -> Images:
    """The same image files as a class folder and as shards."""
    images = Images(setting, root / "folder", root / "shards", limit, batch)
    (images.folder / "all").mkdir(parents=True)
    with tarfile.open(tar) as source, ShardWriter(images.shards, samples_per_shard=500) as writer:
        members = [member for member in source if member.isfile() and member.name.endswith(".JPEG")]
        for i, member in enumerate(random.Random(0).sample(members, limit)):
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            data = data if resize is None else _resized(data, resize)
            (images.folder / "all" / f"{i:06d}.jpg").write_bytes(data)
            caption = f"photograph number {i} of {limit}, found in {member.name.replace('/', ' ')}"
            (images.folder / "all" / f"{i:06d}.txt").write_text(caption)
            writer.write(f"{i:06d}", {"jpg": data, "txt": caption.encode()})
    return images


def _resized(data: bytes, size: int) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    file = io.BytesIO()
    shape = (round(image.width * scale), round(image.height * scale))
    image.resize(shape, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _seconds_an_image(crop: int) -> float:
    images = torch.zeros((64, 3, crop, crop), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    start = time.process_time()
    normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    return (time.process_time() - start) / 64


def main() -> None:
    """Print the table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    rows = measure(arguments.only)
    print(show(rows) if rows else f"nothing measured: {DATA} is not here")
    if arguments.json:
        write(rows, arguments.json)


if __name__ == "__main__":
    main()
