"""The probes that compare images with texts: `zeroshot` and `retrieval`, for models that have learned both."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from datamodules.sample_captions import CaptionConfig, SampleCaptions
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.attributes import classed_by
from evaluation.errors import EvaluationError
from evaluation.features import Features, Featurizer
from evaluation.prompts import PLAIN, make_prompts, read_templates
from evaluation.retrieval import retrieval
from evaluation.retrieval_examples import retrieval_examples
from evaluation.run_files import read_run
from evaluation.zeroshot import zero_shot
from tasks.clip import CLIP
from tasks.encoder_config import EncoderConfig
from tasks.zero_shot import class_weights, encode_texts


class JointFeatures(torch.nn.Module):
    """A CLIP's image tower for `extract`: vectors in the space of the texts."""

    def __init__(self, clip: CLIP, config: EncoderConfig) -> None:
        super().__init__()
        self.clip, self.config = clip, config

    def features(self, images: Tensor) -> Tensor:
        """[b c h w] -> [b e], of length 1."""
        return self.clip.encode_image(images)

    @property
    def feature_width(self) -> int:
        """The joint width e."""
        return int(self.clip.settings()["joint_width"])


def score_texts(
    clip: CLIP,
    test: Path,
    probes: Sequence[str],
    read: Callable[[Featurizer, Path], Features],
    *,
    device: str,
    templates: str | Sequence[str] | None,
    class_names: str | None,
    class_fields: Sequence[str] | None = None,
    captions: CaptionConfig,
) -> tuple[dict[str, Any], Features]:
    """Results of `zeroshot` and `retrieval` by name, and the test images' features.

    Args:
        clip: in evaluation mode.
        test: folder of shards.
        probes: some of `probes.TEXT_PROBES`.
        read: extracts features of the test images.
        device: where texts are encoded.
        templates, class_names: see `make_prompts`.
        class_fields: of zeroshot: see `classed_by`; None: the images' own classes.
        captions: where those for retrieval come from, see `chosen_captions`.

    Raises:
        EvaluationError, DataError: one line, for what the user can repair.
    """
    # first, since features take long and captions may not be there
    given = SampleCaptions(ShardReader(load_manifest(test)), captions) if "retrieval" in probes else None
    images = read(JointFeatures(clip, clip.encoder.config), test)
    if class_fields:
        images = classed_by(images, test, class_fields)
    clip.to(device)
    results: dict[str, Any] = {}
    if "zeroshot" in probes:
        prompts = make_prompts(images.classes, templates, class_names)
        texts = encode_texts(clip, prompts.texts)
        weights = class_weights(texts, torch.from_numpy(prompts.classes).to(device)).cpu().numpy()
        results["zeroshot"] = zero_shot(images.x, images.label, weights, prompts.called) | {
            "protocol": {
                "templates": list(prompts.templates),
                "class_names": prompts.names,
                "prompts": len(prompts.texts),
                "texts_in": "float32",
                "classifier": "mean of a class's prompts at length 1, at length 1 again",
            }
        }
    if given is not None:
        rows, texts_of, without = _captions(test, images, given)
        number: dict[str, int] = {}
        for text in (text for each in texts_of for text in each):
            number.setdefault(text, len(number))
        own = {(i, number[text]) for i, each in enumerate(texts_of) for text in each}
        pairs, words = np.array(sorted(own), np.int64), list(number)
        encoded, vectors = encode_texts(clip, words).cpu().numpy(), np.asarray(images.x)[rows]
        found = retrieval(vectors, encoded, pairs)
        found["examples"] = retrieval_examples(vectors, encoded, pairs, [images.key[row] for row in rows], words)
        found["protocol"] = {
            "captions": _told(captions),
            "images_without_caption": without,
            "texts_in": "float32",
            "right": "the texts that an image has, and the images that have a text; the same words are one text",
            "ties": "count against",
        }
        results["retrieval"] = found
    return results, images


def trained_captions(run: Path | None) -> CaptionConfig:
    """Where the captions came from that a run was trained with; the default where there is no run to ask."""
    if run is None or not (run / "config.yaml").is_file():
        return CaptionConfig()
    told = read_run(run).get("data.recipe.captions") or {}
    return CaptionConfig(told.get("field"), tuple(told.get("templates") or ()), told.get("class_names"))


@contextlib.contextmanager
def table_of_the_run(table: str | None) -> Iterator[None]:
    """Where names of classes come from, if that is the table of the run, and it does not fit other test images.

    Raises:
        DataError: what is wrong with the table, and which option takes another one.
    """
    try:
        yield
    except DataError as error:
        if table is None or not str(error).startswith(str(Path(table).expanduser())):
            raise
        raise DataError(
            f"{error}; this table is the one that the run was trained with: --class-names FILE gives another one for "
            "these test images"
        ) from error


def chosen_captions(
    trained: CaptionConfig, where: str | None, templates: str | Sequence[str] | None, class_names: str | None
) -> CaptionConfig:
    """Where the captions for retrieval come from.

    Args:
        trained: those of the run.
        where: None: as in training; `txt`: the samples' `.txt`, else `captions` or `caption` of their `.json`;
            `json:FIELD`: that field; `templates`: the names of their classes.
        templates: for `templates`, as `make_prompts` takes them; None: as in training.
        class_names: wherever captions are made of names; None: as in training.

    Raises:
        EvaluationError: another word, or templates that are none.
    """
    if where is None:
        return replace(trained, class_names=class_names or trained.class_names) if trained.templates else trained
    if where == "txt":
        return CaptionConfig()
    if where.startswith("json:") and where != "json:":
        return CaptionConfig(field=where.removeprefix("json:"))
    if where != "templates":
        raise EvaluationError(f"--captions {where}: use txt, json:FIELD or templates")
    chosen = read_templates(templates) if templates is not None else trained.templates or PLAIN
    return CaptionConfig(None, chosen, class_names or trained.class_names)


def _told(captions: CaptionConfig) -> str:
    if captions.templates:
        names = captions.class_names or "as in the data set"
        return f"templates {', '.join(captions.templates)} with class names {names}"
    return f"field {captions.field!r} of .json" if captions.field else ".txt, else captions or caption of .json"


def _captions(
    test: Path, images: Features, captions: SampleCaptions
) -> tuple[np.ndarray[Any, Any], list[list[str]], int]:
    """The images that have captions (their rows), the captions of each, and how many images have none."""
    reader = captions.reader
    manifest = reader.manifest
    row = {key: i for i, key in enumerate(images.key)}
    found: dict[int, list[str]] = {}
    for shard in range(len(manifest.shards)):
        for sample in range(manifest.shards[shard].samples):
            try:
                place = row.get(f"{reader.name(shard)}/{reader.key(shard, sample)}")
                if place is not None:
                    found[place] = captions.all(shard, sample)
            except BadSampleError:
                continue
    if len(found) < 2:
        raise EvaluationError(
            f"retrieval needs images with captions, and {test} has none ({_told(captions.config)}); --captions txt, "
            "json:FIELD or templates says where they are"
        )
    rows = np.array(sorted(found))
    return rows, [found[int(place)] for place in rows], len(images) - len(found)
