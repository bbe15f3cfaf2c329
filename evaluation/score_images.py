"""The part of `evaluate` for probes that need images: what they learn from, their floors, their protocol."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def score_on_images(
    names: Sequence[str], encoder: Encoder, train: Path, trained: Features, test: Path, tested: Features,
    probed: ProbeData, settings: ProbeSettings, about: Mapping[str, Any], *, measure: Measure | None,
    floor_cache: Path | None, place: Path | None, after: Sequence[str], **how: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Results of `probes.LABELLED_IMAGES` by name, each as soon as it is there: they may take hours.

    After each one follows its floor, {"floors": {"untrained": {name: result}}}.

    Args:
        names: of the probes.
        encoder: to be scored.
        train, test: folders of shards.
        trained, tested, probed: the features, for labels, readable images and the linear probe.
        settings: of the probes.
        about: what every protocol says.
        measure: makes the features of another encoder, see `floors`; None: no floors.
        floor_cache: where floors are kept; None: in the user's cache.
        place: where the caller writes each result; None: nowhere.
        after: names of probes that come after these.
        how: further fields of ImageData.
    """
    data = ImageData(
        train, rows_of(train, trained.key), trained.key, trained.label, test, rows_of(test, tested.key), tested.key,
        probed.test_label, probed.classes, device=settings.device, **how,
    )  # fmt: skip

    def score(name: str, of: Encoder) -> Result:
        if name != "corruptions":
            return IMAGE_PROBES[name](of, data, settings)
        if of is encoder or measure is None:
            return score_corruptions(of, data, settings, probed.train, probed.test)
        on_disk = floor_cache or cache_home() / "floors"  # /tmp may be memory
        with tempfile.TemporaryDirectory(dir=on_disk) as aside:
            clean = measure(of, Path(aside))
            return score_corruptions(of, data, settings, clean.train, clean.test)

    hashes = (trained.fingerprint, tested.fingerprint)
    yield from _scored(
        names, encoder, score, data, settings, about, hashes if measure else None, floor_cache, place, after
    )


def score_dense(
    names: Sequence[str], encoder: Encoder, train: Path | None, test: Path, settings: ProbeSettings,
    about: Mapping[str, Any], *, floors: bool, floor_cache: Path | None, place: Path | None, after: Sequence[str],
    **how: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Results of `probes.DENSE_PROBES` one by one, and under "floors" those of the untrained encoder."""
    none = np.zeros(0, np.int64)
    data = ImageData(train or test, none, (), none, test, none, (), none, 0, device=settings.device, **how)

    def score(name: str, of: Encoder) -> Result:
        if name == "localisation":
            return score_localisation(of, test, data, settings)
        assert train is not None
        return score_segmentation(of, train, test, data, settings)

    hashes = tuple(load_manifest(root).fingerprint for root in (data.train, test)) if floors else None
    if hashes and data.drop_unknown:
        hashes += ("without unknown classes",)
    yield from _scored(names, encoder, score, data, settings, about, hashes, floor_cache, place, after)


def _scored(
    names: Sequence[str], encoder: Encoder, score: Callable[[str, Encoder], Result], data: ImageData,
    settings: ProbeSettings, about: Mapping[str, Any], hashes: tuple[str, ...] | None, floor_cache: Path | None,
    place: Path | None, after: Sequence[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each result, then its floor, from the cache where data of these hashes were scored before; None: no floors."""
    for number, name in enumerate(names):
        left = (*names[number:], *after)
        with told_when_stopped(left, place):
            result = score(name, encoder)
        yield {name: result | {"protocol": protocol_of(about, result["protocol"])}}
        if hashes is None:
            continue
        # Localisation is one pass over the images, against a table of boxes that may change: it is not kept.
        with told_when_stopped(left, place, in_floor=True):
            under = untrained_floor(
                name, encoder.config, settings, partial(score, name), data_hashes=hashes, batch_size=data.batch_size,
                precision=data.precision, cache_dir=floor_cache, keep=name != "localisation",
            )  # fmt: skip
        yield {"floors": {"untrained": {name: under | {"protocol": floor_protocol(about, under["protocol"])}}}}
