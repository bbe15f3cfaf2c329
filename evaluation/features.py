"""Features of a whole data set, computed once and kept on disk, memory-mapped, for every probe and picture.

Axes: n = images, d = channels of a feature vector.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datamodules.image_set import evaluation_loader
from datamodules.manifest import Manifest
from datamodules.normalize import normalize
from datamodules.sidecars import cache_home, cannot_write
from evaluation.errors import EvaluationError
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import weights_hash

FORMAT = 2
CACHE_LIMIT_BYTES = 50 << 30
MOST_LOST = 0.01
"""Share of the images that may be missing for a reason that may pass; the score of fewer is of another set."""


class Featurizer(Protocol):
    """An encoder, or anything that turns normalised images into vectors and describes its input by a config."""

    config: EncoderConfig

    def features(self, images: Tensor) -> Tensor:
        """[b c h w] -> [b d]."""
        ...

    @property
    def feature_width(self) -> int:
        """The d of `features`."""
        ...


@dataclass(frozen=True)
class Features:
    """x float32 [n d] (memory-mapped), label int64 [n] (-1: none), key "SHARD/KEY" of each image, in stream order.

    `classes`: names of the labels, empty when they only have numbers; `bad`: images that could not be read;
    `data_hash`: of their manifest.
    """

    x: NDArray[np.float32]
    label: NDArray[np.int64]
    key: Sequence[str]
    classes: tuple[str, ...]
    bad: int
    data_hash: str

    def __len__(self) -> int:
        return len(self.label)


def pick_device() -> str:
    """The CUDA device if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def extract(
    encoder: Featurizer,
    root: str | os.PathLike[str],
    *,
    device: str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Features:
    """Features of every readable image under `root` (shards), from the cache if they were computed before.

    Images: of the encoder's channels and bits, shorter side to encoder.config.resize (bicubic, antialiased), centre
    crop of image_size, normalised with the encoder's mean and std; float32. The key is encoder weights and config +
    manifest + transform.

    Images that were packed damaged are always left out. Where others are missing because they cannot be read now (a
    shard that is lost or cut, a network that fails), the features are used once and not kept; beyond `MOST_LOST` of all
    images there are none.

    Args:
        encoder: in evaluation mode; it is moved to `device`.
        root: a folder of shards.
        device: None: CUDA if there is one.
        batch_size: images in one forward pass; it does not change the result beyond rounding.
        workers: loader processes; None: from the cores there are.
        cache_dir: None: `features` in the user's cache ($TRIVIT_CACHE).
        progress: show a bar (on a terminal).

    Raises:
        EvaluationError: no image could be read, too many are lost for now, a feature is not finite, or the cache cannot
            be written.
        DataError: `root` is no data set.
    """
    config = encoder.config
    device = device or pick_device()
    loader = evaluation_loader(
        root, crop_size=config.image_size, resize=config.resize, batch_size=batch_size, workers=workers,
        pin_memory=device.startswith("cuda"), channels=config.in_chans, bits=config.bits,
    )  # fmt: skip
    manifest = loader.manifest
    cache_dir = cache_dir or cache_home() / "features"
    place = cache_dir / _entry(encoder, manifest)
    if not (place / "about.json").exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir, ignore_cleanup_errors=True) as aside:
                _compute(encoder, loader, Path(aside) / "new", device, progress)
                if loader.lost:
                    return _open(Path(aside) / "new", manifest)  # mapped, so that it outlives its name
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(aside) / "new").rename(place)
        except OSError as error:
            raise EvaluationError(f"features: {cannot_write(cache_dir, error)}") from error
        _shrink(cache_dir, keep=place)
    with contextlib.suppress(OSError):
        os.utime(place)  # the longest unused features go first
    return _open(place, manifest)


def cached_features(encoder: Featurizer, manifest: Manifest, cache_dir: Path | None = None) -> Features | None:
    """What `extract` left in the cache for this encoder and data set; None when it is not there."""
    place = (cache_dir or cache_home() / "features") / _entry(encoder, manifest)
    return _open(place, manifest) if (place / "about.json").exists() else None


def _entry(encoder: Any, manifest: Manifest) -> str:
    identity = [FORMAT, type(encoder).__name__, weights_hash(encoder), repr(encoder.config), manifest.hash]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@torch.inference_mode()
def _compute(encoder: Any, loader: Any, place: Path, device: str, progress: bool) -> None:
    place.mkdir()
    encoder.to(device)
    config = encoder.config
    label: list[NDArray[np.int64]] = []
    keys: list[str] = []
    done, total = 0, loader.manifest.num_samples
    with (
        (place / "x.float32").open("wb") as file,
        tqdm(total=total, unit="img", desc="features", disable=None if progress else True, leave=False) as bar,
    ):
        for batch in loader:
            images = normalize(batch["image"].to(device, non_blocking=True), config.mean, config.std)
            x = encoder.features(images).float()
            if not torch.isfinite(x).all():
                row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
                raise EvaluationError(
                    f"the features of {batch['key'][row]} contain NaN or infinite values: the encoder has diverged, "
                    "evaluate an earlier checkpoint"
                )
            file.write(x.cpu().numpy().tobytes())
            label.append(batch["label"].numpy())
            keys += batch["key"]
            done += len(x)
            bar.update(len(x))
    if not done:
        first = f" (first: {loader.bad[0].key}: {loader.bad[0].reason})" if loader.bad else ""
        raise EvaluationError(f"no image under {loader.manifest.name} could be read{first}: try trivit shards verify")
    if len(loader.lost) > MOST_LOST * total:
        first = loader.lost[0]
        raise EvaluationError(
            f"{len(loader.lost)} of {total} images of {loader.manifest.name} cannot be read now (first: {first.shard}, "
            f"{first.key}: {first.reason}), and a score without them would be of another set: run the same command "
            f"again, or see `trivit shards verify {loader.manifest.name}`"
        )
    np.save(place / "label.npy", np.concatenate(label))
    (place / "keys.json").write_text(json.dumps(keys, ensure_ascii=False))
    about = {"images": done, "width": encoder.feature_width, "bad": len(loader.bad)}
    (place / "about.json").write_text(json.dumps(about))


def _open(place: Path, manifest: Manifest) -> Features:
    about = json.loads((place / "about.json").read_text())
    shape = (about["images"], about["width"])
    return Features(
        x=np.memmap(place / "x.float32", dtype=np.float32, mode="r", shape=shape),
        label=np.load(place / "label.npy"),
        key=json.loads((place / "keys.json").read_text()),
        classes=manifest.classes,
        bad=about["bad"],
        data_hash=manifest.hash,
    )


def _shrink(cache_dir: Path, keep: Path) -> None:
    """Remove the features unused for longest until the cache is below its limit; readers keep what they have open."""
    entries = sorted((p for p in cache_dir.iterdir() if (p / "about.json").exists()), key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(file.stat().st_size for file in p.iterdir()) for p in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= CACHE_LIMIT_BYTES:
            break
        if entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
