"""Features of a whole data set, computed once and kept on disk, memory-mapped, for every probe and picture.

Axes: n = images, d = channels of a feature vector.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.bad_samples import BadSample
from datamodules.errors import DataError
from datamodules.image_set import EvaluationLoader, evaluation_loader
from datamodules.manifest import Manifest
from datamodules.normalize import normalize
from datamodules.sidecars import cache_home, cannot_write
from evaluation.errors import EvaluationError
from evaluation.feature_cache import SummedFile, X, finish_entry, is_whole, put, read_entry, shrink
from evaluation.lost_images import check_lost
from evaluation.progress import progress_bar
from evaluation.team import Team
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import weights_hash

FORMAT = 3

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


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
    `data_hash`: of their manifest; `fingerprint`: likewise, and of when its tars were written.
    """

    x: NDArray[np.float32]
    label: NDArray[np.int64]
    key: Sequence[str]
    classes: tuple[str, ...]
    bad: int
    data_hash: str
    fingerprint: str

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
    precision: Precision = "float32",
    team: Team = Team(),  # noqa: B008 (frozen)
    progress: bool = True,
) -> Features:
    """Features of every readable image under `root` (shards), from the cache if they were computed before.

    Images: of the encoder's channels and bits, shorter side to encoder.config.resize (bicubic, antialiased), centre
    crop of image_size, normalised with the encoder's mean and std. The key is encoder weights and config (with it the
    transform and the pooling), manifest, when its tars were written, and precision. The cache holds
    `feature_cache.CACHE_LIMIT_BYTES`: what was unused for longest goes first, and all of it may be deleted at any time.

    Images that were packed damaged are always left out. Where others are missing because they cannot be read now (a
    shard that is lost or cut, a network that fails), the features are used once and not kept; beyond `MOST_LOST` of all
    images there are none, see `check_lost`.

    Args:
        encoder: in evaluation mode; it is moved to `device`.
        root: a folder of shards.
        device: None: CUDA if there is one.
        batch_size: images in one forward pass; it does not change the result beyond rounding.
        workers: loader processes; None: from the cores there are.
        cache_dir: None: `features` in the user's cache ($TRIVIT_CACHE).
        precision: of the matrix products; the features are kept as float32 either way.
        team: processes that each take a part of the images; this is the first one, the others `assist`.
        progress: show a bar (on a terminal).

    Raises:
        EvaluationError: no image could be read, too many are lost for now, a feature is not finite, or the cache cannot
            be written.
        DataError: `root` is no data set.
    """
    device = device or pick_device()
    work = _Work(encoder, str(root), device, batch_size, workers, precision)
    loader = work.loader(team)
    manifest = loader.manifest
    cache_dir = cache_dir or cache_home() / "features"
    place = cache_dir / _entry(encoder, manifest, precision)
    if not is_whole(place):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache_dir, ignore_cleanup_errors=True) as aside:
                new = Path(aside) / "new"
                if _compute(work, loader, new, team, progress):
                    return _open(new, manifest)  # mapped, so that it outlives its name
                put(new, place)
        except OSError as error:
            raise EvaluationError(f"features: {cannot_write(cache_dir, error)}") from error
        shrink(cache_dir, keep=place)
    with contextlib.suppress(OSError):
        os.utime(place)  # the longest unused features go first
    return _open(place, manifest)


def assist(team: Team) -> None:
    """Collective, on all processes but the first: compute parts of the features that it asks for, until it is done."""
    while (job := _next_job(team)) is not None:
        work: _Work = job["work"]
        with tempfile.TemporaryDirectory(prefix="trivit-features-") as aside:
            failure, part, file = None, None, Path(aside) / X
            try:
                with file.open("wb") as output:
                    part = _part(work, work.loader(team), output.write, progress=False)
            except (EvaluationError, DataError, OSError) as error:
                failure = f"process {team.rank} of the evaluation: {error}"
            with contextlib.suppress(EvaluationError):  # which the first one tells
                team.agree(failure)
                team.send(file, part)


