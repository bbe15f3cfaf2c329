"""Two floors under every score: what raw pixels reach, and what the same encoder reaches before any training.

A pretrained encoder that is not above both has learnt nothing that a linear or nearest-neighbour reader can use.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.sidecars import cache_home, write_aside
from evaluation.features import Featurizer, Precision
from evaluation.probes import PROBES, ProbeData, ProbeSettings, Result
from evaluation.protocol import versions
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder

FORMAT = 1
FORMAT_ON_IMAGES = 2  # of the probes that learn from images: 2 since what they do and say was mended
KNN_SIDE = 64
LINEAR_SIDE = 16
PIXEL_BYTES = 1 << 30
UNTRAINED_SEED = 0
UNTRAINED = f"the same encoder, untrained (initialisation seed {UNTRAINED_SEED})"

Measure = Callable[[Featurizer, Path], ProbeData]


class PixelFeatures(nn.Module):
    """The pixels that an encoder would see, normalised, shrunk by area to side x side, as a vector."""

    def __init__(self, config: EncoderConfig, side: int) -> None:
        super().__init__()
        self.config = config
        self.side = side
        self.feature_width = config.in_chans * side * side

    def features(self, images: Tensor) -> Tensor:
        """[b c h w] -> [b c*side*side]."""
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)


def floors(
    config: EncoderConfig,
    measure: Measure,
    probes: Sequence[str],
    settings: ProbeSettings,
    *,
    train_images: int,
    data_hashes: Sequence[str],
    precision: Precision = "float32",
    cache_dir: Path | None = None,
) -> dict[str, dict[str, Result]]:
    """{"raw_pixels": {probe: result}, "untrained": {probe: result}}, from the cache if computed before.

    Raw pixels are shrunk by area: for kNN to 64 px at most (less when train would take more than 1 GiB), for the linear
    probe to 16 px, which costs a twentieth and reaches more, not less. The untrained encoder has the same config, in
    MAE's initialisation (timm models in their own), seed 0.

    Args:
        config: of the encoder whose floors these are.
        measure: (featurizer, folder for its features) -> matched train and test features.
        probes: names.
        settings: as for the encoder itself.
        train_images: how many there are.
        data_hashes: of train and test, for the cache.
        precision: with which `measure` makes features, for the cache.
        cache_dir: None: `floors` in the user's cache.
    """
    cache_dir = cache_dir or cache_home() / "floors"
    cache_dir.mkdir(parents=True, exist_ok=True)
    identity = {
        # all else at its default, so that encoders that see the same pixels share a floor
        "raw_pixels": EncoderConfig(image_size=config.image_size, mean=config.mean, std=config.std,
                                    in_chans=config.in_chans, bits=config.bits, eval_resize=config.resize),
        "untrained": replace(config, drop_path=0.0),
    }  # fmt: skip
    found: dict[str, dict[str, Result]] = {}
    for name, about in identity.items():
        places = {p: _place(cache_dir, name, p, repr(about), repr(settings), *data_hashes, precision) for p in probes}
        missing = [p for p in probes if not places[p].exists()]
        if missing:
            # the numbers are kept, not the features: those of raw pixels are as large as the images
            with tempfile.TemporaryDirectory(dir=cache_dir) as aside:
                build = _raw_pixels if name == "raw_pixels" else _untrained
                results = build(about, measure, missing, settings, train_images, Path(aside))
            for p, result in results.items():
                result["protocol"]["versions"] = versions()
                write_aside(places[p], json.dumps(result).encode())
        found[name] = {p: json.loads(places[p].read_text()) for p in probes}
    return found


def _raw_pixels(
    config: EncoderConfig, measure: Measure, probes: Sequence[str], settings: ProbeSettings, train_images: int,
    aside: Path,
) -> dict[str, Result]:  # fmt: skip
    channels = config.in_chans
    side = pixel_side(config.image_size, train_images, channels)
    data = measure(PixelFeatures(config, side), aside)
    results = {}
    for probe in probes:
        used = side if probe == "knn" else min(side, LINEAR_SIDE)
        small = replace(
            data, train=shrink_pixels(data.train, used, channels), test=shrink_pixels(data.test, used, channels)
        )
        results[probe] = PROBES[probe](small if used < side else data, settings)
        results[probe]["protocol"]["features"] = f"raw pixels, normalised, shrunk by area to {used} x {used}"
    return results


def _untrained(
    config: EncoderConfig, measure: Measure, probes: Sequence[str], settings: ProbeSettings, train_images: int,
    aside: Path,
) -> dict[str, Result]:  # fmt: skip
    data = measure(untrained(config), aside)
    results = {probe: PROBES[probe](data, settings) for probe in probes}
    for result in results.values():
        result["protocol"]["features"] = UNTRAINED
    return results


def untrained_floor(
    probe: str, config: EncoderConfig, settings: ProbeSettings, score: Callable[[Encoder], Result], *,
    data_hashes: Sequence[str], batch_size: int, precision: Precision = "float32", cache_dir: Path | None = None,
    keep: bool = True,
) -> Result:  # fmt: skip
    """What the same probe finds on the same encoder, untrained: the floor of a probe that learns from images.

    It takes as long as the probe, but once for all checkpoints of one config: it is kept in the cache.

    Args:
        probe: its name, which its settings have, too.
        config: of the encoder whose floor this is.
        settings: as for the encoder itself.
        score: the probe.
        batch_size: of the loader, on which corruptions and parts of larger batches depend.
        data_hashes, precision, cache_dir: as for `floors`.
        keep: False: for a probe that depends on more than this; it is made anew each time.
    """

    def made() -> Result:
        found = score(untrained(config))
        found["protocol"] |= {"features": UNTRAINED, "versions": versions()}
        return found

    if not keep:
        return made()
    cache_dir = cache_dir or cache_home() / "floors"
    cache_dir.mkdir(parents=True, exist_ok=True)
    counts = (getattr(settings, probe), settings.seed, settings.strengths, settings.device)
    about = repr(replace(config, drop_path=0.0))
    place = _place(
        cache_dir, "untrained", probe, about, repr(counts), *data_hashes, batch_size, precision, FORMAT_ON_IMAGES
    )
    if not place.exists():
        write_aside(place, json.dumps(made()).encode())
    result: Result = json.loads(place.read_text())
    return result


def _place(cache_dir: Path, *identity: str | int) -> Path:
    """Where a floor is kept, by all that it follows from; by the versions too of who draws and fills timm's models."""
    key = json.dumps([FORMAT, version("torch"), version("timm"), *identity])
    return cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def untrained(config: EncoderConfig) -> Encoder:
    """The same encoder before any training, the same whenever it is asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return Encoder(replace(config, drop_path=0.0)).eval()


def pixel_side(image_size: int, train_images: int, channels: int = 3) -> int:
    """Side to which raw pixels are shrunk for kNN."""
    side = min(KNN_SIDE, image_size)
    while side > LINEAR_SIDE and train_images * channels * side * side * 4 > PIXEL_BYTES:
        side = max(LINEAR_SIDE, side // 2)
    return side


def shrink_pixels(x: NDArray[np.float32], side: int, channels: int = 3) -> NDArray[np.float32]:
    """Pixel vectors [n c*s*s] -> [n c*side*side], by area."""
    old = round((x.shape[1] / channels) ** 0.5)
    if old == side:
        return x
    blocks = (torch.from_numpy(np.array(x[i : i + 1024])).view(-1, channels, old, old) for i in range(0, len(x), 1024))
    shrunk: NDArray[np.float32] = torch.cat([F.adaptive_avg_pool2d(b, side).flatten(1) for b in blocks]).numpy()
    return shrunk
