"""The part of `evaluate` for probes that need images: what they learn from, their floors, their protocol."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.features import Features
from evaluation.floors import UNTRAINED_SEED, untrained
from evaluation.image_data import ImageData, rows_of
from evaluation.image_probes import IMAGE_PROBES, score_corruptions, score_localisation, score_segmentation
from evaluation.probes import ProbeData, ProbeSettings, Result
from tasks.encoders import Encoder

UNTRAINED = f"the same encoder, untrained (initialisation seed {UNTRAINED_SEED})"


def score_on_images(
    names: Sequence[str], encoder: Encoder, train: Path, trained: Features, test: Path, tested: Features,
    probed: ProbeData, settings: ProbeSettings, about: Mapping[str, Any], **how: Any,
) -> Iterator[dict[str, Result]]:  # fmt: skip
    """Results of `probes.LABELLED_IMAGES` by name, each as soon as it is there: they may take hours.

    Args:
        names: of the probes.
        encoder: to be scored.
        train, test: folders of shards.
        trained, tested, probed: the features, for labels, readable images and the linear probe.
        settings: of the probes.
        about: what every protocol says.
        how: further fields of ImageData.
    """
    data = ImageData(
        train, rows_of(train, trained.key), trained.key, trained.label, test, rows_of(test, tested.key), tested.key,
        probed.test_label, probed.classes, device=settings.device, **how,
    )  # fmt: skip
    for name in names:
        if name == "corruptions":
            result = score_corruptions(encoder, data, settings, probed.train, probed.test)
        else:
            result = IMAGE_PROBES[name](encoder, data, settings)
        yield {name: result | {"protocol": dict(about) | result["protocol"]}}


def score_dense(
    names: Sequence[str], encoder: Encoder, train: Path | None, test: Path, settings: ProbeSettings,
    about: Mapping[str, Any], *, floors: bool, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Results of `probes.DENSE_PROBES` by name, and under "floors" those of the untrained encoder."""
    none = np.zeros(0, np.int64)
    data = ImageData(train or test, none, (), none, test, none, (), none, 0, device=settings.device, **how)

    def score(name: str, of: Encoder) -> Result:
        if name == "localisation":
            return score_localisation(of, test, data, settings)
        assert train is not None
        return score_segmentation(of, train, test, data, settings)

    results: dict[str, Any] = {}
    for name in names:
        result = score(name, encoder)
        results[name] = result | {"protocol": dict(about) | result["protocol"]}
        if floors:
            under = score(name, untrained(encoder.config))
            told = {key: value for key, value in about.items() if key not in ("source", "checkpoint", "encoder")}
            under["protocol"] = told | under["protocol"] | {"features": UNTRAINED}
            results.setdefault("floors", {}).setdefault("untrained", {})[name] = under
    return results
