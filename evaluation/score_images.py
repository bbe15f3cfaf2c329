"""The part of `evaluate` for probes that need images: what they learn from, their floors, their protocol."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.manifest import load_manifest
from datamodules.sidecars import cache_home
from evaluation.features import Features
from evaluation.floors import Measure, untrained_floor
from evaluation.image_data import ImageData, rows_of
from evaluation.image_probes import IMAGE_PROBES, score_corruptions, score_localisation, score_segmentation
from evaluation.long_probes import told_when_stopped
from evaluation.probes import ProbeData, ProbeSettings, Result
from evaluation.protocol import floor_protocol, protocol_of
from tasks.encoders import Encoder


@dataclass(frozen=True)
class Scoring:
    """What all probes on images have in common.

    Args:
        encoder: to be scored.
        settings: of the probes.
        about: what every protocol says.
        floors: score the untrained encoder, too.
        floor_cache: where floors are kept; None: in the user's cache.
        place: where the caller writes each result; None: nowhere.
        after: names of probes that come after these.
    """

    encoder: Encoder
    settings: ProbeSettings
    about: Mapping[str, Any]
    floors: bool
    floor_cache: Path | None
    place: Path | None
    after: Sequence[str]


def labelled_images(
    roots: tuple[Path, Path], trained: Features, tested: Features, probed: ProbeData, **how: Any
) -> ImageData:
    """Readable images of train and test, the folders of shards `roots`, with their labels as `probed` has them.

    `how`: further fields of ImageData.
    """
    train, test = roots
    return ImageData(
        train, rows_of(train, trained.key), trained.key, trained.label, test, rows_of(test, tested.key), tested.key,
        probed.test_label, probed.classes, **how,
    )  # fmt: skip


def score_on_images(
    names: Sequence[str], scoring: Scoring, data: ImageData, probed: ProbeData, hashes: tuple[str, ...],
    measure: Measure,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Results of `probes.LABELLED_IMAGES` by name, each as soon as it is there: they may take hours.

    After each one follows its floor, {"floors": {"untrained": {name: result}}}.

    Args:
        names: of the probes.
        scoring: of which encoder, and how.
        data: images to learn from and to score on.
        probed: their features, for the linear probe.
        hashes: of both sets, for what is kept of floors.
        measure: makes the features of another encoder, see `floors`.
    """

    def score(name: str, of: Encoder) -> Result:
        if name != "corruptions":
            return IMAGE_PROBES[name](of, data, scoring.settings)
        if of is scoring.encoder:
            return score_corruptions(of, data, scoring.settings, probed.train, probed.test)
        on_disk = scoring.floor_cache or cache_home() / "floors"  # /tmp may be memory
        with tempfile.TemporaryDirectory(dir=on_disk) as aside:
            clean = measure(of, Path(aside))
            return score_corruptions(of, data, scoring.settings, clean.train, clean.test)

    yield from _scored(names, scoring, data, hashes, score)


def score_dense(
    names: Sequence[str], scoring: Scoring, train: Path | None, test: Path, **how: Any
) -> Iterator[dict[str, Any]]:
    """Results of `probes.DENSE_PROBES` one by one, and under "floors" those of the untrained encoder.

    `how`: further fields of ImageData.
    """
    none = np.zeros(0, np.int64)
    data = ImageData(train or test, none, (), none, test, none, (), none, 0, **how)

    def score(name: str, of: Encoder) -> Result:
        if name == "localisation":
            return score_localisation(of, test, data, scoring.settings)
        assert train is not None
        return score_segmentation(of, train, test, data, scoring.settings)

    hashes = tuple(load_manifest(root).fingerprint for root in (data.train, test)) if scoring.floors else ()
    if data.drop_unknown:
        hashes += ("without unknown classes",)
    yield from _scored(names, scoring, data, hashes, score)


def _scored(
    names: Sequence[str], scoring: Scoring, data: ImageData, hashes: tuple[str, ...],
    score: Callable[[str, Encoder], Result],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each result, then its floor, from the cache where data of these hashes were scored before."""
    about, place = scoring.about, scoring.place
    for number, name in enumerate(names):
        left = (*names[number:], *scoring.after)
        with told_when_stopped(left, place):
            result = score(name, scoring.encoder)
        yield {name: result | {"protocol": protocol_of(about, result["protocol"])}}
        if not scoring.floors:
            continue
        # Localisation is one pass over the images, against a table of boxes that may change: it is not kept.
        with told_when_stopped(left, place, in_floor=True):
            under = untrained_floor(
                name, scoring.encoder.config, scoring.settings, partial(score, name), data_hashes=hashes,
                batch_size=data.batch_size, precision=data.precision, cache_dir=scoring.floor_cache,
                keep=name != "localisation",
            )  # fmt: skip
        yield {"floors": {"untrained": {name: under | {"protocol": floor_protocol(about, under["protocol"])}}}}