def _next_job(team: Team) -> dict[str, Any] | None:
    try:
        return team.hand_out(None)
    except RuntimeError as error:
        raise EvaluationError("the first process of this evaluation has ended: what it said tells why") from error


def cached_features(encoder: Featurizer, manifest: Manifest, cache_dir: Path | None = None) -> Features | None:
    """What `extract` left in the cache for this encoder and data set; None when it is not there."""
    for precision in PRECISIONS:
        place = (cache_dir or cache_home() / "features") / _entry(encoder, manifest, precision)
        if is_whole(place):
            return _open(place, manifest)
    return None


def _entry(encoder: Any, manifest: Manifest, precision: Precision) -> str:
    identity = [FORMAT, type(encoder).__name__, weights_hash(encoder), repr(encoder.config), manifest.fingerprint]
    identity += [precision] if precision != "float32" else []
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Work:
    """Which features are wanted; it is sent to the other processes as it is."""

    encoder: Any
    root: str
    device: str
    batch_size: int
    workers: int | None
    precision: Precision

    def loader(self, team: Team) -> EvaluationLoader:
        """The images of this process's part."""
        config = self.encoder.config
        return evaluation_loader(
            self.root, crop_size=config.image_size, resize=config.resize, batch_size=self.batch_size,
            workers=self.workers, pin_memory=self.device.startswith("cuda"), channels=config.in_chans, bits=config.bits,
            share=(team.rank, team.size),
        )  # fmt: skip


class _Part(NamedTuple):
    """What is known of the images of one process besides their features."""

    label: list[NDArray[np.int64]]
    key: list[str]
    bad: list[BadSample]
    lost: list[BadSample]


def _compute(work: _Work, loader: EvaluationLoader, place: Path, team: Team, progress: bool) -> bool:
    """Write the features of all parts; returns whether some are missing that may be there another time."""
    place.mkdir()
    failure, found = None, _Part([], [], [], [])
    if team.size > 1:
        team.hand_out({"work": replace(work, encoder=work.encoder.cpu())})
    with SummedFile(place / X) as x:
        try:
            found = _part(work, loader, x.write, progress)
        except (EvaluationError, DataError, OSError) as error:
            if team.size == 1:
                raise
            failure = str(error)
        if team.size > 1:
            team.agree(failure)
            for rank in range(1, team.size):
                for ours, theirs in zip(found, team.receive(rank, x.write), strict=True):
                    ours += theirs
    manifest = loader.manifest
    if not found.key:
        first = f" (first: {found.bad[0].key}: {found.bad[0].reason})" if found.bad else ""
        raise EvaluationError(f"no image under {manifest.name} could be read{first}: try trivit shards verify")
    check_lost(found.lost, manifest)
    label = np.concatenate(found.label)
    finish_entry(place, x.crc32, work.encoder.feature_width, label, found.key, len(found.bad))
    return bool(found.lost)


@torch.inference_mode()
def _part(work: _Work, loader: EvaluationLoader, write: Callable[[bytes], object], progress: bool) -> _Part:
    """Features of the loader's images, written one behind the other."""
    encoder, config, device = work.encoder.to(work.device), work.encoder.config, torch.device(work.device)
    label: list[NDArray[np.int64]] = []
    keys: list[str] = []
    half = torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bfloat16")
    with progress_bar(loader.num_images, "img", "features", progress) as bar:
        for batch in loader:
            images = normalize(batch["image"].to(device, non_blocking=True), config.mean, config.std)
            with half:
                x = encoder.features(images).float()
            if not torch.isfinite(x).all():
                row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
                raise EvaluationError(
                    f"the features of {batch['key'][row]} contain NaN or infinite values: the encoder has diverged, "
                    "evaluate an earlier checkpoint"
                )
            write(x.cpu().numpy().tobytes())
            label.append(batch["label"].numpy())
            keys += batch["key"]
            bar.update(len(x))
    return _Part(label, keys, loader.bad, loader.lost)


def _open(place: Path, manifest: Manifest) -> Features:
    kept = read_entry(place)
    return Features(*kept[:3], manifest.classes, kept.bad, data_hash=manifest.hash, fingerprint=manifest.fingerprint)
